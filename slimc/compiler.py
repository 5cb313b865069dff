"""The pipeline: compress, apply, inspect and load, each a list of stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import planner, scores
from . import recover as recovery
from .analysis import Analysis, Progress, Stages, analyse
from .building import alignment_of, build, check_seed, costs_of, limits_of, targets_of
from .choose import BETWEEN, How, check_norm, check_pace, check_select, choose
from .data import open_data
from .describe import UNFITTED, UNSEEN, facts_of, remarks_on, results_of, versions
from .errors import UsageError
from .graph.cost import Costs
from .graph.example import Example
from .graph.resize import Cut
from .pace import Pace
from .passes import check_splits
from .plan import Plan, scores_of, weights_sha256
from .random_state import kept_random_state
from .report import Method
from .result import Compressed
from .samples import FEWEST_MADE_UP, Samples, affordable, collect, made_up
from .synthetic import PICTURES, Invented, synthetic
from .varied import are_pictures, variants

__all__ = ["Compressed", "apply", "compress", "inspect"]

_FEW = 128
"""Fewer samples than this leave layers with more inputs than they show: others are made up beside them."""
_FEW_PICTURES, _VARIANTS = 256, 4
"""Fewer pictures than this are joined by so many variants of each; by fewer in models that take long."""
PACED = (
    "--latency is for one cut without training. Find the FLOPs that are fast enough with one cut (its report tells), "
    "then train with --flops"
)


@kept_random_state()
def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    flops: str | float | None = None,
    params: str | float | None = None,
    size: str | float | None = None,
    memory: str | float | None = None,
    latency: str | float | None = None,
    scorer: str = "auto",
    schedule: str = "one-shot",
    epochs: float | None = None,
    norm: str = "l2",
    normalise: str = "auto",
    select: str = "greedy",
    recover: str | Sequence[str] = "auto",
    data: Iterable[Any] | str | None = None,
    samples: int | None = None,
    val: Iterable[Any] | None = None,
    loss: scores.Loss | None = None,
    ignore: Sequence[str] = (),
    round_to: int | str = "auto",
    seed: int = 0,
    device: str | torch.device | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Remove whole channels until every budget holds, and prove the result.

    model: any nn.Module; it is left as it is. example_inputs: a tensor, a tuple of arguments or a dictionary.
    flops, params, size, memory: what may stay, as a share (0.4, "40%"), an amount ("1.6G", "20MB") or the cut
    ("-60%"). latency: the same of the time ("8ms") that the exported model takes in ONNX Runtime on this machine's
    CPU, batch 1, with torch's number of threads; cuts are measured until one is fast enough. round_to: widths
    become multiples of this; "auto" takes what this machine's runtime likes and gives way where the budget needs
    it. data: batches to score and recover on, labels only where the scorer needs them, up to `samples` of them, or
    what --data takes; without it pictures or tokens are made up. scorer: "auto" is `obs` where there are samples,
    else `magnitude`; with recover "none" none are made up for it. recover: "auto" (all that the samples allow),
    "none" or a list. loss: takes outputs and targets, gives a mean over samples; cross entropy if not given.
    schedule, epochs, val: train while cutting, on `data` with labels; see `slimc.schedule`, which also takes the
    methods' settings. normalise: how groups are made comparable ("mean", "max", "l2", "cost", "isomorphic", "none";
    "auto" is what suits the scorer). select: "greedy", by one ranking, or "exact", whose widths integer programming
    proves to be the best or near them.
    Raises UsageError, CaptureError, UnreachableTarget, VerificationError.
    """
    if schedule != "one-shot" or epochs is not None:
        if norm != "l2" or normalise != "auto" or select != "greedy" or samples is not None:
            raise UsageError("norm, normalise, select and samples are for one cut without training; leave them out")
        from .training.api import schedule as start
        from .training.schedule import find

        find(schedule)
        if latency is not None:
            raise UsageError(PACED)
        if isinstance(data, str):
            raise UsageError(f"data={data!r} is for one cut; to train give loaders as data= and val=")
        if epochs is None:
            raise UsageError(f"--schedule {schedule} trains: give --epochs, how often it may see the data")
        trained: Compressed = start(
            schedule, model, example_inputs, flops=flops, params=params, size=size, memory=memory, epochs=epochs,
            data=data, val=val, loss=loss, scorer=scorer, recover=recover, ignore=ignore, round_to=round_to, seed=seed,
            device=device, model_name=name, progress=progress,
        ).result  # fmt: skip
        return trained
    targets = targets_of(flops=flops, params=params, size=size, memory=memory, latency=latency)
    alignment, wanted = alignment_of(round_to), recovery.asked(recover)
    check_select(select)
    check_seed(seed)
    check_norm(norm, scorer)
    if scorer == "auto" and norm != "l2":
        scorer = "magnitude"  # the only one that takes a norm
    source = _opened(data, example_inputs)
    is_given = source is not None and not isinstance(source, Invented)
    scores.check(scores.find("obs" if scorer == "auto" else scorer), normalise, is_given)
    if val is not None:
        raise UsageError("val is for training: give epochs too")
    stages = Stages(progress)
    analysis = analyse(model, example_inputs, stages, device)
    limits, ignored = limits_of(targets, analysis, stages), tuple(analysis.matching(ignore))
    pace = next((Pace(analysis, target, stages) for target in targets if target.metric == "latency"), None)
    planner.check_reachable(
        analysis.grouping, analysis.cost, limits, round_to=alignment, may_relax=round_to == "auto", ignored=ignored
    )
    options = How(normalise, select, alignment, round_to == "auto", ignored, pace)
    check_pace(analysis, options)
    # With --recover none, data that is given is for the ranking.
    needed = bool(wanted) or (source is not None if scorer == "auto" else scores.find(scorer).needs != "weights")
    calibration = gather(analysis, source, samples, seed, stages) if needed else None
    steps = recovery.possible(wanted, calibration)
    method = scores.find(scorer if scorer != "auto" else "obs" if calibration else "magnitude")
    if method.needs != "weights" and calibration is None:
        raise UsageError(f"--scorer {method.name} needs --data: its samples cannot be made up for these inputs")
    extra = _beside(analysis, calibration, seed, stages) if steps and method.needs != "labels" else []
    # What judges recovery is not scored on.
    fit = recovery.set_aside(calibration)[0] if calibration and steps else calibration
    fit = fit.with_more(extra) if fit else fit
    subject = scores.Subject(analysis.types, analysis.grouping, norm, seed, fit, loss, stages.tick)
    # Each step scores and fits again, a minute or two in a large model: for those who care enough to bring samples. Few
    # samples fit layers too loosely for that: with 32 the result was further off than by a choice at once.
    enough = is_given and calibration is not None and calibration.count >= _FEW
    between = fit if enough and BETWEEN in steps else None
    chosen = choose(analysis, method, subject, limits, options, stages, between)
    choice = chosen.choice
    how = {
        "scorer": method.name, "norm": norm, "schedule": "one-shot", "steps": chosen.steps,
        "round_to": choice.round_to, "seed": seed,
    }  # fmt: skip
    amounts = limits if pace is None else {**limits, "latency": pace.limit}
    facts = facts_of(model, targets, amounts, how) | {"scores": scores_of(analysis.grouping, chosen.scores)}
    results = results_of(targets, analysis.full, choice.costs)
    if chosen.latency is not None:
        results["latency"] = chosen.latency
    described = Method(method.name, "one-shot", choice.round_to, seed)
    warnings = remarks_on(analysis, method, chosen, limits, alignment, bool(wanted) and not calibration)
    if not needed and source is not None:
        warnings.append(f"{UNSEEN}, and --scorer {method.name} takes weights alone")
    slim = build(analysis, chosen.cut, facts, results, described, stages, warnings, name)
    slim.report = replace(slim.report, selection=chosen.selection)
    if steps and calibration:
        slim.fit(steps, calibration, extra, in_order=wanted != ("auto",))
    return slim


