"""The planner on random polynomial costs, compared with loops that do what its description says."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slimc
from slimc.errors import UnreachableTarget
from slimc.graph.cost import Costs, Widths
from slimc.graph.groups import Axis, Group, Grouping, Member
from slimc.planner import METRIC, Choice, isomorphic, per_cost, plan, steps

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Groups with axes and scores; each cost is a sum of products of axis sizes with positive integer factors."""

    grouping: Grouping
    scores: list[Array]
    macs: tuple[tuple[int, tuple[int, ...]], ...]
    params: tuple[tuple[int, tuple[int, ...]], ...]

    def cost(self, widths: Widths) -> Costs:
        sizes = [
            sum(factor * math.prod(int(widths[g]) for g in names) for factor, names in axis.terms)
            for axis in self.grouping.axes
        ]
        macs, params = (
            sum(factor * math.prod(sizes[a] for a in axes) for factor, axes in products)
            for products in (self.macs, self.params)
        )
        return Costs(float(macs), params, 4 * params, float(max(sizes)))

    @property
    def full(self) -> Widths:
        return np.array([group.width for group in self.grouping.groups], np.int64)

    def allowed(self, number: int, round_to: int) -> list[int]:
        """Every width that a group may end with: multiples of its step down to its floor, and the full width."""
        group, step = self.grouping.groups[number], int(steps(self.grouping, round_to)[number])
        return [w for w in range(group.floor, group.width + 1) if w % step == 0 or w == group.width]

    def every_choice(self, round_to: int) -> Iterator[Widths]:
        for widths in itertools.product(*(self.allowed(n, round_to) for n in range(len(self.full)))):
            yield np.array(widths, np.int64)


@st.composite
def problems(draw: st.DrawFn, widest: int = 7, most: int = 3) -> Problem:
    count = draw(st.integers(1, most))
    widths = draw(st.lists(st.integers(1, widest), min_size=count, max_size=count))
    axes, floors = [], []
    for number in range(count):
        constant = draw(st.integers(0, 2))
        floors.append(int(constant == 0))
        terms: list[tuple[int, tuple[int, ...]]] = [(draw(st.integers(1, 3)), (number,))]
        axes.append(Axis((*([(constant, ())] if constant else []), *terms)))
    if count > 1 and draw(st.booleans()):
        axes.append(Axis(((draw(st.integers(1, 2)), (0, 1)),)))
        floors[0] = floors[1] = 1
    number_of = st.integers(0, len(axes) - 1)
    product = st.tuples(st.integers(1, 9), st.lists(number_of, min_size=1, max_size=2).map(tuple))
    # Every group costs something of everything, as in a network.
    each = tuple((1, (axis,)) for axis in range(count))
    macs, params = ((*each, *draw(st.lists(product, max_size=3))) for _ in range(2))
    ranks = draw(st.permutations(range(1, sum(widths) + 1)))
    bounds = np.cumsum([0, *widths])
    scores = [np.array(ranks[a:b], np.float64) for a, b in itertools.pairwise(bounds)]
    groups = tuple(
        Group(n, f"g{n}", np.arange(a, b), (Member(f"t{n}", 0, 1),), True, floors[n])
        for n, (a, b) in enumerate(itertools.pairwise(bounds))
    )
    return Problem(Grouping(groups, np.zeros(0, np.int64), tuple(axes), {}), scores, macs, params)


shares = st.floats(0.05, 0.99)


def solve(problem: Problem, limits: dict[str, float], round_to: int = 1, **options: object) -> Choice:
    arguments: dict[str, object] = {"may_relax": False, "ignored": (), **options}
    return plan(problem.grouping, problem.cost, problem.scores, limits, round_to=round_to, **arguments)  # type: ignore[arg-type]


def limits_of(problem: Problem, **asked: float) -> dict[str, float]:
    full = problem.cost(problem.full)
    return {metric: share * getattr(full, METRIC[metric]) for metric, share in asked.items()}


def fits(costs: Costs, limits: dict[str, float]) -> bool:
    return all(getattr(costs, METRIC[metric]) <= limit for metric, limit in limits.items())


