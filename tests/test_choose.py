"""Choosing in steps: what is left is fitted and scored again before more goes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from convnet import noise, seeded
from scoring import ResNet
from torch import Tensor, nn

import slimc
from slimc import choose, scores
from slimc.analysis import Stages, analyse
from slimc.errors import UnreachableTarget


class Twins(nn.Module):
    """Four hidden channels: the last two compute the same, each with a smaller weight behind it than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]))
            self.b.weight.copy_(torch.tensor([[0.70, 0.80, 0.60, 0.50]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


def kept(model: nn.Module, **options: Any) -> list[int]:
    """Which hidden channels stay, by the row of the first weight."""
    inputs = noise(128, 3, seed=3)  # enough to choose in steps
    slim = slimc.compress(model, inputs[:2], round_to=1, data=[inputs], **options)
    return list(slim.plan.kept["a.weight"][0])


def test_a_channel_whose_stand_in_is_gone_is_scored_with_what_it_took_over() -> None:
    # By magnitude the twins go first, both of them: 0.5 and 0.6 are the smallest. With a step between, the one that
    # stays has taken over its twin's part, 1.1, and the smallest is then 0.7.
    together: dict[str, Any] = {"scorer": "magnitude", "flops": 0.5}
    assert kept(Twins(), recover="bias", **together) == [0, 1]
    assert kept(Twins(), recover="reconstruct", **together) == [1, 2]


def test_a_plan_says_what_channels_were_ranked_by_in_the_step_that_decided() -> None:
    inputs = noise(128, 3, seed=3)
    options: dict[str, Any] = {"scorer": "magnitude", "flops": 0.5, "round_to": 1, "data": [inputs]}
    found = []
    for recover in ("none", "reconstruct"):
        scores = slimc.compress(Twins(), inputs[:2], recover=recover, **options).plan.scores
        assert scores is not None
        (own,) = scores.values()
        assert own is not None
        found.append(own)
    assert found[0][1] > found[0][2]  # 0.8 and 0.6
    assert found[1][1] < found[1][2]  # 0.8 and 1.1


def test_steps_follow_from_how_much_goes() -> None:
    analysis = analyse(seeded(ResNet), noise(2, 3, 8, 8))
    full = analysis.full
    counts = [choose._steps(analysis, {"flops": share * full.macs}) for share in (1.2, 0.9, 0.7, 0.5, 0.01)]
    assert counts == [1, 1, 2, 3, 3]
    assert choose._steps(analysis, {"flops": 0.9 * full.macs, "params": 0.5 * full.params}) == 3


@pytest.mark.parametrize("scorer", ["obs", "magnitude", "fisher", "thinet"])
def test_steps_end_within_the_budget_on_aligned_widths(scorer: str) -> None:
    data = [(noise(128, 3, 8, 8, seed=5), torch.randint(5, (128,), generator=torch.Generator().manual_seed(0)))]
    slim = slimc.compress(
        seeded(ResNet), noise(2, 3, 8, 8), flops=0.5, scorer=scorer, data=data, round_to=2, recover="reconstruct"
    )
    assert slim.plan.method["steps"] == 3
    assert slim.report.verification is not None
    assert slim.report.verification.passed
    found = slimc.inspect(slim.module, noise(2, 3, 8, 8)).macs / slim.analysis.full.macs
    assert 0.25 < found <= 0.5
    assert all(row.kept % 2 == 0 or row.kept == row.width for row in slim.report.groups)


def test_a_budget_out_of_reach_is_told_as_a_share_of_the_whole_model() -> None:
    model, inputs = seeded(ResNet), noise(2, 3, 8, 8)
    together: dict[str, Any] = {"data": [noise(128, 3, 8, 8)], "recover": "reconstruct", "round_to": 1}
    with pytest.raises(UnreachableTarget, match="smallest that can be reached is") as refused:
        slimc.compress(model, inputs, flops=0.001, **together)
    words = str(refused.value).split()
    least = float(words[words.index("reached") + 2])
    assert 0.001 < least < 0.5
    slim = slimc.compress(model, inputs, flops=math.nextafter(least, 1), **together)
    assert slim.report.targets["flops"].met


@pytest.mark.parametrize(
    "options",
    [
        {"recover": "none"},
        {"recover": "bn"},
        {"recover": "reconstruct", "select": "exact"},
        {"recover": "reconstruct", "data": None},
        {"recover": "reconstruct", "data": [noise(127, 3, 8, 8)]},
        {"recover": "reconstruct", "data": [(noise(127, 3, 8, 8), torch.arange(127) % 5)], "scorer": "fisher"},
    ],
    ids=["plain cut", "batch norms only", "exact selection", "made up", "few", "few with labels"],
)
def test_one_step_where_nothing_is_fitted_or_samples_are_few_or_selection_is_exact(options: dict[str, Any]) -> None:
    given = {"data": [noise(128, 3, 8, 8, seed=5)], **options}
    slim = slimc.compress(seeded(ResNet), noise(2, 3, 8, 8), flops=0.5, **given)
    assert slim.plan.method["steps"] == 1


def test_steps_go_through_a_group_norm_whose_statistics_are_over_parts_of_an_axis() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1),
            nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )
    )  # fmt: skip
    slim = slimc.compress(model, noise(2, 3, 8, 8), flops=0.5, round_to=1, data=[noise(128, 3, 8, 8, seed=5)])
    assert slim.plan.method["steps"] == 3
    assert slim.report.verification is not None
    assert slim.report.verification.passed


