"""Models that were once taken for faults: state, constants and inputs of their own, and structures that few have."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import PlanError, UsageError, VerificationError
from slimc.random_state import random_state


class Recurrent(nn.Module):
    """Starts from zeros that `forward` makes, in torch's default type."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.h = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 24)
        for t in range(x.shape[1]):
            h = torch.tanh(self.a(x[:, t] + torch.arange(8.0)) + self.r(h))
        return self.h(h)  # type: ignore[no-any-return]


def test_what_forward_makes_of_nothing_has_the_precision_of_the_proof() -> None:
    torch.manual_seed(0)
    slim = slimc.compress(Recurrent().eval(), torch.randn(2, 5, 8), params=0.5, round_to=1, recover="none")
    assert slim.report.verification is not None
    assert slim.report.verification.max_relative_error < 1e-12


def _counted(module: Any, x: Tensor) -> Tensor:
    module.count += 1
    return x


def _averaged(module: Any, x: Tensor) -> Tensor:
    module.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
    y: Tensor = x * module.mean[:, None, None]
    return y


def _replaced(module: Any, x: Tensor) -> Tensor:
    y: Tensor = x * module.mean[:, None, None]
    module.mean = 0.9 * module.mean + 0.1 * x.mean((0, 2, 3)).detach()
    return y


class State(nn.Module):
    """Moves a buffer at every run."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3), nn.Linear(24, 4)
        self.change = change
        self.register_buffer("mean", torch.ones(24))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.change(self, torch.relu(self.a(x)))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("change", [_counted, _averaged, _replaced])
def test_buffers_that_forward_moves_are_those_of_the_user(change: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = State(change).eval(), torch.randn(2, 3, 8, 8)
    data = [torch.randn(16, 3, 8, 8)]
    slim = slimc.compress(model, x, flops=0.5, round_to=1, data=data, scorer="obs", recover="reconstruct")
    assert type(slim.module) is State
    slim.save(tmp_path / "slim")
    found = slimc.load(tmp_path / "slim", State(change))
    for module in (model, slim.module, found):
        assert int(module.count) == 0  # type: ignore[arg-type]
        assert torch.equal(module.mean, torch.ones(len(module.mean)))  # type: ignore[arg-type]


class Drawing(nn.Module):
    """Adds noise inside, at inference too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.noisy, self.h = nn.Linear(8, 24), Noisy(), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.noisy(torch.relu(self.a(x))))  # type: ignore[no-any-return]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_a_model_that_draws_random_numbers_is_refused_for_that_and_leaves_no_trace() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(VerificationError, match=r"draws random numbers at inference \(randn_like in noisy\)"):
        slimc.compress(Drawing().eval(), x, params=0.5, round_to=1, recover="none")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 24), nn.Dropout(0.5), nn.Linear(24, 4)).eval()
    before = torch.get_rng_state()
    slimc.compress(model, x, params=0.5, round_to=1)
    assert torch.equal(torch.get_rng_state(), before)


class Logarithm(nn.Module):
    """Takes positive numbers only, and a mask of minus infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.relu(self.a(x.log()))
        return self.h((y @ y.mT + mask).softmax(-1) @ y)  # type: ignore[no-any-return]


class Averaged(nn.Module):
    """The mean over the tokens that a mask keeps: without any it is 0 / 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = torch.relu(self.a(x)) * keep[..., None]
        return self.h(y.sum(1) / keep.sum(1, keepdim=True))  # type: ignore[no-any-return]


class Grid(nn.Module):
    """Looks up places that a convolution makes."""

    def __init__(self) -> None:
        super().__init__()
        self.flow, self.a, self.h = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 24, 1), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.flow(x).permute(0, 2, 3, 1).tanh()
        found = nn.functional.grid_sample(torch.relu(self.a(x)), grid, align_corners=False)
        return self.h(found)  # type: ignore[no-any-return]


