from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slimc

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


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_the_peers_choice_as_a_plan_is_the_peers_own_network(method: str) -> None:
    peer = pytest.importorskip("torch_pruning")
    from bench import peer_cut

    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 24), (24, 24)):
        layers += [torch.nn.Conv2d(inputs, outputs, 3, bias=False), torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]
    head = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(24, 10))
    model = torch.nn.Sequential(*layers, *head).eval()
    pictures, labels = torch.randn(4, 1, 14, 14), torch.tensor([1, 2, 3, 4])
    plan = peer_cut.chosen(model, pictures, 0.5, method, [(pictures, labels)])
    theirs = copy.deepcopy(model)
    taylor = method == "taylor"
    pruner = peer_cut.pruner_of(theirs, pictures, peer.importance.GroupTaylorImportance() if taylor else None)
    if taylor:
        torch.nn.functional.cross_entropy(theirs(pictures), labels).backward()  # type: ignore[no-untyped-call]
    peer_cut.shrink(pruner, theirs, pictures, 0.5 * peer_cut.macs(theirs, pictures))
    ours = slimc.apply(model, plan, pictures)
    assert (ours.module(pictures) - theirs(pictures)).abs().max() < 1e-5
    assert 0.3 < slimc.inspect(ours.module, pictures).macs / ours.analysis.full.macs <= 0.5
