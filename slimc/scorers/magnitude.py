"""Magnitude: a channel matters as much as its weights are large.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.1, which sums absolute values
over a filter; lifted to coupled groups by the sum over all members.
"""

from __future__ import annotations

import numpy as np
import torch

from slimc.errors import UsageError
from slimc.scores import Scores, Subject, scorer

ORDER = {"l1": 1, "l2": 2}


@scorer(
    "magnitude", "sum of absolute (l1) or squared (l2) weights over all members of the group", "Li et al., ICLR 2017"
)
def magnitude(subject: Subject) -> list[Scores]:
    """l1: the sum of |w| over everything that goes with a channel; l2: the root of the sum of w squared."""
    order = ORDER.get(subject.norm)
    if order is None:
        raise UsageError(f"--norm {subject.norm}: known norms are {' and '.join(ORDER)}")

    def powers(name: str, axes: list[int]) -> dict[int, Scores] | None:
        if not subject.is_parameter(name):  # a buffer: statistics say nothing of a channel's weight
            return None
        tensor = subject.tensor(name).float()
        inner = [axis for axis in range(tensor.dim()) if axis not in axes]  # kernels: no channel lies there
        size = tensor.shape
        if all(size[axis] == 1 for axis in inner):
            flat = tensor.reshape([size[axis] for axis in axes])
        else:
            flat = torch.linalg.vector_norm(tensor, order, inner)
        power = flat.abs() if order == 1 else flat.square()
        return {axis: _along(power, place) for place, axis in enumerate(axes)}

    sums = subject.sum_over_members(powers)
    return sums if order == 1 else [np.sqrt(own) for own in sums]


def _along(power: torch.Tensor, axis: int) -> Scores:
    """Sum over all axes but one."""
    others = [other for other in range(power.dim()) if other != axis]
    sums = power.sum(others) if others else power
    return np.asarray(sums.double().cpu())
