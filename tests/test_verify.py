"""Verification catches planted mistakes, names where they are, and never passes because nothing could fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import random_cut
from torch import Tensor, nn
from torch.fx import Node
from zoo import CASES

import slimc
from slimc.analysis import Analysis, analyse
from slimc.errors import VerificationError
from slimc.graph import rule
from slimc.graph.infer import Inference
from slimc.graph.resize import Cut
from slimc.graph.rule import Axes
from slimc.rewrite import Rewritten, rewrite, slice_tensors
from slimc.verify import Proof, random_inputs, verify


@dataclass
class Cutting:
    """One zoo model on its way through a cut, to be broken by hand."""

    analysis: Analysis
    cut: Cut
    rewritten: Rewritten

    @staticmethod
    def of(name: str, seed: int = 0, fraction: float | None = 0.5) -> Cutting:
        model, inputs = CASES[name].build()
        return Cutting.model(model, inputs, seed, fraction)

    @staticmethod
    def model(model: nn.Module, inputs: Tensor, seed: int = 0, fraction: float | None = 0.5) -> Cutting:
        analysis = analyse(model, inputs)
        cut = random_cut(analysis, np.random.default_rng(seed), fraction)
        return Cutting(analysis, cut, rewrite(analysis.types, cut))

    def proof(self) -> Proof:
        example = self.analysis.captured.example
        return verify(self.analysis.types, self.cut, self.rewritten, random_inputs(example, 2, seed=0))

    def node(self, operator: str) -> Node:
        """The first node of the rewritten graph that calls an operator."""
        found: Node = next(
            node for node in self.rewritten.module.graph.nodes
            if node.op == "call_function" and rule.operator_name(node) == operator
        )  # fmt: skip
        return found


# -- mistakes in the rewritten graph --------------------------------------------------------------------


def wrong_split(cutting: Cutting) -> None:
    node = cutting.node("split_with_sizes")
    sizes = list(node.args[1])  # type: ignore[arg-type]
    node.args = (node.args[0], sizes[::-1], 1)
    left, right = sorted(node.users, key=lambda user: int(user.args[1]))  # type: ignore[arg-type]
    left.args, right.args = (node, 1), (node, 0)


def wrong_shift(cutting: Cutting) -> None:
    node = cutting.node("roll")
    node.args = (node.args[0], [int(node.args[1][0]) + 1], node.args[2])  # type: ignore[index, arg-type]


def forgotten_scale(cutting: Cutting) -> None:
    cutting.node("scaled_dot_product_attention").kwargs = {}


class Sliced(nn.Module):
    """Reads the first channels of a map, so that a bound has to be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.a(x)[:, :4].mean((2, 3)))
        return result


@pytest.mark.parametrize(
    ("name", "break_it", "first"),
    [
        ("UnevenSplit", wrong_split, "split_with_sizes"),
        ("Roll", wrong_shift, "roll"),
        ("SeparateHeads", forgotten_scale, "scaled_dot_product_attention"),
    ],
)
def test_a_wrong_literal_is_caught_and_its_node_is_named(
    name: str, break_it: Callable[[Cutting], None], first: str
) -> None:
    cutting = Cutting.of({"SeparateHeads": "FusedAttention"}.get(name, name))
    cutting.proof()
    break_it(cutting)
    cutting.rewritten.module.recompile()
    with pytest.raises((VerificationError, RuntimeError), match=first if name != "UnevenSplit" else None):
        cutting.proof()


def test_a_slice_that_is_off_by_one_is_caught() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cutting = Cutting.model(Sliced().eval(), torch.randn(2, 3, 8, 8))
    cutting.proof()
    nodes = cutting.rewritten.module.graph.nodes
    node = next(n for n in nodes if n.target is torch.ops.aten.slice.Tensor and n.args[1] == 1)
    node.args = (node.args[0], 1, 1, int(node.args[3]) + 1)
    cutting.rewritten.module.recompile()
    with pytest.raises(VerificationError, match="first node that differs is slice"):
        cutting.proof()


# -- mistakes in what is kept ---------------------------------------------------------------------------


class Swapped(Cut):
    """A cut that hands out two kept indices of one axis in the wrong order."""

    def __init__(self, right: Cut, axis: object) -> None:
        super().__init__(right.types, right.alive)
        self.axis = axis

    def indices(self, axis: np.ndarray) -> Tensor:
        found = super().indices(axis)
        if axis is self.axis:
            found = found.clone()
            found[[0, 1]] = found[[1, 0]]
        return found


