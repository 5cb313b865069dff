"""Comparing networks while they train: the loss on some of the training data, never on validation data."""

from __future__ import annotations

from slimc import losses, recover
from slimc.errors import UsageError

from .loop import evaluate
from .run import Run

_MOST, _JUDGED = 256, 0.5
"""Networks are compared on the same samples, so that few tell them apart; and there are many to compare."""


class Judge:
    """The loss of the network as it is, on half of the run's samples; the statistics of norms come from the others.

    Raises UsageError where there are no labelled samples.
    """

    def __init__(self, run: Run) -> None:
        self._network = run.network
        self._fit, self._judge = run.samples.first(_MOST).split(_JUDGED)
        if not run.samples.labelled:
            raise UsageError(f"--schedule {run.schedule.name} compares losses: let every batch be (inputs, targets)")
        self._loss = losses.cross_entropy if run.loss is None else losses.scalar(run.loss)

    def __call__(self) -> float:
        """Mean over samples, in eval mode; the running statistics of norms are those measured for it afterwards."""
        self._network.refit(recover.find("bn").run, self._fit)
        return -evaluate(self._network.module, self._judge.batches, lambda *pair: -float(self._loss(*pair)))
