"""Passes of samples through the graph: whole batches, or parts that memory and caches hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from .errors import UsageError, first_line
from .graph.capture import Captured
from .graph.infer import Types, tensors_of
from .graph.rule import operator_name
from .graph.stateless import Stateless
from .samples import Batch, Samples
from .scores import Subject

ACTIVATION_LIMIT = 2**29
"""Bytes of activations alive during a backward pass."""
_FEW = 8
_PASSES = {"dropout", "contiguous", "to", "alias", "detach", "reshape", "flatten"}


def batches_of(subject: Subject) -> Samples:
    """The samples; UsageError where there are none."""
    if subject.samples is None or not subject.samples.batches:
        raise UsageError("this scorer needs data: give --data, or data= in Python")
    return subject.samples


def run_graph(run: Interpreter, batch: Batch) -> Any:
    """The model's outputs, as the model returns them; inputs are copied, since operators may write into them."""
    with torch.random.fork_rng():
        flat = run.run(*batch.example.copies(), enable_io_processing=False)
    return run.graph.process_outputs(flat)


def check_splits(captured: Captured, samples: Samples) -> None:
    """UsageError where a batch cannot be taken apart since its rows are no samples, as the nodes of a graph."""
    batch = samples.batches[0]
    if samples.whole or batch.count < 2:
        return
    with torch.no_grad():
        try:
            run_graph(Stateless(captured.module), batch[: min(batch.count // 2, _FEW)])
        except Exception as error:  # the model's own
            try:
                run_graph(Stateless(captured.module), batch)
            except Exception:  # what fails whole is told where it is run
                return
            raise UsageError(
                f"{samples.source}: half of a batch fails ({first_line(error)}), so that its rows are no samples of "
                "their own, as the nodes of a graph. Scoring and fitting take batches apart: leave the data out, with "
                "--recover none"
            ) from error


def parts(types: Types, batch: Batch, size: int | None) -> Iterator[Batch]:
    """A batch cut so that a backward pass over each part stays within the limit; whole where the size is fixed."""
    if types.captured.dynamic_shapes is None:
        yield batch
        return
    size = size or max(1, ACTIVATION_LIMIT // max(1, _activation_bytes(types)))
    count = -(-batch.count // size)
    each = -(-batch.count // count)  # parts of about the same size
    for start in range(0, batch.count, each):
        yield batch[start : start + each]


def _activation_bytes(types: Types) -> int:
    """Bytes of all values that the graph computes, per sample."""
    total = 0
    for node in types.captured.module.graph.nodes:
        if node.op == "call_function" and not is_view(node):
            value = node.meta.get("val")
            values = value if isinstance(value, (tuple, list)) else [value]
            for tensor, axes in zip(
                [v for v in values if isinstance(v, Tensor)], tensors_of(types.values.get(node)), strict=False
            ):
                size = tensor.dtype.itemsize
                for axis in axes:
                    size *= len(axis)
                total += size
    return total // types.captured.batch


def is_view(node: Node) -> bool:
    """Whether a node's result may share its operand's memory."""
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else []
    return operator_name(node) in ("getitem", *_PASSES) or bool(returns and returns[0].alias_info is not None)
