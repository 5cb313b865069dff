"""What is found out before training, what is told after it, and what methods leave alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import begin, dataset
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import slimc
from slimc.errors import UnreachableTarget, UsageError
from slimc.schedules.scratch import draw
from slimc.training.recipe import Recipe

OPTIONS: dict[str, Any] = {"flops": 0.6, "epochs": 1, "round_to": 1, "recover": "none"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": lambda o, t: o.missing}, "metric= fails with .* on batch 1 of the validation data"),
        ({"metric": lambda o, t: (1, 2)}, "metric= returned a tuple; wanted a number"),
        ({"loss": lambda o, t: o.missing}, "loss= fails with AttributeError.* on batch 1 of the training data"),
        ({"epochs": math.inf}, "epochs is inf; it must be a number above 0"),
        ({"recipe": {"patience": -1}}, "patience is -1; wanted a number from 0 up"),
        ({"recipe": {"temperature": 0}}, "temperature is 0; it must be above 0"),
        ({"recipe": {"gate_momentum": 2}}, "gate_momentum is 2; wanted a number from 0 to 1"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options: dict[str, Any], message: str) -> None:
    def run() -> None:
        given = options | ({"recipe": Recipe(**options["recipe"])} if "recipe" in options else {})
        begin("one-shot", **given)

    with pytest.raises(UsageError, match=message):
        run()


def test_validation_without_a_metric_for_its_labels_asks_for_one() -> None:
    batches = [(torch.randn(4, 1, 8, 8), torch.randn(4, 3)) for _ in range(2)]
    with pytest.raises(UsageError, match="validation data are float32, not class numbers; give metric="):
        begin("one-shot", data=batches, val=batches, loss=functional.mse_loss)


def test_a_schedule_that_cannot_reach_a_budget_says_that_it_is_the_schedule() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    batches = [(torch.randn(8, 6), torch.zeros(8, dtype=torch.int64))]
    with pytest.raises(UnreachableTarget, match="as far as this schedule goes"):
        next(slimc.schedule("slimming", model, batches[0][0], data=batches, **OPTIONS | {"flops": 0.3}))


def test_numbers_of_numpy_may_say_how_long(tmp_path: Path) -> None:
    assert begin("one-shot", epochs=np.int64(1), folder=tmp_path).result.report.accuracy is not None


class Named(nn.Module):
    """Gives a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.b(torch.relu(self.a(x)))}


def test_dcp_refuses_a_loss_that_takes_what_its_heads_do_not_give() -> None:
    batches = [(torch.randn(8, 6), torch.zeros(8, dtype=torch.int64))]

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs["logits"], targets)

    run = slimc.schedule("dcp", Named(), batches[0][0], data=batches, loss=loss, **OPTIONS)
    with pytest.raises(UsageError, match=r"dcp's heads give a tensor .* a dict"):
        _ = run.result


def test_dcp_without_data_is_refused_before_its_first_phase() -> None:
    run = begin("dcp", data=None, val=None)
    with pytest.raises(UsageError, match="needs data="):
        next(run)


# -- what is told ------------------------------------------------------------------------------------


def test_multiples_that_gave_way_are_told_and_written_down() -> None:
    report = begin("one-shot", flops=0.3, round_to="auto").result.report
    small = begin("one-shot", flops=0.3, round_to=1).result
    assert report.method.round_to < 16
    assert any("widths are multiples of" in text for text in report.warnings)
    assert (small.report.method.round_to, small.plan.method["round_to"]) == (1, 1)
    assert not any("multiples" in text for text in small.report.warnings)


def test_the_last_point_is_of_the_network_that_is_given_back() -> None:
    report = begin("one-shot", recover="reconstruct", epochs=1).result.report
    assert [point.phase for point in report.training.points][-2:] == ["finetune", "settle"]
    assert report.training.points[-1].accuracy == report.accuracy.after


# -- methods ------------------------------------------------------------------------------------------


def test_scratch_leaves_alone_what_does_not_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    first = model.get_submodule("0").requires_grad_(False)
    batches = [(torch.randn(8, 6), torch.zeros(8, dtype=torch.int64))]
    slim = slimc.schedule("scratch", model, batches[0][0], data=batches, **OPTIONS).result.module
    rows = {tuple(row.tolist()) for row in first.get_parameter("weight")}
    assert all(tuple(row.tolist()) in rows for row in slim.get_parameter("0.weight"))


def test_drawing_anew_leaves_frozen_norms_with_what_they_saw() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    model.get_submodule("1").requires_grad_(False)
    model.get_buffer("1.running_mean").fill_(5.0)
    before = model.get_parameter("0.weight").detach().clone()
    draw(model)
    assert bool((model.get_buffer("1.running_mean") == 5).all())
    assert not torch.equal(model.get_parameter("0.weight"), before)


class Stochastic(nn.Module):
    """Leaves a branch out in every other training step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        self.calls += self.training
        if not self.training or self.calls % 2:
            x = x + torch.relu(self.b(x))
        return self.c(x)  # type: ignore[no-any-return]


def test_layers_that_a_step_leaves_out_are_drawn_to_nothing() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 6), torch.zeros(8, dtype=torch.int64)) for _ in range(4)]
    run = slimc.schedule(
        "one-shot", Stochastic(), batches[0][0], data=batches, recipe=Recipe(features=1.0, rate=0.01), **OPTIONS
    )
    assert run.result.report.training is not None


@pytest.mark.parametrize("name", ["lottery", "iterative"])
def test_a_scorer_that_says_too_little_for_the_budget_is_found_out_before_training(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip
    data: DataLoader[Any] = DataLoader(dataset(), 16)
    whole = slimc.inspect(model, torch.zeros(2, 1, 8, 8)).macs
    run = slimc.schedule(
        name, model, torch.zeros(2, 1, 8, 8), data=data, scorer="bn-scale", **OPTIONS | {"flops": 0.5, "epochs": 2}
    )
    with pytest.raises(UnreachableTarget, match=f"of {whole / 1e3:.3g} k"):
        next(run)
