from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from slimc.demo import SIDE, Digits, DigitsNet, digits, trained_digits_net
from slimc.errors import UsageError
from slimc.graph.capture import capture
from slimc.graph.example import Example
from slimc.random_state import kept_random_state, random_state, seed_all
from slimc.samples import Batch, batch_of
from slimc.training.loop import Epoch, Loop, evaluate, fit
from slimc.training.recipe import Recipe, default_rate, factor, parameter_groups
from slimc.training.stream import Stream

LIKE = torch.zeros(2, 4)
PLAIN = Recipe(rate=0.1, precision="float32")


def separable(count: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two classes that a linear layer tells apart."""
    with kept_random_state():
        seed_all(0, 0)
        targets = torch.randint(0, 2, (count,))
        inputs = torch.randn(count, 4) + 4.0 * (2 * targets - 1).unsqueeze(1)
    return [(inputs[start : start + 16], targets[start : start + 16]) for start in range(0, count, 16)]


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.dropout(torch.relu(self.norm(self.first(x)))))


def small_net() -> SmallNet:
    with kept_random_state():
        seed_all(0, 0)
        return SmallNet()


def train(model: nn.Module, data: Any, *, epochs: int, recipe: Recipe = PLAIN, **options: Any) -> tuple[Epoch, ...]:
    return fit(model, data, LIKE, epochs=epochs, recipe=recipe, **options)


def batches_of(data: Any) -> list[Batch]:
    return [batch_of(item, Example.of(LIKE)) for item in data]


def noise_digits() -> Digits:
    part = TensorDataset(torch.zeros(64, 1, SIDE, SIDE), torch.zeros(64, dtype=torch.int64))
    return Digits(part, part, part)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_training_learns_what_can_be_learned() -> None:
    model, data = small_net(), separable()
    nn.init.zeros_(model.last.weight)  # every input scores alike, so that all are given one class
    before = evaluate(model, batches_of(data))
    history = train(model, data, epochs=3)
    assert before < 0.8
    assert evaluate(model, batches_of(data)) == 1.0
    assert history[-1].loss < history[0].loss


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    weights = []
    for seed in (1, 1, 2):
        model = small_net()
        train(model, separable(), epochs=2, seed=seed)
        weights.append(model.first.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])  # dropout makes the seed matter


def test_training_leaves_the_callers_random_state_as_it_was() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(small_net(), separable(), epochs=1, seed=3)
    trained_digits_net(noise_digits(), epochs=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_restored_module_by_module(mode: bool) -> None:
    model = small_net().train(mode)
    model.norm.train(not mode)
    before = [module.training for module in model.modules()]
    train(model, separable(), epochs=1, val=separable())
    assert [module.training for module in model.modules()] == before


def test_a_norm_that_its_user_froze_in_eval_mode_keeps_its_statistics() -> None:
    model = small_net().train()
    model.norm.eval()
    before = state(model)
    train(model, separable(), epochs=1)
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"])  # type: ignore[arg-type]
    assert not torch.equal(model.norm.weight, before["norm.weight"])


def test_modes_are_restored_when_a_batch_is_refused() -> None:
    model = small_net().eval()
    with pytest.raises(UsageError, match=r"\[N, 5\]; the example input is float32 \[N, 4\]"):
        train(model, [(torch.ones(4, 5), torch.zeros(4, dtype=torch.int64))], epochs=1)
    assert not any(module.training for module in model.modules())


def test_evaluation_changes_no_weight_and_no_statistic() -> None:
    model = small_net()
    before = state(model)
    evaluate(model, batches_of(separable()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_counts_pictures_and_not_batches() -> None:
    one_hot = torch.eye(2)
    # three of four right in the first batch, none of one in the second: 3/5, while the mean of batches is 3/8
    data = [(one_hot[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 0])), (one_hot[[0]], torch.tensor([1]))]
    found = evaluate(nn.Identity(), [batch_of(item, Example.of(one_hot)) for item in data])
    assert found == pytest.approx(3 / 5)


def test_norms_and_biases_are_not_decayed() -> None:
    decayed, free = parameter_groups(small_net().named_parameters(), 0.1)
    assert [p.shape for p in decayed["params"]] == [(8, 4), (2, 8)]  # type: ignore[attr-defined]
    assert len(free["params"]) == 4  # type: ignore[arg-type]  # two biases, norm weight and norm bias
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_stay() -> None:
    model = small_net()
    model.first.weight.requires_grad_(False)
    before = state(model)
    train(model, separable(), epochs=1)
    assert torch.equal(model.first.weight, before["first.weight"])
    assert not torch.equal(model.last.weight, before["last.weight"])


def test_the_cosine_rises_then_falls_to_zero() -> None:
    at = factor(Recipe(warmup=0.1), 100)
    assert [at(step) for step in range(10)] == [(step + 1) / 10 for step in range(10)]
    assert at(10) == 1.0
    assert all(later < earlier for earlier, later in pairwise(at(step) for step in range(10, 101)))
    assert at(100) == 0.0


def test_the_steps_fall_by_ten_at_half_and_at_three_quarters() -> None:
    at = factor(Recipe(shape="step", warmup=0.0), 100)
    assert [at(step) for step in (0, 49)] == [1.0, 1.0]
    assert [at(step) for step in (50, 74, 75, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_the_triangle_begins_and_ends_at_a_tenth_of_its_peak() -> None:
    at = factor(Recipe(shape="triangle"), 1001)
    assert at(500) == pytest.approx(1.0)
    assert at(0) == pytest.approx(at(1000)) == pytest.approx(0.1, abs=1e-3)


def test_an_average_of_the_weights_lags_behind_them() -> None:
    moved = []
    for average in (0.0, 0.9):
        model = small_net()
        before = model.first.weight.detach().clone()
        train(model, separable(), epochs=2, recipe=Recipe(rate=0.1, average=average, precision="float32"))
        moved.append(float((model.first.weight.detach() - before).norm()))
    assert 0 < moved[1] < moved[0]


def test_distillation_alone_needs_no_labels_and_gives_the_teachers_outputs() -> None:
    teacher, student = small_net().eval(), small_net()
    nn.init.zeros_(student.last.weight)
    data = [inputs for inputs, _ in separable()]
    recipe = Recipe(rate=0.1, distil=1.0, precision="float32")

    def distance() -> float:
        found, wanted = (model.eval()(torch.cat(data)).softmax(1) for model in (student, teacher))
        return float((found - wanted).square().mean())

    before = distance()
    with kept_random_state():
        stream = Stream(data, Example.of(LIKE), 0)
        loop = Loop(student, stream, 40, recipe, teacher=teacher)
        for _ in range(40):
            loop.step()
        loop.finish()
    assert distance() < before / 2


def test_numbers_that_are_no_classes_are_distilled_as_numbers() -> None:
    teacher, student = small_net().eval(), small_net()
    nn.init.zeros_(student.last.weight)
    data = [(inputs, torch.zeros(len(inputs), teacher.last.out_features)) for inputs, _ in separable()]
    recipe = Recipe(rate=0.01, distil=1.0, precision="float32", shape="constant", warmup=0.0, momentum=0.0)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)

    with kept_random_state():
        loop = Loop(student, Stream(data, Example.of(LIKE), 0), 1, recipe, teacher=teacher, loss=loss)
        batch = loop.stream.next()
        found = loop._value(batch)
        with torch.no_grad():
            wanted = (batch.example.run(student.train()) - batch.example.run(teacher)).square().mean()
    assert float(found.detach()) == pytest.approx(float(wanted))


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_loop_goes_on_bit_for_bit(average: float) -> None:
    recipe, data = Recipe(rate=0.1, average=average, precision="float32"), separable()
    with kept_random_state():
        whole = small_net()
        stream = Stream(data, Example.of(LIKE), 5)
        loop = Loop(whole, stream, 7, recipe)
        for _ in range(7):
            loop.step()
        loop.finish()

        first = small_net()
        stream = Stream(data, Example.of(LIKE), 5)
        loop = Loop(first, stream, 7, recipe)
        for _ in range(3):
            loop.step()
        saved, place, random = loop.state(), (stream.epoch, stream.index), random_state()
        weights = {name: value.clone() for name, value in first.state_dict().items()}

        second = small_net()
        second.load_state_dict(weights)
        stream = Stream(data, Example.of(LIKE), 5)
        stream.seek(*place, random)
        loop = Loop(second, stream, 7, recipe)
        loop.load(saved)
        while loop.done < 7:
            loop.step()
        loop.finish()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_loss_of_ones_own_is_used() -> None:
    calls: list[int] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets))
        return nn.functional.mse_loss(outputs, nn.functional.one_hot(targets, 2).float())

    with kept_random_state():
        loop = Loop(small_net(), Stream(separable(), Example.of(LIKE), 0), 8, PLAIN, loss=loss)
        for _ in range(8):
            loop.step()
    assert calls == [16] * 8


def test_a_loss_that_is_not_finite_is_refused() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UsageError, match="batch 1 of the training data holds NaN or infinity in its sample 0"):
        train(small_net(), [(torch.full((4, 4), torch.inf), labels)], epochs=1)
    with pytest.raises(UsageError, match="loss is nan at step 1"):
        train(small_net(), [(torch.full((4, 4), 1e38), labels)], epochs=1)


def test_every_epoch_is_reported() -> None:
    seen: list[Epoch] = []
    history = train(small_net(), separable(), epochs=3, val=separable(), progress=seen.append)
    assert tuple(seen) == history
    assert [(epoch.number, epoch.of) for epoch in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(epoch.accuracy is not None for epoch in seen)


@pytest.mark.parametrize(
    ("data", "epochs", "message"),
    [([], 1, "empty"), (iter(separable()), 1, "only once"), (separable(), 0, "at least 1")],
)
def test_training_on_nothing_is_refused(data: Any, epochs: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(small_net(), data, epochs=epochs)


def test_evaluation_on_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        evaluate(small_net(), [])


@pytest.mark.parametrize(("name", "value"), [("warmup", 1.5), ("average", -0.1), ("distil", 2.0), ("rate", 0.0)])
def test_a_recipe_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UsageError, match="learning rate" if name == "rate" else name):
        Recipe(**{name: value})  # type: ignore[arg-type]


def test_the_digits_split_is_stratified_fixed_and_without_overlap() -> None:
    data, again, other = digits(), digits(), digits(seed=1)
    parts = [data.train, data.validation, data.test]
    assert sum(len(part) for part in parts) == 1797
    assert torch.equal(data.test.tensors[0], again.test.tensors[0])
    assert not torch.equal(data.test.tensors[1], other.test.tensors[1])
    shares = torch.stack([part.tensors[1].bincount(minlength=10) / len(part) for part in parts])
    assert (shares.amax(0) - shares.amin(0)).max() < 0.01
    pictures = {bytes(image.numpy()) for part in parts for image in part.tensors[0]}
    assert len(pictures) == 1797


def test_digits_are_normalised_by_the_training_part() -> None:
    images = digits().train.tensors[0]
    assert images.shape[1:] == (1, SIDE, SIDE)
    assert abs(float(images.mean())) < 1e-4
    assert abs(float(images.std()) - 1) < 1e-4


def test_the_demo_network_maps_pictures_to_ten_classes() -> None:
    model = DigitsNet(width=4, blocks=1)
    assert model(torch.zeros(2, 1, SIDE, SIDE)).shape == (2, 10)


@pytest.mark.slow
def test_the_demo_network_learns_the_digits() -> None:
    data = digits()
    model = trained_digits_net(data)
    images, labels = data.test.tensors
    assert evaluate(model, [Batch(Example.of(images), labels)]) >= 0.97
    assert not model.training


def test_layer_norms_are_seen_in_graphs_as_well() -> None:
    normed = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    graph = capture(normed, torch.randn(2, 4)).module
    plain = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)).module
    assert default_rate(Recipe(), normed) == default_rate(Recipe(), graph) == 5e-4
    assert default_rate(Recipe(), plain) == 0.05