def test_two_kept_indices_in_the_wrong_order_are_caught_in_the_tensor_that_has_them() -> None:
    cutting = Cutting.of("Chain")
    cutting.proof()
    types = cutting.analysis.types
    wrong = slice_tensors(types, Swapped(cutting.cut, types.tensors["a.weight"][0]))["a.weight"]
    weight = cutting.rewritten.module.get_parameter("a.weight")
    assert not torch.equal(weight, wrong)
    weight.data.copy_(wrong.data)
    with pytest.raises(VerificationError, match="first node that differs is a_weight"):
        cutting.proof()


def test_a_wrong_number_of_groups_is_caught() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1))
        cutting = Cutting.model(model.eval(), torch.randn(2, 3, 4, 4))
    cutting.proof()
    grouped = [n for n in cutting.rewritten.module.graph.nodes if n.target is torch.ops.aten.conv2d.default][1]
    grouped.args = (*grouped.args[:6], 1)
    cutting.rewritten.module.recompile()
    with pytest.raises(Exception, match=r"groups|conv2d"):
        cutting.proof()


# -- wrong rules ----------------------------------------------------------------------------------------


class Along(nn.Module):
    """Two layers with an operator over the channels between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between, self.a, self.b = between, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.between(self.a(x)))
        return result


def as_elementwise(walk: Inference, node: Node) -> Axes:
    return walk.axes(node.args[0])


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "cumprod": lambda x: x.cumprod(1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(3, 1),
    "sort": lambda x: x.sort(1)[0],
    "layer_norm": lambda x: nn.functional.layer_norm(x.transpose(1, 3), (8,)).transpose(1, 3),
    "channel_shuffle": lambda x: nn.functional.channel_shuffle(x, 4),
    "var": lambda x: x / x.var(1, keepdim=True),
}


@pytest.mark.parametrize("operator", WRONG)
def test_a_rule_that_takes_an_operator_for_elementwise_is_caught(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule.load()

    def wrong(walk: Inference, node: Node) -> object:
        value = node.meta["val"]
        axes = as_elementwise(walk, node)
        if operator == "var":  # a statistic whose channels nobody has marked
            return (axes[0], walk.store.frozen(1), *axes[2:])
        return tuple(axes for _ in value) if isinstance(value, (tuple, list)) else axes

    monkeypatch.setitem(rule.INFER, operator, wrong)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = Along(WRONG[operator]).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises((VerificationError, RuntimeError)) as caught:
        Cutting.model(model, inputs).proof()
    if isinstance(caught.value, VerificationError):
        # An operator with several results differs where one of them is read.
        named = "getitem" if operator == "sort" else operator
        assert f"first node that differs is {named}" in str(caught.value)


# -- proofs that mean something ---------------------------------------------------------------------------


class LayerScale(nn.Module):
    """A branch that contributes nothing yet: its scale is zero."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(6, 8), nn.Linear(8, 6), nn.Parameter(torch.zeros(6))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.scale * self.b(self.between(self.a(x)))
        return result


def layer_scale(between: Callable[[Tensor], Tensor] = torch.relu) -> Cutting:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Cutting.model(LayerScale(between).eval(), torch.randn(4, 6))


def test_a_branch_scaled_by_zero_is_proven_with_redrawn_parameters() -> None:
    proof = layer_scale().proof()
    assert proof.redrawn
    assert proof.moved is not None
    assert proof.moved > 1e3 * proof.max_relative_error


def test_a_mistake_in_a_branch_scaled_by_zero_is_caught_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rule.load()
    monkeypatch.setitem(rule.INFER, "softmax", as_elementwise)
    with pytest.raises(VerificationError, match="softmax"):
        layer_scale(lambda x: x.softmax(-1)).proof()


def test_a_proof_on_the_models_own_weights_is_not_redrawn() -> None:
    assert not Cutting.of("Residual").proof().redrawn


def test_nothing_moves_where_nothing_is_cut() -> None:
    cutting = Cutting.of("Chain", fraction=0.5)
    whole = Cut(cutting.analysis.types, np.ones_like(cutting.cut.alive))
    example = cutting.analysis.captured.example
    proof = verify(cutting.analysis.types, whole, rewrite(cutting.analysis.types, whole), [example])
    assert proof.max_relative_error == 0
    assert proof.moved is None


def test_the_error_of_a_right_cut_is_rounding_only() -> None:
    assert Cutting.of("DenseConcat").proof().max_relative_error < 1e-12


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