class TwoNames(nn.Module):
    """Layers that are attributes and parts of a list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 4, 3)
        self.layers = nn.Sequential(self.a, nn.ReLU(), self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = torch.take_along_dim(y, y.argsort(-1), -1)
        return self.h(torch.relu(self.b(y)))  # type: ignore[no-any-return]


class Implicit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(8, 24), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.h(torch.einsum("...id,...jd", y, y))  # type: ignore[no-any-return]


DOMAINS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "logarithm": (Logarithm, (torch.rand(2, 6, 8) + 0.1, torch.full((6, 6), -torch.inf).triu(1))),
    "masked mean": (Averaged, (torch.randn(2, 6, 8), torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]))),
    "grid": (Grid, (torch.randn(2, 3, 8, 8),)),
    "two names": (TwoNames, (torch.randn(2, 3, 8, 8),)),
    "taken along an axis": (Taken, (torch.randn(2, 8),)),
    "einsum without an arrow": (Implicit, (torch.randn(2, 6, 8),)),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_inputs_and_structures_that_were_once_taken_for_faults(name: str) -> None:
    make, inputs = DOMAINS[name]
    torch.manual_seed(0)
    slim = slimc.compress(make().eval(), inputs, params=0.7, round_to=1, recover="none")
    assert type(slim.module) is make
    assert slim.report.verification is not None
    assert slim.report.verification.max_relative_error < 1e-12
    assert slim.report.params.share <= 0.7


READ: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sliced": lambda table, n: table[:, :n],
    "cast": lambda table, n: table.to(torch.float32)[:, :n],
    "split": lambda table, n: torch.split(table, n, 1)[0],
    "scaled": lambda table, n: (0.5 * table)[:, :n],
    "a layer's": lambda table, n: nn.functional.linear(table, torch.eye(24))[:, :n],
    "normalised": lambda table, n: nn.functional.layer_norm(table, (24,))[:, :n],
    "reshaped": lambda table, n: table.reshape(-1, 24)[:n],
}


class Positions(nn.Module):
    """Reads as many rows of its tables as the input is long."""

    def __init__(self, read: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.a, self.b, self.h = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.places = nn.Parameter(torch.randn(1, 40, 24))
        self.register_buffer("mask", torch.ones(40, 40).tril())
        self.mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        y = self.a(x) + self.read(self.places, n)
        weights = (y @ y.mT).masked_fill(self.mask[:n][:, :n] == 0, -torch.inf).softmax(-1)
        return self.h(torch.relu(self.b(weights @ y)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", READ)
def test_rows_of_a_table_beyond_the_example_stay(name: str) -> None:
    torch.manual_seed(0)
    slim = slimc.compress(Positions(READ[name]).eval(), torch.randn(2, 10, 8), params=0.7, round_to=1, recover="none")
    found = dict([*slim.module.named_parameters(), *slim.module.named_buffers()])
    assert found["places"].shape[1] == 40
    assert found["mask"].shape == (40, 40)
    if isinstance(slim.module, Positions):
        assert slim.module(torch.randn(2, 40, 8)).shape == (2, 40, 4)
    reasons = {cause.reason for cause in slim.analysis.types.store.causes}
    assert "beyond the example; a larger input may read it" in reasons


class Joined(nn.Module):
    """Two layers in one parameter, of which slices read everything."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.h = nn.Parameter(torch.randn(48, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.relu(x @ self.both[:24].mT) @ self.both[24:])  # type: ignore[no-any-return]


def test_slices_that_read_all_of_a_parameter_let_it_shrink() -> None:
    torch.manual_seed(0)
    slim = slimc.compress(Joined().eval(), torch.randn(2, 10, 8), params=0.5, round_to=1, recover="none")
    assert slim.report.params.share <= 0.5


class Deep(nn.Module):
    """Has a head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3), nn.Linear(24, 4)
        self.side = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        out: Tensor = self.h(torch.relu(self.b(y)).mean((2, 3)))
        return out + self.side(y.mean((2, 3))) if self.training else out


def test_a_head_that_only_training_uses_is_told_of_and_trained_without() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(3)]
    slim = slimc.compress(Deep(), data[0][0], flops=0.3, round_to=1, recover="none")
    assert type(slim.module) is Deep
    assert any("Deep no longer runs in training mode" in warning for warning in slim.report.warnings)
    trained = slimc.compress(Deep(), data[0][0], flops=0.3, round_to=1, data=data, epochs=2)
    assert type(trained.module) is Deep
    assert trained.module.training
    assert any("without the layers that only training uses" in warning for warning in trained.report.warnings)


class Itself(nn.Module):
    """Counts its steps, draws by Python and numpy, and looks other in training by a `train` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.share, self.steps = 1.0, 0

    def train(self, mode: bool = True) -> Itself:
        super().train(mode)
        self.share = 0.5 if mode else 1.0
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1 + round(random.random() + np.random.uniform())
        return self.h(torch.relu(self.b(torch.relu(self.a(x)) * self.share)))  # type: ignore[no-any-return]


