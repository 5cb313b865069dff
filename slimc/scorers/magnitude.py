"""Magnitude: a channel matters as much as its weights are large.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.1, which sums absolute values
over a filter; lifted to coupled groups by the sum over all members.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slimc.errors import UsageError
from slimc.scores import Scores, Subject, scorer

ORDER = {"l1": 1, "l2": 2}
_BLOCK = 1 << 16
"""Elements that are raised to their power at a time: few enough to stay in a core's cache until they are summed."""


@scorer("magnitude", "l2 norm (default) or l1 norm of all weights that go with a channel", "Li et al., ICLR 2017")
def magnitude(subject: Subject) -> list[Scores]:
    """l1: the sum of |w| over everything that goes with a channel; l2: the root of the sum of w squared."""
    order = ORDER.get(subject.norm)
    if order is None:
        raise UsageError(f"--norm {subject.norm}: known norms are {' and '.join(ORDER)}")

    def powers(name: str, axes: list[int]) -> dict[int, Scores] | None:
        if not subject.is_parameter(name):  # a buffer: statistics say nothing of a channel's weight
            return None
        return _power_sums(subject.tensor(name), axes, order)

    sums = subject.sum_over_members(powers)
    return sums if order == 1 else [np.sqrt(own) for own in sums]


def _power_sums(tensor: Tensor, axes: list[int], order: int) -> dict[int, Scores]:
    """For each of these axes, the sum of |w| or w squared over all the others; the tensor is read once."""
    flat = tensor.reshape(len(tensor), -1)
    rows: list[Tensor] = []
    columns: Tensor | None = None
    lines = max(1, _BLOCK // flat.shape[1])
    for start in range(0, len(flat), lines):
        part = flat[start : start + lines]
        power = part.float().abs() if order == 1 else part.float().square()
        if 0 in axes:
            rows.append(power.sum(1))
        if axes != [0]:
            below = power.sum(0)
            columns = below if columns is None else columns + below
    found = {0: _numbers(torch.cat(rows) if len(rows) > 1 else rows[0])} if rows else {}
    if columns is not None:
        inner = columns.reshape(tensor.shape[1:])
        for axis in axes:
            if axis > 0:
                others = [other for other in range(inner.dim()) if other != axis - 1]
                found[axis] = _numbers(inner.sum(others) if others else inner)
    return found


def _numbers(sums: Tensor) -> Scores:
    return np.asarray(sums.double().cpu())
