"""The measuring process: one or two ONNX files timed in turn, with nothing else in the process.

Run as `python -m slimc.exporters.paired`: a Request as JSON on standard input, an Outcome as JSON on standard
output. A fresh process, since ONNX Runtime flushes denormal numbers to zero only if the first session of a process
asks for it, and since torch's threads would compete for the cores. So: no torch in here.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimc.errors import SlimcError, UsageError
from slimc.exporters import fast_path

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
_MIN_ROUNDS, _MAX_ROUNDS = 20, 5000
_MIN_WARMUP = 3
_REFILL_SECONDS = 0.01
_TINY = 1e-30
_RESAMPLES = 2000


@dataclass(frozen=True)
class Request:
    """What to measure. `batch` None: 1, or what the file fixes. `shapes` fills free axes other than the batch."""

    paths: tuple[str, ...]
    provider: str
    threads: int
    batch: int | None
    budget_seconds: float
    precision: float
    shapes: dict[str, list[int]]
    seed: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one file's runs: median, 90th and 99th percentile, smallest."""

    p50: float
    p90: float
    p99: float
    min: float


@dataclass(frozen=True)
class Outcome:
    """What was measured; the tuples hold one entry per file, in the order of the request."""

    batch: int
    rounds: int
    warmup: int
    timings: tuple[Timing, ...]
    speedup: float | None
    interval: tuple[float, float] | None
    dtypes: tuple[str, ...]
    denormals_flushed: bool
    tiny_weights: tuple[float, ...]
    fast_paths: tuple[fast_path.FastPath | None, ...]
    warnings: tuple[str, ...]


class NotMeasurable(SlimcError):
    """The provider cannot be measured here; the message is the reason."""


def median_interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap 95% interval of the median."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


def take_turns(
    runs: Sequence[Callable[[], list[float]]],
    *,
    budget_seconds: float,
    precision: float,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[list[float]]]:
    """Call the runs in turn, in random order within each round; returns their results, [round][run].

    Ends when the interval of the median (of the ratio, for two) is within ±`precision` of it, or the budget is used.
    """
    start = clock()
    generator = np.random.default_rng(seed)
    results: list[list[list[float]]] = []
    next_check = _MIN_ROUNDS
    while len(results) < _MAX_ROUNDS:
        row: list[list[float]] = [[] for _ in runs]
        for index in generator.permutation(len(runs)):
            row[index] = runs[index]()
        results.append(row)
        if clock() - start >= budget_seconds:
            break
        if len(results) == next_check:
            if _precise(figures(results), precision):
                break
            next_check = math.ceil(next_check * 1.5)
    return results


def figures(results: Sequence[Sequence[Sequence[float]]]) -> NDArray[np.float64]:
    """Return per round what the interval is about: before / after for two files, the time itself for one."""
    medians = np.array([[np.median(turn) for turn in row] for row in results])
    return np.asarray(medians[:, 0] / medians[:, 1] if medians.shape[1] == 2 else medians[:, 0])


def measure(request: Request) -> Outcome:
    """Measure in this process; its first session must be ours. Raises SlimcError."""
    import onnxruntime

    _check_provider(request.provider, onnxruntime)
    sessions = [_open(path, request, onnxruntime) for path in request.paths]
    flushed = denormals_flushed()
    feeds = _feeds(sessions, request)
    warnings = [
        note for path, feed in zip(request.paths, feeds, strict=True) for note in _placement(path, feed, request)
    ]
    runs = [_turn(session, feed) for session, feed in zip(sessions, feeds, strict=True)]
    start = time.perf_counter()
    warmup = _warm_up(runs, request.budget_seconds / 10)
    gc.collect()
    gc.disable()
    results = take_turns(
        runs,
        budget_seconds=request.budget_seconds - (time.perf_counter() - start),
        precision=request.precision,
        seed=request.seed,
    )
    gc.enable()
    weights = [_weights(path) for path in request.paths]
    cpu = request.provider == CPU
    return Outcome(
        batch=_batch(feeds[0]),
        rounds=len(results),
        warmup=warmup,
        timings=tuple(_timing(turns) for turns in zip(*results, strict=True)),
        speedup=float(np.median(figures(results))) if len(runs) == 2 else None,
        interval=median_interval(figures(results)) if len(runs) == 2 else None,
        dtypes=tuple(dtype for dtype, _ in weights),
        denormals_flushed=flushed,
        tiny_weights=tuple(share for _, share in weights),
        fast_paths=tuple(fast_path.inspect(Path(path), onnxruntime) if cpu else None for path in request.paths),
        warnings=tuple(warnings),
    )


def denormals_flushed() -> bool:
    """Tell whether this thread's arithmetic turns denormal numbers into zero."""
    return not np.any(np.full(64, 1e-38, np.float32) * np.float32(0.01))


def _precise(values: NDArray[np.float64], precision: float) -> bool:
    low, high = median_interval(values)
    return high - low <= 2 * precision * float(np.median(values))


def _timing(turns: Sequence[Sequence[float]]) -> Timing:
    seconds = np.concatenate(turns)
    p50, p90, p99 = (float(value) for value in np.percentile(seconds * 1e3, [50, 90, 99]))
    return Timing(p50, p90, p99, float(seconds.min() * 1e3))


def _check_provider(provider: str, onnxruntime: Any) -> None:
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise NotMeasurable(
            f"onnxruntime {onnxruntime.__version__} here has no {provider} (it has {', '.join(available)})"
        )


