"""The planner: from scores and budgets to the channels that stay.

All channels of all groups stand in one ranking, lowest score first. The smallest number of lowest-ranked
channels that meets every budget goes (found by bisection, since every cost falls with every removal); then
channels come back, best first, wherever that still meets every budget. What is left cannot take one more
channel, or one more rounding step, of any group.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .budget import amount
from .errors import UnreachableTarget
from .graph.cost import Costs, Widths
from .graph.groups import Grouping
from .graph.rule import operator_name
from .scores import Scores

if TYPE_CHECKING:
    from .analysis import Analysis

CostOf = Callable[[Widths], Costs]
METRIC = {"flops": "macs", "params": "params", "size": "size", "memory": "memory", "latency": "time"}
"""The cost that each target limits."""
_PROTECTED = 0.1

_SMALL_SHARE = 1e-9


@dataclass(frozen=True)
class Choice:
    """What the planner chose.

    kept: per group, the positions (in the group) of the channels that stay, ascending.
    round_to: the alignment that was reached; smaller than asked only where the budget forced it.
    """

    kept: tuple[npt.NDArray[np.int64], ...]
    widths: Widths
    costs: Costs
    round_to: int


def plan(
    grouping: Grouping,
    cost: CostOf,
    scores: Sequence[Scores],
    limits: Mapping[str, float],
    *,
    round_to: int,
    may_relax: bool,
    ignored: Sequence[int] = (),
    whole: Widths | None = None,
) -> Choice:
    """Choose channels so that every limit holds.

    limits: metric to the largest value allowed, per sample.
    round_to: axes are cut to multiples of this; with `may_relax` a smaller power of two is taken where the
        limits cannot be met otherwise.
    ignored: numbers of groups that stay whole. whole: widths of the groups before the first cut, if this is not it.
    Raises UnreachableTarget with the smallest reachable value.
    """
    return _search(grouping, cost, scores, limits, round_to, may_relax, frozenset(ignored), whole).choose()


def check_reachable(
    grouping: Grouping,
    cost: CostOf,
    limits: Mapping[str, float],
    *,
    round_to: int,
    may_relax: bool,
    ignored: Sequence[int] = (),
) -> int:
    """The alignment that can be reached; raises what `plan` would, before anything slow is done to find scores."""
    nothing = [np.zeros(group.width) for group in grouping.groups]
    return _search(grouping, cost, nothing, limits, round_to, may_relax, frozenset(ignored), None).round_to


def least(grouping: Grouping, cost: CostOf, round_to: int, may_relax: bool, ignored: Sequence[int]) -> Choice:
    """The smallest network that can be planned, of whatever channels."""
    nothing = [np.zeros(group.width) for group in grouping.groups]
    search = Search(grouping, cost, nothing, {}, 1 if may_relax else round_to, frozenset(ignored), None)
    return search.result(search.smallest)


def _search(
    grouping: Grouping,
    cost: CostOf,
    scores: Sequence[Scores],
    limits: Mapping[str, float],
    round_to: int,
    may_relax: bool,
    ignored: frozenset[int],
    whole: Widths | None,
) -> Search:
    """The search with the largest alignment for which the limits can be met."""
    attempt = round_to
    while True:
        search = Search(grouping, cost, scores, limits, attempt, ignored, whole)
        smallest = cost(search.smallest)
        if search.fits(smallest):
            return search
        if attempt == 1 or not may_relax:
            missed = _missed(limits, smallest, cost(search.full))
            raise UnreachableTarget(f"{missed}. {_way_out(grouping, ignored, attempt)}")
        attempt = max(1, attempt // 2)


def _missed(limits: Mapping[str, float], smallest: Costs, full: Costs) -> str:
    missed = []
    for metric, limit in limits.items():
        least, before = getattr(smallest, METRIC[metric]), getattr(full, METRIC[metric])
        if least > limit:
            reached = amount(metric, _least(least) if least < before else before)
            missed.append(
                f"--{metric} asks for at most {amount(metric, limit)} of {amount(metric, before)}; the smallest that "
                f"can be reached is {_up(least / before)} of the original ({reached})"
            )
    return "; ".join(missed)


def _way_out(grouping: Grouping, ignored: frozenset[int], round_to: int) -> str:
    free = {group.number for group in grouping.groups if group.floor < group.width}
    if not free:
        return "No channel of this model can be removed; slimc inspect shows what holds them."
    if free <= ignored:
        return "All that can be removed is left whole by --ignore, or since the scorer says nothing of it."
    fewer = ", or leave fewer layers whole" if ignored else ""
    if round_to > 1:
        return f"With --round-to 1 it is smaller; else raise the target{fewer}."
    return f"Raise the target{fewer}."


def _up(share: float) -> str:
    """A share in four digits, never below the share itself, so that it can be asked for."""
    scale = 10 ** (3 - math.floor(math.log10(share))) if share > 0 else 1
    return f"{math.ceil(share * scale) / scale:.12g}"


def last_to_go(whole: Widths) -> Widths:
    """How many channels of each group go last: a tenth, so that no layer collapses while others can still give.

    whole: widths of the groups before the first cut.
    """
    last: Widths = np.ceil(_PROTECTED * whole).astype(np.int64)
    return last


def on_the_way(full: Costs, limits: Mapping[str, float], progress: float) -> dict[str, float]:
    """Limits at a part of the way from the whole model (0) to the budgets (1): each step leaves the same share."""
    wholes = {metric: float(getattr(full, METRIC[metric])) for metric in limits}
    return {metric: wholes[metric] * (limit / wholes[metric]) ** progress for metric, limit in limits.items()}


def per_cost(
    scores: Sequence[Scores], analysis: Analysis, limits: Mapping[str, float], widths: Widths | None = None
) -> list[Scores]:
    """Scores in one unit divided by what a channel of the group frees of the amounts with a budget.

    Shares of these amounts count by how far they are from their budgets, so that one that is nearly met says little.
    widths: of the network as it is; whole if not given.
    """
    grouping, cost = analysis.grouping, analysis.cost
    full = grouping.widths if widths is None else widths
    whole = cost(full)
    before = {metric: float(getattr(whole, METRIC[metric])) for metric in limits}
    left = {metric: 1 - limit / before[metric] for metric, limit in limits.items() if before[metric] > limit}
    ranked = []
    for group, own in zip(grouping.groups, scores, strict=True):
        fewer = full.copy()
        fewer[group.number] = max(0, full[group.number] - 1)
        less = cost(fewer)
        freed = sum(far * (1 - getattr(less, METRIC[metric]) / before[metric]) for metric, far in left.items())
        freed /= sum(left.values(), _SMALL_SHARE)
        ranked.append(own / max(freed, _SMALL_SHARE))
    return ranked


def isomorphic(scores: Sequence[Scores], analysis: Analysis, ignored: Sequence[int] = ()) -> list[Scores]:
    """Ranks within classes of groups that are alike: every class then loses the same share of its channels.

    ignored: groups that stay whole, whose channels take no part.

    Two groups are alike where the same operators use the same axes of their members, in the same order; sizes do not
    matter. A group without a score keeps it (NaN). Source: Fang et al., "Isomorphic Pruning for Vision Models" (ECCV
    2024), section 3.2.
    """
    users: dict[str, str] = {}
    for node in analysis.captured.module.graph.nodes:
        if node.op == "get_attr":
            users[str(node.target)] = ",".join(sorted({operator_name(user) for user in node.users}))
    classes: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    tensors = analysis.types.tensors
    for group in analysis.groups:
        if group.number not in ignored and not np.isnan(scores[group.number]).any():
            kind = tuple((users.get(m.tensor, ""), len(tensors[m.tensor]), m.axis) for m in group.members)
            classes.setdefault(kind, []).append(group.number)
    ranked = [own.copy() for own in scores]
    for members in classes.values():
        together = np.concatenate([scores[number] for number in members])
        places = np.empty(len(together))
        places[np.argsort(together, kind="stable")] = np.arange(1, len(together) + 1) / max(1, len(together))
        for number, own in zip(
            members, np.split(places, np.cumsum([len(scores[n]) for n in members])[:-1]), strict=True
        ):
            ranked[number] = own
    return ranked


def _least(value: float) -> float:
    """An amount that is shown in three digits, never below itself."""
    scale = 10 ** (2 - math.floor(math.log10(value))) if value > 0 else 1
    return math.ceil(value * scale * (1 - 1e-12)) / scale


class Search:
    """One search with one alignment."""

    def __init__(
        self,
        grouping: Grouping,
        cost: CostOf,
        scores: Sequence[Scores],
        limits: Mapping[str, float],
        round_to: int,
        ignored: frozenset[int],
        whole: Widths | None,
    ) -> None:
        self.cost, self.limits, self.round_to = cost, limits, round_to
        self.full = grouping.widths
        self.step = steps(grouping, round_to)
        whole = self.full if whole is None else whole
        self.protected = last_to_go(whole)
        floor = np.array([group.floor for group in grouping.groups], np.int64)
        self.smallest = np.minimum(self.full, np.maximum(floor, np.where(floor > 0, self.step, 0)))
        for number in ignored:
            self.smallest[number] = self.full[number]
        # Earlier cuts may have left a width that is no multiple; only the model's own one may be that.
        aligned = np.maximum(self.smallest, self.full // self.step * self.step)
        self.full = np.where(self.full < whole, aligned, self.full)
        # Best first within each group, so that a width says which channels stay.
        self.order = [np.argsort(-own, kind="stable") for own in scores]
        self.scores = [own[order] for own, order in zip(scores, self.order, strict=True)]
        self.ranking = self._rank()

    def _rank(self) -> npt.NDArray[np.int64]:
        """The group of each removable channel, in order of removal."""
        groups, protected, values = [], [], []
        for number, own in enumerate(self.scores):
            places = np.arange(self.smallest[number], self.full[number])
            groups.append(np.full(len(places), number))
            protected.append(places < self.protected[number])
            values.append(own[places])
        if not groups:
            return np.zeros(0, np.int64)
        order = np.lexsort((np.concatenate(values), np.concatenate(protected)))
        ranked: npt.NDArray[np.int64] = np.concatenate(groups)[order]
        return ranked

    def allowed(self, number: int) -> Widths:
        """Widths that a group may have, ascending."""
        least, most, step = (int(own[number]) for own in (self.smallest, self.full, self.step))
        steps = np.arange(-(-least // step) * step, most + 1, step, dtype=np.int64)
        return np.union1d(steps, [least, most])

    def result(self, widths: Widths) -> Choice:
        """The choice with these widths: the best channels of each group."""
        kept = tuple(np.sort(order[:width]) for order, width in zip(self.order, widths.tolist(), strict=True))
        return Choice(kept, widths, self.cost(widths), self.round_to)

    def fits(self, costs: Costs) -> bool:
        """Whether every limit holds."""
        return all(getattr(costs, METRIC[metric]) <= limit for metric, limit in self.limits.items())

    def choose(self) -> Choice:
        """Bisect the ranking, then give back what fits."""
        low, high = 0, len(self.ranking)  # removing `high` fits, removing fewer than `low` does not
        while low < high:
            middle = (low + high) // 2
            if self.fits(self.cost(self._widths(middle))):
                high = middle
            else:
                low = middle + 1
        return self.result(self.give_back(self._widths(high)))

    def _widths(self, removed: int) -> Widths:
        left = self.full - np.bincount(self.ranking[:removed], minlength=len(self.full))
        return self._rounded(left)

    def _rounded(self, left: Widths) -> Widths:
        """The nearest allowed width: a multiple of the group's step, or the full width."""
        down = left // self.step * self.step
        up = np.minimum(down + self.step, self.full)
        nearest = np.where(left - down < up - left, down, up)
        nearest = np.where(left == down, left, nearest)
        return np.clip(np.where(left == self.full, left, nearest), self.smallest, self.full)

    def give_back(self, widths: Widths) -> Widths:
        """Add channels, best first, wherever the budgets still hold."""
        widths = widths.copy()
        waiting = [(-self._next_score(n, widths), n) for n in range(len(widths)) if widths[n] < self.full[n]]
        heapq.heapify(waiting)
        while waiting:
            _, number = heapq.heappop(waiting)
            before = widths[number]
            widths[number] = min(before // self.step[number] * self.step[number] + self.step[number], self.full[number])
            if not self.fits(self.cost(widths)):
                widths[number] = before
            elif widths[number] < self.full[number]:
                heapq.heappush(waiting, (-self._next_score(number, widths), number))
        return widths

    def _next_score(self, number: int, widths: Widths) -> float:
        return float(self.scores[number][widths[number]])


def multiple_of(grouping: Grouping, widths: Widths, round_to: int) -> int:
    """The largest of `round_to`, its half, the half of that and so on, of which all cut widths are multiples."""
    is_cut = widths < grouping.widths
    while round_to > 1 and bool((is_cut & (widths % steps(grouping, round_to) != 0)).any()):
        round_to //= 2
    return max(1, round_to)


def steps(grouping: Grouping, round_to: int) -> Widths:
    """Channels that must go together in each group so that the axes it shrinks stay multiples of `round_to`.

    Where an axis is a product of groups (heads times head size), the widest of them is rounded and the others
    are free, since the product is then aligned whatever they are.
    """
    needed = np.ones(len(grouping.groups), np.int64)
    if round_to == 1:
        return needed
    for axis in grouping.axes:
        for coefficient, names in axis.terms:
            if not names:
                continue
            widest = max(names, key=lambda n: (grouping.groups[n].width, -n))
            step = round_to // math.gcd(round_to, coefficient)
            needed[widest] = max(needed[widest], step)
    return needed
