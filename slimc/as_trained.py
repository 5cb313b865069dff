"""What a network saw in training, as far as its batch norms remember: the mean and variance of values, per channel.

A batch norm gives each channel the mean beta and the variance gamma^2 over the training data, whatever samples are at
hand now. What follows is worked out as if channels were normally distributed and independent: activations by quadrature
over the normal distribution, sums by adding means and variances. A value behind any other operator is unknown, never
guessed.

Source: Ioffe and Szegedy, "Batch Normalization" (ICML 2015), section 3, for beta and gamma as the output's moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graph.infer import attribute, hint
from .graph.rule import arguments, is_pointwise, operator_name, writes

_SAME = {
    "dropout", "feature_dropout", "clone", "detach", "alias", "contiguous", "lift_fresh_copy", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
}  # fmt: skip
"""Operators that are taken to leave a channel's moments as they are; a mean over places lowers the variance by an
amount that the batch norms do not tell."""
_FLAT = {"flatten", "view", "reshape"}
_POINTS = 512
"""Of the quadrature: a mean of equally likely points, good to three digits."""


@dataclass(frozen=True)
class Moments:
    """Mean and variance over samples and places, [C] each, float64; the channels are axis 1."""

    mean: Tensor
    variance: Tensor

    @property
    def square(self) -> Tensor:
        """[C] the expected square."""
        return self.mean.square() + self.variance


def overlap(own: Tensor, trained: Tensor) -> Tensor:
    """How far the expected squares of samples agree with those in training, both of one shape: from 0 to 1, all equal.

    The sum of the smaller ones over the sum of the larger ones (Jaccard's index, weighted).
    """
    return torch.minimum(own, trained).sum() / torch.maximum(own, trained).sum().clamp_min(1e-30)


@torch.no_grad()
def moments_as_trained(module: GraphModule) -> dict[Node, Moments]:
    """What each value was in training; values of which nothing is known are left out.

    module: at inference. Only values with channels on axis 1 are in it.
    """
    found: dict[Node, Moments] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        moments = _moments(module, node, found)
        if writes(node):  # what was written into is no longer what it was
            target = node.args[0]
            assert isinstance(target, Node)
            found.pop(target, None)
        if moments is not None and _shape(node)[1:2] == moments.mean.shape:
            found[node] = moments
    return found


def _moments(module: GraphModule, node: Node, found: dict[Node, Moments]) -> Moments | None:
    name = operator_name(node)
    if name == "batch_norm":
        return _normed(module, node)
    given = [n for n in node.all_input_nodes if n.op != "get_attr"]
    known = [found[n] for n in given if n in found]
    if not known or len(known) != len(given):
        return None
    if name == "cat":
        return _joined(node, found)
    if name == "add" and len(node.all_input_nodes) == 2:
        return _added(node, known) if len(given) == 2 else None
    if len(known) != 1 or len(node.all_input_nodes) != 1:
        return None
    if name in _SAME:
        return known[0]
    if name in _FLAT:
        return _flattened(given[0], node, known[0])
    if is_pointwise(node) and torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return _passed(node, given[0], known[0])
    return None


def has_statistics(node: Node) -> bool:
    """Whether a node is a batch norm that reads stored statistics."""
    if node.op != "call_function" or operator_name(node) != "batch_norm":
        return False
    call = arguments(node)
    stored = all(isinstance(t, Node) and t.op == "get_attr" for t in (call["running_mean"], call["running_var"]))
    # In a graph that trains the flag is read from the module's mode; at inference it is off there too.
    return stored and call["training"] is not True


def _normed(module: GraphModule, node: Node) -> Moments | None:
    """A batch norm with stored statistics: its input had these."""
    call = arguments(node)

    def read(key: str) -> Tensor:
        found: Tensor = attribute(module, str(call[key].target))
        return found.detach().double()

    if not has_statistics(node):
        return None
    variance = read("running_var")
    scale = torch.ones_like(variance) if call["weight"] is None else read("weight")
    shift = torch.zeros_like(variance) if call["bias"] is None else read("bias")
    return Moments(shift, scale.square() * variance / (variance + call["eps"]))


def _added(node: Node, known: list[Moments]) -> Moments | None:
    """Two values, of the same shape and taken for independent."""
    shapes = {_shape(n) for n in node.all_input_nodes}
    if len(shapes) != 1 or arguments(node)["alpha"] != 1:
        return None
    return Moments(known[0].mean + known[1].mean, known[0].variance + known[1].variance)


def _joined(node: Node, found: dict[Node, Moments]) -> Moments | None:
    call = arguments(node)
    if call["dim"] not in (1, 1 - node.meta["val"].dim()):
        return None
    parts = [found[n] for n in call["tensors"]]
    return Moments(torch.cat([p.mean for p in parts]), torch.cat([p.variance for p in parts]))


def _flattened(source: Node, node: Node, moments: Moments) -> Moments | None:
    """[N, C, ...] as [N, C * ...]: each channel's places are channels now."""
    before, after = _shape(source), _shape(node)
    if len(after) != 2 or before[0] != after[0]:
        return None
    each = math.prod(before[2:])
    return Moments(moments.mean.repeat_interleave(each), moments.variance.repeat_interleave(each))


def _passed(node: Node, source: Node, moments: Moments) -> Moments | None:
    """Through a function of each number alone: its mean and variance over the normal distribution's quantiles.

    None where it gives no real numbers, as a comparison.
    """
    if not node.meta["val"].is_floating_point():
        return None
    levels = (torch.arange(_POINTS, dtype=torch.float64, device=moments.mean.device) + 0.5) / _POINTS
    points = torch.special.ndtri(levels)
    points = points / points.square().mean().sqrt()
    values = moments.mean + moments.variance.sqrt() * points[:, None]

    def given(argument: Any) -> Any:
        return values if argument is source else argument

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given)
    assert callable(node.target)
    results = node.target(*args, **kwargs)
    return Moments(results.mean(0), results.var(0, correction=0))


def _shape(node: Node) -> tuple[int, ...]:
    """Sizes; of an axis that may have any, that of the example."""
    return tuple(hint(size) for size in node.meta["val"].shape)
