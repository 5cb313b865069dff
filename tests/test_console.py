"""What a terminal shows while a run goes on."""

from __future__ import annotations

import pytest

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
