"""The command line. Imports of torch happen inside commands, so that `slimc --help` answers at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Console
from .errors import UsageError
from .options import (
    Allow,
    Arch,
    BatchSize,
    Data,
    Distil,
    Epochs,
    Flops,
    Ignore,
    Input,
    Json,
    LatencyTarget,
    Memory,
    ModelArg,
    NoLatency,
    NoOnnx,
    Norm,
    Normalise,
    Out,
    Overwrite,
    Params,
    PlanSeed,
    Quiet,
    Rate,
    Recover,
    Resume,
    RoundTo,
    SamplesOption,
    Schedule,
    Scorer,
    Seed,
    Select,
    Setting,
    Size,
    Still,
    Threads,
    UnsafePickle,
)

if TYPE_CHECKING:
    from .graph.example import Example
    from .loading import Loaded

_DEMO = Path("slimc-demo")

app = typer.Typer(
    name="slimc",
    help="Make a trained PyTorch model smaller: remove whole channels until a budget holds, prove it, export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def compress(
    model: ModelArg,
    flops: Flops = None,
    params: Params = None,
    size: Size = None,
    memory: Memory = None,
    latency: LatencyTarget = None,
    scorer: Scorer = "auto",
    schedule: Schedule = "one-shot",
    epochs: Epochs = None,
    rate: Rate = None,
    batch_size: BatchSize = None,
    distil: Distil = 0.0,
    settings: Setting = None,
    resume: Resume = False,
    norm: Norm = "l2",
    normalise: Normalise = "auto",
    select: Select = "greedy",
    recover: Recover = "auto",
    data: Data = None,
    samples: SamplesOption = None,
    ignore: Ignore = None,
    round_to: RoundTo = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    input: Input = None,
    arch: Arch = None,
    allow: Allow = None,
    unsafe_pickle: UnsafePickle = False,
    no_onnx: NoOnnx = False,
    no_latency: NoLatency = False,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress MODEL until every target holds, prove the result, export and measure it."""
    # Of several processes that train together the first one speaks.
    with Console(quiet or os.environ.get("RANK", "0") != "0", as_json, stages=12) as console:
        from . import compiler, scores
        from . import recover as recovery
        from .choose import check_norm, check_select

        targets = _targets(flops=flops, params=params, size=size, memory=memory, latency=latency)
        if scorer != "auto":
            scores.check(scores.find(scorer), normalise, data is not None)
        compiler.alignment_of(round_to)
        check_norm(norm, scorer)
        check_select(select)
        recovery.asked(recover, trains=epochs is not None)
        training = _training_options(schedule, epochs, rate, batch_size, distil, settings, resume, data)
        one_cut: dict[str, Any] = {"norm": norm, "normalise": normalise, "select": select, "samples": samples}
        if training is not None and targets.pop("latency") is not None:
            raise UsageError(compiler.PACED)
        if training is not None and one_cut != {"norm": "l2", "normalise": "auto", "select": "greedy", "samples": None}:
            raise UsageError(
                "--norm, --normalise, --select and --samples are for one cut without training; leave them out"
            )
        # A run can be stopped between writing its result and being cleared: going on writes the same result again.
        overwrite = overwrite or (resume and training is not None)
        folder = _folder(out, model, overwrite)
        loaded, example = _open(console, model, arch, allow, unsafe_pickle, input, threads, seed)
        options: dict[str, Any] = {
            **targets, "scorer": scorer, "recover": recover, "ignore": ignore or (), "round_to": round_to, "seed": seed,
            "progress": console.progress,
        }  # fmt: skip
        if training is None or data is None:
            slim = compiler.compress(loaded.model, example, **options, **one_cut, data=data, name=model)
            _finish(console, slim, folder, overwrite, no_onnx, no_latency, threads, loaded)
            return
        from .training.command import resumable

        kept = Path(f"{folder}-run")
        with resumable(kept):
            trained = training.run(loaded.model, example, data=data, folder=kept, model_name=model, **options)
            if trained is not None:
                _finish(console, trained, folder, overwrite, no_onnx, no_latency, threads, loaded)


