"""Runs that are interrupted, killed and gone on with; the user's own loop; the folder of a run."""

from __future__ import annotations

import copy
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
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slimc
from slimc.demo import ResidualBlock
from slimc.errors import Interrupted, OutputError, UnreachableTarget, UsageError
from slimc.training.folder import RunFolder
from slimc.training.run import Run
from slimc.training.schedule import schedules
from slimc.training.stream import kept_random_state, seed_all

METHODS = sorted(schedules())


def network(seed: int = 0) -> nn.Module:
    with kept_random_state():
        seed_all(seed, 0)
        layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        blocks = [ResidualBlock(8, 8), nn.Dropout(0.1), ResidualBlock(8, 12, 2)]
        return nn.Sequential(*layers, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))


def dataset(count: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator) + labels[:, None, None, None].float()
    return TensorDataset(images, labels)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(dataset(), batch_size=16, shuffle=True), DataLoader(dataset(48), batch_size=48)


def begin(name: str = "tick-tock", **options: Any) -> Run:
    train, val = loaders()
    given: dict[str, Any] = {
        "flops": 0.5, "epochs": 4, "data": train, "val": val, "round_to": 1, "recover": "none",
    } | options  # fmt: skip
    return slimc.schedule(name, network(), torch.zeros(2, 1, 8, 8), **given)


def weights(run: Run) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = run.result.module.state_dict()
    return found


class Stop(Exception):
    """A crash in the middle of a run."""


def crash_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimc.training.loop import Loop

    step, left = Loop.step, [steps]

    def crashing(self: Loop) -> None:
        if not left[0]:
            raise Stop
        left[0] -= 1
        step(self)

    monkeypatch.setattr(Loop, "step", crashing)


@pytest.mark.parametrize("name", METHODS)
def test_a_crashed_run_goes_on_and_ends_with_the_same_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every step a checkpoint: the run crashes at several places in phases and between them.
    monkeypatch.setattr("slimc.training.run._SAVED_EVERY", -1.0)
    mends = "auto" if name in ("tick-tock", "one-shot") else "none"
    whole = begin(name, recover=mends)
    wanted = weights(whole)
    folder = tmp_path / "run"
    crashes = 0
    for steps in (1, 5, 9, 4, 40):
        with monkeypatch.context() as context:
            crash_after(steps, context)
            try:
                weights(begin(name, recover=mends, folder=folder, resume=crashes > 0))
                break
            except Stop:
                crashes += 1
    run = begin(name, recover=mends, folder=folder, resume=crashes > 0)
    found = weights(run)
    assert crashes >= 3
    assert [vars(p) for p in run.history] == [vars(p) for p in whole.history]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())


def test_training_leaves_the_callers_model_and_random_state_as_they_were() -> None:
    model, (train, val) = network(), loaders()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run = slimc.schedule(
        "iterative", model, torch.zeros(2, 1, 8, 8), flops=0.6, epochs=1, data=train, val=val, round_to=1
    )
    slim = run.result
    assert torch.equal(torch.rand(2), expected)
    # Also between phases, and when a run is dropped halfway.
    torch.manual_seed(3)
    other = iter(begin("iterative", epochs=1))
    next(other).train()
    del other
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert slim.report.verification.passed
    assert slim.report.training.points[-1].phase == "finetune"
    assert slim.report.accuracy.data == "validation"
    assert slim.report.to_dict()["training"]["schedule"] == "iterative"


def test_phases_can_be_trained_by_ones_own_loop() -> None:
    model, (train, _) = network(), loaders()
    run = slimc.schedule("tick-tock", model, torch.zeros(2, 1, 8, 8), flops=0.5, epochs=3, round_to=1)
    names = []
    for phase in run:
        optimiser = torch.optim.SGD(phase.parameters(), lr=0.01)
        phase.attach(optimiser)
        phase.module.train()
        for images, labels in list(train)[:2]:
            optimiser.zero_grad()
            nn.functional.cross_entropy(phase.module(images), labels).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        phase.done()
        names.append(phase.name)
        assert phase.metrics == {"loss": None, "accuracy": None}
    assert names[0] == "tock"
    assert 7 <= names.count("tick") <= 10  # the budget can hold a little early: channels are whole
    assert names[-1] == "finetune"
    assert run.result.report.targets["flops"].met


