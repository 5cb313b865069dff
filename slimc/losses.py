"""Losses: what a gradient is taken of, with labels checked before anything slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from .errors import UsageError
from .graph.infer import Types, hint
from .scores import Loss, Subject

GIVE_LOSS = "give loss= in Python, any function of (outputs, targets) that returns a scalar"
GIVE_METRIC = "give metric= in Python, any function of (outputs, targets) that returns a number"


def loss_of(subject: Subject) -> Loss:
    """The user's loss, else cross entropy of the model's first floating-point output; means over the samples.

    Raises UsageError naming the batch whose labels are missing or do not fit.
    """
    assert subject.samples is not None
    for number, batch in enumerate(subject.samples.batches, 1):
        if batch.targets is None:
            raise UsageError(
                f"batch {number} of {subject.samples.source} has no labels, and this scorer needs them: "
                "let every batch be (inputs, targets)"
            )
        if subject.loss is None:
            shape = output_shape(subject.types)
            check_labels(batch.targets, batch.count, shape, f"batch {number} of {subject.samples.source}")
    return cross_entropy if subject.loss is None else scalar(subject.loss)


def scalar(own: Loss) -> Loss:
    """The user's loss, whose values are checked: UsageError unless it gives one floating-point number."""

    def loss(outputs: Any, targets: Any) -> Tensor:
        value = own(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"loss= returned {shape}; wanted a floating-point scalar")
        return value.reshape(())

    return loss


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Mean cross entropy of the first floating-point output, [N, classes, ...], with class numbers [N, ...]."""
    return functional.cross_entropy(first_output(outputs), targets.long())


def first_output(outputs: Any) -> Tensor:
    """The first floating-point tensor of whatever a model returns."""
    leaves = (leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    first = next(leaves, None)
    if first is None:
        raise UsageError(f"the model has no floating-point output; {GIVE_LOSS}")
    return first


def output_shape(types: Types, give: str = GIVE_LOSS) -> tuple[int, ...]:
    """Sizes of the first floating-point output, in the example. give: what to do where there is none."""
    output = next(node for node in types.captured.module.graph.nodes if node.op == "output")
    values = (node.meta.get("val") for node in output.all_input_nodes)
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return tuple(hint(size) for size in value.shape)
    raise UsageError(f"the model has no floating-point output to compare labels with; {give}")


def check_labels(targets: Any, count: int, output: tuple[int, ...], where: str, give: str = GIVE_LOSS) -> None:
    """Raise UsageError where targets are no class numbers for `count` samples of an output of these sizes.

    give: what to do where they are right for something else.
    """
    if targets is None:
        raise UsageError(f"{where} has no labels: let every batch be (inputs, targets), or {give}")
    if not isinstance(targets, Tensor):
        raise UsageError(f"the labels of {where} are a {type(targets).__name__}, not a tensor; {give}")
    if targets.is_floating_point() or targets.is_complex():
        raise UsageError(f"the labels of {where} are {str(targets.dtype)[6:]}, not class numbers; {give}")
    wanted = (count, *output[2:])
    if len(output) < 2 or tuple(targets.shape) != wanted:
        raise UsageError(
            f"the labels of {where} have shape {list(targets.shape)}; classes of the model's first output "
            f"{['N', *output[1:]]} are {list(wanted) if len(output) > 1 else 'not there'}. If that is not what labels "
            f"are compared with, {give}"
        )
    wrong = targets[(targets < 0) | (targets >= output[1])]
    if wrong.numel():
        raise UsageError(
            f"{where} holds the label {int(wrong.reshape(-1)[0])}; the model has {output[1]} classes, "
            f"so labels are 0 to {output[1] - 1}. Places without a class, as of ignore_index, take a loss of your own "
            "that leaves them out (loss= in Python)"
        )


def check_finite(value: Tensor, number: int) -> None:
    """Raise UsageError where a batch's loss is NaN or infinity."""
    if not bool(torch.isfinite(value)):
        raise UsageError(f"the loss of batch {number} is {float(value)}; scores need a finite one")
