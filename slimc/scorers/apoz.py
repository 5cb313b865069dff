"""APoZ: a channel that is switched off most of the time matters little.

Source: Hu et al., "Network Trimming" (2016), equation 1: the average percentage of zeros of a ReLU's output O over N
samples k and M positions j, APoZ = sum_k sum_j [O_j(k) = 0] / (N M); here its complement, so that more is better. A
unit is off where the rectifier's input is not positive, which is the same for ReLU and ReLU6 and carries over to
GELU, SiLU, Mish and hard swish.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from slimc.activations import Place, See, watch
from slimc.errors import UsageError
from slimc.graph.rule import arguments, operator_name
from slimc.graph.terms import Terms
from slimc.samples import Batch
from slimc.scores import Scores, Subject, scorer

_RECTIFIERS = {"relu", "relu6", "gelu", "silu", "mish", "hardswish"}


@scorer("apoz", "share of samples and positions at which a channel's rectifier is on", "Hu et al., 2016", "inputs")
def apoz(subject: Subject) -> list[Scores]:
    """1 - APoZ, the mean over all rectifiers that a channel goes through; none for groups that meet no rectifier.

    Raises UsageError where no group meets one.
    """
    found = _rectifiers(subject)
    held = np.zeros(subject.types.solution.variables + 1)
    for _, factors in found.values():
        held[factors] = 1.0
    if not held[:-1].any():
        names = ", ".join(group.name for group in subject.grouping.groups)
        raise UsageError(
            f"--scorer apoz counts how often rectifiers ({', '.join(sorted(_RECTIFIERS))}) are off, and none follows "
            f"any of these groups: {names}. Take another scorer, such as taylor."
        )
    sums = {place: torch.zeros(len(factors), dtype=torch.float64) for place, (_, factors) in found.items()}
    counts = dict.fromkeys(found, 0)

    def counting(place: Place, axis: int) -> See:
        def see(value: Tensor, _: Batch) -> None:
            others = [other for other in range(value.dim()) if other != axis]
            # Sums of booleans are several times slower in the default int64 than in int32.
            on = (value > 0).sum(others, dtype=torch.int32) if others else value > 0
            sums[place] += on.double().cpu()
            counts[place] += value.numel() // value.shape[axis]

        return see

    watch(subject, {place: counting(place, axis) for place, (axis, _) in found.items()})
    total, weight = np.zeros_like(held), np.zeros_like(held)
    for place, (_, factors) in found.items():
        share = sums[place].numpy() / max(1, counts[place])
        for column in factors.T:  # a channel of several indices is on as often as these are on average
            np.add.at(total, column, share)
            np.add.at(weight, column, 1.0)
    return subject.by_group(total / np.maximum(weight, 1.0), held > 0)


def _rectifiers(subject: Subject) -> dict[Place, tuple[int, Terms]]:
    """For each rectifier: the axis with channels, and the variables behind each of its indices."""
    found: dict[Place, tuple[int, Terms]] = {}
    for node in subject.types.captured.module.graph.nodes:
        if node.op != "call_function" or not _is_rectifier(node):
            continue
        axes = subject.types.values[node]
        factors = [subject.types.solution.factors(axis) for axis in axes]
        widest = max(range(len(axes)), key=lambda position: int((factors[position] >= 0).sum()), default=None)
        if widest is not None and (factors[widest] >= 0).any():
            found[(node, node.args[0])] = widest, factors[widest]
    return found


def _is_rectifier(node: Node) -> bool:
    name = operator_name(node)
    lowest = {"hardtanh": "min_val", "clamp": "min", "clamp_min": "min", "clip": "min"}.get(name)
    return name in _RECTIFIERS or (lowest is not None and arguments(node)[lowest] == 0)
