"""Exact selection: the widths that keep the most score within the budgets, and a proof of how much any could keep.

Choosing one width for each group is a multiple-choice knapsack (Shen et al., HALP, NeurIPS 2022, equation 5), but for
costs that are products of widths: a convolution costs its inputs times its outputs. Sums of such products are convex in
the logarithms of widths. So they lie above their tangents, and a tangent is a sum over groups again. Knapsacks under
tangents never ask for more than the budgets do: what they keep bounds what any choice keeps, and a solution that breaks
a budget adds the tangent that rules it out, until one holds and is the best of all (outer approximation, Duran and
Grossmann, Mathematical Programming 36, 1986). HiGHS solves the knapsacks: first with fractions, which is quick and
gives nearly all tangents, then with whole widths until time is up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from .graph.cost import Model, Widths
from .planner import METRIC, Search

_SECONDS = 30.0
_ROUNDS = 60
_HALVINGS = 20
_NEAR = 1e-3
"""The share by which fractions may still break a budget when whole widths take over."""
_CLOSE = 1e-6
"""The share of what is kept that counts as nothing."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """Widths that meet the budgets and keep the share `kept` of all scores; no choice keeps more than `bound`.

    started: what the widths that were given keep.
    """

    widths: Widths
    started: float
    kept: float
    bound: float


def improve(search: Search, cost: Model, start: Widths) -> Found:
    """The best widths that were found, at least as good as `start`, which meets the budgets."""
    if not len(start):
        return Found(start, 1.0, 1.0, 1.0)
    knapsack, best = _Knapsack(search, cost, start), start
    stop = time.monotonic() + _SECONDS
    bound = knapsack.kept(search.full)
    knapsack.cut(start.astype(np.float64))
    for whole in (False, True):
        for _ in range(_ROUNDS):
            limit, solution = knapsack.solve(whole, stop - time.monotonic())
            bound = min(bound, limit)
            if solution is None:
                break
            within, beyond = knapsack.border(solution)
            best = max(best, knapsack.near(within), key=knapsack.kept)
            near = knapsack.over(solution) <= (0 if whole else _NEAR)
            if near or knapsack.kept(best) >= bound - _CLOSE * abs(bound):
                break
            knapsack.cut(solution if whole else beyond)
    started, kept = knapsack.kept(start), knapsack.kept(best)
    full = knapsack.kept(search.full) or 1.0
    return Found(best, started / full, kept / full, max(bound, kept) / full)


class _Knapsack:
    """One width for each group out of those allowed, within tangents of the costs."""

    def __init__(self, search: Search, cost: Model, start: Widths) -> None:
        self._search, self._cost = search, cost
        self._values = [np.concatenate([[0.0], np.cumsum(own)]) for own in search.scores]
        self._allowed = [search.allowed(number) for number in range(len(search.full))]
        self._width = np.concatenate(self._allowed)
        self._group = np.repeat(np.arange(len(self._allowed)), [len(own) for own in self._allowed])
        self._gain = np.concatenate([own[allowed] for own, allowed in zip(self._values, self._allowed, strict=True)])
        self._log = np.log(np.maximum(self._width, 1).astype(np.float64))
        self._inner = np.sqrt(np.maximum(search.smallest, 1.0) * np.maximum(start, 1.0))
        self._rows: list[Floats] = []
        self._room: list[float] = []

    def kept(self, widths: Widths) -> float:
        """The sum of the scores that stay."""
        return float(sum(own[width] for own, width in zip(self._values, widths.tolist(), strict=True)))

    def cut(self, widths: Floats) -> None:
        """Add the tangents at widths of each budgeted cost."""
        slopes = self._cost.slopes(widths)
        here = self._cost(widths)
        logs = np.log(np.where(widths > 0, widths, 1))
        for metric, limit in self._search.limits.items():
            name = METRIC[metric]
            slope, scale = slopes[name], limit or 1.0
            room = (limit - getattr(here, name) + float(slope @ logs)) / scale
            row = slope[self._group] / scale * self._log
            # Without the group its products are gone, whatever the others are: nothing is asked of them.
            most = np.zeros(len(self._allowed))
            np.maximum.at(most, self._group, row)
            gone = self._width == 0
            row[gone] = np.minimum(0, room - (most.sum() - most[self._group[gone]])) * (slope[self._group[gone]] > 0)
            self._rows.append(row)
            self._room.append(room)

    def solve(self, whole: bool, seconds: float) -> tuple[float, Floats | None]:
        """The most that any choice within the tangents keeps, and the widths that keep it; None where time is up.

        whole: one width for each group; else fractions of widths, of which the geometric mean is returned.
        """
        count, groups = len(self._group), len(self._allowed)
        scale = max(float(np.abs(self._gain).max(initial=0.0)), 1e-300)
        one_each = csr_array((np.ones(count), (self._group, np.arange(count))), shape=(groups, count))
        within = LinearConstraint(np.array(self._rows), -np.inf, np.array(self._room))
        solved = milp(
            -self._gain / scale, integrality=np.full(count, float(whole)), bounds=(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), within],
            options={"time_limit": max(seconds, 0.0), "mip_rel_gap": _CLOSE / 10},
        )  # fmt: skip
        dual = solved.mip_dual_bound if whole else solved.fun if solved.status == 0 else None
        bound = np.inf if dual is None else -float(dual) * scale
        if solved.x is None or solved.status not in (0, 1):
            return bound, None
        share = solved.x.round() if whole else solved.x
        logs = np.bincount(self._group, share * self._log, groups)
        gone = np.bincount(self._group, share * (self._width == 0), groups) > 1 - _CLOSE
        return bound, np.where(gone, 0.0, np.exp(logs))

    def border(self, widths: Floats) -> tuple[Floats, Floats]:
        """Where the way to these widths, straight in logarithms, leaves the budgets: a place within, one beyond."""
        if self.over(widths) <= 0:
            return widths, widths
        low, high, within, beyond = 0.0, 1.0, self._inner, widths
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            way = np.where(widths > 0, self._inner ** (1 - middle) * widths**middle, 0.0)
            if self.over(way) <= 0:
                low, within = middle, way
            else:
                high, beyond = middle, way
        return within, beyond

    def over(self, widths: Floats) -> float:
        """By what share the budget that is broken most is broken; not above 0 where all hold. widths: whole or not."""
        costs = self._cost(widths)
        limits = self._search.limits.items()
        return max(float(getattr(costs, METRIC[metric])) / max(limit, 1e-300) - 1 for metric, limit in limits)

    def near(self, widths: Floats) -> Widths:
        """Allowed widths next to these: where least is lost for what comes free, less is left; what fits comes back."""
        places = [int(np.abs(own - width).argmin()) for own, width in zip(self._allowed, widths, strict=True)]
        left = np.array([own[place] for own, place in zip(self._allowed, places, strict=True)], np.int64)
        while not self._search.fits(here := self._cost(left)):
            fewer = np.array([own[max(0, p - 1)] for own, p in zip(self._allowed, places, strict=True)], np.int64)
            lost = np.array([own[n] - own[f] for own, n, f in zip(self._values, left, fewer, strict=True)])
            slopes = self._cost.slopes(left.astype(np.float64))
            freed = np.zeros(len(left))
            for metric, limit in self._search.limits.items():
                if getattr(here, METRIC[metric]) > limit:
                    freed += (
                        slopes[METRIC[metric]] / (limit or 1.0) * np.log(np.maximum(left, 0.5) / np.maximum(fewer, 0.5))
                    )
            number = int(np.where(freed > 0, lost / np.maximum(freed, 1e-300), np.inf).argmin())
            places[number] -= 1
            left[number] = fewer[number]
        return self._search.give_back(left)
