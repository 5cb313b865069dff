"""Taylor 2019: the squared change of the loss that a first-order expansion predicts for closing a channel's gate.

Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), the gate after batch norm
("Taylor-FO-BN") and the sum over a filter's weights; a set's own square comes after its sum in the paper.
"""

from __future__ import annotations

import torch

from slimc.gradients import gate_gradients, parameter_gradients
from slimc.passes import batches_of
from slimc.roles import gated, joint, writers
from slimc.scores import Scores, Subject, scorer

_SOURCE = "Molchanov et al., CVPR 2019"


@scorer("taylor", "(dL/dgate)² of the batch's mean loss, one gate for all writers of a channel", _SOURCE, "labels")
def taylor(subject: Subject) -> list[Scores]:
    """The mean over batches (by sample) of (dL/dm)², signed sums over writers first (joint lift)."""
    sites = writers(subject.types)
    total, count = torch.zeros(subject.types.solution.variables, dtype=torch.float64), batches_of(subject).count
    for found in gate_gradients(subject, sites):
        total += joint(subject.types, sites, found.values)[0].square() * found.count
    return subject.by_group((total / count).numpy(), gated(subject.types, sites))


@scorer("taylor-sum", "sum of (weight × gradient)² over everything that goes with a channel", _SOURCE, "labels")
def taylor_sum(subject: Subject) -> list[Scores]:
    """The mean over batches (by sample) of the sum of (w g)².

    Squares before sums: the additive lift, without the trap of scale invariance.
    """
    total: dict[str, torch.Tensor] = {}
    samples = batches_of(subject)
    for batch, gradients in zip(samples.batches, parameter_gradients(subject), strict=True):
        for name, gradient in gradients.items():
            each = gradient.mul_(subject.tensor(name)).square_().mul_(batch.count)
            total[name] = each if name not in total else total[name].add_(each)
    return [own / samples.count for own in subject.sum_over_weights(total)]
