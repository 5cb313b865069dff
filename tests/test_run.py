"""Runs that crash and go on; the user's own loop; what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import METHODS, Stop, begin, crash_after, dataset, loaders, network, weights
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import slimc
from slimc.errors import UnreachableTarget, UsageError
from slimc.training.loop import fit
from slimc.training.recipe import Recipe
from slimc.training.run import Run

LABELS = torch.zeros(4, dtype=torch.long)
IMAGES = torch.zeros(4, 1, 8, 8)


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
    assert [point.phase for point in slim.report.training.points][-2:] == ["finetune", "settle"]
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


def test_the_best_weights_are_looked_for_after_a_part_of_an_epoch_too() -> None:
    answers = iter([0.3, 0.9])

    class Watching(Run):
        def accuracy_of(self, module: nn.Module) -> float | None:
            return next(answers)

    run = begin("one-shot", epochs=1.5, recipe=slimc.Recipe(keep="best"))
    run.__class__ = Watching
    phase = next(run)
    recorded: list[dict[str, torch.Tensor]] = []
    compare = run.accuracy_of

    def recording(module: nn.Module) -> float | None:
        recorded.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return compare(module) if len(recorded) < 3 else 0.9

    run.accuracy_of = recording  # type: ignore[method-assign]
    phase.train()
    assert len(recorded) == 3  # after the epoch, after its half, and what the phase reports
    assert all(torch.equal(recorded[1][name], tensor) for name, tensor in phase.module.state_dict().items())


def test_statistics_are_left_alone_after_a_long_loop_of_ones_own() -> None:
    model, data = network(), list(loaders()[0])
    run = slimc.schedule("one-shot", model, torch.zeros(2, 1, 8, 8), flops=0.5, epochs=60, round_to=1, data=data)
    for phase in run:
        statistics = {name: buffer.clone() for name, buffer in phase.module.named_buffers()}
        for buffer in phase.module.buffers():
            buffer.add_(1)  # what the loop has come to
        phase.done()
    found = dict(run.result.module.named_buffers())
    assert statistics
    for name in [name for name in statistics if "running" in name]:
        assert torch.equal(found[name], statistics[name] + 1)


def test_what_trains_is_as_before_where_training_fails() -> None:
    calls: list[int] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:  # the first one looks whether it works at all
            raise ZeroDivisionError
        return torch.zeros(())

    run = begin(epochs=2, loss=loss)
    next(run).done()
    phase = next(run)
    assert phase.name == "tick"  # in which few parameters train
    wanted = {name: parameter.requires_grad for name, parameter in phase.module.named_parameters()}
    with pytest.raises(ZeroDivisionError):
        phase.train()
    assert wanted == {name: parameter.requires_grad for name, parameter in phase.module.named_parameters()}


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


class Functional(nn.Module):
    """Torch's attention, whose parts are never called, and a layer of its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.weight, self.bias = nn.Parameter(0.1 * torch.randn(16, 16)), nn.Parameter(torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x.flatten(1, 2)))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        y = nn.functional.linear(torch.relu(y), self.weight, self.bias)
        return self.last(y.mean(1))  # type: ignore[no-any-return]


