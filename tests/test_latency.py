from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim

import slimc
from slimc.errors import LoadError, UsageError
from slimc.exporters import child, machine
from slimc.exporters.formats import onnx as onnx_format
from slimc.exporters.latency import LatencyResult, measure
from slimc.exporters.paired import Timing


def file(path: Path, channels: int, scale: float = 1.0, dynamic: bool = True, batch: int = 2) -> Path:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 8, 3, padding=1),
    ).eval()
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.1, generator=generator).mul_(scale)
    shapes = ({0: Dim("batch")},) if dynamic else None
    program = torch.export.export(net, (torch.randn(batch, 3, 32, 32),), dynamic_shapes=shapes, strict=False)
    return onnx_format.export(program, path).path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file(tmp_path_factory.mktemp("wide") / "m.onnx", 128)


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file(tmp_path_factory.mktemp("slim") / "m.onnx", 16)


def quick(before: Path, after: Path | None = None, **options: Any) -> LatencyResult:
    return measure(before, after, budget_seconds=1.5, threads=1, **options)


def test_a_net_of_an_eighth_of_the_channels_is_found_faster(wide: Path, slim: Path) -> None:
    found = quick(wide, slim)
    assert found.conclusive
    assert found.speedup is not None
    assert found.ci95 is not None
    assert 3 < found.ci95[0] <= found.speedup <= found.ci95[1]
    assert found.before is not None
    assert found.after is not None
    assert found.before_ms == found.before.p50
    for timing in (found.before, found.after):
        assert 0 < timing.min <= timing.p50 <= timing.p90 <= timing.p99
    assert (found.provider, found.threads, found.batch) == ("CPUExecutionProvider", 1, 1)
    assert found.precision == "float32"
    assert found.rounds >= 6
    assert found.warmup >= 3


def test_a_slower_file_is_found_slower(wide: Path, slim: Path) -> None:
    found = quick(slim, wide)
    assert found.conclusive
    assert found.speedup is not None
    assert found.speedup < 0.5


def test_a_file_is_not_faster_than_itself(wide: Path) -> None:
    found = quick(wide, wide)
    assert not found.conclusive
    assert found.speedup == pytest.approx(1.0, abs=0.2)


def test_one_file_alone_gives_figures_but_no_ratio(slim: Path) -> None:
    found = quick(slim, batch=3)
    assert found.before_ms is not None
    assert found.batch == 3
    assert (found.after_ms, found.after, found.speedup, found.ci95) == (None, None, None, None)
    assert not found.conclusive


def test_denormal_numbers_neither_slow_a_file_nor_go_unsaid(tmp_path: Path, wide: Path) -> None:
    # Unflushed, these weights make the net several times slower.
    tiny = file(tmp_path / "tiny.onnx", 128, scale=1e-34)
    found = quick(wide, tiny)
    assert found.denormals_flushed
    assert found.speedup is not None
    assert found.speedup > 0.7
    assert found.tiny_weights_before == 0.0
    assert found.tiny_weights_after is not None
    assert found.tiny_weights_after > 0.99
    assert any("below 1e-30" in warning for warning in found.warnings)


