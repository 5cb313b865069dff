"""The command line. Imports of torch happen inside commands, so that `slimc --help` answers at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from . import commands
from .console import Console
from .errors import UsageError
from .options import (
    Allow,
    ApplyData,
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

_DEMO = Path("slimc-demo")

app = typer.Typer(
    name="slimc",
    help="Make a trained PyTorch model smaller: remove whole channels until a budget holds, prove it, export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="the version, and torch's", is_eager=True)] = False,
) -> None:
    """Answer --version; everything else is a command."""
    if version:
        from .describe import versions

        print(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


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
        from . import building, compiler, scores
        from . import recover as recovery
        from .choose import check_norm, check_select

        targets = commands.checked_targets(flops=flops, params=params, size=size, memory=memory, latency=latency)
        if scorer != "auto":
            scores.check(scores.find(scorer), normalise, data is not None)
        building.alignment_of(round_to)
        check_norm(norm, scorer)
        check_select(select)
        recovery.asked(recover, trains=epochs is not None)
        training = commands.training_options(schedule, epochs, rate, batch_size, distil, settings, resume, data)
        if training is None and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError("several processes are for training: give --epochs too, or start one process")
        one_cut: dict[str, Any] = {"norm": norm, "normalise": normalise, "select": select, "samples": samples}
        if training is not None and targets.pop("latency") is not None:
            raise UsageError(compiler.PACED)
        if training is not None and one_cut != {"norm": "l2", "normalise": "auto", "select": "greedy", "samples": None}:
            raise UsageError(
                "--norm, --normalise, --select and --samples are for one cut without training; leave them out"
            )
        # A run can be stopped between writing its result and being cleared: going on writes the same result again.
        overwrite = overwrite or (resume and training is not None)
        folder = commands.output_folder(out, model, overwrite, no_onnx)
        loaded, example = commands.opened(console, model, arch, allow, unsafe_pickle, input, threads, seed)
        options: dict[str, Any] = {
            **targets, "scorer": scorer, "recover": recover, "ignore": ignore or (), "round_to": round_to, "seed": seed,
            "progress": console.progress,
        }  # fmt: skip
        if training is None or data is None:
            slim = compiler.compress(loaded.model, example, **options, **one_cut, data=data, name=model)
            commands.finish(console, slim, folder, overwrite, no_onnx, no_latency, threads, loaded)
            return
        from .training.command import resumable

        kept = Path(f"{folder}-run")
        with resumable(kept):
            trained = training.run(loaded.model, example, data=data, folder=kept, model_name=model, **options)
            if trained is not None:
                commands.finish(console, trained, folder, overwrite, no_onnx, no_latency, threads, loaded)


@app.command()
def apply(
    model: ModelArg,
    plan: Annotated[Path, typer.Argument(help="plan.json of an earlier compression, edited or not")],
    recover: Recover = "none",
    data: ApplyData = None,
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
        folder = commands.output_folder(out, model, overwrite, no_onnx)
        loaded, example = commands.opened(console, model, arch, allow, unsafe_pickle, input, threads, seed or 0)
        slim = compiler.apply(
            loaded.model, cut, example,
            recover=recover, data=data, samples=samples, seed=seed, name=model, progress=console.progress,
        )  # fmt: skip
        commands.finish(console, slim, folder, overwrite, no_onnx, no_latency, threads, loaded)


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
        loaded, example = commands.opened(console, model, arch, allow, unsafe_pickle, input, None, seed)
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
    provider: Annotated[
        str, typer.Option(help="cpu, cuda, tensorrt, all of these that are there, or a name as ONNX Runtime has it")
    ] = "cpu",
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
            "threads": threads, "batch": batch, "budget_seconds": budget, "input_shapes": commands.shapes(input or []),
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
    """Train a small network on handwritten digits, cut it, fine-tune it, export it and measure it.

    Its default folder is written anew each time.
    """
    with Console(quiet, as_json, stages=12) as console:
        from .exporters.artifact import check_writable

        commands.checked_targets(flops=flops)
        overwrite = overwrite or out == _DEMO
        check_writable(out, overwrite)
        commands.set_threads(threads)
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