@kept_random_state()
def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    recover: str | Sequence[str] = "none",
    data: Iterable[Any] | str | None = None,
    samples: int | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Make the same cut in another checkpoint of the same architecture, and prove it again.

    recover, data, samples: as for `compress`, but nothing is fitted unless asked for. seed: the plan's unless given.
    Raises PlanError naming the first mismatch where the plan was made for another architecture, or was edited so that
    coupled indices no longer go together.
    """
    stages, wanted = Stages(progress), recovery.asked(recover)
    source = _opened(data, example_inputs)
    if not isinstance(plan, Plan):
        raise UsageError(f"plan is a {type(plan).__name__}; give a Plan, such as slimc.Plan.load(path)")
    method = plan.method
    round_to, planned = method.get("round_to"), method.get("seed")
    if seed is None:
        seed = planned if isinstance(planned, int) else 0
    check_seed(seed)
    analysis = analyse(model, example_inputs, stages, device)
    with stages.stage("plan"):
        cut = Cut(analysis.types, plan.alive(analysis.types))
    scorer = method.get("scorer", "plan")
    schedule, multiples = str(method.get("schedule", "plan")), round_to if isinstance(round_to, int) else 1
    chosen = Method(None if scorer is None else str(scorer), schedule, multiples, seed)
    facts = {
        "targets": _holding(plan.targets, costs_of(analysis, cut)), "scores": plan.scores, "method": method,
        "versions": versions(), "source_sha256": weights_sha256(model),
    }  # fmt: skip
    calibration = gather(analysis, source, samples, seed, stages) if wanted else None
    steps = recovery.possible(wanted, calibration)
    warnings = [UNFITTED] if wanted and not calibration else []
    if not wanted and source is not None:
        warnings.append(UNSEEN)
    slim = build(analysis, cut, facts, {}, chosen, stages, warnings, name)
    if calibration and steps:
        extra = _beside(analysis, calibration, seed, stages)
        slim.fit(steps, calibration, extra, in_order=wanted != ("auto",))
    return slim


def inspect(model: nn.Module, example_inputs: Any, *, progress: Progress | None = None) -> Analysis:
    """What can be removed, what is coupled, and what is frozen and why."""
    return analyse(model, example_inputs, Stages(progress))


# -- stages -------------------------------------------------------------------------------------------


def _opened(data: Iterable[Any] | str | None, example_inputs: Any) -> Iterable[Any] | Invented | None:
    """The user's batches, or the kind of samples that are to be made up."""
    if not isinstance(data, str):
        return data
    kind = data.removeprefix("synthetic:")
    return open_data(data, Example.of(example_inputs)) if kind == data else Invented(kind)


