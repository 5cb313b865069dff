"""The folder of a run, and the command line that is interrupted, killed and gone on with."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import begin

from slimc.errors import Interrupted, OutputError, UsageError
from slimc.training.folder import RunFolder

# -- the folder ---------------------------------------------------------------------------------------


def test_a_folder_holds_two_checkpoints_and_survives_a_broken_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"what": 1})
    assert folder.start(resume=False) is None
    for number in range(4):
        folder.save({"number": number, "tensor": torch.arange(number)})
    files = sorted(path.name for path in folder.path.glob("checkpoint-*"))
    assert files == ["checkpoint-000003.pt", "checkpoint-000004.pt"]
    state = folder.start(resume=True)
    assert state is not None
    assert state["number"] == 3
    (folder.path / files[1]).write_bytes(b"half of a file")
    state = folder.start(resume=True)
    assert state is not None
    assert state["number"] == 2
    (folder.path / files[0]).unlink()
    with pytest.raises(OutputError, match="whole"):
        folder.start(resume=True)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"epochs": 3}).save({})
    with pytest.raises(UsageError, match="epochs is 3, not 4"):
        RunFolder(tmp_path, {"epochs": 4}).start(resume=True)
    with pytest.raises(UsageError, match="--resume"):
        RunFolder(tmp_path, {"epochs": 3}).start(resume=False)


@pytest.mark.parametrize(
    "text",
    ["[]", '{"about": 5, "checkpoints": []}', '{"about": {}, "checkpoints": [5]}', '{"about": {}, "checkpoints": 5}'],
)
def test_a_manifest_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(OutputError, match="is not a manifest of slimc"):
        RunFolder(tmp_path, {}).start(resume=True)


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    run = begin(folder=tmp_path / "run", data_name="npz:a.npz in batches of 8")
    next(iter(run))
    run.save(None)
    del run
    gc.collect()  # and its lock
    with pytest.raises(UsageError, match=r"its data is 'npz:a\.npz in batches of 8', not 'npz:b\.npz in batches of 8'"):
        next(iter(begin(folder=tmp_path / "run", data_name="npz:b.npz in batches of 8", resume=True)))


def test_going_on_where_nothing_was_begun_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run holds no run to go on with"):
        begin(folder=tmp_path / "run", resume=True)
    assert not list(tmp_path.iterdir())
    with RunFolder(tmp_path, {}).locked(), pytest.raises(UsageError, match="no run to go on with"):
        RunFolder(tmp_path, {}).start(resume=True)


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}).locked(), pytest.raises(UsageError, match="in use"), RunFolder(tmp_path, {}).locked():
        pass
    with RunFolder(tmp_path, {}).locked():
        pass


def test_a_run_that_has_ended_is_not_gone_on_with_and_another_may_begin(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {"what": 1})
    folder.start(resume=False)
    folder.log({"event": "phase"})
    folder.save({"number": 1})
    RunFolder.clear(folder.path)
    assert json.loads(folder.path.joinpath("log.jsonl").read_text().splitlines()[-1]) == {"event": "end"}
    with pytest.raises(UsageError, match="has ended"):
        folder.start(resume=True)
    assert folder.start(resume=False) is None
    assert not folder.path.joinpath("log.jsonl").exists()


# -- the command line ---------------------------------------------------------------------------------

HOME = """
import torch
from torch import nn
from slimc.demo import ResidualBlock

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), ResidualBlock(8, 8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

def feeds():
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (512,), generator=g)
    images = torch.randn(512, 1, 8, 8, generator=g) + labels[:, None, None, None].float()
    batches = list(zip(images.split(16), labels.split(16)))
    return batches[:28], batches[28:]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(textwrap.dedent(HOME))
    return tmp_path


def command(*more: str, epochs: str = "3", out: str = "out") -> list[str]:
    return [
        sys.executable, "-m", "slimc", "compress", "mine:net", "--input", "2x1x8x8", "--flops", "0.5", "--schedule",
        "tick-tock", "--epochs", epochs, "--data", "mine:feeds", "--round-to", "1", "--no-latency", "--threads", "1",
        "--recover", "none", "--out", out, *more,
    ]  # fmt: skip


