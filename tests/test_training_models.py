"""Training odd models whole: layouts, volumes, half precision, shared weights, one batch size; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import UsageError
from slimc.graph.example import Example
from slimc.samples import Batch
from slimc.training import precision as precisions
from slimc.training.layout import arrange, layout
from slimc.training.loop import evaluate
from slimc.training.recipe import Recipe

LIKE = torch.zeros(2, 4)


class Flattening(nn.Module):
    """Flattens maps with `view`, which needs them in torch's usual layout, as LeNet and many others do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16 * 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.register_buffer("order", torch.arange(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.a(x))), 2)
        x = torch.relu(self.b(x[:, self.order]))  # type: ignore[index]
        return self.h(x.view(x.size(0), -1))  # type: ignore[no-any-return]


def pictures(batches: int = 4, like: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (batches, 16), generator=generator)
    return [(torch.randn(16, 3, 8, 8, generator=generator).to(like), own) for own in labels]


@pytest.mark.parametrize("name", ["one-shot", "tick-tock"])
def test_models_that_flatten_with_view_are_trained_in_the_layout_in_which_they_run(name: str) -> None:
    torch.manual_seed(0)
    model = Flattening().eval()
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"flops": 0.6, "round_to": 1, "epochs": 1, "data": pictures(), "val": pictures(1)}
    slim = slimc.schedule(name, model, torch.randn(2, 3, 8, 8), recipe=Recipe(average=0.9), **options).result
    assert type(slim.module) is Flattening
    assert slim.module(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    # Averages are of real numbers: an index stays one.
    kept = dict(slim.module.named_buffers())["order"].tolist()
    assert sorted(kept) == list(range(len(kept))) or kept == before["order"].tolist()


def test_a_layout_is_tried_without_a_trace() -> None:
    torch.manual_seed(0)
    model = Flattening()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    batch = Batch(Example.of(torch.randn(4, 3, 8, 8)), None)
    random = torch.get_rng_state()
    arrange(model)
    assert layout(batch, model) is batch
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    turned = layout(batch, plain).example.args[0]
    assert turned.is_contiguous(memory_format=torch.channels_last)


def test_a_metric_may_return_a_tensor_and_must_return_a_number() -> None:
    data = [Batch(Example.of(x), y) for x, y in pictures(2)]
    model = Flattening()
    found = evaluate(model, data, lambda outputs, targets: (outputs.argmax(1) == targets).float().mean())
    assert isinstance(found, float)
    with pytest.raises(UsageError, match="metric= returned a Tensor; wanted a number"):
        evaluate(model, data, lambda outputs, targets: outputs)


def test_what_would_fail_after_training_is_refused_before() -> None:
    options: dict[str, Any] = {"flops": 0.6, "epochs": 1, "data": pictures()}
    for more, said in (
        ({"test": iter(pictures())}, "test data can be read only once"),
        ({"recipe": Recipe(keep="best")}, "need validation data"),
        ({"recipe": Recipe(patience=2)}, "need validation data"),
    ):
        with pytest.raises(UsageError, match=said):
            slimc.schedule("one-shot", Flattening(), torch.randn(2, 3, 8, 8), **options, **more)
    for wrong in ({"optimiser": "adam"}, {"keep": "Best"}, {"precision": "float16"}, {"average": 1.0}):
        with pytest.raises(UsageError):
            Recipe(**wrong)


def test_a_run_that_ended_in_an_error_has_no_result() -> None:
    calls: list[int] = []

    def broken(outputs: Any, targets: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:  # the first one looks whether it works at all
            raise RuntimeError("broken")
        return torch.zeros(())

    run = slimc.schedule(
        "one-shot", Flattening(), torch.randn(2, 3, 8, 8), flops=0.6, epochs=1, data=pictures(), loss=broken
    )
    with pytest.raises(RuntimeError):
        _ = run.result
    with pytest.raises(UsageError, match="ended in an error"):
        _ = run.result


def test_half_precision_and_volumes_are_trained() -> None:
    class Volumes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.h = nn.Conv2d(3, 16, 3), nn.Conv3d(16, 8, (1, 3, 3)), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.h(torch.relu(self.b(torch.relu(self.a(x))[:, :, None])).mean((2, 3, 4)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    example = torch.randn(2, 3, 8, 8)
    options: dict[str, Any] = {"flops": 0.6, "round_to": 1, "epochs": 1, "recover": "none"}
    assert slimc.schedule("one-shot", Volumes(), example, data=pictures(), **options).result
    half = pictures(like=torch.bfloat16)
    assert slimc.schedule("one-shot", Volumes().bfloat16(), example.bfloat16(), data=half, **options).result


@pytest.mark.parametrize("name", ["group-sparsity", "csgd"])
def test_constants_in_forward_and_shared_weights_are_no_obstacle(name: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 16), nn.Linear(16, 16)
            self.c.weight = self.b.weight
            self.h = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.a(x * torch.tensor([1.0, 2.0, 3.0])[:, None, None])).mean((2, 3))
            return self.h(torch.relu(self.c(torch.relu(self.b(x)))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    options: dict[str, Any] = {"params": 0.7, "round_to": 1, "epochs": 1, "data": pictures()}
    slim = slimc.schedule(name, Odd(), torch.randn(2, 3, 8, 8), **options).result
    assert slim.report.targets["params"].got <= 0.7


class OneSize(nn.Module):
    """Takes batches of two alone: it counts them out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.relu(self.a(x))
        return self.b(torch.stack([first, second]))  # type: ignore[no-any-return]


def test_batches_of_another_size_than_the_models_are_refused_before_training() -> None:
    batches = [(torch.randn(size, 6), torch.zeros(size, dtype=torch.int64)) for size in (4, 2)]
    options: dict[str, Any] = {"flops": 0.6, "epochs": 1, "round_to": 1, "recover": "none"}
    with pytest.raises(UsageError, match=r"does not take batch 1 of the training data, 4 samples .*batches of 2"):
        _ = slimc.schedule("one-shot", OneSize(), batches[0][0][:2], data=batches, **options).result
    run = slimc.schedule("one-shot", OneSize(), batches[1][0], data=batches[1:], **options)
    assert run.result.report.macs.after < run.result.report.macs.before


def test_a_later_batch_of_another_size_is_refused_with_the_sizes_that_went_well() -> None:
    batches = [(torch.randn(size, 6), torch.zeros(size, dtype=torch.int64)) for size in (2, 2, 1)]
    run = slimc.schedule("one-shot", OneSize(), batches[0][0], data=batches, flops=0.6, epochs=1, round_to=1)
    with pytest.raises(
        UsageError, match=r"does not take batch 3 of the training data, 1 samples .*took batches of 2\."
    ):
        _ = run.result


class Gathering(nn.Module):
    """Adds rows up, which takes operands of one type only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("where", torch.tensor([0, 1, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.a(x)).movedim(1, 0)
        found = torch.zeros(2, *rows.shape[1:]).index_add(0, self.where, rows)  # type: ignore[arg-type]
        return self.b(found.mean(0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_a_model_that_does_not_run_in_bfloat16_trains_in_float32_unless_asked(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "computes_in_bfloat16", lambda kind: True)
    batches = [(torch.randn(4, 4, 6), torch.zeros(4, dtype=torch.int64))]
    options: dict[str, Any] = {"flops": 0.6, "epochs": 1, "round_to": 1, "recover": "none"}
    options["recipe"] = Recipe(precision=precision)
    if precision == "bfloat16":
        with pytest.raises(UsageError, match=r"does not run in bfloat16 .*leave precision= out"):
            slimc.schedule("one-shot", Gathering(), batches[0][0], data=batches, **options)
        return
    run = slimc.schedule("one-shot", Gathering(), batches[0][0], data=batches, **options)
    assert any("trained in float32" in note for note in run.result.report.warnings)