def test_a_loop_that_was_left_is_gone_on_with() -> None:
    wanted, run, names = weights(begin(epochs=2)), begin(epochs=2), []
    for phase in run:
        names.append(phase.name)
        if len(names) == 3:
            break
    found = weights(run)
    assert names == ["tock", "tick", "tick"]
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert list(run) == []


def test_asking_for_metrics_trains_a_phase_once() -> None:
    run = begin("one-shot", epochs=1)
    for phase in run:
        before = copy.deepcopy(phase.module.state_dict())
        first = phase.metrics
        after = copy.deepcopy(phase.module.state_dict())
        assert phase.metrics == first
        assert first["accuracy"] is not None
        assert not all(torch.equal(before[name], value) for name, value in after.items())
        assert all(torch.equal(after[name], value) for name, value in phase.module.state_dict().items())


def test_a_loss_and_a_metric_of_ones_own_are_used() -> None:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.multi_margin_loss(outputs, targets)

    run = begin("one-shot", epochs=1, loss=loss, metric=lambda outputs, targets: 0.25)
    assert run.result.report.accuracy.metric == "metric"
    assert run.result.report.accuracy.after == pytest.approx(0.25)


def test_the_best_weights_are_kept_where_the_recipe_says_so() -> None:
    answers = iter([0.3, 0.9, 0.2, 0.1])
    found: list[dict[str, torch.Tensor]] = []

    class Watching(Run):
        def accuracy_of(self, module: nn.Module) -> float | None:
            found.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
            return next(answers, 0.5)

    run = begin("one-shot", epochs=3, recipe=slimc.Recipe(keep="best"))
    run.__class__ = Watching
    for phase in run:
        phase.train()
        last = {name: tensor.clone() for name, tensor in phase.module.state_dict().items()}
    assert all(torch.equal(last[name], tensor) for name, tensor in found[1].items())
    assert not all(torch.equal(last[name], tensor) for name, tensor in found[2].items())


def test_values_inside_are_drawn_to_the_originals_and_hooks_are_taken_off() -> None:
    distances = []
    for features in (0.0, 10.0):
        recipe = slimc.Recipe(distil=0.5, features=features, rate=0.01)
        run = begin("one-shot", epochs=3, recipe=recipe, recover="none")
        for phase in run:
            phase.train()
            module, original = phase.module, run.analysis.model
            assert not any(part._forward_hooks for model in (module, original) for part in model.modules())
        (images, _), index = next(iter(loaders()[1])), run.network.cut_so_far.indices(run.network.places[-1].axis)
        with torch.no_grad():
            wanted = torch.nn.Sequential(*list(original.children())[:6])(images)[:, index]
            found = torch.nn.Sequential(*list(module.eval().children())[:6])(images)
        distances.append(float((wanted - found).square().mean()))
    assert distances[1] < 0.8 * distances[0]


def test_training_stops_early_where_the_recipe_says_so(tmp_path: Path) -> None:
    run = begin(
        "one-shot", epochs=6, recipe=slimc.Recipe(patience=2), metric=lambda outputs, targets: 0.5, folder=tmp_path
    )
    _ = run.result
    epochs = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "epoch" for line in epochs) == 3


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"epochs": 0}, UsageError, "epochs is 0"),
        ({"flops": 0.0001}, UnreachableTarget, "smallest"),
        ({"name": "ticktock"}, UsageError, "known are.*tick-tock"),
        ({"settings": {"tiks": 3}}, UsageError, "--set tiks.*ticks"),
        ({"settings": {"ticks": "many"}}, UsageError, "--set ticks=many"),
        ({"recover": "distill"}, UsageError, "Recipe"),
        ({"data": iter([])}, UsageError, "only once"),
        ({"data": [torch.zeros(4, 1, 8, 8)]}, UsageError, "no labels"),
        ({"data": [(torch.zeros(4, 2, 8, 8), torch.zeros(4).long())], "name": "one-shot"}, Exception, "channels"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = dict(options)
    with pytest.raises(kind, match=message):
        _ = begin(given.pop("name", "tick-tock"), **given).result


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


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}).locked(), pytest.raises(UsageError, match="in use"), RunFolder(tmp_path, {}).locked():
        pass
    with RunFolder(tmp_path, {}).locked():
        pass


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
        (("--schedule", "tik", "--epochs", "2", "--data", "mine:feeds"), "known are"),
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