def gather(
    analysis: Analysis, data: Iterable[Any] | Invented | None, limit: int | None, seed: int, stages: Stages
) -> Samples | None:
    """The samples to score and recover on: from the user's data, else made up; None where that cannot be.

    UsageError where a kind is asked for that the model does not take.
    """
    captured = analysis.captured
    if limit is not None and not (isinstance(limit, int) and limit >= 2):
        raise UsageError(f"--samples {limit}: at least 2 are needed, one to fit on and one to judge by")
    kind = data.kind if isinstance(data, Invented) else None
    if data is not None and not isinstance(data, Invented):
        fixed = captured.batch if captured.dynamic_shapes is None else None
        with stages.stage("data"):
            found = collect(data, captured.example, limit or affordable(analysis.work), fixed)
            check_splits(captured, found)
            return found
    count = made_up(analysis.work) if limit is None else limit
    if kind is not None:
        count = count or FEWEST_MADE_UP
    if not count:
        return None
    with stages.stage("synthesise"):
        made = synthetic(captured, count, analysis.work, seed, kind)
    if kind is not None and made is None:
        takes = "one input of pictures" if kind in PICTURES else "tokens that a table is looked up with"
        raise UsageError(f"--data synthetic:{kind}: this model does not take {takes}")
    return made


def _beside(analysis: Analysis, calibration: Samples | None, seed: int, stages: Stages) -> list[Samples]:
    """What is made up beside the user's samples where they are few: variants of pictures; of very few, others too."""
    enough = affordable(analysis.work)
    if calibration is None or calibration.invented or calibration.count >= min(_FEW_PICTURES, max(enough, _FEW)):
        return []
    others = made_up(analysis.work) if calibration.count < _FEW else 0
    own = recovery.set_aside(calibration)[0]
    if not others and not are_pictures(own):
        return []
    with stages.stage("synthesise"):
        found = [variants(own, min(_VARIANTS * own.count, 3 * enough - calibration.count), seed)]
        if others:
            found.append(synthetic(analysis.captured, others, analysis.work, seed))
    return [samples for samples in found if samples]


def _holding(targets: Mapping[str, Any], costs: Costs) -> dict[str, Any]:
    """A plan's targets without those that it does not meet since it was edited; of a latency that is not known."""
    found = {}
    for metric, target in targets.items():
        got = getattr(costs, planner.METRIC.get(metric, ""), None)
        limit = target.get("limit") if isinstance(target, dict) else None
        if got is None or not isinstance(limit, (int, float)) or got <= limit:
            found[metric] = target
    return found
