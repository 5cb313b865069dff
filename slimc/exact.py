"""Exact selection: integer programming for the widths that keep the most score, from the greedy choice on.

Costs are products of widths (a convolution costs its inputs times its outputs), which no integer program states at
once. Around a choice, each group's cost is a function of its own width alone; choosing one width for each group is then
a multiple-choice knapsack (Shen et al., HALP, NeurIPS 2022, equation 5), solved exactly by HiGHS. The choice moves to
the solution where the budgets really hold there, else the groups may move less, until nothing is won. Each step is
optimal; where they end is a choice that no such step improves, not proven to be the best of all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from .graph.cost import Widths
from .planner import METRIC, Search

_ROUNDS = 12
_SECONDS = 10.0
_AT_ONCE = 0.5
"""The share of its full width by which a group may move at first."""

Values = list[npt.NDArray[np.float64]]


def improve(search: Search, start: Widths) -> Widths:
    """Widths that keep at least as much score as `start`, which meets the budgets, as they do themselves."""
    values = [np.concatenate([[0.0], np.cumsum(own)]) for own in search.scores]
    best, radius = start.copy(), _AT_ONCE
    for _ in range(_ROUNDS):
        if radius * search.full.max(initial=0) < 1:
            break
        found = _knapsack(search, values, best, radius)
        if found is not None and search.fits(search.cost(found)):
            found = search.give_back(found)
            if kept(values, found) > kept(values, best) * (1 + 1e-9):
                best = found
                continue
        radius /= 2
    return best


def kept(values: Values, widths: Widths) -> float:
    """The sum of the scores that stay."""
    return float(sum(own[width] for own, width in zip(values, widths.tolist(), strict=True)))


def share_kept(search: Search, widths: Widths) -> float:
    """The share of all scores that stays."""
    values = [np.concatenate([[0.0], np.cumsum(own)]) for own in search.scores]
    whole = kept(values, search.full)
    return kept(values, widths) / whole if whole else 1.0


def _knapsack(search: Search, values: Values, around: Widths, radius: float) -> Widths | None:
    """One width for each group, with costs as they are when all other groups stay as they are around here."""
    groups, widths = [], []
    for number, width in enumerate(around.tolist()):
        full = int(search.full[number])
        allowed = search.allowed(number)
        near = allowed[np.abs(allowed - width) <= max(radius * full, 1)]
        choices = np.union1d(near, [width])
        groups.append(np.full(len(choices), number))
        widths.append(choices)
    group, width = np.concatenate(groups), np.concatenate(widths)
    count = len(group)
    here = search.cost(around)
    rows, room = [], []
    for metric, limit in search.limits.items():
        name = METRIC[metric]
        base = float(getattr(here, name))
        costs = np.zeros(count)
        for index in np.flatnonzero(width != around[group]).tolist():
            moved = around.copy()
            moved[group[index]] = width[index]
            costs[index] = float(getattr(search.cost(moved), name)) - base
        scale = max(limit, 1.0)
        rows.append(costs / scale)
        room.append((limit - base) / scale)
    one_each = csr_array((np.ones(count), (group, np.arange(count))), shape=(len(around), count))
    gain = np.array([values[g][w] for g, w in zip(group.tolist(), width.tolist(), strict=True)])
    solved = milp(
        -gain / max(gain.max(initial=0.0), 1e-30), integrality=np.ones(count), bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.array(rows), -np.inf, np.array(room))],
        options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6},
    )  # fmt: skip
    if solved.x is None:
        return None
    chosen = np.flatnonzero(solved.x > 0.5)
    result: Widths = around.copy()
    result[group[chosen]] = width[chosen]
    return result
