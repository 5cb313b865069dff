"""Magnitude: a channel matters as much as its weights are large.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.1, which sums absolute values
over a filter; lifted to coupled groups by the sum over all members.
"""

from __future__ import annotations

import numpy as np
import torch

from slimc.errors import UsageError
from slimc.graph.groups import Group
from slimc.scores import Scores, Subject, scorer


@scorer(
    "magnitude", "sum of absolute (l1) or squared (l2) weights over all members of the group", "Li et al., ICLR 2017"
)
def magnitude(subject: Subject) -> list[Scores]:
    """l1: the sum of |w| over everything that goes with a channel; l2: the root of the sum of w squared."""
    if subject.norm not in ("l1", "l2"):
        raise UsageError(f"--norm {subject.norm}: known norms are l1 and l2")
    powers: dict[str, torch.Tensor] = {}
    for name in subject.types.tensors:
        if subject.is_parameter(name):
            tensor = subject.tensor(name).float()
            powers[name] = tensor.abs() if subject.norm == "l1" else tensor.square()
    sums: dict[tuple[str, int], Scores] = {}
    return [_group(subject, group, powers, sums) for group in subject.grouping.groups]


def _group(
    subject: Subject, group: Group, powers: dict[str, torch.Tensor], sums: dict[tuple[str, int], Scores]
) -> Scores:
    total = np.zeros(group.width)
    for member in group.members:
        power = powers.get(member.tensor)
        if power is None:  # a buffer: statistics say nothing of a channel's weight
            continue
        key = (member.tensor, member.axis)
        if key not in sums:
            others = [axis for axis in range(power.dim()) if axis != member.axis]
            sums[key] = (power.sum(others) if others else power).double().cpu().numpy()
        total += subject.per_channel(group, member.tensor, member.axis, sums[key])
    return total if subject.norm == "l1" else np.sqrt(total)
