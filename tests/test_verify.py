"""Verification catches planted mistakes, names where they are, and never passes because nothing could fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from laws import random_cut
from torch import Tensor, nn
from torch.fx import Node
from zoo import CASES

from slimc.analysis import Analysis, analyse
from slimc.errors import VerificationError
from slimc.graph import rule
from slimc.graph.infer import Inference
from slimc.graph.resize import Cut
from slimc.graph.rule import Axes
from slimc.rewrite import Rewritten, rewrite, slice_tensors
from slimc.verify import Proof, distance, random_inputs, verify


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
        ("UnevenSplit", wrong_split, "getitem"),  # of the split
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
    with pytest.raises(VerificationError, match=first):
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
    with pytest.raises(VerificationError, match="does not run: Given groups=1"):
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
    # An operator with several results differs where one of them is read.
    named = "getitem" if operator == "sort" else operator
    with pytest.raises(VerificationError, match=f"first node that differs is {named}"):
        Cutting.model(model, inputs).proof()


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


class Rooted(LayerScale):
    """Takes the root of a table of positive numbers as well."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(1 + torch.rand(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) @ self.spread.sqrt()
        return result


def test_redrawn_parameters_stay_positive_where_the_models_own_are() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert Cutting.model(Rooted().eval(), torch.randn(4, 6)).proof().redrawn


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


@pytest.mark.parametrize("place", [0, 1])
def test_an_output_that_is_not_a_number_is_near_nothing(place: int) -> None:
    wanted = [torch.ones(2), torch.ones(3)]
    values = [tensor.clone() for tensor in wanted]
    values[place][1] = torch.nan
    assert not distance(values, wanted) <= 1


def test_the_error_of_a_right_cut_is_rounding_only() -> None:
    assert Cutting.of("DenseConcat").proof().max_relative_error < 1e-12
