"""Random: the floor under every other scorer, and the tool to tell a scorer from luck."""

from __future__ import annotations

import numpy as np

from slimc.scores import Scores, Subject, scorer


@scorer("random", "uniform random numbers from --seed", "baseline")
def random(subject: Subject) -> list[Scores]:
    """One uniform number in (0, 1) per channel, the same for the same seed."""
    generator = np.random.default_rng(subject.seed)
    return [generator.uniform(size=group.width) for group in subject.grouping.groups]