@app.command()
def apply(
    model: ModelArg,
    plan: Annotated[Path, typer.Argument(help="plan.json of an earlier compression, edited or not")],
    recover: Recover = "none",
    data: Data = None,
    samples: SamplesOption = None,
    out: Out = None,
    overwrite: Overwrite = False,
    input: Input = None,
    arch: Arch = None,
    allow: Allow = None,
    unsafe_pickle: UnsafePickle = False,
    no_onnx: NoOnnx = False,
    no_latency: NoLatency = False,
    seed: PlanSeed = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the same cut in another checkpoint of the same architecture."""
    with Console(quiet, as_json, stages=11) as console:
        from . import compiler
        from . import recover as recovery
        from .plan import Plan

        if not recovery.asked(recover) and (data is not None or samples is not None):
            raise UsageError("--data and --samples are for the fit after the cut: give --recover auto too")
        cut = Plan.load(plan)
        folder = _folder(out, model, overwrite)
        loaded, example = _open(console, model, arch, allow, unsafe_pickle, input, threads, seed or 0)
        slim = compiler.apply(
            loaded.model, cut, example,
            recover=recover, data=data, samples=samples, seed=seed, name=model, progress=console.progress,
        )  # fmt: skip
        _finish(console, slim, folder, overwrite, no_onnx, no_latency, threads, loaded)


@app.command()
def inspect(
    model: ModelArg,
    input: Input = None,
    arch: Arch = None,
    allow: Allow = None,
    unsafe_pickle: UnsafePickle = False,
    dot: Annotated[bool, typer.Option("--dot", help="the dependency graph for Graphviz")] = False,
    types: Annotated[bool, typer.Option("--types", help="the channel types of every value")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Still = False,
) -> None:
    """Show what can be removed from MODEL, what is coupled, and what is frozen and why."""
    with Console(quiet, as_json, stages=4) as console:
        from . import compiler, inspection
        from .graph.view import to_dot

        if as_json and (dot or types):
            raise UsageError("--json is a summary as data; leave out --dot and --types, or --json")
        if dot and types:
            raise UsageError("--dot and --types are two ways of showing the model: give one of them")
        loaded, example = _open(console, model, arch, allow, unsafe_pickle, input, None, seed)
        for note in loaded.notes:
            console.progress("note", note)
        analysis = compiler.inspect(loaded.model, example, progress=console.progress)
        if dot:
            print(to_dot(analysis.to_networkx()), end="")
        elif types:
            print(analysis.dump(), end="")
        elif as_json:
            console.result(inspection.summary(analysis, model))
        else:
            console.inspection(inspection.summary(analysis, model))


@app.command()
def latency(
    before: Annotated[Path, typer.Argument(metavar="A.onnx", help="an ONNX file")],
    after: Annotated[
        Path | None, typer.Argument(metavar="[B.onnx]", help="another, measured in turn with the first")
    ] = None,
    provider: Annotated[str, typer.Option(help="cpu, cuda, tensorrt, or all that are there")] = "cpu",
    batch: Annotated[int | None, typer.Option(min=1, help="batch size where the file leaves it open")] = None,
    budget: Annotated[float, typer.Option(min=0.1, max=86_400, help="seconds to measure for")] = 10.0,
    input: Annotated[
        list[str] | None, typer.Option("--input", help="NAME=1x128: an input's sizes, where the file leaves them open")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Still = False,
) -> None:
    """Measure one ONNX file, or two in turn, with a confidence interval of the ratio."""
    with Console(quiet, as_json) as console:
        from dataclasses import asdict

        from .exporters.latency import measure, measure_all

        console.progress("stage", "latency")
        options: dict[str, Any] = {
            "threads": threads, "batch": batch, "budget_seconds": budget, "input_shapes": _shapes(input or []),
        }  # fmt: skip
        results = (
            measure_all(before, after, **options)
            if provider == "all"
            else (measure(before, after, provider=provider, **options),)
        )
        if provider != "all" and results[0].skipped is not None:
            raise UsageError(f"--provider {provider}: {results[0].skipped}")
        if as_json:
            console.result([asdict(result) for result in results])
        else:
            console.latency(results)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="output folder")] = _DEMO,
    flops: Annotated[str, typer.Option(help="what may stay of the FLOPs")] = "0.4",
    seed: Seed = 0,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small network on handwritten digits, compress it, recover it, export it and measure it."""
    with Console(quiet, as_json, stages=12) as console:
        from .exporters.artifact import check_writable

        _targets(flops=flops)
        overwrite = overwrite or out == _DEMO
        check_writable(out, overwrite)
        _threads(threads)
        from .demo import run

        slim = run(out, flops=flops, seed=seed, threads=threads, overwrite=overwrite, progress=console.progress)
        if as_json:
            console.result(slim.report.to_dict())
        else:
            console.report(slim.report, out)


@app.command()
def methods(as_json: Json = False) -> None:
    """List scorers, schedules and recovery steps, each with what it needs and its source."""
    with Console(False, as_json) as console:
        from .inspection import methods as known

        if as_json:
            console.result(known())
        else:
            console.methods(known())


# -- shared by commands -------------------------------------------------------------------------------


def _folder(out: Path | None, model: str, overwrite: bool) -> Path:
    """The output folder, checked before anything slow."""
    from .exporters.artifact import check_writable

    folder = out or Path(f"{_short(model)}-slim")
    check_writable(folder, overwrite)
    return folder


def _short(model: str) -> str:
    if ":" in model and os.sep not in model:
        return model.rpartition(":")[2] or "model"
    return Path(model).stem or "model"


def _open(
    console: Console,
    model: str,
    arch: str | None,
    allow: list[str] | None,
    unsafe_pickle: bool,
    inputs: list[str] | None,
    threads: int | None,
    seed: int,
) -> tuple[Loaded, Example]:
    console.progress("stage", "load")
    _threads(threads)
    from .inputs import example_inputs
    from .loading import load

    if unsafe_pickle:
        console.progress("note", "--unsafe-pickle: the file may run any code while it is read")
    loaded = load(model, arch=arch, allow=allow or (), unsafe_pickle=unsafe_pickle)
    console.progress("stage", "input")
    return loaded, example_inputs(inputs or [], loaded.input_shape, seed, loaded.batch, loaded.model, loaded.notes)


def _targets(**given: str | None) -> dict[str, str | None]:
    """What the targets say, checked before anything slow."""
    from . import budget

    for metric, text in given.items():
        if text is not None:
            budget.parse(metric, text)
    if not any(given.values()):
        names = ", ".join(f"--{metric}" for metric in given)
        raise UsageError(f"no target: give at least one of {names}, such as --flops 0.4")
    return given


def _training_options(
    schedule: str,
    epochs: float | None,
    rate: float | None,
    batch_size: int | None,
    distil: float,
    settings: list[str] | None,
    resume: bool,
    data: str | None,
) -> Any:
    """What the options say of training, checked before anything slow; None where nothing is trained."""
    if schedule == "one-shot" and epochs is None:
        given = {"--rate": rate, "--batch-size": batch_size, "--set": settings, "--resume": resume, "--distil": distil}
        for name, value in given.items():
            if value:
                raise UsageError(f"{name} is for training: give --epochs too")
        return None
    from .training.command import Training
    from .training.schedule import find

    find(schedule)
    if epochs is None:
        raise UsageError(f"--schedule {schedule} trains: give --epochs, how often it may see the data")
    if data is None:
        raise UsageError("--epochs trains with labels: give --data")
    return Training(schedule, epochs, rate, batch_size, distil, settings or [], resume)


def _shapes(given: list[str]) -> dict[str, tuple[int, ...]]:
    found = {}
    for text in given:
        name, _, sizes = text.rpartition("=")
        if not name or not all(size.isdecimal() and int(size) for size in sizes.split("x")):
            raise UsageError(f"--input {text}: wanted the name of an input and its sizes, as in input_ids=1x128")
        found[name] = tuple(int(size) for size in sizes.split("x"))
    return found


def _threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _finish(
    console: Console,
    slim: Any,
    folder: Path,
    overwrite: bool,
    no_onnx: bool,
    no_latency: bool,
    threads: int | None,
    loaded: Loaded,
) -> None:
    slim.warn(loaded.notes)
    slim.save(folder, overwrite=overwrite, onnx=not no_onnx, latency=not no_latency, threads=threads)
    if console.as_json:
        console.result(slim.report.to_dict())
    else:
        console.report(slim.report, folder)
