"""A latency target: the search for the estimate that is fast enough, and one real run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slimc
from slimc import budget, pace
from slimc.__main__ import guarded
from slimc.analysis import Analysis, Stages
from slimc.cli import app
from slimc.compiler import inspect
from slimc.errors import UnreachableTarget, UsageError
from slimc.exporters import latency
from slimc.exporters.latency import LatencyResult
from slimc.graph.resize import Cut
from slimc.pace import Pace, Timed

BEFORE = 10.0
LAWS: dict[str, Callable[[float], float]] = {
    "in step": lambda share: share,
    "an overhead": lambda share: 0.3 + 0.7 * share,
    "falls faster": lambda share: share**1.5,
    "root": lambda share: share**0.5,
    "in stairs": lambda share: np.ceil(share * 12) / 12,
}


def net(width: int = 48) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    ).eval()  # fmt: skip


FULL = 8 * 64 * 9 * (3 + 8 + 8) + 80
"""MACs of `net(8)` for 8 x 8 pictures."""


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    found = inspect(net(8), torch.zeros(2, 3, 8, 8))
    assert found.full.macs == FULL
    return found


@pytest.fixture
def start(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Pace, list[float]]]:
    """A target on a machine that follows no clock: cuts are limits of the estimate, times follow `law`."""

    def measured(before: Path, after: Path | None, ranges: Any = ()) -> LatencyResult:
        return LatencyResult("", "", 1, 1, before_ms=BEFORE)

    def make(text: str, law: Callable[[float], float] = LAWS["in step"]) -> tuple[Pace, list[float]]:
        asked: list[float] = []

        class Clock:
            def __init__(self, *_: Any) -> None: ...

            def __call__(self, cut: float) -> Timed:
                asked.append(cut)
                share = law(cut / BEFORE)
                return Timed(BEFORE, BEFORE * share, share, share * 1.01)

        monkeypatch.setattr(pace, "_measure", measured)
        monkeypatch.setattr(pace, "_operators", lambda path, ranges: ())
        monkeypatch.setattr(pace, "_Clock", Clock)
        monkeypatch.setattr(pace, "_export", lambda analysis, folder, cut: folder)
        return Pace(analysis, budget.parse("latency", text), Stages(None)), asked

    return make


def estimate(limits: dict[str, float]) -> Any:
    return limits["latency"]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("text", ["0.8", "5ms", "0.35"])
def test_the_largest_estimate_that_is_fast_enough_is_found(start: Any, law: str, text: str) -> None:
    target, asked = start(text, LAWS[law])
    share = target.limit / BEFORE
    settled = target.settle({"latency": share * BEFORE, "params": 7.0}, 0.01 * BEFORE, BEFORE, estimate)
    assert settled.limits["params"] == 7.0
    assert settled.result.got * 1.01 <= settled.result.asked == pytest.approx(share)
    assert settled.result.after == pytest.approx(settled.result.got * BEFORE)
    assert len(asked) <= 8
    possible = max(x for x in np.linspace(0.01, 1, 2000) if LAWS[law](x) * 1.01 <= share)
    assert settled.limits["latency"] >= 0.93 * possible * BEFORE or settled.result.got >= 0.95 * share


def test_what_has_gone_already_is_not_asked_back(start: Any) -> None:
    target, asked = start("0.8")
    settled = target.settle({"latency": 0.8 * BEFORE}, 0.1 * BEFORE, 0.6 * BEFORE, estimate)
    assert asked == [0.6 * BEFORE]
    assert settled.limits["latency"] == 0.6 * BEFORE


def test_a_target_below_the_smallest_cut_names_what_can_be_had(start: Any) -> None:
    target, asked = start("0.3", lambda share: 0.4 + 0.6 * share)
    with pytest.raises(UnreachableTarget, match=r"3 ms \(30% of the original\).* takes 4[67]\.\d% \(4\.6 ms\)"):
        target.settle({"latency": 0.3 * BEFORE}, 0.1 * BEFORE, BEFORE, estimate)
    assert asked[-1] == 0.1 * BEFORE


def test_the_smallest_cut_is_measured_at_once_where_it_may_be_too_slow(start: Any) -> None:
    target, asked = start("0.5", lambda share: 0.2 + 0.8 * share)
    target.check(0.2 * BEFORE, 0.2 * BEFORE)
    assert asked == []  # far from the target
    target.check(0.3 * BEFORE, 0.3 * BEFORE)
    with pytest.raises(UnreachableTarget, match=r"takes 52\.5% \(5\.2 ms\)"):
        target.check(0.4 * BEFORE, 0.4 * BEFORE)
    assert asked == [0.3 * BEFORE, 0.4 * BEFORE]


def test_the_last_trial_is_the_smallest_cut(start: Any) -> None:
    target, asked = start("0.5", lambda share: 0.49 if share <= 1e-6 else 0.51 + 1e-3 * share)
    assert target.settle({"latency": 0.5 * BEFORE}, 1e-6 * BEFORE, BEFORE, estimate).result.got == 0.49
    assert len(asked) <= 8
    assert asked[-1] == 1e-6 * BEFORE


def test_milliseconds_hold_even_if_the_machine_has_become_slower(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = start("5ms")
    slower = 1.3 * BEFORE

    def timed(cut: float) -> Timed:
        share = cut / BEFORE
        return Timed(slower, slower * share, share, share * 1.01)

    monkeypatch.setattr(target, "_clock", timed)
    settled = target.settle({"latency": 0.5 * BEFORE}, 0.1 * BEFORE, BEFORE, estimate)
    assert settled.result.after <= 5.0
    assert settled.result.met
    assert settled.result.asked == pytest.approx(5.0 / slower)


def test_too_few_pairs_hold_no_target(analysis: Analysis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = LatencyResult("", "", 1, 1, before_ms=9e3, after_ms=4e3, speedup=2.2, rounds=2)
    monkeypatch.setattr(pace, "_measure", lambda *_: few)
    cut = Cut(analysis.types, np.ones(analysis.types.solution.variables, np.bool_))
    with pytest.raises(UsageError, match="a call of 9000 ms is too long"):
        pace._Clock(tmp_path, lambda cut: tmp_path, ())(cut)


def test_a_target_above_the_original_removes_nothing(start: Any) -> None:
    target, _ = start("20ms")
    begun = target.start({}, 0.0)
    assert begun["latency"] == BEFORE
    assert target.settle(begun, 0.1 * BEFORE, BEFORE, estimate).limits["latency"] == BEFORE


def test_the_search_begins_where_the_estimate_says_but_where_it_can_be(start: Any) -> None:
    target, _ = start("0.5")
    assert target.start({"params": 3.0}, 0.0) == {"params": 3.0, "latency": 0.5 * BEFORE}
    assert target.start({}, 0.7 * BEFORE) == {"latency": 0.7 * BEFORE}


def test_the_same_cut_is_measured_once(analysis: Analysis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[Path | None] = []

    def measured(before: Path, after: Path | None, ranges: Any = ()) -> LatencyResult:
        runs.append(after)
        return LatencyResult("", "", 1, 1, before_ms=4.0, after_ms=2.2, speedup=2.0, ci95=(1.6, 2.5))

    monkeypatch.setattr(pace, "_measure", measured)
    clock = pace._Clock(tmp_path, lambda cut: tmp_path, ())
    cut = Cut(analysis.types, np.ones(analysis.types.solution.variables, np.bool_))
    assert clock(cut) == clock(cut) == Timed(4.0, 2.2, 0.5, 1 / 1.6)
    assert len(runs) == 1


def test_nothing_measured_is_no_target_held(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = LatencyResult("", "", 1, 1, skipped="it was killed")
    monkeypatch.setattr(latency, "measure", lambda *_, **__: gone)
    with pytest.raises(UsageError, match="it was killed"):
        Pace(analysis, budget.parse("latency", "0.5"), Stages(None))


def test_a_model_without_products_has_no_time_to_save() -> None:
    with pytest.raises(UsageError, match=r"--latency 0\.5: the model has no multiply-accumulates"):
        slimc.compress(nn.ReLU(), torch.rand(2, 3, 8, 8), latency=0.5)


def test_a_real_network_becomes_as_fast_as_asked() -> None:
    said: list[str] = []
    slim = slimc.compress(
        net(), torch.rand(2, 3, 32, 32), latency=0.6, params=0.9, recover="none",
        progress=lambda kind, text: said.append(text) if kind == "target" else None,
    )  # fmt: skip
    found = slim.report.targets["latency"]
    assert found.asked == pytest.approx(0.6)
    assert found.met
    assert found.after < found.before
    assert set(slim.report.targets) == {"params", "latency"}  # FLOPs were nobody's target
    assert 0.1 < slim.report.macs.share < 0.9
    assert slim.plan.targets["latency"]["text"] == "0.6"
    assert any("latency:" in line and "keep 60%, cut 40%" in line for line in said)


@pytest.mark.parametrize("select", ["greedy", "exact"])
def test_all_targets_hold_together(select: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(before: Path, after: Path | None, ranges: Any = ()) -> LatencyResult:
        return LatencyResult("", "", 1, 1, before_ms=10.0, after_ms=2.5, speedup=4.0, ci95=(3.9, 4.1))

    monkeypatch.setattr(pace, "_measure", measured)
    monkeypatch.setattr(pace, "_operators", lambda path, ranges: ())
    monkeypatch.setattr(pace, "_export", lambda analysis, folder, cut: folder)
    slim = slimc.compress(
        net(), torch.rand(2, 3, 8, 8), latency="9ms", flops=0.5, recover="none", round_to=1, select=select
    )
    assert slim.report.targets["flops"].got == pytest.approx(0.5, rel=0.02)
    assert slim.report.targets["flops"].met  # although 9 ms would leave room for more
    assert slim.report.targets["latency"].got == 0.25


def test_the_command_line_says_what_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(net(16), tmp_path / "m.pt")
    args = ["compress", str(tmp_path / "m.pt"), "--input", "1x3x16x16", "--latency", "0.001", "--recover", "none"]
    assert guarded(lambda: app([*args, "--out", str(tmp_path / "out")])) == 3
    assert "--latency 0.001 asks for at most" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_takes_no_latency_target(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train with --flops"):
        slimc.compress(net(), torch.rand(2, 3, 8, 8), latency=0.5, schedule="iterative", epochs=1)


@pytest.mark.parametrize(
    ("text", "milliseconds"), [("8ms", 8.0), ("250us", 0.25), ("1.5 s", 1500.0), ("40%", 4.0), ("-30%", 7.0)]
)
def test_times_are_read_as_people_write_them(text: str, milliseconds: float) -> None:
    assert budget.parse("latency", text).limit(10.0) == pytest.approx(milliseconds)


def test_a_bare_number_of_milliseconds_is_asked_about() -> None:
    with pytest.raises(UsageError, match="Did you mean 8ms"):
        budget.parse("latency", "8")
    with pytest.raises(UsageError, match="known: us, ms, s"):
        budget.parse("latency", "8xs")
