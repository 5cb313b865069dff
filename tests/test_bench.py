from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bench(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark script as a user runs it; its exit code tells whether the claim holds."""
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_acceptance_checks_a_row_keeps_it_and_draws_it(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--models", "squeezenet1_0", "--budgets", "0.4", "--round-to", "1", "--out", str(out)]
    done = bench("acceptance", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["failures"] == []
    assert row["macs_after"] == row["predicted_after"] < 0.4 * row["macs_before"]
    assert row["normalisations_after_convolutions"] == 0
    page = out.with_suffix(".md").read_text()
    assert "1 of 1 rows hold" in page
    assert "Machine:" in page
    again = bench("acceptance", *arguments, "--resume")
    assert again.returncode == 0
    assert "squeezenet1_0 0.4" not in again.stdout
    assert len(out.read_text().splitlines()) == 1


def test_scale_times_slimc_and_its_peer(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    out = tmp_path / "scale.md"
    done = bench("scale", "--depths", "2", "4", "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "| exponent |" in out.read_text()


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the high-water mark")
    out = tmp_path / "memory.md"
    done = bench("memory", "--models", "squeezenet1_0", "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "| squeezenet1_0 |" in out.read_text()


@pytest.mark.slow
def test_speed_pairs_both_tools_on_one_model(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    out = tmp_path / "speed.md"
    done = bench("speed", "--models", "squeezenet1_0", "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "| squeezenet1_0 |" in out.read_text()
