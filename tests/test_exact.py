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
def test_nothing_within_the_budgets_keeps_more_but_by_moving_several_groups_at_once(seed: int) -> None:
    analysis = slimc.inspect(Chain(), torch.zeros(2, 5))
    rng = np.random.default_rng(seed)
    scores = [rng.exponential(size=group.width) for group in analysis.groups]
    search = search_of(analysis, scores, rng.uniform(0.3, 0.8))
    greedy = search.choose().widths
    found = exact.improve(search, greedy)
    assert search.fits(search.cost(found))
    best = max(
        score(search, widths)
        for widths in itertools.product(*(range(1, group.width + 1) for group in analysis.groups))
        if search.fits(search.cost(np.array(widths)))
    )
    assert score(search, greedy) <= score(search, found) <= best + 1e-9
    # Products of widths leave local optima; they are close to the best of all.
    assert score(search, found) >= 0.97 * best


def test_it_wins_where_the_ranking_is_misled_by_cost() -> None:
    model = nn.Sequential(nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    analysis = slimc.inspect(model, torch.zeros(2, 40))
    # The dear group's scores are the better by a hair, so that the ranking takes nearly all of the cheap one first.
    scores = [np.full(6, 1.01), np.full(6, 1.0)]
    search = search_of(analysis, scores, 0.6)
    greedy = search.choose().widths
    found = exact.improve(search, greedy)
    assert score(search, found) > 1.05 * score(search, greedy)
    assert exact.share_kept(search, found) == pytest.approx(score(search, found) / score(search, (6, 6)))


def test_compress_selects_exactly_and_says_what_that_won() -> None:
    torch.manual_seed(0)
    model = Chain()
    options = {"flops": 0.6, "round_to": 1, "scorer": "magnitude", "recover": "none"}
    greedy, found = (slimc.compress(model, torch.zeros(2, 5), select=how, **options) for how in ("greedy", "exact"))  # type: ignore[arg-type]
    assert greedy.report.selection is None
    selection = found.report.selection
    assert selection is not None
    assert selection.kept >= selection.greedy > 0
    assert selection.gap == pytest.approx(1 - selection.greedy / selection.kept)
    assert found.report.targets["flops"].met
    assert found.report.verification is not None
    assert found.report.verification.passed
    with pytest.raises(UsageError, match="greedy and exact"):
        slimc.compress(model, torch.zeros(2, 5), select="best", **options)  # type: ignore[arg-type]


def test_widths_stay_multiples_of_the_alignment() -> None:
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 4))
    slim = slimc.compress(model, torch.zeros(2, 8), flops=0.5, round_to=8, select="exact", recover="none")
    assert all(group.kept % 8 == 0 for group in slim.report.groups)
