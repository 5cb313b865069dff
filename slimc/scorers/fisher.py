"""Group Fisher: the expected squared derivative of each sample's loss by one mask that all readers of a channel share.

Source: Liu et al., "Group Fisher Pruning for Practical Network Compression" (ICML 2021), equations 1 to 4 and the
normalisations by memory (recommended there) and by FLOPs. Masks sit on the inputs of convolutions and linear layers,
and coupled masks are summed with their signs before the square.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from slimc.gradients import gate_gradients
from slimc.graph.cost import Model
from slimc.roles import gated, joint, readers, writers
from slimc.scores import Scores, Subject, scorer

_SOURCE = "Liu et al., ICML 2021"


@scorer("fisher", "mean over samples of (dL/dmask)², one mask for all readers of a channel", _SOURCE, "labels")
def fisher(subject: Subject) -> list[Scores]:
    """The mean over samples of (sum over readers of dL_n/dm)², per-sample gradients (joint lift)."""
    sites = readers(subject.types)
    total, samples = torch.zeros(subject.types.solution.variables, dtype=torch.float64), 0
    for found in gate_gradients(subject, sites, per_sample=True):
        total += joint(subject.types, sites, found.values).square().sum(0)
        samples += found.count
    return subject.by_group((total / samples).numpy(), gated(subject.types, sites))


@scorer(
    "fisher-memory",
    "fisher over the activations that a channel's writers make",
    _SOURCE,
    "labels",
    normalisation="none",
)
def fisher_memory(subject: Subject) -> list[Scores]:
    """fisher divided by how many numbers the layers that write a group make per channel and sample.

    Within a group the ranking is fisher's; between groups it is the paper's, so groups are not normalised again.
    """
    made = np.zeros(subject.types.solution.variables + 1)
    for site in writers(subject.types, after_norms=False):
        if site.operand is None:
            axes = subject.types.values[site.node]
            numbers = math.prod(map(len, axes)) / subject.types.captured.batch
            for column in site.factors.T:
                np.add.at(made, column, numbers / len(axes[site.axis]))  # -1, no variable, is the last entry
    scores = fisher(subject)
    return [own / each.max(initial=1.0) for own, each in zip(scores, subject.by_group(made), strict=True)]


@scorer(
    "fisher-flops",
    "fisher over the multiply-accumulates that go with a channel",
    _SOURCE,
    "labels",
    normalisation="none",
)
def fisher_flops(subject: Subject) -> list[Scores]:
    """fisher divided by the MACs that removing one channel of the group saves, at full widths."""
    cost = Model(subject.types, subject.grouping)
    full = subject.grouping.widths
    whole, scores = cost(full).macs, []
    for group, own in zip(subject.grouping.groups, fisher(subject), strict=True):
        fewer = full.copy()
        fewer[group.number] -= 1
        scores.append(own / max(1.0, whole - cost(fewer).macs))
    return scores