@pytest.mark.skipif(machine.describe().simd == "other", reason="the fast path needs AVX2")
def test_convolutions_that_lost_the_fast_path_are_named(tmp_path: Path, slim: Path) -> None:
    found = quick(slim, file(tmp_path / "odd.onnx", 18))
    assert found.lost_fast_path == ("2.weight", "4.weight")
    assert any("2.weight" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("provider", "full"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_missing_provider_is_skipped_with_the_reason(slim: Path, provider: str, full: str) -> None:
    if full in machine.onnxruntime_providers():
        pytest.skip("this machine has it")
    found = quick(slim, provider=provider)
    assert found.skipped is not None
    assert f"has no {full}" in found.skipped
    assert (found.before_ms, found.speedup, found.conclusive) == (None, None, False)


def test_a_provider_that_leaves_every_node_to_another_is_not_measured(slim: Path) -> None:
    if "AzureExecutionProvider" not in machine.onnxruntime_providers():
        pytest.skip("needs a provider that runs no node of a plain network")
    found = quick(slim, provider="AzureExecutionProvider")
    assert found.skipped is not None
    assert "all fall back to CPUExecutionProvider" in found.skipped


def test_a_fixed_batch_is_used_or_refused(tmp_path: Path) -> None:
    fixed = file(tmp_path / "fixed.onnx", 8, dynamic=False, batch=4)
    assert quick(fixed).batch == 4
    with pytest.raises(UsageError, match="its batch is fixed; a batch of 2"):
        quick(fixed, batch=2)


def test_a_file_that_leaves_its_batch_open_takes_that_of_the_other(tmp_path: Path) -> None:
    free, fixed = file(tmp_path / "free.onnx", 8), file(tmp_path / "fixed.onnx", 8, dynamic=False, batch=2)
    assert quick(free, fixed).batch == 2


def test_sizes_that_no_input_takes_are_refused(slim: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no input y; it has \w+"):
        quick(slim, input_shapes={"y": (1, 3, 16, 16)})
    (name,) = [own.name for own in onnx.load(slim).graph.input]
    with pytest.raises(UsageError, match=r"its axis 2 is fixed at \d+; 99 is not possible"):
        quick(slim, input_shapes={name: (1, 3, 99, 16)})
    with pytest.raises(UsageError, match="its first size is 5, and the batch is to be 3"):
        quick(slim, input_shapes={name: (5, 3, 16, 16)}, batch=3)


def test_files_with_different_inputs_are_not_compared(tmp_path: Path, slim: Path) -> None:
    with pytest.raises(UsageError, match="its batch axis is fixed at 4; a batch of 2 is not possible"):
        quick(slim, file(tmp_path / "fixed.onnx", 8, dynamic=False, batch=4), batch=2)
    program = torch.export.export(nn.Linear(6, 3), (torch.ones(2, 6),), strict=False)
    with pytest.raises(UsageError, match="takes the inputs"):
        quick(slim, onnx_format.export(program, tmp_path / "other.onnx").path)


def test_whole_number_inputs_are_valid_indices_and_free_axes_must_be_given(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(2, 4), nn.Linear(4, 3)).eval()
    shapes = ({0: Dim("batch"), 1: Dim("length")},)
    program = torch.export.export(net, (torch.ones(2, 5, dtype=torch.long),), dynamic_shapes=shapes, strict=False)
    path = onnx_format.export(program, tmp_path / "m.onnx").path
    with pytest.raises(UsageError, match=r"input input: axis 1 \(input_axis1\) is free; give its size"):
        quick(path)
    assert quick(path, input_shapes={"input": (1, 7)}).before_ms is not None


def test_a_file_that_does_not_run_on_random_inputs_is_skipped_with_the_reason(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(1, 4), nn.Linear(4, 3)).eval()
    program = torch.export.export(net, (torch.zeros(2, 5, dtype=torch.long),), strict=False)
    path = onnx_format.export(program, tmp_path / "m.onnx").path
    assert "m.onnx does not run on random inputs" in str(quick(path).skipped)
    assert quick(path, ranges=[(0, 0)]).before_ms is not None


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        quick(tmp_path / "missing.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"garbage")
    with pytest.raises(UsageError, match="onnxruntime cannot load it"):
        quick(tmp_path / "broken.onnx")


@pytest.mark.parametrize("option", ["threads", "batch"])
def test_no_threads_and_no_batch_are_refused(slim: Path, option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(UsageError, match=f"{option} is 0"):
        measure(slim, **options)


def test_without_onnxruntime_the_message_says_what_to_install(slim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install onnxruntime"):
        measure(slim)


@pytest.mark.parametrize(
    ("interval", "rounds", "conclusive"),
    [
        ((1.1, 1.3), 20, True),
        ((0.7, 0.9), 20, True),
        ((0.9, 1.3), 20, False),
        ((1.01, 1.05), 20, False),  # one file against itself can look like this
        ((1.1, 1.3), 5, False),
        (None, 20, False),
    ],
)
def test_a_claim_needs_an_interval_without_one_and_enough_pairs(
    interval: tuple[float, float] | None, rounds: int, conclusive: bool
) -> None:
    result = LatencyResult("onnxruntime", "CPUExecutionProvider", 1, 1, ci95=interval, rounds=rounds)
    assert result.conclusive is conclusive


def test_a_busy_machine_is_noticed() -> None:
    calm = Timing(p50=1.1, p90=1.2, p99=1.3, min=1.0)
    result = LatencyResult("onnxruntime", "CPUExecutionProvider", 2, 1, before=calm)
    assert not result.busy
    assert dataclasses.replace(result, after=Timing(p50=3.6, p90=4.0, p99=9.0, min=1.0)).busy


def test_a_measuring_process_that_dies_or_hangs_is_a_reason_not_a_crash(
    slim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_CHILD", "import os; os.kill(os.getpid(), 9)")
    assert "killed by signal 9" in (quick(slim).skipped or "")
    monkeypatch.setattr(child, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(child, "_START_SECONDS", -4.0)
    assert "did not end" in (quick(slim).skipped or "")


@pytest.mark.parametrize("module", ["paired", "operators"])
def test_the_measuring_process_loads_no_torch(module: str) -> None:
    code = f"import sys, slimc.exporters.{module}; sys.exit('torch' in sys.modules)"
    root = str(Path(slimc.__path__[0]).parent)
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