def solved(problem: Problem, limits: dict[str, float], round_to: int = 1, **options: object) -> Choice:
    """The choice; examples whose budget cannot be met are skipped."""
    try:
        return solve(problem, limits, round_to, **options)
    except UnreachableTarget:
        assume(False)
        raise


# -- what every choice must meet ----------------------------------------------------------------------


@given(problems(), shares, shares, shares, st.sampled_from([1, 2, 3, 4]))
def test_every_limit_holds_at_once(problem: Problem, flops: float, params: float, memory: float, step: int) -> None:
    limits = limits_of(problem, flops=flops, params=params, memory=memory)
    choice = solved(problem, limits, step)
    assert fits(problem.cost(choice.widths), limits)
    assert choice.costs == problem.cost(choice.widths)
    assert [len(kept) for kept in choice.kept] == choice.widths.tolist()


@given(problems(), shares, shares, st.sampled_from([1, 2, 4]))
def test_no_group_can_take_one_more_step(problem: Problem, flops: float, params: float, round_to: int) -> None:
    limits = limits_of(problem, flops=flops, params=params)
    choice = solved(problem, limits, round_to)
    for number, width in enumerate(choice.widths.tolist()):
        wider = [w for w in problem.allowed(number, round_to) if w > width]
        if wider:
            widths = choice.widths.copy()
            widths[number] = wider[0]
            assert not fits(problem.cost(widths), limits)


@given(problems(), shares)
def test_the_kept_channels_are_the_best_of_their_group(problem: Problem, flops: float) -> None:
    choice = solved(problem, limits_of(problem, flops=flops))
    for kept, scores in zip(choice.kept, problem.scores, strict=True):
        assert kept.tolist() == sorted(np.argsort(scores)[len(scores) - len(kept) :].tolist())


@given(problems(), shares, st.sampled_from([1, 2, 3, 4, 8]))
def test_widths_are_multiples_of_the_step_or_full_and_never_below_the_floor(
    problem: Problem, flops: float, round_to: int
) -> None:
    choice = solved(problem, limits_of(problem, flops=flops), round_to)
    for number, width in enumerate(choice.widths.tolist()):
        assert width in problem.allowed(number, round_to)


@given(problems(), shares, st.data())
def test_ignored_groups_stay_whole(problem: Problem, flops: float, data: st.DataObject) -> None:
    count = len(problem.full)
    ignored = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    choice = solved(problem, limits_of(problem, flops=flops), ignored=tuple(ignored))
    assert choice.widths[ignored].tolist() == problem.full[ignored].tolist()


@given(problems(), shares, shares, st.sampled_from([1, 2, 4]))
def test_a_smaller_budget_never_keeps_more(problem: Problem, one: float, other: float, round_to: int) -> None:
    low, high = sorted((one, other))
    less = solved(problem, limits_of(problem, flops=low), round_to, may_relax=True)
    more = solve(problem, limits_of(problem, flops=high), round_to, may_relax=True)
    assert less.costs.macs <= more.costs.macs


@given(problems())
def test_a_budget_that_the_whole_model_meets_removes_nothing(problem: Problem) -> None:
    choice = solve(problem, limits_of(problem, flops=1.0, params=1.0), 4)
    assert choice.widths.tolist() == problem.full.tolist()


# -- the same as by plain loops -----------------------------------------------------------------------


@given(problems(widest=12), shares, shares, st.sampled_from([1, 2, 3, 4]))
def test_the_choice_is_that_of_a_scan_along_the_ranking(
    problem: Problem, flops: float, params: float, round_to: int
) -> None:
    limits = limits_of(problem, flops=flops, params=params)
    choice = solved(problem, limits, round_to)
    assert choice.widths.tolist() == by_scanning(problem, limits, round_to)


