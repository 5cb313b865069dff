"""Choose channels: score them, put groups on one footing, plan widths within every budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import planner, scores
from .analysis import Analysis, Stages
from .errors import UsageError
from .graph.resize import Cut
from .report import Selection

SELECT = ("greedy", "exact")


@dataclass(frozen=True)
class Chosen:
    """What stays.

    unscored: groups that the scorer says nothing of, which stay whole. selection: None where the greedy ranking chose.
    """

    cut: Cut
    choice: planner.Choice
    unscored: tuple[int, ...]
    selection: Selection | None


@dataclass(frozen=True)
class How:
    """The options of choosing; see `slimc.compress`. may_relax: alignment gives way to budgets."""

    normalise: str
    select: str
    alignment: int
    may_relax: bool
    ignored: tuple[int, ...]


def check_select(select: str) -> None:
    """UsageError where there is no such selection."""
    if select not in SELECT:
        raise UsageError(f"--select {select}: known are {' and '.join(SELECT)}")


def choose(
    analysis: Analysis, method: scores.Method, subject: scores.Subject, limits: Mapping[str, float], how: How,
    stages: Stages,
) -> Chosen:  # fmt: skip
    """The channels that stay within the limits; raises UnreachableTarget."""
    with stages.stage("score"):
        found = method.score(subject)
        footing = method.normalisation if how.normalise == "auto" else how.normalise
        ranked = valued = scores.normalise(found, footing)
        if footing == "cost":
            ranked = planner.per_cost(ranked, analysis, limits)
        elif footing == "isomorphic":
            ranked = planner.isomorphic(ranked, analysis)
    with stages.stage("plan"):
        unscored = scores.unscored(found)
        kept_whole = [*how.ignored, *unscored]
        choice = planner.plan(
            analysis.grouping, analysis.cost, ranked, limits,
            round_to=how.alignment, may_relax=how.may_relax, ignored=kept_whole,
        )  # fmt: skip
        selection = None
        if how.select == "exact":
            choice, selection = _exactly(analysis, valued, limits, choice, kept_whole)
        return Chosen(_cut(analysis, choice), choice, tuple(unscored), selection)


def _exactly(
    analysis: Analysis,
    valued: Sequence[scores.Scores],
    limits: Mapping[str, float],
    greedy: planner.Choice,
    ignored: Sequence[int],
) -> tuple[planner.Choice, Selection]:
    """Widths by exact selection, from the greedy ones on, and how much score each keeps."""
    from . import exact  # scipy takes long to import

    search = planner.Search(analysis.grouping, analysis.cost, valued, limits, greedy.round_to, frozenset(ignored), None)
    widths = exact.improve(search, greedy.widths)
    before, after = (exact.share_kept(search, own) for own in (greedy.widths, widths))
    return search.result(widths), Selection("exact", before, after)


def _cut(analysis: Analysis, choice: planner.Choice) -> Cut:
    alive = np.ones(analysis.types.solution.variables, np.bool_)
    for group, kept in zip(analysis.groups, choice.kept, strict=True):
        alive[group.variables] = False
        alive[group.variables[kept]] = True
    return Cut(analysis.types, alive)
