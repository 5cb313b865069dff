"""What a compression says of itself: facts for the plan, results, warnings and the report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from . import __version__, eager, planner
from .analysis import Analysis, Stages
from .budget import Target
from .choose import Chosen
from .exporters import machine
from .graph.cost import Costs
from .graph.resize import Cut
from .plan import groups_of, weights_sha256
from .report import (
    Change,
    Environment,
    FrozenOperator,
    Method,
    Report,
    TargetResult,
    Verification,
)
from .scores import Method as Scorer
from .verify import Proof

_UNUSED = 0.05
"""A share of the original that a budget may leave unused without a remark."""


def facts_of(
    model: nn.Module, targets: Sequence[Target], limits: Mapping[str, float], method: Mapping[str, Any]
) -> dict[str, Any]:
    """What a plan says of where it came from."""
    return {
        "targets": {t.metric: {"text": t.text, "limit": limits[t.metric]} for t in targets},
        "method": dict(method),
        "versions": versions(),
        "source_sha256": weights_sha256(model),
    }


def results_of(targets: Sequence[Target], before: Costs, after: Costs) -> dict[str, TargetResult]:
    """What each target asked and got, but for a latency, which is measured."""
    found = {}
    for target in targets:
        if target.metric == "latency":
            continue
        full, left = (getattr(costs, planner.METRIC[target.metric]) for costs in (before, after))
        asked = target.limit(full) / full if target.share is None else target.share
        found[target.metric] = TargetResult(asked, left / full, full, left)
    return found


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {"slimc": __version__, "torch": torch.__version__, "python": platform.python_version()}


def warnings_of(analysis: Analysis, own: eager.Eager) -> list[str]:
    """What a person should read first: a fixed batch, a result that is a graph, channels that were left alone."""
    warnings = []
    captured = analysis.captured
    if captured.samples != captured.batch:
        warnings.append(
            "amounts are for one call, not for a sample: no output has as many rows as the first input "
            f"({captured.batch})"
        )
    elif captured.batch_note:
        warnings.append(f"the batch size is fixed at {captured.batch}: {captured.batch_note}")
    if own.reason and not _is_graph(analysis.model):
        warnings.append(f"the result is the graph as a module, not {type(analysis.model).__name__}: {own.reason}")
    if own.module is not None:
        fault = eager.training_fault(own.module, analysis.model, analysis.types)
        if fault:
            warnings.append(
                f"{type(own.module).__name__} no longer runs in training mode: layers that only training uses keep "
                f"their sizes ({fault})"
            )
    if analysis.frozen:
        names = ", ".join(sorted({cause.op for cause in analysis.frozen}))
        warnings.append(f"channels were left alone around {names}")
    return warnings


def _is_graph(model: nn.Module) -> bool:
    """Whether a model came from a file that holds a graph: there is no class of the user's to miss."""
    return isinstance(model, GraphModule) or getattr(type(model), "holds_a_graph", False)


def report_of(
    analysis: Analysis,
    cut: Cut,
    targets: Mapping[str, TargetResult],
    method: Method,
    proof: Proof,
    stages: Stages,
    costs: tuple[Costs, Costs],
    warnings: list[str],
    name: str | None,
) -> Report:
    """The report of a cut that is proven; later stages add to it."""
    before, after = costs
    groups = groups_of(analysis.grouping, cut)
    here = machine.describe()
    return Report(
        model=name or type(analysis.model).__name__,
        targets=targets,
        macs=Change(round(before.macs), round(after.macs)),
        params=Change(before.params, after.params),
        size=Change(before.size, after.size),
        memory=Change(round(before.memory), round(after.memory)),
        method=method,
        groups=groups,
        frozen=tuple(FrozenOperator(c.op, c.node, c.module, c.reason) for c in analysis.frozen),
        seconds=dict(stages.seconds),
        environment=Environment(
            slimc=__version__, python=platform.python_version(), torch=torch.__version__,
            onnxruntime=machine.onnxruntime_version(), platform=here.platform, cpu=here.cpu,
            threads=torch.get_num_threads(),
            accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        ),
        verification=Verification(
            passed=True, max_relative_error=proof.max_relative_error, moved=proof.moved, dtype=proof.dtype,
            inputs=proof.inputs, groups=sum(g.kept < g.width for g in groups),
            renormalising_groups=sum(g.kept < g.width and not g.exact for g in groups),
            redrawn=proof.redrawn,
        ),
        warnings=tuple(warnings),
    )  # fmt: skip


UNFITTED = (
    "the kept weights are as the cut left them: there is no --data, and nothing was made up for these inputs "
    "(for large pictures --samples N does so, however long it takes)"
)


UNSEEN = "data was given and not looked at: nothing is fitted (--recover none)"


def remarks_on(
    analysis: Analysis,
    method: Scorer,
    chosen: Chosen,
    limits: Mapping[str, float],
    alignment: int,
    unfitted: bool,
) -> list[str]:
    """What users should know of how channels were chosen."""
    choice = chosen.choice
    budgets = limits if chosen.latency is None else {}
    found = remarks_on_widths(analysis, choice.costs, choice.round_to, alignment, budgets)
    if chosen.unscored:
        names = ", ".join(analysis.groups[number].name for number in chosen.unscored)
        found.append(f"--scorer {method.name} says nothing of these groups, which stay whole: {names}")
    if unfitted:
        found.append(UNFITTED)
    return found


def remarks_on_widths(
    analysis: Analysis, costs: Costs, round_to: int, alignment: int, limits: Mapping[str, float]
) -> list[str]:
    """That widths are smaller multiples than was asked for, and that multiples leave much of a budget unused."""
    found = [_coarse(analysis, costs, round_to, limits)] if round_to > 1 else []
    if round_to < alignment:
        found.append(f"widths are multiples of {round_to} only: the budget leaves no room for {alignment}")
    return [remark for remark in found if remark]


def _coarse(analysis: Analysis, costs: Costs, round_to: int, limits: Mapping[str, float]) -> str:
    """That multiples cost more than the budget did, where it is much, as in small networks."""
    unused: dict[str, tuple[float, float]] = {}
    for metric, limit in limits.items():
        whole, got = (float(getattr(own, planner.METRIC[metric])) for own in (analysis.full, costs))
        if limit < whole:
            unused[metric] = got / whole, limit / whole
    if not unused:
        return ""
    metric, (got, most) = min(unused.items(), key=lambda item: item[1][1] - item[1][0])
    if most - got <= _UNUSED:
        return ""
    return (
        f"widths are multiples of {round_to}, which leaves {100 * got:.1f}% of --{metric} where "
        f"{100 * most:.1f}% may stay: --round-to 1 comes nearer"
    )
