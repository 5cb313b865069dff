"""A latency target: how much may stay so that the exported model is as fast as asked, found by measuring.

What each operator of the original takes tells which layers are worth cutting, and about what a cut comes to: its
estimate. But kernels like some widths better than others, so cuts are exported and run beside the original in ONNX
Runtime, in turn. Searched for is the largest estimate whose cut is fast enough, by the upper end of the measured
interval.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import budget
from .analysis import Analysis, Stages
from .budget import Target
from .errors import UnreachableTarget, UsageError
from .exporters import latency, operators
from .exporters.formats import onnx
from .exporters.session import NotMeasurable
from .graph.capture import program_of
from .graph.cost import Model
from .graph.resize import Cut
from .report import TargetResult
from .rewrite import rewrite
from .timing import shared_out, threads_of_a_call

_TRIALS = 8
_NEAR = 0.97
"""A cut that takes this share of what is allowed, or a search narrowed so far, is near enough."""
_FURTHEST, _NEAREST = 0.3, 0.95
"""Shares of the last estimate between which the next ones are, while no cut is fast enough."""
_DOUBT = 0.5
"""A smallest cut whose estimate is above this share of what is allowed is measured before anything else is done."""
_INSIDE = 0.2
"""A trial between two others is this part of their distance away from both: times go in stairs."""


@dataclass(frozen=True)
class Timed:
    """A cut beside the original, in turn: milliseconds of one call; `share` of the original's time, `upper` its
    interval's upper end."""

    before_ms: float
    after_ms: float
    share: float
    upper: float


@dataclass(frozen=True)
class Trial:
    """A limit of the estimate, in ms, and the upper end of the share of the original's time that its cut takes."""

    estimate: float
    share: float
    timed: Timed | None = None


@dataclass(frozen=True)
class Settled:
    """What the search found: limits that hold, the estimate's among them, and what the target got."""

    limits: dict[str, float]
    result: TargetResult


