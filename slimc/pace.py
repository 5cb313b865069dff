"""A latency target: how many FLOPs may stay so that the exported model is as fast as asked, found by measuring.

Nothing tells beforehand how long a network of other widths takes, so candidates are exported and run beside the
original in ONNX Runtime, in turn. Latency falls with FLOPs, though not in step: searched for is the largest FLOPs limit
whose cut is fast enough, by the upper end of the measured interval.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from . import budget
from .analysis import Analysis, Stages
from .budget import Target
from .errors import UnreachableTarget, UsageError
from .exporters import latency
from .exporters.formats import onnx
from .graph.capture import program_of
from .graph.resize import Cut
from .report import TargetResult
from .rewrite import rewrite

_TRIALS = 8
_NEAR = 0.97
"""A cut that takes this share of what is allowed, or a search narrowed so far, is near enough."""
_FURTHEST, _NEAREST = 0.3, 0.95
"""Shares of the last FLOPs between which the next ones are, while no cut is fast enough."""
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
    """A FLOPs limit and the upper end of the share of the original's time that its cut takes."""

    flops: float
    share: float
    timed: Timed | None = None


@dataclass(frozen=True)
class Settled:
    """What the search found: limits that hold, the FLOPs' among them, and what the target got."""

    limits: dict[str, float]
    result: TargetResult


class Pace:
    """One target for one model; measures the original at once.

    limit: milliseconds of one call (batch 1, or what the model fixes) on the CPU with torch's number of threads.
    Raises UsageError where ONNX Runtime is missing or cannot run the model, OutputError where it cannot be exported.
    """

    def __init__(self, analysis: Analysis, target: Target, stages: Stages) -> None:
        if not analysis.full.macs:
            raise UsageError(f"--latency {target.text}: the model has no {budget.METRICS['flops']} to save")
        self._analysis, self._stages, self._text = analysis, stages, target.text
        with stages.stage("latency"), tempfile.TemporaryDirectory(prefix="slimc-") as folder:
            before = _measure(self._export(Path(folder), None), None).before_ms
        assert before is not None
        self.limit = target.limit(before)
        self._share = self.limit / before
        stages.target(budget.describe(target, before))

    def start(self, limits: Mapping[str, float], floor: float) -> dict[str, float]:
        """Limits to begin with: FLOPs in step with latency, which is seldom too few; never below the floor."""
        full = float(self._analysis.full.macs)
        return {**limits, "flops": min(limits.get("flops", full), max(floor, min(1.0, self._share) * full))}

    def settle(
        self, limits: Mapping[str, float], floor: float, ceiling: float, cut_of: Callable[[dict[str, float]], Cut]
    ) -> Settled:
        """The largest FLOPs limit from `floor` to `ceiling` whose cut is fast enough, to a few percent.

        cut_of: the cut within given limits. Raises UnreachableTarget.
        """
        fast: Trial | None = None
        slow = [Trial(float(self._analysis.full.macs), 1.0)]
        asked = min(max(limits["flops"], floor), ceiling)
        with tempfile.TemporaryDirectory(prefix="slimc-") as folder:
            clock = _Clock(self._export(Path(folder), None), partial(self._export, Path(folder)))
            for left in reversed(range(_TRIALS)):
                timed = clock(cut_of({**limits, "flops": asked}))
                self._stages.detail(f"{budget.amount('flops', asked)} FLOPs: {100 * timed.share:.1f}% of the time")
                if timed.upper <= self._share or self._share >= 1:
                    fast = Trial(asked, timed.upper, timed)
                else:
                    slow.append(Trial(asked, timed.upper))
                if fast is None:
                    if asked <= floor:
                        break
                    asked = max(floor, _lower(slow[-2], slow[-1], self._share)) if left > 1 else floor
                else:
                    if fast.flops >= min(ceiling, _NEAR * slow[-1].flops) or fast.share >= _NEAR * self._share:
                        break
                    asked = min(ceiling, _between(fast, slow[-1], self._share))
        if fast is None:
            raise UnreachableTarget(
                f"--latency {self._text} asks for at most {budget.amount('latency', self.limit)} "
                f"({100 * self._share:.3g}% of the original); the smallest cut that can be made takes "
                f"{100 * timed.upper:.3g}% ({budget.amount('latency', timed.after_ms)}). Raise the target, or ignore "
                "fewer layers."
            )
        found = fast.timed
        assert found is not None
        result = TargetResult(self._share, found.share, found.before_ms, found.after_ms)
        return Settled({**limits, "flops": fast.flops}, result)

    def _export(self, folder: Path, cut: Cut | None) -> Path:
        types, captured = self._analysis.types, self._analysis.captured
        path = folder / ("original.onnx" if cut is None else "slim.onnx")
        onnx.export(program_of(captured.module if cut is None else rewrite(types, cut).module, captured), path)
        return path


def _lower(before: Trial, last: Trial, wanted: float) -> float:
    """The FLOPs at which the line through two cuts that are too slow comes to what is wanted: a part of the way."""
    slope = (before.share - last.share) / (before.flops - last.flops)
    reached = last.flops - (last.share - _NEAR * wanted) / slope if slope > 0 else 0.0
    return min(max(reached, _FURTHEST * last.flops), _NEAREST * last.flops)


def _between(fast: Trial, slow: Trial, wanted: float) -> float:
    """The FLOPs at which the line from a cut that is fast enough to one that is not comes to what is wanted."""
    part = (_NEAR * wanted - fast.share) / (slow.share - fast.share)
    return fast.flops + min(max(part, _INSIDE), 1 - _INSIDE) * (slow.flops - fast.flops)


class _Clock:
    """Times cuts, the same one once."""

    def __init__(self, original: Path, export: Callable[[Cut], Path]) -> None:
        self._original, self._export = original, export
        self._known: dict[bytes, Timed] = {}

    def __call__(self, cut: Cut) -> Timed:
        key = cut.alive.tobytes()
        if key not in self._known:
            found = _measure(self._original, self._export(cut))
            assert found.before_ms is not None
            assert found.after_ms is not None
            assert found.speedup is not None
            lower = found.ci95[0] if found.ci95 else found.speedup
            self._known[key] = Timed(found.before_ms, found.after_ms, 1 / found.speedup, 1 / lower)
        return self._known[key]


def _measure(before: Path, after: Path | None) -> latency.LatencyResult:
    found = latency.measure(before, after, threads=torch.get_num_threads())
    if found.skipped is not None:
        raise UsageError(f"--latency cannot be held, since nothing could be measured: {found.skipped}")
    return found
