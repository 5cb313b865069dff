"""Lottery tickets of channels: train, cut the weakest, put the rest back to where they began, and again.

Sources: Frankle and Carbin, "The Lottery Ticket Hypothesis" (ICLR 2019), section 2, strategy 1; rewinding to early
weights: Frankle et al., "Stabilizing the Lottery Ticket Hypothesis" (2019). Whole channels instead of single weights,
so that every round trains a smaller dense network. What is put back is the network as it was given: give it as it was
initialised, or early in training, for a ticket in the papers' sense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from slimc.planner import METRIC
from slimc.training.network import Alive
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule


@schedule(
    "lottery",
    "train, cut the weakest channels, rewind the rest to where they began, repeat",
    "Frankle, ICLR 2019",
    ranks=True,
    mends=False,
)
def lottery(run: Run, *, fraction: float = 0.2) -> Iterator[Phase]:
    """Each round removes `fraction` of the channels that are left, by --scorer; the last one meets the budget."""
    demand(0.001, 0.999, fraction=fraction)
    count = rounds(run, fraction)
    each = run.options.epochs / (count + 1)
    run.check_reachable()
    run.keep("start")
    for number in range(1, count + 1):
        yield run.phase("train", each)
        run.cut(partial(_weakest, run, fraction, number == count))
        run.rewind("start")
    yield run.phase("finetune", run.left)


def rounds(run: Run, fraction: float) -> int:
    """How many rounds reach the budget: a channel costs its writers and its readers, so costs fall with the square."""
    whole = run.analysis.full
    shares = [limit / float(getattr(whole, METRIC[metric])) for metric, limit in run.options.limits.items()]
    return max(1, math.ceil(math.log(min([*shares, 1.0])) / (2 * math.log(1 - fraction))))


def _weakest(run: Run, fraction: float, last: bool) -> Alive:
    if last:
        return run.chosen()
    total = run.score(run.options.scorer)
    removable = [0 if np.isnan(total[group.variables]).any() else 1 for group in run.selection.grouping().groups]
    left = sum(width * one for width, one in zip(run.network.widths.tolist(), removable, strict=True))
    return run.selection.lowest(total, round(fraction * left), removable)
