"""`slimc.schedule`: a method that trains, on the user's data and in the user's loop if they have one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimc import building, eager, planner, recover, scores
from slimc.analysis import Analysis, Progress, Stages, analyse
from slimc.budget import Target
from slimc.choose import cut_of
from slimc.describe import facts_of, remarks_on_widths, results_of
from slimc.errors import UsageError
from slimc.losses import GIVE_LOSS, GIVE_METRIC, output_shape
from slimc.plan import weights_sha256
from slimc.random_state import kept_random_state
from slimc.report import Accuracy, Method, Training
from slimc.result import Compressed
from slimc.rewrite import rewrite
from slimc.samples import batch_of
from slimc.scores import Loss

from . import schedule as registry
from .feeds import Arrays, Pictures
from .folder import RunFolder
from .loop import Metric, check_own
from .network import Network
from .options import Options
from .precision import settled
from .recipe import Recipe
from .run import Run
from .stream import check_first, takes

MEND = ("reconstruct", "bn")
"""What `recover="auto"` does after every cut of a schedule."""


def schedule(
    name: str,
    model: nn.Module,
    example_inputs: Any,
    *,
    flops: str | float | None = None,
    params: str | float | None = None,
    size: str | float | None = None,
    memory: str | float | None = None,
    epochs: float,
    data: Iterable[Any] | None = None,
    val: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    recipe: Recipe | None = None,
    scorer: str = "auto",
    recover: str | Sequence[str] = "auto",
    settings: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    round_to: int | str = "auto",
    seed: int = 0,
    device: str | torch.device | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    model_name: str | None = None,
    data_name: str | None = None,
    progress: Progress | None = None,
) -> Run:
    """A run of one of `slimc methods`' schedules: iterate over its phases, then take `result`.

    model, example_inputs, flops ... memory, ignore, round_to, seed, device: as for `compress`. epochs: the whole
    training budget over `data`, fine-tuning included. data: batches of (inputs, targets), readable again and again;
    None where your own loop trains every phase. val: batches for the accuracy that is reported; nothing is chosen by it
    unless the recipe says so. test: batches that are looked at once, for the report. loss: takes outputs and targets,
    gives a mean; cross entropy if not given. metric: takes the same, larger is better; top-1 accuracy if not given.
    recipe: how phases train. scorer: for schedules that take one; "auto" is `obs` for `one-shot` and `iterative` where
    cuts are mended, else `magnitude`. recover: what is fitted without labels after every cut: "auto", "none" (the
    method as it was published) or a list, for schedules that fit. settings: the method's own. folder: where the run is
    kept, so that `resume` goes on with it. data_name: what the data is called; a run goes on with data of that name
    alone.
    Raises UsageError, CaptureError, UnreachableTarget, and what `compress` raises when the result is built.
    """
    method = registry.find(name)
    own = method.settings(settings or {})
    targets = building.targets_of(flops=flops, params=params, size=size, memory=memory)
    alignment, mend = building.alignment_of(round_to), _mending(method, recover, data)
    building.check_seed(seed)
    if resume and folder is not None:
        RunFolder.check_resumable(Path(folder))
    if not 0 < epochs < math.inf:
        raise UsageError(f"epochs is {epochs}; it must be a number above 0")
    epochs = float(epochs)
    if recipe is not None and val is None and (recipe.keep == "best" or recipe.patience):
        raise UsageError("keep='best' and patience need validation data (val=)")
    notes = []
    if scorer != "auto" and not method.ranks:
        notes.append(f"--scorer {scorer} was not used: the schedule {name} chooses channels by numbers of its own")
    if scorer == "auto":
        scorer = method.fitted_scorer if mend else "magnitude"
    chosen = scores.find(scorer)
    if chosen.needs != "weights" and data is None:
        raise UsageError(f"--scorer {scorer} needs data, and there is none")
    stages = Stages(progress)
    analysis = analyse(model, example_inputs, stages, device)
    limits = building.limits_of(targets, analysis, stages)
    ignored = tuple(analysis.matching(ignore))
    planner.check_reachable(
        analysis.grouping, analysis.cost, limits, round_to=alignment, may_relax=round_to == "auto", ignored=ignored
    )
    with stages.stage("data"):
        as_graph = _trains_as_graph(analysis, round_to == "auto", alignment, ignored, recipe or Recipe(), loss)
        data, val, test = (_in_batches_of_the_models(analysis, part, as_graph, notes) for part in (data, val, test))
        _check_data(analysis, data, val, test, loss, metric)
    if as_graph:
        notes.append("trained without the layers that only training uses, since these keep their sizes")
    about = {
        "model": weights_sha256(model), "schedule": name, "targets": {t.metric: t.text for t in targets},
        "epochs": epochs, "settings": own, "scorer": scorer, "recover": list(mend), "round_to": str(round_to),
        "seed": seed, "recipe": vars(recipe or Recipe()), "ignore": list(ignore), "data": data_name,
    }  # fmt: skip
    if recipe is not None and recipe.smoothing and loss is not None:
        notes.append("labels were not smoothed: loss= does with them what it does")
    taken = settled(recipe or Recipe(), analysis.model, analysis.captured.example)
    if taken != (recipe or Recipe()):
        notes.append("trained in float32: the model does not run in bfloat16")
    options = Options(limits, epochs, taken, scorer, alignment, round_to == "auto", mend, ignored, seed, own, as_graph)

    def finish(run: Run) -> Compressed:
        return _compressed(run, model, targets, model_name, test, notes)

    return Run(
        method, analysis, options, data=data, val=val, loss=loss, metric=metric, stages=stages,
        folder=None if folder is None else RunFolder(Path(folder), about), resume=resume, finish=finish,
    )  # fmt: skip


def _in_batches_of_the_models(
    analysis: Analysis, part: Iterable[Any] | None, as_graph: bool, notes: list[str]
) -> Iterable[Any] | None:
    """Files in batches of the only size that a model takes, if it takes one only."""
    captured = analysis.captured
    if captured.dynamic_shapes is not None or not isinstance(part, (Arrays, Pictures)):
        return part
    if not as_graph:
        with kept_random_state():
            first = next(iter(part), None)
        if first is None or takes(analysis.model, batch_of(first, captured.example)):
            return part
    note = f"trained and measured in batches of {captured.example.count}, the only size that the model takes"
    if note not in notes:
        notes.append(note)
    return part.in_batches_of(captured.example.count)


def _check_data(
    analysis: Analysis,
    data: Iterable[Any] | None,
    val: Iterable[Any] | None,
    test: Iterable[Any] | None,
    loss: Loss | None,
    metric: Metric | None,
) -> None:
    """UsageError before anything is trained, where a first batch does not fit the model, or a function of the user's
    does not take what the model gives for it."""
    parts = (("the training data", data, loss), ("the validation data", val, metric), ("the test data", test, metric))
    if isinstance(test, Iterator):
        raise UsageError("the test data can be read only once; give a DataLoader or a list of batches")
    captured = analysis.captured
    fixed = analysis.model if captured.dynamic_shapes is None else None
    for source, batches, own in parts:
        if batches is not None and not isinstance(batches, Iterator):
            trains = source == parts[0][0]
            give = GIVE_LOSS if trains else GIVE_METRIC
            output = None if own else output_shape(analysis.types, give)
            first = check_first(batches, captured.example, output, source, give, fixed)
            if own is not None:
                check_own(own, "loss" if trains else "metric", analysis.model, first, source)


def _trains_as_graph(
    analysis: Analysis, may_relax: bool, alignment: int, ignored: Sequence[int], recipe: Recipe, loss: Loss | None
) -> bool:
    """Whether the user's class, cut as far as can be, runs at inference only: then the graph is trained from the start.

    Raises UsageError where what is asked for needs the class.
    """
    model, example = analysis.model, analysis.captured.example
    cut = cut_of(analysis, planner.least(analysis.grouping, analysis.cost, alignment, may_relax, ignored))
    if cut.alive.all():
        return False
    own = eager.build(model, analysis.types, cut, rewrite(analysis.types, cut), example)
    fault = None if own.module is None else eager.training_fault(own.module, model, analysis.types)
    if recipe.features and (own.reason or fault):
        raise UsageError(f"features= needs {type(model).__name__} itself, and cut it is a graph: {own.reason or fault}")
    if fault and loss is not None and eager.outputs_differ(model, example):
        raise UsageError(
            f"{type(model).__name__} returns more in training than at inference, and cut it can't: {fault}. Switch its "
            "auxiliary heads off, and give a loss= for what it returns at inference"
        )
    return fault is not None


def _mending(method: registry.Schedule, wanted: str | Sequence[str], data: Iterable[Any] | None) -> tuple[str, ...]:
    steps = recover.asked(wanted, trains=True)
    if steps == ("auto",):
        return MEND if data is not None else ()
    if steps and data is None:
        raise UsageError(f"--recover {','.join(steps)} needs data to fit on")
    if "distill" in steps:
        raise UsageError(
            "distillation is part of a schedule's training: give --distil 0.5, or Recipe(distil=0.5) in Python, instead"
        )
    if steps and not method.mends:
        raise UsageError(f"--schedule {method.name} fits nothing after cuts: leave --recover {','.join(steps)} out")
    return steps


def _compressed(
    run: Run,
    model: nn.Module,
    targets: Sequence[Target],
    name: str | None,
    test: Iterable[Any] | None,
    notes: Sequence[str],
) -> Compressed:
    """The trained network as the result of one cut of the original: proven, described, with its plan."""
    network, options, analysis = run.network, run.options, run.analysis
    scorer = options.scorer if run.schedule.ranks else None
    round_to = planner.multiple_of(analysis.grouping, network.widths, options.round_to)
    how = {
        "scorer": scorer, "schedule": run.schedule.name, "epochs": options.epochs, "seed": options.seed,
        "round_to": round_to, "settings": dict(options.settings), "mended": list(run.mend),
    }  # fmt: skip
    facts = facts_of(model, targets, options.limits, how)
    results = results_of(targets, analysis.full, network.costs)
    method = Method(scorer, run.schedule.name, round_to, options.seed)
    warnings = list(notes) + [
        f"the gate of {place} was so small that its offset had to be limited: outputs may have moved by {moved:.2g}"
        for place, moved in network.clipped.items()
    ]
    warnings += remarks_on_widths(analysis, network.costs, round_to, options.round_to, options.limits)
    for scorer_name in sorted(set(run.unscored.values())):
        names = ", ".join(group for group, own in run.unscored.items() if own == scorer_name)
        warnings.append(f"--scorer {scorer_name} says nothing of these groups, which stay whole: {names}")
    with _trained(analysis, network):
        slim = building.build(analysis, network.cut_so_far, facts, results, method, run.stages, warnings, name)
    settings = {key: str(value) for key, value in options.settings.items()}
    before = run.accuracy_of(analysis.model)
    training = Training(
        run.schedule.name, options.epochs, before, settings, run.mend, tuple(run.history), run.metric_name
    )
    accuracy = _accuracy(run, slim, test)
    slim.report = replace(slim.report, training=training, accuracy=accuracy, seconds=dict(run.stages.seconds))
    return slim


def _accuracy(run: Run, slim: Compressed, test: Iterable[Any] | None) -> Accuracy | None:
    """Of the original and of the result, on the test data, else on the validation data; None without either."""
    modules = (run.analysis.model, slim.module)
    values = [run.accuracy_of(m) if test is None else run.accuracy_on(m, test) for m in modules]
    before, after = values
    if before is None or after is None:
        return None
    return Accuracy(run.metric_name, before, None, after, "validation" if test is None else "test")


@contextmanager
def _trained(analysis: Analysis, network: Network) -> Iterator[None]:
    """The original graph with the trained weights at the kept indices, for a while: what the proof masks and cuts."""
    cut, types = network.cut_so_far, analysis.types
    saved = {name: tensor.detach().clone() for name, tensor in types.weights.items()}
    try:
        with torch.no_grad():
            for name, small in network.tensors().items():
                index = [torch.from_numpy(cut.kept(axis).nonzero()[0]).to(small.device) for axis in types.tensors[name]]
                whole = types.weights[name]
                if index:
                    whole[torch.meshgrid(*index, indexing="ij")] = small.detach()
                else:
                    whole.copy_(small)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                types.weights[name].copy_(tensor)