def by_scanning(problem: Problem, limits: dict[str, float], round_to: int) -> list[int]:
    """Remove the channels of the ranking one by one until every limit holds; then give back, best first."""
    allowed = [problem.allowed(n, round_to) for n in range(len(problem.full))]
    lowest = [next(w for w in sizes if w > 0 or 0 in sizes) for sizes in allowed]
    ranking = []
    for number, scores in enumerate(problem.scores):
        for place, score in enumerate(sorted(scores, reverse=True)):
            if place >= lowest[number]:
                ranking.append((place < math.ceil(0.1 * len(scores)), score, number))
    left = problem.full.tolist()
    widths = [nearest(size, sizes) for size, sizes in zip(left, allowed, strict=True)]
    for _, _, number in sorted(ranking):
        if fits(problem.cost(np.array(widths)), limits):
            break
        left[number] -= 1
        widths = [nearest(size, sizes) for size, sizes in zip(left, allowed, strict=True)]
    while True:
        best_first = sorted(
            (-sorted(scores, reverse=True)[width], number)
            for number, (scores, width) in enumerate(zip(problem.scores, widths, strict=True))
            if width < len(scores)
        )
        for _, number in best_first:
            wider = list(widths)
            wider[number] = next(w for w in allowed[number] if w > widths[number])
            if fits(problem.cost(np.array(wider)), limits):
                widths = wider
                break
        else:
            return widths


def nearest(size: int, allowed: list[int]) -> int:
    """The nearest allowed width, the wider of two as near."""
    return min(allowed, key=lambda width: (abs(width - size), -width))


# -- what cannot be met -------------------------------------------------------------------------------


@settings(max_examples=60)
@given(problems(widest=5), st.sampled_from([1, 2]))
def test_an_unreachable_budget_names_the_smallest_value_that_can_be_reached(problem: Problem, round_to: int) -> None:
    smallest = min(problem.cost(widths).macs for widths in problem.every_choice(round_to))
    with pytest.raises(UnreachableTarget) as refused:
        solve(problem, {"flops": smallest - 1}, round_to)
    said = re.search(r"smallest that can be reached is ([\d.]+) of the original", str(refused.value))
    assert said is not None
    named, full = float(said[1]), problem.cost(problem.full).macs
    assert smallest <= named * full <= 1.001 * smallest + 1e-9
    can_go = any(group.floor < group.width for group in problem.grouping.groups)
    assert ("--round-to 1" in str(refused.value)) == (round_to > 1 and can_go)
    for reachable in (smallest, named * full):
        assert solve(problem, {"flops": reachable}, round_to).costs.macs == smallest


@given(problems(widest=5))
def test_only_the_budgets_that_are_missed_are_named(problem: Problem) -> None:
    smallest = min(problem.cost(widths).params for widths in problem.every_choice(1))
    with pytest.raises(UnreachableTarget) as refused:
        solve(problem, {"flops": 1e9, "params": smallest - 1})
    assert "--params" in str(refused.value)
    assert "--flops" not in str(refused.value)


