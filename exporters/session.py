"""Sessions of ONNX Runtime for the measuring processes, what they are fed, and their profile. So: no torch in here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimc.errors import SlimcError, UsageError, first_line

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

# TF32 rounds to 10 bits of mantissa; figures called float32 must be float32.
_PROVIDER_OPTIONS: dict[str, list[Any]] = {
    CUDA: [(CUDA, {"use_tf32": "0"})],
    TENSORRT: [TENSORRT, (CUDA, {"use_tf32": "0"})],
}
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Request:
    """What to measure. `batch` None: 1, or what the file fixes. `shapes` fills free axes other than the batch; `ranges`
    are the smallest and largest whole number of each input, in order, None where 0 and 1 will do."""

    paths: tuple[str, ...]
    provider: str
    threads: int
    batch: int | None
    budget_seconds: float
    precision: float
    shapes: dict[str, list[int]]
    seed: int
    ranges: list[list[int] | None] = field(default_factory=list)


class NotMeasurable(SlimcError):
    """The provider cannot be measured here; the message is the reason."""


def check_provider(provider: str, onnxruntime: Any) -> None:
    """NotMeasurable where this ONNX Runtime does not have it."""
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise NotMeasurable(
            f"onnxruntime {onnxruntime.__version__} here has no {provider} (it has {', '.join(available)})"
        )


def options(request: Request, onnxruntime: Any) -> Any:
    """Session options that make figures comparable."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = request.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Weights of 1e-40 slow a convolution by 7; pruned and decayed models have them, and they are no speed-up.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    # Each session has its own threads: those of the idle one must not spin on the cores of the other.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def start(path: str, request: Request, onnxruntime: Any, asked: Any = None) -> Any:
    """An open session; NotMeasurable where the provider cannot run the file, UsageError where nothing can."""
    providers = _PROVIDER_OPTIONS.get(request.provider, [request.provider])
    try:
        session = onnxruntime.InferenceSession(
            path, asked or options(request, onnxruntime), providers=providers, enable_fallback=False
        )
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        if request.provider != CPU:
            raise NotMeasurable(f"{request.provider} cannot load {path}: {first_line(error)}") from error
        raise UsageError(f"{path}: onnxruntime cannot load it: {first_line(error)}") from error
    if session.get_providers()[0] != request.provider:
        raise NotMeasurable(f"{request.provider} did not start; onnxruntime fell back to {session.get_providers()[0]}")
    return session


def check_runs(path: str, session: Any, feed: Mapping[str, NDArray[Any]]) -> None:
    """NotMeasurable where a file does not run on what it is fed: a hard-coded size, an index beyond a table."""
    try:
        session.run(None, dict(feed))
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        raise NotMeasurable(f"{Path(path).name} does not run on random inputs: {first_line(error)}") from error


def feeds(sessions: Sequence[Any], request: Request) -> list[dict[str, NDArray[Any]]]:
    """Make one set of random inputs and give it to every session, by position."""
    specs = [[(value.name, value.type, tuple(value.shape)) for value in session.get_inputs()] for session in sessions]
    _check_shapes(specs[0], request)
    if request.batch is None and not request.shapes:
        request = replace(request, batch=_batch_of_others(specs))
    first = [shape[0] for _, _, shape in specs[0] if shape]
    if request.batch is not None and all(isinstance(size, int) and size != request.batch for size in first):
        raise UsageError(f"{request.paths[0]}: its batch is fixed; a batch of {request.batch} is not possible")
    generator = np.random.default_rng(request.seed)
    ranges = [*request.ranges, *[None] * len(specs[0])]
    arrays = [
        _random(kind, _shape(name, shape, request), name, generator, ends)
        for (name, kind, shape), ends in zip(specs[0], ranges, strict=False)
    ]
    for path, spec in zip(request.paths[1:], specs[1:], strict=True):
        wanted = [(kind, _shape(name, shape, request)) for name, kind, shape in spec]
        have = [(kind, array.shape) for (_, kind, _), array in zip(specs[0], arrays, strict=True)]
        if wanted != have:
            raise UsageError(f"{path}: takes the inputs {wanted}, but {request.paths[0]} takes {have}")
    return [{name: array for (name, _, _), array in zip(spec, arrays, strict=True)} for spec in specs]


def _batch_of_others(specs: Sequence[Sequence[tuple[str, str, tuple[int | str | None, ...]]]]) -> int | None:
    """The batch that another file fixes where the first one leaves it open; None if there is no such one."""
    pairs = ((own, one) for spec in specs[1:] for (_, _, own), (_, _, one) in zip(specs[0], spec, strict=False))
    fixed = {one[0] for own, one in pairs if own and one and not isinstance(own[0], int) and isinstance(one[0], int)}
    found = fixed.pop() if len(fixed) == 1 else None
    return found if isinstance(found, int) else None


def _check_shapes(spec: Sequence[tuple[str, str, tuple[int | str | None, ...]]], request: Request) -> None:
    """UsageError for sizes of inputs that are not there, or other sizes than a file fixes."""
    names = {name: shape for name, _, shape in spec}
    for name, given in request.shapes.items():
        if name not in names:
            raise UsageError(f"{request.paths[0]} has no input {name}; it has {', '.join(names)}")
        for axis, (asked, size) in enumerate(zip(given, names[name], strict=False)):
            if isinstance(size, int) and asked != size:
                raise UsageError(f"input {name}: its axis {axis} is fixed at {size}; {asked} is not possible")
            if axis == 0 and request.batch not in (None, asked):
                raise UsageError(f"input {name}: its first size is {asked}, and the batch is to be {request.batch}")


def _shape(name: str, shape: tuple[int | str | None, ...], request: Request) -> tuple[int, ...]:
    given = request.shapes.get(name)
    if given is not None and len(given) != len(shape):
        raise UsageError(f"input {name}: has {len(shape)} axes, but the shape given has {len(given)}")
    filled: list[int] = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            if axis == 0 and size > 1 and request.batch not in (None, size):
                raise UsageError(
                    f"input {name}: its batch axis is fixed at {size}; a batch of {request.batch} is not possible"
                )
            filled.append(size)
        elif axis == 0 and (given is None or request.batch is not None):
            filled.append(request.batch or 1)
        elif given is not None:
            filled.append(given[axis])
        else:
            raise UsageError(f"input {name}: axis {axis} ({size}) is free; give its sizes with --input {name}=1x...")
    return tuple(filled)


def _random(
    kind: str, shape: tuple[int, ...], name: str, generator: np.random.Generator, ends: Sequence[int] | None
) -> NDArray[Any]:
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise UsageError(f"input {name}: cannot make random values of type {kind}")
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    # 0 and 1 are valid indices, masks and token numbers of nearly any model.
    low, high = ends if ends and dtype is not np.bool_ else (0, 1)
    return generator.integers(low, high + 1, shape).astype(dtype)


def profile(path: str, feed: Mapping[str, NDArray[Any]], request: Request, calls: int = 1) -> list[dict[str, Any]]:
    """What ONNX Runtime notes of each operator in each call, in the order in which they ran."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="slimc-") as folder:
        asked = options(request, onnxruntime)
        asked.enable_profiling = True
        asked.profile_file_prefix = str(Path(folder) / "profile")
        session = start(path, request, onnxruntime, asked)
        for _ in range(calls):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    return [event for event in events if event.get("cat") == "Node" and "provider" in event["args"]]
