"""SNIP: how much the loss depends on a connection being there.

Source: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity" (ICLR 2019), equations 3 to 6.
The paper removes single weights of an untrained network; for channels there are two usable forms, one gate for all
writers (`snip`) and the sum over all weights that go (`snip-sum`). Batch norms work with their stored statistics, so an
untrained network should have seen some data; sums of w g over a filter, which are noise in front of a batch norm in
training mode, are taken nowhere.
"""

from __future__ import annotations

import torch

from slimc.gradients import gate_gradients, parameter_gradients
from slimc.passes import batches_of
from slimc.roles import gated, joint, writers
from slimc.scores import Scores, Subject, scorer

_SOURCE = "Lee et al., ICLR 2019"


@scorer("snip", "|dL/dgate|, one gate for all writers of a channel, as a share of all gates", _SOURCE, "labels")
def snip(subject: Subject) -> list[Scores]:
    """The mean over batches (by sample) of |dL/dm_i| over its sum over all channels (joint lift)."""
    sites = writers(subject.types)
    total, count = torch.zeros(subject.types.solution.variables, dtype=torch.float64), batches_of(subject).count
    for found in gate_gradients(subject, sites):
        each = joint(subject.types, sites, found.values)[0].abs()
        total += each / each.sum().clamp_min(torch.finfo(torch.float64).tiny) * found.count
    return subject.by_group((total / count).numpy(), gated(subject.types, sites))


@scorer("snip-sum", "sum of |weight × gradient| over everything that goes with a channel", _SOURCE, "labels")
def snip_sum(subject: Subject) -> list[Scores]:
    """The mean over batches (by sample) of |w g|, as a share of all weights, summed over a channel (additive lift)."""
    total: dict[str, torch.Tensor] = {}
    samples = batches_of(subject)
    for batch, gradients in zip(samples.batches, parameter_gradients(subject), strict=True):
        sensitivity = {name: gradient.mul_(subject.tensor(name)).abs_() for name, gradient in gradients.items()}
        whole = sum(float(each.double().sum()) for each in sensitivity.values())
        for name, each in sensitivity.items():
            share = each.mul_(batch.count / whole) if whole > 0 else each
            total[name] = share if name not in total else total[name].add_(share)
    return [own / samples.count for own in subject.sum_over_weights(total)]
