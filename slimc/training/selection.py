"""Which channels stay: from scores of channels to a choice that meets a budget, or a part of the way to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from slimc import planner, scores
from slimc.graph.groups import Grouping
from slimc.scores import Scores

from .network import Alive, Network


class Selection:
    """Choices for one network. limits: metric to the largest value allowed; ignored: groups that stay whole."""

    def __init__(
        self, network: Network, limits: Mapping[str, float], round_to: int, may_relax: bool, ignored: Sequence[int]
    ) -> None:
        self.network, self.limits = network, limits
        self._round_to, self._may_relax, self._ignored = round_to, may_relax, tuple(ignored)

    def meets(self, alive: Alive) -> bool:
        """Whether every budget holds with these channels."""
        analysis = self.network.analysis
        costs = analysis.cost(np.array([int(alive[g.variables].sum()) for g in analysis.groups], np.int64))
        return all(getattr(costs, planner.METRIC[metric]) <= limit for metric, limit in self.limits.items())

    def choose(self, total: Scores, progress: float = 1.0, *, per_cost: bool = False) -> Alive:
        """The channels that stay so that budgets hold to the degree of `progress` (geometrically, 1: wholly).

        total: [variables or more] scores, larger for what matters more; NaN where nothing is known (it stays).
        per_cost: scores are divided by what a channel frees of the budgets as the network is now.
        """
        grouping = self.grouping()
        own = [total[group.variables] for group in grouping.groups]
        if per_cost:
            own = planner.per_cost(own, self.network.analysis, self.limits, self.network.widths)
        limits = self.limits
        if progress < 1:
            limits = planner.on_the_way(self.network.analysis.full, limits, progress)
        choice = planner.plan(
            grouping, self.network.analysis.cost, scores.normalise(own, "none"), limits,
            round_to=self._round_to, may_relax=self._may_relax,
            ignored=[*scores.unscored(own), *self._ignored], whole=self.network.analysis.grouping.widths,
        )  # fmt: skip
        alive = self.network.alive.copy()
        for group, kept in zip(grouping.groups, choice.kept, strict=True):
            alive[group.variables] = False
            alive[group.variables[kept]] = True
        return alive

    def lowest(self, total: Scores, count: int, members: Sequence[int]) -> Alive:
        """The channels that stay when those of lowest score go until `count` members are gone, or the budget is met.

        members: how many members a channel of each group counts for; 0 for groups that stay whole. A tenth of each
        group stays, and what the last step needs for a multiple; widths on the way there are not multiples.
        """
        alive = self.network.alive.copy()
        candidates: list[tuple[float, int, int]] = []
        analysis = self.network.analysis
        whole = analysis.grouping
        alignment = planner.check_reachable(
            whole, analysis.cost, self.limits, round_to=self._round_to, may_relax=self._may_relax, ignored=self._ignored
        )
        stays = np.maximum(planner.last_to_go(whole.widths), planner.steps(whole, alignment)).tolist()
        for group, each, floor in zip(self.grouping().groups, members, stays, strict=True):
            own = total[group.variables]
            if group.number in self._ignored or np.isnan(own).any() or not each:
                continue
            removable = np.argsort(own, kind="stable")[: max(0, group.width - max(floor, group.floor))].tolist()
            candidates.extend((float(own[place]), int(group.variables[place]), each) for place in removable)
        for _, variable, each in sorted(candidates):
            if count <= 0:
                break
            alive[variable] = False
            count -= each
        # Not past the budget: the last step meets it as closely as can be.
        return self.choose(total) if self.meets(alive) else alive

    def grouping(self) -> Grouping:
        """The groups with the channels that are left."""
        whole, alive = self.network.analysis.grouping, self.network.alive
        return replace(whole, groups=tuple(replace(g, variables=g.variables[alive[g.variables]]) for g in whole.groups))
