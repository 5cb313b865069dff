"""Gate Decorator: how much the loss changes when a channel's gate closes, to first order.

Source: You et al., "Gate Decorator" (NeurIPS 2019): the score is the sum over batches of |phi dL/dphi| (equation 6),
and coupled gates add up (equation 9); with z = phi x, the product is that of value and gradient wherever the scale was
put (after a batch norm it is gamma g_gamma + beta g_beta). HALP (Shen et al., NeurIPS 2022) sums coupled gates before
the absolute value.
"""

from __future__ import annotations

import torch

from slimc.gradients import gate_gradients
from slimc.passes import batches_of
from slimc.roles import gated, joint, spread, writers
from slimc.scores import Scores, Subject, scorer


@scorer(
    "gate",
    "|gate × gradient| of each batch, summed over the writers of a channel",
    "You et al., NeurIPS 2019",
    "labels",
)
def gate(subject: Subject) -> list[Scores]:
    """The mean over batches (by sample) of the sum over writers of |phi dL/dphi| (additive lift)."""
    sites = writers(subject.types)
    count = batches_of(subject).count
    total = torch.zeros((1, subject.types.solution.variables + 1), dtype=torch.float64)
    for found in gate_gradients(subject, sites):
        for site, own in zip(sites, found.values, strict=True):
            # A writer may hold a channel at several indices, which share its gate.
            each = torch.zeros_like(total)
            spread(each, site, own)
            total += each.abs() * found.count
    return subject.by_group((total[0] / count).numpy(), gated(subject.types, sites))


@scorer(
    "gate-joint",
    "as gate, with coupled writers summed before the absolute value",
    "Shen et al., HALP, NeurIPS 2022",
    "labels",
)
def gate_joint(subject: Subject) -> list[Scores]:
    """The mean over batches (by sample) of |sum over writers of phi dL/dphi| (joint lift)."""
    sites = writers(subject.types)
    total, count = torch.zeros(subject.types.solution.variables, dtype=torch.float64), batches_of(subject).count
    for found in gate_gradients(subject, sites):
        total += joint(subject.types, sites, found.values)[0].abs() * found.count
    return subject.by_group((total / count).numpy(), gated(subject.types, sites))