class Pairs(nn.Module):
    """Layers of one kind, each followed by a norm, before one of another kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, width, 3, padding=1)
        self.n1, self.n2, self.fc = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n2(self.b(torch.relu(self.n1(self.a(x))))))
        return self.fc(torch.relu(self.c(x)).mean((2, 3)))  # type: ignore[no-any-return]


def widths(
    width: int, share: float, *, normalise: str, select: str, ignored: tuple[int, ...] = (), factors: dict[int, float]
) -> list[int]:
    """What each group keeps of scores that are drawn, those of some groups multiplied."""
    analysis = analyse(seeded(lambda: Pairs(width)), noise(2, 3, 4, 4))
    rng = np.random.default_rng(0)
    own = [factors.get(group.number, 1.0) * rng.exponential(size=group.width) for group in analysis.groups]
    method = scores.Method("drawn", "", "", lambda subject: own, "weights", normalise)
    subject = scores.Subject(analysis.types, analysis.grouping, "l2", 0)
    how = choose.How("auto", select, 1, True, ignored)
    limits = {"flops": share * analysis.full.macs}
    found: list[int] = choose.choose(analysis, method, subject, limits, how, Stages(None)).choice.widths.tolist()
    return found


@pytest.mark.parametrize("select", ["greedy", "exact"])
def test_scores_of_one_class_are_not_compared_with_those_of_another(select: str) -> None:
    # Groups 0 and 1 are followed by norms, group 2 is not.
    found = [
        widths(8, 0.5, normalise="isomorphic", select=select, factors={2: factor}) for factor in (1.0, 1e3)
    ]  # fmt: skip
    assert found[0] == found[1]


def test_groups_that_stay_whole_take_no_part_in_their_class() -> None:
    weak = widths(40, 0.5, normalise="isomorphic", select="greedy", ignored=(1,), factors={1: 0.01})
    strong = widths(40, 0.5, normalise="isomorphic", select="greedy", ignored=(1,), factors={1: 100.0})
    assert weak == strong
    assert weak[1] == 40
    assert abs(weak[0] - weak[2]) <= 1  # both classes lose the same share


def test_exact_selection_keeps_a_tenth_of_each_group_where_the_ranking_could() -> None:
    options: dict[str, Any] = {"normalise": "none", "factors": {1: 1e-3}}
    greedy, exact = (widths(40, 0.08, select=select, **options) for select in ("greedy", "exact"))
    assert min(greedy) >= 4
    assert min(exact) >= 4


def test_a_budget_out_of_reach_names_what_the_scorer_leaves_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    with pytest.raises(UnreachableTarget, match=r"Raise the target.* says nothing of 2\.weight: another may cut"):
        slimc.compress(model, noise(2, 8), flops=0.1, scorer="apoz", data=[noise(16, 8)], recover="none", round_to=1)