def _options(request: Request, onnxruntime: Any) -> Any:
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


def _open(path: str, request: Request, onnxruntime: Any, options: Any = None) -> Any:
    providers = _PROVIDER_OPTIONS.get(request.provider, [request.provider])
    try:
        session = onnxruntime.InferenceSession(
            path, options or _options(request, onnxruntime), providers=providers, enable_fallback=False
        )
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        if request.provider != CPU:
            raise NotMeasurable(f"{request.provider} cannot load {path}: {_first_line(error)}") from error
        raise UsageError(f"{path}: onnxruntime cannot load it: {_first_line(error)}") from error
    if session.get_providers()[0] != request.provider:
        raise NotMeasurable(f"{request.provider} did not start; onnxruntime fell back to {session.get_providers()[0]}")
    return session


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _feeds(sessions: Sequence[Any], request: Request) -> list[dict[str, NDArray[Any]]]:
    """Make one set of random inputs and give it to every session, by position."""
    specs = [[(value.name, value.type, tuple(value.shape)) for value in session.get_inputs()] for session in sessions]
    generator = np.random.default_rng(request.seed)
    arrays = [_random(kind, _shape(name, shape, request), name, generator) for name, kind, shape in specs[0]]
    for path, spec in zip(request.paths[1:], specs[1:], strict=True):
        wanted = [(kind, _shape(name, shape, request)) for name, kind, shape in spec]
        have = [(kind, array.shape) for (_, kind, _), array in zip(specs[0], arrays, strict=True)]
        if wanted != have:
            raise UsageError(f"{path}: takes the inputs {wanted}, but {request.paths[0]} takes {have}")
    return [{name: array for (name, _, _), array in zip(spec, arrays, strict=True)} for spec in specs]


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
            raise UsageError(f"input {name}: axis {axis} ({size}) is free; give its size with --input")
    return tuple(filled)


def _random(kind: str, shape: tuple[int, ...], name: str, generator: np.random.Generator) -> NDArray[Any]:
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise UsageError(f"input {name}: cannot make random values of type {kind}")
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    # 0 and 1 are valid indices, masks and token numbers of nearly any model.
    return generator.integers(0, 2, shape).astype(dtype)


def _batch(feed: dict[str, NDArray[Any]]) -> int:
    return next((array.shape[0] for array in feed.values() if array.ndim), 1)


def _turn(session: Any, feed: dict[str, NDArray[Any]]) -> Callable[[], list[float]]:
    """Return a function that has one turn: untimed runs for a while, then timed ones, in seconds."""

    def turn() -> list[float]:
        # The other file's turn emptied the caches: without this, a small net after a big one seems 1.4 times slower
        # than it is when deployed alone.
        untimed, end = 0, time.perf_counter() + _REFILL_SECONDS
        while not untimed or time.perf_counter() < end:
            session.run(None, feed)
            untimed += 1
        timed = []
        for _ in range(math.ceil(untimed / 2)):
            start = time.perf_counter()
            session.run(None, feed)
            timed.append(time.perf_counter() - start)
        return timed

    return turn


def _warm_up(runs: Sequence[Callable[[], list[float]]], seconds: float) -> int:
    """Take turns until `seconds` have passed, at least 3 rounds; returns the rounds."""
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _MIN_WARMUP or time.perf_counter() < end:
        for run in runs:
            run()
        rounds += 1
    return rounds


def _placement(path: str, feed: dict[str, NDArray[Any]], request: Request) -> list[str]:
    """Say which nodes did not run on the provider asked for; NotMeasurable if none did."""
    if request.provider == CPU:
        return []
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="slimc-") as folder:
        options = _options(request, onnxruntime)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = _open(path, request, onnxruntime, options)
        session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = Counter(
        event["args"]["provider"] for event in events if event.get("cat") == "Node" and "provider" in event["args"]
    )
    there = nodes.pop(request.provider, 0)
    if not there:
        raise NotMeasurable(f"no node of {path} runs on {request.provider}: all fall back to {', '.join(nodes)}")
    elsewhere = ", ".join(f"{count} on {provider}" for provider, count in nodes.items())
    return [f"{path}: {there} nodes run on {request.provider}, {elsewhere}"] if nodes else []


def _weights(path: str) -> tuple[str, float]:
    """Return the commonest type of the weights, by count, and the share of float weights with 0 < |w| < 1e-30."""
    import onnx

    sizes: Counter[str] = Counter()
    tiny = floats = 0
    for tensor in onnx.load(path).graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        sizes[str(array.dtype)] += array.size
        if array.dtype in (np.float32, np.float64):
            # Compared as whole numbers: this thread's own arithmetic may see denormal numbers as zero.
            bits = np.ascontiguousarray(array).view(f"uint{8 * array.itemsize}") << 1
            limit = np.array(_TINY, array.dtype).view(bits.dtype) << 1
            tiny += int(np.count_nonzero((bits > 0) & (bits < limit)))
            floats += array.size
    return (sizes.most_common(1)[0][0] if sizes else "none"), (tiny / floats if floats else 0.0)


def main() -> None:
    """Answer one request."""
    # Native libraries may print: standard output is kept for the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = Request(**json.load(sys.stdin))
    try:
        result: dict[str, object] = {"outcome": dataclasses.asdict(measure(request))}
    except NotMeasurable as error:
        result = {"skipped": str(error)}
    except UsageError as error:
        result = {"error": str(error)}
    json.dump(result, answer)
    answer.close()


if __name__ == "__main__":
    main()
