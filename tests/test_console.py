"""What a terminal shows while a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import slimc
from slimc import inspection
from slimc.analysis import Stages
from slimc.console import Console


def test_training_and_cutting_are_one_line_that_says_what_cuts_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 14.0, 20.0, 21.0, 21.0, 21.5])
    monkeypatch.setattr("slimc.console.time.perf_counter", lambda: next(clock))
    with Console(quiet=False, as_json=False) as console:
        for stage in ("train", "cut", "train", "cut", "rewrite"):
            console.progress("stage", stage)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["✓ training 21.0 s, 5.0 s of it cutting and fitting", "✓ rewriting the graph 0.5 s"]


def test_a_stage_that_fails_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=False, as_json=False)
    console.progress("stage", "data")
    console.__exit__(ValueError, ValueError("x"), None)
    assert capsys.readouterr().err.startswith("✗ reading the data")


def test_a_stage_that_has_ended_is_not_blamed_for_what_fails_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=False, as_json=False)
    with Stages(console.progress).stage("verify"):
        pass
    console.__exit__(ValueError, ValueError("x"), None)
    assert capsys.readouterr().err.startswith("✓ proving")


def test_names_with_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"x[/y]": nn.Linear(4, 8)})
    model.forward = lambda x: model["x[/y]"](x).sort(0)[0]
    with Console(quiet=False, as_json=False) as console:
        console.inspection(inspection.summary(slimc.inspect(model, torch.randn(2, 4)), "a[b]"))
    assert "a[b]" in capsys.readouterr().out


def test_without_a_terminal_a_long_stage_says_once_a_minute_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr("slimc.console.time.perf_counter", lambda: clock["now"])
    with Console(quiet=False, as_json=False) as console:
        console.progress("stage", "score")
        for clock["now"], done in ((30.0, 1), (59.0, 2), (61.0, 3), (62.0, 4), (125.0, 5)):
            console.progress("tick", f"{done}/10")
        console.progress("stage", "train")
        for clock["now"], share in ((130.0, 0.1), (150.0, 0.2), (190.0, 0.4)):
            console.progress("live", f"{share} tick, 80.0% FLOPs")
    assert capsys.readouterr().err.splitlines() == [
        "  scoring channels: 3/10",
        "  scoring channels: 5/10",
        "✓ scoring channels 125.0 s",
        "  tick, 80.0% FLOPs, 40% trained, 2:00 left",
        "✓ training 65.0 s",
    ]


def test_exact_selection_says_what_it_kept_and_what_any_could(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    slim = slimc.compress(net, torch.randn(2, 4), flops=0.5, select="exact", recover="none", round_to=1)
    Console(quiet=False, as_json=False).report(slim.report, tmp_path)
    best = slim.report.selection
    assert best is not None
    shares = [f"{100 * share:.2f}%" for share in (best.kept, best.greedy, best.bound)]
    line = next(line for line in capsys.readouterr().out.splitlines() if "exact selection" in line)
    assert [word.strip(");") for word in line.split() if "%" in word] == shares
