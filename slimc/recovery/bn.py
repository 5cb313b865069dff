"""Batch-norm re-estimation: new running statistics for the slim network, from unlabelled data.

After a cut the inputs of every batch norm have other means and variances than those it stored. One pass over a few
hundred samples measures them again; normalisation uses each batch's own statistics on the way, as in training, so
that later layers see corrected inputs. Weights are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from slimc.as_trained import has_statistics
from slimc.errors import UsageError
from slimc.graph.infer import attribute
from slimc.graph.rule import arguments
from slimc.graph.stateless import Stateless
from slimc.recover import Task, step

_AT_ONCE = 8
_LEAST = 16
"""Samples that normalise each other: the statistics of fewer are noise, so that results would hang on batches."""


@dataclass
class _Sums:
    """Pooled statistics of one layer over all batches, per channel, in float64."""

    count: int
    total: Tensor
    squares: Tensor

    def add(self, x: Tensor) -> None:
        """Add one batch, x [N, C, ...]."""
        other = [axis for axis in range(x.dim()) if axis != 1]
        self.count += x.numel() // x.shape[1]
        for part in torch.split(x, _AT_ONCE):  # float64 takes twice the memory
            wide = part.double()
            self.total += wide.sum(other)
            self.squares += wide.square().sum(other)


class _Measuring(Stateless):
    """Runs the graph with batch statistics and pools them per layer, over all places where it is used.

    sums: by the names of the running mean and variance.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.sums: dict[tuple[str, str], _Sums] = {}

    def run_node(self, n: Node) -> Any:
        """Batch norms with running statistics are measured; everything else runs as it is."""
        if not has_statistics(n):
            return super().run_node(n)
        call = arguments(n)
        x, weight, bias = (
            self.env[call[name]] if call[name] is not None else None for name in ("input", "weight", "bias")
        )
        assert isinstance(x, Tensor)
        zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        place = (str(call["running_mean"].target), str(call["running_var"].target))
        self.sums.setdefault(place, _Sums(0, zeros.clone(), zeros.clone())).add(x)
        if x.numel() == x.shape[1]:  # one value has no variance: a model that takes one sample at a time, say
            return super().run_node(n)
        return functional.batch_norm(x, None, None, weight, bias, training=True, eps=call["eps"])


@step("bn", "re-estimate batch-norm statistics on unlabelled samples", "Li et al., EagleEye, ECCV 2020, section 3.3")
def reestimate(task: Task) -> str:
    """Replace the running mean and variance of every batch norm in the slim graph.

    Raises UsageError where the data has one value per channel only, or leads to values that are not finite.
    """
    module = task.slim
    if not any(has_statistics(node) for node in module.graph.nodes):
        return "the model has no batch norm with running statistics: nothing to re-estimate"
    measuring = _Measuring(module)
    with torch.no_grad():
        for example in task.samples.joined(_LEAST).examples():
            measuring.run(*example.copies(), enable_io_processing=False)
        found = {place: _statistics(sums, place[0]) for place, sums in measuring.sums.items()}
        for names, values in found.items():
            for name, value in zip(names, values, strict=True):
                attribute(module, name).copy_(value)
    return f"batch-norm statistics re-estimated on {task.samples.count} samples ({task.samples.source})"


def _statistics(sums: _Sums, name: str) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel."""
    if sums.count < 2:
        raise UsageError("batch norms cannot be re-estimated from one value per channel; give more data")
    mean = sums.total / sums.count
    variance = (sums.squares / sums.count - mean.square()).clamp_min(0) * (sums.count / (sums.count - 1))
    if not (mean.isfinite().all() and variance.isfinite().all()):
        raise UsageError(f"{name} cannot be re-estimated: --data leads to values that are not finite (NaN or infinity)")
    return mean, variance