def test_looking_at_training_mode_leaves_no_trace() -> None:
    model, x = Itself().eval(), torch.randn(2, 8)
    before = random_state()
    slim = slimc.compress(model, x, flops=0.5, round_to=1, recover="none")
    after = random_state()
    assert after["python"] == before["python"]
    assert torch.equal(after["numpy"][1], before["numpy"][1])
    assert torch.equal(after["torch"], before["torch"])
    for module in (model, slim.module):
        assert isinstance(module, Itself)
        assert (module.share, module.steps, module.training) == (1.0, 0, False)
    assert torch.equal(slim.module(x), slim.graph(x))


class Sometimes(Deep):
    """Uses its head in half of all steps."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        out: Tensor = self.h(torch.relu(self.b(y)).mean((2, 3)))
        return out + self.side(y.mean((2, 3))) if self.training and torch.rand(()) < 0.5 else out


class Twofold(Deep):
    """Returns what its head gives as well."""

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.a(x))
        out = self.h(torch.relu(self.b(y)).mean((2, 3)))
        return (out, self.side(y.mean((2, 3)))) if self.training else out


@pytest.mark.parametrize("schedule", ["one-shot", "tick-tock", "iterative"])
def test_a_head_that_is_used_now_and_then_is_seen_before_training(schedule: str) -> None:
    data = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(3)]
    options: dict[str, Any] = {"flops": 0.3, "round_to": 1, "data": data, "epochs": 2}
    run = slimc.schedule(schedule, Sometimes(), data[0][0], **options)
    assert {type(phase.module).__name__ for phase in run} == {"SlimGraph"}
    assert type(run.result.module) is Sometimes
    with pytest.raises(UsageError, match="features= needs Sometimes itself"):
        slimc.schedule(schedule, Sometimes(), data[0][0], recipe=slimc.Recipe(features=1.0), **options)
    assert slimc.schedule(schedule, Twofold(), data[0][0], **options).result
    with pytest.raises(UsageError, match="Twofold returns more in training"):
        slimc.schedule(schedule, Twofold(), data[0][0], loss=lambda outputs, targets: outputs[0].sum(), **options)


def test_lazy_modules_that_have_not_run_are_named(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(24), nn.ReLU(), nn.Linear(24, 4)).eval()

    model, x = make(), torch.randn(2, 8)
    with pytest.raises(UsageError, match=r"0\.weight has no shape yet: run the model once"):
        slimc.compress(model, x, params=0.5)
    model(x)
    slim = slimc.compress(model, x, params=0.5, recover="none", round_to=1)
    slim.save(tmp_path / "slim")
    with pytest.raises(PlanError, match="has no shape yet"):
        slimc.load(tmp_path / "slim", make())


class Looped(nn.Module):
    """A loop that torch captures as one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.h = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(torch.relu(self.a(x))))
        _, y = torch.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, torch.sin(y)), (torch.tensor(0), y))  # type: ignore[no-untyped-call]
        return self.h(y)  # type: ignore[no-any-return]


def test_a_loop_of_torch_is_left_alone_and_named() -> None:
    torch.manual_seed(0)
    slim = slimc.compress(Looped().eval(), torch.randn(2, 8), params=0.8, round_to=1, recover="none")
    assert [group.width for group in slim.analysis.groups] == [24, 8]
    assert slim.report.warnings == ("channels were left alone around while_loop",)
    assert "its work is not counted" in slim.report.frozen[0].reason


def test_a_buffer_that_is_not_saved_is_cut_in_a_fresh_class(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(8, 24), nn.Linear(24, 4)
            self.register_buffer("scale", torch.arange(1.0, 25.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(torch.relu(self.a(x)) * self.scale)  # type: ignore[no-any-return]

    x = torch.randn(2, 8)
    slim = slimc.compress(Scaled().eval(), x, params=0.6, round_to=1, recover="none")
    slim.save(tmp_path / "slim", onnx=False)
    found = slimc.load(tmp_path / "slim", Scaled())
    torch.testing.assert_close(found.eval()(x), slim.module.eval()(x))
