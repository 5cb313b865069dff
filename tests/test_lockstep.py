"""Nodes run on all samples at once; where values would take too much memory, some join later, with equal results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from slimc import lockstep
from slimc.analysis import Analysis, analyse
from slimc.graph.example import Example
from slimc.graph.resize import Cut
from slimc.graph.rule import operator_name
from slimc.lockstep import Frontier
from slimc.rewrite import Rewritten, rewrite
from slimc.samples import Batch, Samples

COUNT = 40
TIGHT = 160_000
"""Bytes. The first layers of one sample need some 10,000 in each graph."""


class Funnel(nn.Module):
    """Maps of 256, 64 and 16 places, with a branch that stays alive."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.b(self.a(x).relu()).relu()
        result: Tensor = self.c(inner) + nn.functional.avg_pool2d(inner, 2)
        return result


def pictures() -> Tensor:
    return torch.randn(COUNT, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def samples(whole: bool = False) -> Samples:
    return Samples(tuple(Batch(Example((part,), {})) for part in torch.split(pictures(), 20)), "noise", whole)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(Funnel().eval(), pictures()[:2])


def is_convolution(node: Node) -> bool:
    return node.op == "call_function" and operator_name(node) == "conv2d"


def swept(analysis: Analysis, given: Samples) -> list[Tensor]:
    found: list[Tensor] = []
    module = analysis.captured.module
    lockstep.sweep(module, given, lambda node, frontier: found.append(torch.cat(frontier.of(node))), is_convolution)
    return found


def test_samples_join_as_maps_get_smaller(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = swept(analysis, samples())
    assert [len(value) for value in whole] == [COUNT] * 3
    monkeypatch.setattr(lockstep, "MEMORY", 2 * TIGHT)  # of which a sweep takes half
    tight = swept(analysis, samples())
    counts = [len(value) for value in tight]
    assert counts[0] < counts[1] <= counts[2] == COUNT
    for value, wanted in zip(tight, whole, strict=True):
        torch.testing.assert_close(value, wanted[: len(value)])


def test_a_batch_that_must_stay_whole_is_never_split(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep, "MEMORY", 1)
    assert [len(value) for value in swept(analysis, samples(whole=True))] == [20] * 3


def test_late_samples_run_through_what_is_fitted_already(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = np.ones(analysis.types.solution.variables, np.bool_)
    alive[analysis.groups[0].variables[0]] = False
    cut = Cut(analysis.types, alive)

    def fitted(rewritten: Rewritten) -> list[Tensor]:
        """Double each layer's weights just before it runs, and keep what it then reads."""
        read: list[Tensor] = []

        def visit(old: Node, before: Frontier, after: Frontier) -> None:
            new = rewritten.twins[old]
            read.append(torch.cat(after.of(new.args[0])))  # type: ignore[arg-type]
            assert sum(map(len, before.of(old))) == len(read[-1])
            weight = rewritten.module.get_parameter(str(new.args[1].target))  # type: ignore[union-attr]
            weight.data.mul_(2)

        original = analysis.captured.module
        lockstep.lockstep(original, rewritten.module, rewritten.twins, samples(), visit, is_convolution)
        return read

    whole = fitted(rewrite(analysis.types, cut))
    monkeypatch.setattr(lockstep, "MEMORY", TIGHT)
    tight = fitted(rewrite(analysis.types, cut))
    assert [len(value) for value in whole] == [COUNT] * 3
    assert len(tight[0]) < len(tight[2]) == COUNT
    for value, wanted in zip(tight, whole, strict=True):
        torch.testing.assert_close(value, wanted[: len(value)])


@pytest.mark.parametrize(("memory", "ran"), [(lockstep.MEMORY, COUNT), (TIGHT, COUNT), (1, 8)])
def test_what_found_no_room_is_not_counted(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch, memory: int, ran: int
) -> None:
    slim = rewrite(analysis.types, Cut(analysis.types, np.ones(analysis.types.solution.variables, np.bool_)))
    monkeypatch.setattr(lockstep, "MEMORY", memory)
    seen: list[int] = []

    def visit(old: Node, before: Frontier, after: Frontier) -> None:
        seen.append(sum(map(len, before.of(old))))

    module = analysis.captured.module
    assert lockstep.lockstep(module, slim.module, slim.twins, samples(), visit, is_convolution) == ran == seen[-1]
