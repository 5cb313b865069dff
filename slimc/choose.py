"""Choose channels: score them, put groups on one footing, plan widths within every budget.

Where layers can be fitted again, the budget is met in steps: a part of the way is cut, the layers are fitted, and what
is left is scored as it then is, since a channel matters more once those that could stand in for it are gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from . import planner, recover, scores
from .analysis import Analysis, Stages
from .errors import UnreachableTarget, UsageError
from .graph.cost import Costs
from .graph.groups import Grouping
from .graph.resize import Cut
from .graph.shrink import shrink
from .pace import Pace
from .report import Selection, TargetResult
from .rewrite import rewrite
from .samples import Samples
from .scores import Scores, Subject

SELECT = ("greedy", "exact")
BETWEEN = "reconstruct"
"""The recovery step that fits layers between steps; where it is not asked for, there are none."""
_STEP, _MOST_STEPS = 0.8, 3
"""Each step leaves about this share of what the one before left, where that makes no more steps than so many."""


@dataclass(frozen=True)
class Chosen:
    """What stays.

    latency: what a latency target got. unscored: groups that the scorer says nothing of, which stay whole. selection:
    None where the greedy ranking chose. steps: in how many cuts. scores: [variables] by what channels were ranked when
    they went or, of those that stay, in the last step; NaN in groups that the scorer says nothing of.
    """

    cut: Cut
    choice: planner.Choice
    latency: TargetResult | None
    unscored: tuple[int, ...]
    selection: Selection | None
    steps: int
    scores: Scores


@dataclass(frozen=True)
class How:
    """Options of choosing; see `slimc.compress`. may_relax: alignment gives way to budgets. pace: a latency target."""

    normalise: str
    select: str
    alignment: int
    may_relax: bool
    ignored: tuple[int, ...]
    pace: Pace | None = None


def check_select(select: str) -> None:
    """UsageError where there is no such selection."""
    if select not in SELECT:
        raise UsageError(f"--select {select}: known are {' and '.join(SELECT)}")


def check_norm(norm: str, scorer: str) -> None:
    """UsageError where there is no such norm, or the scorer takes none."""
    if norm not in ("l1", "l2"):
        raise UsageError(f"--norm {norm}: known are l1 and l2")
    if norm != "l2" and scorer not in ("auto", "magnitude"):
        raise UsageError(f"--norm {norm} is for --scorer magnitude; {scorer} takes none")


@dataclass(frozen=True)
class _Ranking:
    """Scores of the channels that are left, on one footing.

    valued: before they were divided by costs or ranked in classes. kept_whole: groups that stay whole.
    """

    grouping: Grouping
    ranked: list[Scores]
    valued: list[Scores]
    unscored: tuple[int, ...]
    kept_whole: tuple[int, ...]

    def note(self, scores: Scores) -> None:
        """Write what the channels that are left were ranked by into [variables]."""
        for group, own in zip(self.grouping.groups, self.ranked, strict=True):
            scores[group.variables] = np.nan if group.number in self.unscored else own


def choose(
    analysis: Analysis, method: scores.Method, subject: Subject, limits: Mapping[str, float], how: How, stages: Stages,
    between: Samples | None = None,
) -> Chosen:  # fmt: skip
    """The channels that stay within the limits; raises UnreachableTarget.

    between: samples to fit layers on between steps; without them, and where selection is exact, there is one step.
    """
    if how.pace is not None:
        analysis = replace(analysis, cost=how.pace.cost)
        limits = how.pace.start(limits, _least(analysis, analysis.grouping, how, how.ignored))
    count = _steps(analysis, limits) if between is not None and how.select == "greedy" else 1
    alive = np.ones(analysis.types.solution.variables, np.bool_)
    found = np.full(len(alive), np.nan)
    with stages.stage("score"):
        ranking = _rank(analysis, method, subject, limits, how)
        ranking.note(found)
        for step in range(1, count):
            _planned(analysis, ranking, limits, how)  # raises now where the budget cannot be met
            choice = _planned(analysis, ranking, planner.on_the_way(analysis.full, limits, step / count), how)
            how = replace(how, alignment=choice.round_to)
            stages.detail(f"step {step + 1} of {count}")
            assert between is not None
            subject = _fitted(analysis, _remove(analysis, alive, ranking.grouping, choice), subject, between)
            ranking = _rank(analysis, method, subject, limits, how)
            ranking.note(found)

    def planned(limits: Mapping[str, float]) -> tuple[planner.Choice, Selection | None]:
        choice = _planned(analysis, ranking, limits, how)
        return _exactly(analysis, ranking, limits, choice) if how.select == "exact" else (choice, None)

    with stages.stage("plan"):
        latency = None
        if how.pace is not None:
            # What other targets and steps leave: as slow as it may be.
            others = {metric: limit for metric, limit in limits.items() if metric != "latency"}
            settled = how.pace.settle(
                limits, _least(analysis, ranking.grouping, how, ranking.kept_whole),
                _time(_planned(analysis, ranking, others, how).costs),
                lambda own: _remove(analysis, alive.copy(), ranking.grouping, planned(own)[0]),
            )  # fmt: skip
            limits, latency = settled.limits, settled.result
        choice, selection = planned(limits)
        cut = _remove(analysis, alive, ranking.grouping, choice)
        return Chosen(cut, choice, latency, ranking.unscored, selection, count, found)


def check_pace(analysis: Analysis, how: How) -> None:
    """UnreachableTarget where even the smallest cut is too slow, before anything slow is done to find scores."""
    if how.pace is not None:
        smallest = planner.least(analysis.grouping, how.pace.cost, how.alignment, how.may_relax, how.ignored)
        how.pace.check(_time(smallest.costs), cut_of(analysis, smallest))


def cut_of(analysis: Analysis, choice: planner.Choice) -> Cut:
    """What a choice among all channels of a model removes."""
    alive = np.ones(analysis.types.solution.variables, np.bool_)
    return _remove(analysis, alive, analysis.grouping, choice)


def _least(analysis: Analysis, grouping: Grouping, how: How, kept_whole: Sequence[int]) -> float:
    """The estimated time of the smallest network that can be planned."""
    return _time(planner.least(grouping, analysis.cost, how.alignment, how.may_relax, kept_whole).costs)


def _time(costs: Costs) -> float:
    assert costs.time is not None  # the costs are those of a pace
    return costs.time


def _rank(
    analysis: Analysis, method: scores.Method, subject: Subject, limits: Mapping[str, float], how: How
) -> _Ranking:
    found = method.score(subject) if subject.grouping.groups else []
    footing = method.normalisation if how.normalise == "auto" else how.normalise
    ranked = valued = scores.normalise(found, footing)
    if footing == "cost":
        ranked = planner.per_cost(ranked, analysis, limits, subject.grouping.widths)
    elif footing == "isomorphic":
        ranked = valued = planner.isomorphic(ranked, analysis, how.ignored)  # values of two classes say nothing
    unscored = tuple(scores.unscored(found))
    return _Ranking(subject.grouping, ranked, valued, unscored, (*how.ignored, *unscored))


def _planned(analysis: Analysis, ranking: _Ranking, limits: Mapping[str, float], how: How) -> planner.Choice:
    try:
        return planner.plan(
            ranking.grouping, analysis.cost, ranking.ranked, limits, round_to=how.alignment, may_relax=how.may_relax,
            ignored=ranking.kept_whole, whole=analysis.grouping.widths,
        )  # fmt: skip
    except UnreachableTarget as error:
        if not ranking.unscored:
            raise
        names = ", ".join(analysis.groups[number].name for number in ranking.unscored)
        raise UnreachableTarget(f"{error} The scorer says nothing of {names}: another may cut these.") from error


def _remove(analysis: Analysis, alive: npt.NDArray[np.bool_], grouping: Grouping, choice: planner.Choice) -> Cut:
    """What is left when channels that were not chosen are marked in `alive` as gone."""
    for group, kept in zip(grouping.groups, choice.kept, strict=True):
        alive[group.variables] = False
        alive[group.variables[kept]] = True
    return Cut(analysis.types, alive.copy())


def _steps(analysis: Analysis, limits: Mapping[str, float]) -> int:
    """How many steps the budget that takes most away is worth."""
    least = min(limit / getattr(analysis.full, planner.METRIC[metric]) for metric, limit in limits.items())
    return min(_MOST_STEPS, max(1, round(math.log(least) / math.log(_STEP)))) if least < 1 else 1


def _exactly(
    analysis: Analysis, ranking: _Ranking, limits: Mapping[str, float], greedy: planner.Choice
) -> tuple[planner.Choice, Selection]:
    """Widths by exact selection, from the greedy ones on, and how much score each keeps."""
    from . import exact  # scipy takes long to import

    ignored = frozenset(ranking.kept_whole)
    search = planner.Search(ranking.grouping, analysis.cost, ranking.valued, limits, greedy.round_to, ignored, None)
    # What goes last in the ranking goes only where the ranking had to take it.
    last = planner.last_to_go(analysis.grouping.widths)
    least = np.minimum(-(-last // search.step) * search.step, greedy.widths)
    search.smallest = np.maximum(search.smallest, least)
    found = exact.improve(search, analysis.cost, greedy.widths)
    selection = Selection("exact", found.started, found.kept, found.bound)
    return search.result(found.widths), selection


def _fitted(analysis: Analysis, cut: Cut, subject: Subject, samples: Samples) -> Subject:
    """What a scorer sees of the network with a cut whose layers were fitted again."""
    types = analysis.types
    slim, whole = rewrite(types, cut), types.captured.module
    task = recover.Task(whole, slim.module, slim.twins, types, cut, samples, subject.seed, analysis.work, subject.tick)
    recover.find(BETWEEN).run(task)
    smaller, grouping = shrink(types, analysis.grouping, cut, slim.module, slim.twins)
    return replace(subject, types=smaller, grouping=grouping)