@settings(max_examples=60)
@given(problems(widest=5), st.floats(0.05, 0.6), st.sampled_from([2, 4, 6, 8]))
def test_the_alignment_is_halved_only_as_often_as_the_budget_needs(
    problem: Problem, flops: float, round_to: int
) -> None:
    limits = limits_of(problem, flops=flops)
    choice = solved(problem, limits, round_to, may_relax=True)
    tried = [round_to]
    while tried[-1] > 1:
        tried.append(tried[-1] // 2)
    reachable = [r for r in tried if any(fits(problem.cost(w), limits) for w in problem.every_choice(r))]
    assert choice.round_to == reachable[0]


def test_the_alignment_stays_as_asked_where_it_may_not_give_way() -> None:
    # Groups of 8 rounded to 8 are all or nothing, so 0.5 is out of reach; at 4 it is not.
    group = Group(0, "g", np.arange(8), (Member("t", 0, 1),), True, 1)
    grouping = Grouping((group,), np.zeros(0, np.int64), (Axis(((1, (0,)),)),), {})
    problem = Problem(grouping, [np.arange(8.0)], ((1, (0,)),), ((1, (0,)),))
    with pytest.raises(UnreachableTarget):
        solve(problem, {"flops": 4.0}, 8)
    assert solve(problem, {"flops": 4.0}, 8, may_relax=True).round_to == 4


def test_nothing_to_prune_is_an_unreachable_budget_and_no_crash() -> None:
    problem = Problem(Grouping((), np.zeros(0, np.int64), (Axis(((5, ()),)),), {}), [], ((1, (0,)),), ((1, (0,)),))
    with pytest.raises(UnreachableTarget, match=r"smallest that can be reached is 1 of the original \(5\)"):
        solve(problem, {"flops": 4.0})
    assert solve(problem, {"flops": 5.0}).kept == ()


# -- steps --------------------------------------------------------------------------------------------


def test_a_step_accounts_for_indices_that_one_channel_removes() -> None:
    # One channel that removes 4 indices needs 2 of its kind for a multiple of 8; one that removes 3 needs all 8.
    groups = tuple(Group(n, f"g{n}", np.arange(16), (), True, 1) for n in range(2))
    grouping = Grouping(groups, np.zeros(0, np.int64), (Axis(((4, (0,)),)), Axis(((3, (1,)),))), {})
    assert steps(grouping, 8).tolist() == [2, 8]


def test_of_a_product_of_groups_only_the_widest_is_rounded() -> None:
    heads, size = (Group(n, f"g{n}", np.arange(w), (), True, 1) for n, w in ((0, 12), (1, 64)))
    grouping = Grouping((heads, size), np.zeros(0, np.int64), (Axis(((1, (0, 1)),)),), {})
    assert steps(grouping, 8).tolist() == [1, 8]


class Two(nn.Module):
    """Two linear chains of the same kind, and a convolution that is of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 20), nn.Linear(20, 30), nn.Linear(30, 4)
        self.conv, self.head = nn.Conv1d(1, 10, 3), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 6] to [N, 4] and [N, 2]."""
        return self.last(torch.relu(self.b(torch.relu(self.a(x))))), self.head(self.conv(x[:, None]).flatten(1))


def isomorphic_widths(scale: float) -> list[int]:
    torch.manual_seed(0)
    analysis = slimc.inspect(Two(), torch.randn(2, 6))
    rng = np.random.default_rng(0)
    found = [rng.uniform(size=group.width) for group in analysis.groups]
    conv = next(group.number for group in analysis.groups if group.width == 10)
    found[conv] *= scale
    ranked = isomorphic(found, analysis)
    kept = plan(
        analysis.grouping, analysis.cost, ranked, {"params": 0.5 * analysis.params}, round_to=1, may_relax=False
    )
    return [int(width) for width in kept.widths]


def test_kinds_of_groups_lose_the_same_share_whatever_their_scores() -> None:
    widths = isomorphic_widths(1.0)
    assert widths == isomorphic_widths(1000.0)
    linear, conv = (widths[0] + widths[1]) / 50, widths[2] / 10
    assert abs(linear - conv) <= 0.1
    assert conv < 1


def test_groups_of_one_kind_are_ranked_together() -> None:
    analysis = slimc.inspect(Two(), torch.randn(2, 6))
    weak, strong = np.linspace(0, 1, 20), np.linspace(2, 3, 30)
    ranked = isomorphic([weak, strong, np.full(10, np.nan)], analysis)
    assert ranked[0].max() < ranked[1].min()
    assert np.isnan(ranked[2]).all()


def test_a_budget_that_is_met_has_no_say_in_what_a_channel_costs() -> None:
    analysis = slimc.inspect(Two(), torch.randn(2, 6))
    scores = [np.ones(group.width) for group in analysis.groups]
    flops = {"flops": 0.5 * analysis.macs}
    alone = per_cost(scores, analysis, flops)
    for beside in ({"params": 2.0 * analysis.params}, {"params": float(analysis.params)}):
        for own, other in zip(alone, per_cost(scores, analysis, flops | beside), strict=True):
            np.testing.assert_allclose(other, own)
    # One that is all but met says next to nothing, and of two that ask for the same share each has half.
    for own, other in zip(alone, per_cost(scores, analysis, flops | {"params": 0.9999 * analysis.params}), strict=True):
        np.testing.assert_allclose(other, own, rtol=1e-3)
    params = {"params": 0.5 * analysis.params}
    both, second = per_cost(scores, analysis, flops | params), per_cost(scores, analysis, params)
    for first, other, own in zip(alone, second, both, strict=True):
        np.testing.assert_allclose(1 / own, (1 / first + 1 / other) / 2)