class Pace:
    """One target for one model; measures the original at once.

    limit: milliseconds of one call (batch 1, or what the model fixes) on the CPU with `threads_of_a_call()`. cost:
    of every choice of widths, the estimate as its time. Raises UsageError where ONNX Runtime is missing or cannot run
    the model, OutputError where it cannot be exported.
    """

    def __init__(self, analysis: Analysis, target: Target, stages: Stages) -> None:
        if not analysis.full.macs:
            raise UsageError(f"--latency {target.text}: the model has no {budget.METRICS['flops']} to save")
        self._stages, self._text = stages, target.text
        folder = Path(tempfile.mkdtemp(prefix="slimc-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        with stages.stage("latency"):
            path, ranges = _export(analysis, folder, None), analysis.captured.example.ranges()
            before = _measure(path, None, ranges).before_ms
            assert before is not None
            times = shared_out(analysis.types, _operators(path, ranges), before)
        self._clock = _Clock(path, partial(_export, analysis, folder), ranges)
        self.cost = Model(analysis.types, analysis.grouping, times)
        self.limit = target.limit(before)
        self._before, self._share = before, self.limit / before
        self._is_amount = target.amount is not None
        stages.target(budget.describe(target, before))

    def check(self, estimate: float, smallest: Cut) -> None:
        """Measure the smallest cut, unless its estimate leaves no doubt; raises UnreachableTarget."""
        if estimate < _DOUBT * self.limit:
            return
        with self._stages.stage("latency"):
            timed = self._clock(smallest)
        if not self._holds(timed):
            raise self._unreachable(timed)

    def start(self, limits: Mapping[str, float], floor: float) -> dict[str, float]:
        """Limits to begin with: the target as if the estimate were right, but never below the floor."""
        return {**limits, "latency": max(floor, min(self._before, self.limit))}

    def settle(
        self, limits: Mapping[str, float], floor: float, ceiling: float, cut_of: Callable[[dict[str, float]], Cut]
    ) -> Settled:
        """The largest estimate from `floor` to `ceiling` whose cut is fast enough, to a few percent.

        cut_of: the cut within given limits. Raises UnreachableTarget.
        """
        fast: Trial | None = None
        slow = [Trial(self._before, 1.0)]
        asked = min(max(limits["latency"], floor), ceiling)
        for left in reversed(range(_TRIALS)):
            timed = self._clock(cut_of({**limits, "latency": asked}))
            estimate = 100 * asked / self._before
            self._stages.detail(f"estimated {estimate:.1f}% of the time, measured {100 * timed.share:.1f}%")
            if self._holds(timed):
                fast = Trial(asked, timed.upper, timed)
            else:
                slow.append(Trial(asked, timed.upper))
            if fast is None:
                if asked <= floor:
                    break
                asked = max(floor, _lower(slow[-2], slow[-1], self._share)) if left > 1 else floor
            else:
                if fast.estimate >= min(ceiling, _NEAR * slow[-1].estimate) or fast.share >= _NEAR * self._share:
                    break
                asked = min(ceiling, _between(fast, slow[-1], self._share))
        if fast is None:
            raise self._unreachable(timed)
        found = fast.timed
        assert found is not None
        asked = self.limit / found.before_ms if self._is_amount else self._share
        result = TargetResult(asked, found.share, found.before_ms, found.after_ms)
        return Settled({**limits, "latency": fast.estimate}, result)

    def _holds(self, timed: Timed) -> bool:
        """Whether a cut is fast enough: as a share of the original's time, and in milliseconds if these were given.

        The machine may be slower now than when the original was measured alone.
        """
        if self._share >= 1:
            return True
        in_time = not self._is_amount or timed.upper * timed.before_ms <= self.limit
        return in_time and timed.upper <= self._share

    def _unreachable(self, smallest: Timed) -> UnreachableTarget:
        return UnreachableTarget(
            f"--latency {self._text} asks for at most {budget.amount('latency', self.limit)} "
            f"({100 * self._share:.3g}% of the original); the smallest cut that can be made takes "
            f"{100 * smallest.upper:.3g}% ({budget.amount('latency', smallest.after_ms)}). Raise the target, or ignore "
            "fewer layers."
        )


def _export(analysis: Analysis, folder: Path, cut: Cut | None) -> Path:
    captured = analysis.captured
    path = folder / ("original.onnx" if cut is None else "slim.onnx")
    onnx.export(program_of(captured.module if cut is None else rewrite(analysis.types, cut).module, captured), path)
    return path


def _lower(before: Trial, last: Trial, wanted: float) -> float:
    """Where the line through two cuts that are too slow comes to what is wanted: a part of the way."""
    slope = (before.share - last.share) / (before.estimate - last.estimate)
    reached = last.estimate - (last.share - _NEAR * wanted) / slope if slope > 0 else 0.0
    return min(max(reached, _FURTHEST * last.estimate), _NEAREST * last.estimate)


def _between(fast: Trial, slow: Trial, wanted: float) -> float:
    """Where the line from a cut that is fast enough to one that is not comes to what is wanted."""
    part = (_NEAR * wanted - fast.share) / (slow.share - fast.share)
    return fast.estimate + min(max(part, _INSIDE), 1 - _INSIDE) * (slow.estimate - fast.estimate)


class _Clock:
    """Times cuts, the same one once."""

    def __init__(self, original: Path, export: Callable[[Cut], Path], ranges: Sequence[tuple[int, int] | None]) -> None:
        self._original, self._export, self._ranges = original, export, ranges
        self._known: dict[bytes, Timed] = {}

    def __call__(self, cut: Cut) -> Timed:
        key = cut.alive.tobytes()
        if key not in self._known:
            found = _measure(self._original, self._export(cut), self._ranges)
            assert found.before_ms is not None
            assert found.after_ms is not None
            assert found.speedup is not None
            if found.ci95 is None:
                raise UsageError(
                    f"--latency cannot be held: a call of {found.before_ms:.0f} ms is too long for enough measurements"
                )
            self._known[key] = Timed(found.before_ms, found.after_ms, 1 / found.speedup, 1 / found.ci95[0])
        return self._known[key]


def _operators(path: Path, ranges: Sequence[tuple[int, int] | None]) -> tuple[operators.Operator, ...]:
    try:
        return operators.measure(path, threads=threads_of_a_call(), ranges=ranges)
    except NotMeasurable as error:
        raise UsageError(f"--latency cannot be held, since nothing could be measured: {error}") from error


def _measure(before: Path, after: Path | None, ranges: Sequence[tuple[int, int] | None]) -> latency.LatencyResult:
    found = latency.measure(before, after, threads=threads_of_a_call(), ranges=ranges)
    if found.skipped is not None:
        raise UsageError(f"--latency cannot be held, since nothing could be measured: {found.skipped}")
    return found
