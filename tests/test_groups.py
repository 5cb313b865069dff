"""Groups are the coarsest sets of channels that can stand in for each other."""

from __future__ import annotations

import numpy as np
import torch
from laws import signatures
from torch import Tensor, nn
from zoo import CASES

from slimc.analysis import analyse


def test_every_variable_of_a_group_removes_as_many_indices_as_any_other() -> None:
    for name in ("Grouped", "DenseConcat", "FusedAttention", "CatWithFlip"):
        analysis = analyse(*CASES[name].build())
        for group in analysis.groups:
            for member in group.members:
                factors = analysis.types.solution.factors(analysis.types.tensors[member.tensor][member.axis])
                each = {int((factors == v).any(axis=1).sum()) for v in group.variables.tolist()}
                assert len(each) == 1, (name, group.name, member)


def test_a_group_of_a_product_says_how_many_indices_each_channel_removes() -> None:
    analysis = analyse(*CASES["FlattenedMap"].build())
    (group,) = analysis.groups
    # Each of 4 channels owns 2 x 2 inputs of the linear layer.
    assert {(m.tensor, m.axis): m.each for m in group.members} == {
        ("a.weight", 0): 1, ("a.bias", 0): 1, ("fc.weight", 1): 4,
    }  # fmt: skip


def test_groups_are_named_after_the_first_output_axis_that_they_shrink() -> None:
    assert [g.name for g in analyse(*CASES["Residual"].build()).groups] == ["stem.weight", "a.weight"]


def test_groups_that_share_a_name_are_numbered() -> None:
    names = [g.name for g in analyse(*CASES["UnevenSplit"].build()).groups]
    assert len(names) == len(set(names))
    assert {"a.weight", "a.weight#2"} <= set(names)


def test_every_axis_without_a_constant_keeps_a_channel() -> None:
    for name in ("Chain", "DenseConcat", "Grouped", "UnevenSplit"):
        analysis = analyse(*CASES[name].build())
        floors = np.array([g.floor for g in analysis.groups])
        assert (analysis.cost.sizes(floors) >= 1).all(), name


def test_a_concatenated_branch_may_go_only_where_no_axis_is_its_own() -> None:
    # Both halves are slices of one layer's axis, so that axis lives with one of them; the readers need both.
    analysis = analyse(*CASES["UnevenSplit"].build())
    assert [g.floor for g in analysis.groups] == [1, 1, 1]


class Apart(nn.Module):
    """Two branches of equal width that nothing ties together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(torch.relu(self.a(x))) + self.d(torch.relu(self.b(x)))
        return result


def test_channels_of_different_places_are_different_groups() -> None:
    analysis = analyse(Apart().eval(), torch.randn(2, 4))
    assert [s[:2] for s in signatures(analysis.grouping)] == [(4, True), (4, True)]


def test_a_model_without_channels_has_no_groups() -> None:
    analysis = analyse(nn.Sequential(nn.Linear(3, 2)).eval(), torch.randn(2, 3))
    assert analysis.groups == ()
    assert analysis.full.params == 8  # 3 x 2 + 2