def start(home: Path, *more: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*more, **options), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def test_an_interrupted_command_says_how_to_go_on_and_does(home: Path) -> None:
    from safetensors.torch import load_file

    whole = start(home, out="whole")
    first = start(home, epochs="3")
    wait_for(home / "out-run" / "manifest.json", first)
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=60)
    assert whole.wait(timeout=120) == 0, whole.communicate()[1]
    assert first.returncode == 130, told
    assert "--resume" in told
    assert not (home / "out").exists()
    refused = start(home)
    _, told = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "--resume" in told
    second = start(home, "--resume")
    _, told = second.communicate(timeout=120)
    assert second.returncode == 0, told
    wanted, found = (load_file(home / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(wanted[name], tensor) for name, tensor in found.items())
    report = json.loads((home / "out" / "report.json").read_text())
    assert report["training"]["points"][-1]["phase"] == "finetune"
    assert "tick" in (home / "out" / "report.html").read_text()
    assert not list((home / "out-run").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_command_that_is_killed_twenty_times_ends_with_the_same_weights(home: Path) -> None:
    from safetensors.torch import load_file

    begun = time.monotonic()
    whole = start(home, out="whole", epochs="40")
    assert whole.wait(timeout=300) == 0
    length = time.monotonic() - begun
    wanted = load_file(home / "whole" / "model.safetensors")
    rng, kills, number, ended = np.random.default_rng(0), 0, 0, 0
    # A run that ends before it is killed twenty times is followed by another one.
    while kills < 20 or not ended:
        out = f"out{number}"
        resumes = (home / f"{out}-run" / "manifest.json").exists()
        process = start(home, *(["--resume"] if resumes else []), epochs="40", out=out)
        try:
            patience = length * rng.uniform(0.3, 1.0) if kills < 20 else 300
            assert process.wait(timeout=patience) == 0, process.communicate()[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            # Killed when all was done: the result is there and the run is cleared.
            if not (home / out / "report.json").exists() or (home / f"{out}-run" / "manifest.json").exists():
                continue
        found = load_file(home / out / "model.safetensors")
        assert all(torch.equal(wanted[name], tensor) for name, tensor in found.items())
        number, ended = number + 1, ended + 1
    assert kills == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--schedule", "tick-tock"), "--epochs"),
        (("--epochs", "2"), "--data"),
        (("--rate", "0.1"), "--epochs"),
        (("--resume",), "--epochs"),
        (("--schedule", "tik", "--epochs", "2", "--data", "mine:feeds"), "known: "),
        (("--schedule", "tick-tock", "--epochs", "2", "--data", "mine:feeds", "--set", "x"), "NAME=VALUE"),
        (("--epochs", "2", "--data", "mine:net"), "train, validation"),
    ],
)
def test_options_for_training_are_checked(home: Path, options: tuple[str, ...], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "slimc", "compress", "mine:net", "--input", "2x1x8x8", "--flops", "0.5", *options],
        cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_an_interrupt_finishes_the_step_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimc.training.loop import Loop

    step, count = Loop.step, [0]

    def interrupting(self: Loop) -> None:
        step(self)
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Loop, "step", interrupting)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="--resume"):
        _ = begin(folder=tmp_path / "run").result
    assert count[0] == 3
    assert signal.getsignal(signal.SIGINT) is handler
    state = RunFolder(tmp_path / "run", json.loads((tmp_path / "run" / "manifest.json").read_text())["about"])
    saved = state.start(resume=True)
    assert saved is not None
    trained = sum(event["kind"] == "phase" for event in saved["journal"]), saved["middle"]["loop"]["done"]
    assert trained == (2, 0)  # a tock of two steps and a tick of one; the next one has not begun


def test_a_run_that_fails_before_anything_is_kept_leaves_no_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {})
    with pytest.raises(RuntimeError), folder.locked():
        raise RuntimeError
    assert not (tmp_path / "run").exists()
    with folder.locked():
        folder.log({"event": "begun"})
    assert (tmp_path / "run" / "log.jsonl").exists()
