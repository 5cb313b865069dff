from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc import exact, planner
from slimc.analysis import Analysis
from slimc.errors import UsageError
from slimc.graph.cost import Widths


class Chain(nn.Module):
    """Three groups whose costs multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, 5] to [N, 2]."""
        found: Tensor = self.layers(x)
        return found


def search_of(
    analysis: Analysis, scores: list[np.ndarray[tuple[int], np.dtype[np.float64]]], share: float
) -> planner.Search:
    limits = {"flops": share * analysis.full.macs, "params": 0.95 * analysis.params}
    return planner.Search(analysis.grouping, analysis.cost, scores, limits, 1, frozenset(), None)


def score(search: planner.Search, widths: tuple[int, ...] | Widths) -> float:
    return sum(float(own[:width].sum()) for own, width in zip(search.scores, widths, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_nothing_within_the_budgets_keeps_more_and_that_is_proven(seed: int) -> None:
    analysis = slimc.inspect(Chain(), torch.zeros(2, 5))
    rng = np.random.default_rng(seed)
    scores = [rng.exponential(size=group.width) for group in analysis.groups]
    search = search_of(analysis, scores, rng.uniform(0.3, 0.8))
    greedy = search.choose().widths
    found = exact.improve(search, analysis.cost, greedy)
    assert search.fits(search.cost(found.widths))
    best = max(
        score(search, widths)
        for widths in itertools.product(*(range(1, group.width + 1) for group in analysis.groups))
        if search.fits(search.cost(np.array(widths)))
    )
    whole = score(search, search.full)
    assert found.started == pytest.approx(score(search, greedy) / whole)
    assert found.kept == pytest.approx(score(search, found.widths) / whole)
    assert score(search, found.widths) == pytest.approx(best)
    assert found.bound == pytest.approx(best / whole, rel=1e-5)


def test_what_is_proven_holds_also_where_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = slimc.inspect(Chain(), torch.zeros(2, 5))
    rng = np.random.default_rng(8)
    search = search_of(analysis, [rng.exponential(size=group.width) for group in analysis.groups], 0.5)
    start = search.smallest
    proven = exact.improve(search, analysis.cost, start)
    monkeypatch.setattr(exact, "_ROUNDS", 1)
    early = exact.improve(search, analysis.cost, start)
    assert start.sum() < early.widths.sum()
    assert early.kept < proven.kept < early.bound
    monkeypatch.setattr(exact, "_SECONDS", 0.0)
    at_once = exact.improve(search, analysis.cost, start)
    assert at_once.bound == 1.0
    assert at_once.kept == at_once.started < early.kept


@pytest.mark.parametrize("seed", range(8))
def test_groups_that_may_go_as_a_whole(seed: int) -> None:
    analysis = slimc.inspect(Chain(), torch.zeros(2, 5))
    rng = np.random.default_rng(seed)
    search = search_of(analysis, [rng.exponential(size=group.width) for group in analysis.groups], 0.5)
    search.smallest = np.array([0, 1, 1])
    allowed = [search.allowed(number).tolist() for number in range(3)]
    found = exact.improve(search, analysis.cost, search.choose().widths)
    fitting = [w for w in itertools.product(*allowed) if search.fits(search.cost(np.array(w)))]
    assert score(search, found.widths) == pytest.approx(max(score(search, widths) for widths in fitting))
    assert found.bound == pytest.approx(found.kept, rel=1e-5)


@pytest.mark.parametrize("metric", ["macs", "size", "memory"])
def test_slopes_are_derivatives_by_logarithms_and_tangents_lie_below(metric: str) -> None:
    analysis = slimc.inspect(convolutions(), torch.zeros(2, 3, 8, 8))
    rng = np.random.default_rng(0)
    full = np.array([group.width for group in analysis.groups])
    for _ in range(20):
        widths = rng.uniform(1, full)
        slopes, here = analysis.cost.slopes(widths)[metric], getattr(analysis.cost(widths), metric)
        other = rng.uniform(1, full)
        tangent = here + slopes @ np.log(other / widths)
        assert getattr(analysis.cost(other), metric) >= tangent - 1 - 1e-9 * abs(here)  # sizes are whole bytes
        for number in range(len(full)):
            moved = [widths * np.where(np.arange(len(full)) == number, np.exp(step), 1) for step in (-0.01, 0.01)]
            before, after = (float(getattr(analysis.cost(own), metric)) for own in moved)
            assert slopes[number] == pytest.approx((after - before) / 0.02, rel=1e-2, abs=60 if metric == "size" else 1)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def test_it_wins_where_the_ranking_is_misled_by_cost() -> None:
    model = nn.Sequential(nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    analysis = slimc.inspect(model, torch.zeros(2, 40))
    # The dear group's scores are the better by a hair, so that the ranking takes nearly all of the cheap one first.
    scores = [np.full(6, 1.01), np.full(6, 1.0)]
    search = search_of(analysis, scores, 0.6)
    greedy = search.choose().widths
    found = exact.improve(search, analysis.cost, greedy)
    assert score(search, found.widths) > 1.05 * score(search, greedy)


def test_compress_selects_exactly_and_says_what_that_won() -> None:
    torch.manual_seed(0)
    model = Chain()
    options = {"flops": 0.6, "round_to": 1, "scorer": "magnitude", "recover": "none"}
    greedy, found = (slimc.compress(model, torch.zeros(2, 5), select=how, **options) for how in ("greedy", "exact"))  # type: ignore[arg-type]
    assert greedy.report.selection is None
    selection = found.report.selection
    assert selection is not None
    assert selection.bound >= selection.kept >= selection.greedy > 0
    assert selection.won == pytest.approx(1 - selection.greedy / selection.kept)
    assert selection.gap == pytest.approx(0, abs=1e-5)
    assert found.report.targets["flops"].met
    assert found.report.verification is not None
    assert found.report.verification.passed
    with pytest.raises(UsageError, match="greedy and exact"):
        slimc.compress(model, torch.zeros(2, 5), select="best", **options)  # type: ignore[arg-type]


def test_widths_stay_multiples_of_the_alignment() -> None:
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 4))
    slim = slimc.compress(model, torch.zeros(2, 8), flops=0.5, round_to=8, select="exact", recover="none")
    assert all(group.kept % 8 == 0 for group in slim.report.groups)


def test_the_spared_tenth_is_a_multiple_of_the_alignment_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))
    slim = slimc.compress(model, torch.zeros(2, 8), flops=0.08, round_to=8, select="exact", recover="none")
    assert slim.report.method.round_to == 8
    assert all(group.kept % 8 == 0 for group in slim.report.groups)
