"""What commands share: options checked before anything slow, the model and its example, the result written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import Console
from .errors import UsageError

if TYPE_CHECKING:
    from .graph.example import Example
    from .loading import Loaded


def output_folder(out: Path | None, model: str, overwrite: bool, no_onnx: bool) -> Path:
    """The output folder, checked before anything slow, as is what the ONNX file needs."""
    from importlib.util import find_spec

    from .exporters.artifact import check_writable

    if not no_onnx and find_spec("onnxruntime") is None:
        raise UsageError(
            "checking and measuring model.onnx needs onnxruntime, which is not installed. Install it with "
            "`pip install onnxruntime` (onnxruntime-gpu for NVIDIA GPUs), or leave the file out with --no-onnx"
        )
    folder = out or Path(f"{_short(model)}-slim")
    check_writable(folder, overwrite)
    return folder


def _short(model: str) -> str:
    if ":" in model and os.sep not in model:
        return model.rpartition(":")[2] or "model"
    return Path(model).stem or "model"


def opened(
    console: Console,
    model: str,
    arch: str | None,
    allow: list[str] | None,
    unsafe_pickle: bool,
    inputs: list[str] | None,
    threads: int | None,
    seed: int,
) -> tuple[Loaded, Example]:
    """The model, and inputs to try it with."""
    console.progress("stage", "load")
    set_threads(threads)
    from .inputs import example_inputs
    from .loading import load

    if unsafe_pickle:
        console.progress("note", "--unsafe-pickle: the file may run any code while it is read")
    loaded = load(model, arch=arch, allow=allow or (), unsafe_pickle=unsafe_pickle)
    console.progress("stage", "input")
    example = example_inputs(inputs or [], loaded.input_shape, seed, loaded.batch, loaded.model, loaded.notes)
    console.progress("done", "input")
    return loaded, example


def checked_targets(**given: str | None) -> dict[str, str | None]:
    """What the targets say, checked before anything slow."""
    from . import budget

    for metric, text in given.items():
        if text is not None:
            budget.parse(metric, text)
    if not any(given.values()):
        names = ", ".join(f"--{metric}" for metric in given)
        raise UsageError(f"no target: give at least one of {names}, such as --flops 0.4")
    return given


def training_options(
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
        given = {
            "--rate": rate,
            "--batch-size": batch_size,
            "--set": settings,
            "--resume": resume,
            "--distil": distil or None,
        }
        for name, value in given.items():
            if value is not None and value is not False and value != []:
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


def shapes(given: list[str]) -> dict[str, tuple[int, ...]]:
    """What `--input NAME=SIZES` says, by name."""
    found = {}
    for text in given:
        name, _, sizes = text.rpartition("=")
        if not name or not all(size.isdecimal() and int(size) for size in sizes.split("x")):
            raise UsageError(f"--input {text}: wanted the name of an input and its sizes, as in input_ids=1x128")
        found[name] = tuple(int(size) for size in sizes.split("x"))
    return found


def set_threads(threads: int | None) -> None:
    """Let torch use so many, if a number is given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def finish(
    console: Console,
    slim: Any,
    folder: Path,
    overwrite: bool,
    no_onnx: bool,
    no_latency: bool,
    threads: int | None,
    loaded: Loaded,
) -> None:
    """Write the result and show it."""
    slim.warn(loaded.notes)
    slim.save(folder, overwrite=overwrite, onnx=not no_onnx, latency=not no_latency, threads=threads)
    if console.as_json:
        console.result(slim.report.to_dict())
    else:
        console.report(slim.report, folder)
