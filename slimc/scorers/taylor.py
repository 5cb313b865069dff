"""Taylor 2019: the squared change of the loss that a first-order expansion predicts for closing a channel's gate.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), the gate after batch norm
("Taylor-FO-BN") and the sum over a filter's weights; a set's own square comes after its sum in the paper.
"""

from __future__ import annotations

import torch

from slimc.gradients import gate_gradients, parameter_gradients
from slimc.roles import gated, joint, writers
from slimc.scores import Scores, Subject, scorer

_SOURCE = "Molchanov et al., CVPR 2019"


@scorer("taylor", "(dL/dgate)² of the batch's mean loss, one gate for all writers of a channel", _SOURCE, "labels")
def taylor(subject: Subject) -> list[Scores]:
    """The mean over batches of (dL/dm)², signed sums over writers first (joint lift)."""
    sites = writers(subject.types)
    total, batches = torch.zeros(subject.types.solution.variables, dtype=torch.float64), 0
    for found in gate_gradients(subject, sites):
        total += joint(subject.types, sites, found.values)[0].square()
        batches += 1
    return subject.by_group((total / batches).numpy(), gated(subject.types, sites))


@scorer("taylor-sum", "sum of (weight × gradient)² over everything that goes with a channel", _SOURCE, "labels")
def taylor_sum(subject: Subject) -> list[Scores]:
    """The mean over batches of the sum of (w g)², squares before sums (additive lift, no scale-invariance trap)."""
    total: dict[str, torch.Tensor] = {}
    batches = 0
    for gradients in parameter_gradients(subject):
        for name, gradient in gradients.items():
            each = gradient.mul_(subject.tensor(name)).square_()
            total[name] = each if name not in total else total[name].add_(each)
        batches += 1
    return [own / batches for own in subject.sum_over_weights(total)]
