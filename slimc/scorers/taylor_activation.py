"""Taylor 2017: activation times gradient, averaged over a feature map, absolute per sample.

Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (ICLR 2017),
equations 3 to 8; `--normalise l2` is its layer-wise normalisation (equation 9).
"""

from __future__ import annotations

import math

import torch

from slimc.gradients import gate_gradients
from slimc.roles import Site, gated, joint, writers
from slimc.scores import Scores, Subject, scorer


@scorer(
    "taylor-activation",
    "activation × gradient, mean over a feature map, absolute per sample",
    "Molchanov et al., ICLR 2017",
    "labels",
)
def taylor_activation(subject: Subject) -> list[Scores]:
    """The mean over samples of |1/M sum of z dL/dz| over the M positions of a map.

    Right before or right after a ReLU it is the same number. Coupled maps are summed, with their signs, first.
    """
    sites = writers(subject.types)
    scale = [1.0 / positions(subject, site) for site in sites]
    total, samples = torch.zeros(subject.types.solution.variables, dtype=torch.float64), 0
    for found in gate_gradients(subject, sites, per_sample=True):
        means = [own * each for own, each in zip(found.values, scale, strict=True)]
        total += joint(subject.types, sites, means).abs().sum(0)
        samples += found.count
    return subject.by_group((total / samples).numpy(), gated(subject.types, sites))


def positions(subject: Subject, site: Site) -> float:
    """How many numbers of one sample lie at one index of a gated axis."""
    axes = subject.types.values[site.shaped]
    count = math.prod(len(axis) for position, axis in enumerate(axes) if position != site.axis)
    return max(1.0, count / subject.types.captured.batch)
