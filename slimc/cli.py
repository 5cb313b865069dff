"""The command line. Imports of torch happen inside commands, so that `slimc --help` answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .console import Console
from .errors import SlimcError, UsageError

if TYPE_CHECKING:
    from .graph.capture import Example
    from .loading import Loaded

app = typer.Typer(
    name="slimc",
    help="Make a trained PyTorch model smaller: remove whole channels until a budget holds, prove it, export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="model.pt, .safetensors, .pt2, .onnx, torchvision:NAME, timm:NAME, hf:PATH or package.module:factory")]  # fmt: skip  # noqa: E501
Arch = Annotated[str | None, typer.Option(help="architecture of a file that holds weights only: torchvision:resnet50")]
Allow = Annotated[list[str] | None, typer.Option(metavar="PKG", help="package whose classes a .pt file may use")]
UnsafePickle = Annotated[bool, typer.Option("--unsafe-pickle", help="unpickle MODEL without protection: the file can run any code")]  # fmt: skip  # noqa: E501
Input = Annotated[list[str] | None, typer.Option(metavar="SHAPE|FILE", help="example input: 1x3x224x224, 1x128:int64 (repeat for several) or an .npz file")]  # fmt: skip  # noqa: E501
Threads = Annotated[int | None, typer.Option(min=1, help="threads for computing and for the latency measurement")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no summary; errors only")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier result in --out")]
NoLatency = Annotated[bool, typer.Option("--no-latency", help="do not measure latency")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="output folder (default: MODEL-slim)")]
Recover = Annotated[str, typer.Option(help="auto (all that the samples allow, kept where it helps), none (the plain cut), or a list; see `slimc methods`")]  # fmt: skip  # noqa: E501
Data = Annotated[str | None, typer.Option(help="samples to score and recover on: fashion-mnist:DIR, imagefolder:DIR, npz:FILE or package.module:function; made up if not given")]  # fmt: skip  # noqa: E501
SamplesOption = Annotated[int | None, typer.Option("--samples", min=2, help="how many samples to use at most (default: up to 512, fewer for large models)")]  # fmt: skip  # noqa: E501
Schedule = Annotated[str, typer.Option(help="how it is cut and trained; see `slimc methods`")]
Epochs = Annotated[float | None, typer.Option(min=0.0, help="train with labels: passes over --data in all, fine-tuning included")]  # fmt: skip  # noqa: E501
BatchSize = Annotated[int | None, typer.Option(min=1, help="samples in a training batch (default 128)")]
Rate = Annotated[float | None, typer.Option(help="peak learning rate (default: 0.05, 0.0005 for transformers)")]
Distil = Annotated[float, typer.Option(help="share of the training loss that draws to the original's outputs, 0 to 1")]
Setting = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a setting of the schedule")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with an interrupted training run (OUT-run)")]
Seed = Annotated[int, typer.Option(help="seed of everything random")]


@app.command()
def compress(
    model: ModelArg,
    flops: Annotated[
        str | None, typer.Option(help="what may stay: 0.4, 40%, 1.6G (MACs of one sample), or the cut: -60%")
    ] = None,
    params: Annotated[str | None, typer.Option(help="parameters that may stay: 0.4, 40%, 12M")] = None,
    size: Annotated[str | None, typer.Option(help="bytes of weights that may stay: 0.4, 20MB")] = None,
    memory: Annotated[str | None, typer.Option(help="peak bytes of activations that may stay: 0.4, 8MB")] = None,
    scorer: Annotated[str, typer.Option(help="which channels matter; see `slimc methods`")] = "auto",
    schedule: Schedule = "one-shot",
    epochs: Epochs = None,
    rate: Rate = None,
    batch_size: BatchSize = None,
    distil: Distil = 0.0,
    settings: Setting = None,
    resume: Resume = False,
    norm: Annotated[str, typer.Option(help="l1 or l2, for magnitude; l1 chooses it")] = "l2",
    normalise: Annotated[
        str,
        typer.Option(
            help="how groups are made comparable: mean, max, l2, cost, isomorphic, none; auto: what suits the scorer"
        ),
    ] = "auto",
    select: Annotated[
        str, typer.Option(help="greedy: by one ranking; exact: the most score within the targets (slower)")
    ] = "greedy",
    recover: Recover = "auto",
    data: Data = None,
    samples: SamplesOption = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="modules or parameters to leave whole")
    ] = None,
    round_to: Annotated[
        str, typer.Option(help="widths become multiples of N; auto: what this machine likes; 1: any")
    ] = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    input: Input = None,
    arch: Arch = None,
    allow: Allow = None,
    unsafe_pickle: UnsafePickle = False,
    no_latency: NoLatency = False,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress MODEL until every target holds, prove the result, export and measure it."""
    # Of several processes that train together the first one speaks.
    with Console(quiet or os.environ.get("RANK", "0") != "0", as_json, stages=12) as console:
        from . import budget, compiler, scores
        from .data import open_data

        targets: dict[str, Any] = {"flops": flops, "params": params, "size": size, "memory": memory}
        for metric, text in targets.items():
            if text is not None:
                budget.parse(metric, text)  # before anything slow
        if not any(targets.values()):
            raise UsageError("no target: give at least one of --flops, --params, --size, --memory, such as --flops 0.4")
        if scorer != "auto":
            scores.check(scores.find(scorer), normalise, data is not None)
        compiler.alignment_of(round_to)
        compiler.recover_steps(recover)
        training = _training_options(schedule, epochs, rate, batch_size, distil, settings, resume, data)
        # A run can be stopped between writing its result and being cleared: going on writes the same result again.
        overwrite = overwrite or (resume and training is not None)
        folder = _folder(out, model, overwrite)
        loaded, example = _open(console, model, arch, allow, unsafe_pickle, input, threads, seed)
        if training is not None and (norm != "l2" or normalise != "auto" or select != "greedy" or samples is not None):
            raise UsageError(
                "--norm, --normalise, --select and --samples are for one cut without training; leave them out"
            )
        if training is not None and data is not None:
            from .training.command import resumable

            kept = Path(f"{folder}-run")
            with resumable(kept):
                slim = training.run(
                    loaded.model, example, data=data, folder=kept, **targets, scorer=scorer, recover=recover,
                    ignore=ignore or (), round_to=round_to, seed=seed, model_name=model, progress=console.progress,
                )  # fmt: skip
                if slim is not None:
                    _finish(console, slim, folder, overwrite, no_latency, threads, loaded)
            return
        batches = open_data(data, example) if data else None
        slim = compiler.compress(
            loaded.model,
            example,
            **targets,
            scorer=scorer,
            norm=norm,
            normalise=normalise,
            select=select,
            recover=recover,
            data=batches,
            samples=samples,
            ignore=ignore or (),
            round_to=round_to,
            seed=seed,
            name=model,
            progress=console.progress,
        )
        _finish(console, slim, folder, overwrite, no_latency, threads, loaded)


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
    no_latency: NoLatency = False,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the same cut in another checkpoint of the same architecture."""
    with Console(quiet, as_json, stages=11) as console:
        from . import compiler
        from .data import open_data
        from .plan import Plan

        compiler.recover_steps(recover)
        cut = Plan.load(plan)
        folder = _folder(out, model, overwrite)
        loaded, example = _open(console, model, arch, allow, unsafe_pickle, input, threads, seed)
        batches = open_data(data, example) if data else None
        slim = compiler.apply(
            loaded.model, cut, example,
            recover=recover, data=batches, samples=samples, name=model, progress=console.progress,
        )  # fmt: skip
        _finish(console, slim, folder, overwrite, no_latency, threads, loaded)


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
    quiet: Quiet = False,
) -> None:
    """Show what can be removed from MODEL, what is coupled, and what is frozen and why."""
    with Console(quiet, as_json, stages=4) as console:
        from . import compiler, inspection
        from .graph.view import to_dot

        loaded, example = _open(console, model, arch, allow, unsafe_pickle, input, None, seed)
        analysis = compiler.inspect(loaded.model, example, progress=console.progress)
        if dot:
            print(to_dot(analysis.to_networkx()), end="")
        elif types:
            print(analysis.dump(), end="")
        elif as_json:
            print(json.dumps(inspection.summary(analysis, model), indent=2))
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
    budget: Annotated[float, typer.Option(min=0.1, help="seconds to measure for")] = 10.0,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure one ONNX file, or two in turn, with a confidence interval of the ratio."""
    with Console(quiet, as_json) as console:
        from dataclasses import asdict

        from .exporters.latency import measure, measure_all

        console.progress("stage", "latency")
        options: dict[str, Any] = {"threads": threads, "batch": batch, "budget_seconds": budget}
        results = (
            measure_all(before, after, **options)
            if provider == "all"
            else (measure(before, after, provider=provider, **options),)
        )
        if as_json:
            print(json.dumps([asdict(result) for result in results], indent=2, default=str))
        else:
            console.latency(results)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="output folder")] = Path("slimc-demo"),
    flops: Annotated[str, typer.Option(help="what may stay of the FLOPs")] = "0.4",
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small network on handwritten digits, compress it, recover it, export it and measure it."""
    with Console(quiet, as_json, stages=12) as console:
        from .exporters.artifact import check_writable

        check_writable(out, overwrite=True)
        _threads(threads)
        from .demo import run

        slim = run(out, flops=flops, seed=seed, threads=threads, progress=console.progress)
        if as_json:
            print(json.dumps(slim.report.to_dict(), indent=2))
        else:
            console.report(slim.report, out)


@app.command()
def methods(as_json: Json = False) -> None:
    """List scorers and recovery steps, each with one line and its source."""
    with Console(False, as_json) as console:
        from .inspection import methods as known

        if as_json:
            print(json.dumps(known(), indent=2))
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
    return Path(model).stem if os.sep in model or Path(model).suffix else model.rpartition(":")[2] or "model"


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
    return loaded, example_inputs(inputs or [], loaded.input_shape, seed, loaded.batch)


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
    if epochs is None:
        raise UsageError(f"--schedule {schedule} trains: give --epochs, how often it may see the data")
    if data is None:
        raise UsageError("--epochs trains with labels: give --data")
    from .training.command import Training

    return Training(schedule, epochs, rate, batch_size, distil, settings or [], resume)


def _threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _finish(
    console: Console, slim: Any, folder: Path, overwrite: bool, no_latency: bool, threads: int | None, loaded: Loaded
) -> None:
    slim.warn(loaded.notes)
    slim.save(folder, overwrite=overwrite, latency=not no_latency, threads=threads)
    if console.as_json:
        print(json.dumps(slim.report.to_dict(), indent=2))
    else:
        console.report(slim.report, folder)


def main() -> NoReturn:
    """Run the command line; errors become one message and an exit code."""
    # Threads that wait must sleep: with other programs on the cores, OpenMP's spinning was measured to make a proof
    # of mobilenet_v2 take 116 s instead of 1.4 s. Read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # `torch.load` of a dependency must not unpickle either, unless the user says so.
    if "--unsafe-pickle" not in sys.argv:
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    if not os.environ.get("SLIMC_DEBUG"):
        warnings.simplefilter("ignore")  # torch's remarks about itself; what users should know is in the report
    sys.exit(_guarded(app))


def _terminated(number: int, frame: Any) -> None:
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(number, frame)
    else:
        raise KeyboardInterrupt


def _guarded(command: Callable[[], Any]) -> int:
    # A terminated run cleans up like an interrupted one, also where interrupts are ignored (behind nohup or &).
    signal.signal(signal.SIGTERM, _terminated)
    try:
        command()
    except SlimcError as error:
        print(f"slimc: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit) as end:
        # Typer makes an exit with this code of an interrupt.
        code = 130 if isinstance(end, KeyboardInterrupt) else end.code if isinstance(end.code, int) else 1
        if code == 130:
            print("slimc: interrupted; nothing was written. Run the same command again to start over.", file=sys.stderr)
        return code
    except MemoryError:
        print("slimc: out of memory. Give a smaller example with --input, or run on a larger machine.", file=sys.stderr)
        return 2
    except Exception as error:
        if os.environ.get("SLIMC_DEBUG"):
            raise
        print(
            f"slimc: internal error: {type(error).__name__}: {error}\n"
            "This is a fault of slimc. SLIMC_DEBUG=1 shows where; please report it with the model.",
            file=sys.stderr,
        )
        return 1
    return 0