def test_only_layers_that_are_called_are_drawn_to_the_originals_values() -> None:
    recipe = slimc.Recipe(features=1.0)
    train, _ = loaders()
    run = slimc.schedule(
        "one-shot", Functional(), torch.zeros(2, 1, 8, 8), flops=0.9, epochs=1, data=train, round_to=1, recipe=recipe,
        ignore=["attention.in_proj_weight"],
    )  # fmt: skip
    assert run.result.report.targets["flops"].met


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
        ({"name": "ticktock"}, UsageError, "known: .*tick-tock"),
        ({"settings": {"tiks": 3}}, UsageError, "--set tiks.*ticks"),
        ({"settings": {"ticks": "many"}}, UsageError, "--set ticks=many"),
        ({"recover": "distill"}, UsageError, "Recipe"),
        ({"name": "lottery", "recover": "bn"}, UsageError, "lottery fits nothing after cuts: leave --recover bn out"),
        ({"data": iter([])}, UsageError, "only once"),
        ({"data": [torch.zeros(4, 1, 8, 8)]}, UsageError, "no labels"),
        ({"data": [(torch.zeros(4, 2, 8, 8), LABELS)]}, UsageError, r"\[N, 2, 8, 8\]; the example"),
        ({"data": [(torch.full((4, 1, 8, 8), torch.nan), LABELS)]}, UsageError, "training data holds NaN"),
        ({"data": [(IMAGES, LABELS + 3)]}, UsageError, "batch 1 of the training data holds the label 3; .* 3 classes"),
        ({"data": [(IMAGES, LABELS[:3])]}, UsageError, r"training data have shape \[3\]"),
        ({"data": [(IMAGES, LABELS.float())]}, UsageError, "float32, not class numbers"),
        ({"val": [(IMAGES, LABELS - 1)]}, UsageError, "validation data holds the label -1"),
        ({"val": []}, UsageError, "validation data is empty"),
        ({"test": [(IMAGES, LABELS + 3)]}, UsageError, "test data holds the label 3"),
        ({"loss": lambda outputs, targets: outputs}, UsageError, r"loss= returned \[16, 3\]; wanted"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = dict(options)
    with pytest.raises(kind, match=message):
        _ = begin(given.pop("name", "tick-tock"), **given).result


def test_a_later_batch_is_checked_too() -> None:
    data = [(IMAGES, LABELS), (IMAGES, LABELS + 3)]
    with pytest.raises(UsageError, match="batch 2 of the training data holds the label 3"):
        _ = begin(data=data).result
    with pytest.raises(UsageError, match=r"\[N, 1, 4, 4\]; the example"):
        _ = begin(data=[(IMAGES, LABELS), (IMAGES[..., :4, :4], LABELS)]).result
    with pytest.raises(UsageError, match="a batch of the validation or test data holds the label 3"):
        _ = begin(val=data).result


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset(48))


def test_a_loader_that_does_not_know_its_length_is_counted() -> None:
    run = begin(data=DataLoader(Endless(), batch_size=16), epochs=2)
    assert run.result.report.training.points[-1].epochs == pytest.approx(2)
    assert run.stream is not None
    assert len(run.stream) == 3


def test_averages_are_not_chosen_among() -> None:
    with pytest.raises(UsageError, match="average"):
        Recipe(average=0.9, keep="best")


def test_statistics_are_averaged_with_the_weights() -> None:
    """An average that hardly moves stays at what the first step left, in weights and statistics alike."""
    data, like = list(loaders()[0]), torch.zeros(2, 1, 8, 8)
    averaged, once = network(), network()
    fit(
        averaged, data, like, epochs=3, recipe=Recipe(average=1 - 1e-7, precision="float32", shape="constant", warmup=0)
    )
    with torch.no_grad():
        once.train()(data[0][0])
    found, wanted = averaged.state_dict(), once.state_dict()
    for name in found:
        if name.startswith("1.running"):  # dropout stands before the others
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_which_axis_holds_classes_is_not_guessed_when_distilling() -> None:
    model = nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 3, padding=1))
    data = [(torch.randn(8, 1, 6), torch.zeros(8, 6, dtype=torch.long))]
    options: dict[str, Any] = {
        "flops": 0.7, "epochs": 1, "data": data, "round_to": 1, "recover": "none",
        "recipe": Recipe(distil=0.5, precision="float32"),
    }  # fmt: skip
    assert slimc.schedule("one-shot", model, torch.zeros(2, 1, 6), **options).result
    options["loss"] = lambda outputs, targets: outputs.square().mean()
    with pytest.raises(UsageError, match=r"\[8, 4, 6\]: which of its axes"):
        _ = slimc.schedule("one-shot", model, torch.zeros(2, 1, 6), **options).result
