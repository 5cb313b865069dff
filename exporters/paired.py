"""The measuring process: one or two ONNX files timed in turn, with nothing else in the process.

Run as `python -m slimc.exporters.paired`: a Request as JSON on standard input, an Outcome as JSON on standard
output. A fresh process, since ONNX Runtime flushes denormal numbers to zero only if the first session of a process
asks for it, and since torch's threads would compete for the cores. So: no torch in here.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimc.exporters import child, fast_path
from slimc.exporters.session import CPU, NotMeasurable, Request, check_provider, check_runs, feeds, profile, start

_MIN_ROUNDS, _MAX_ROUNDS = 20, 5000
MIN_PAIRS = 6
"""Fewer pairs cannot give a 95% interval of a median: all 5 on one side of it has a chance of 6%."""
_OVER = 3
"""How many times the budget they may take."""
_MIN_WARMUP = 3
_REFILL_SECONDS = 0.01
_LONG = 0.2
"""A call of so many seconds fills the caches itself."""
_TINY = 1e-30
_RESAMPLES = 2000


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

    Ends when the interval of the median (of the ratio, for two) is within ±`precision` of it, or the budget is used:
    for two runs not before there are enough pairs for an interval, unless these take three times the budget.
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
        spent, enough = clock() - start, len(runs) < 2 or len(results) >= MIN_PAIRS
        if spent >= budget_seconds * (1 if enough else _OVER):
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

    check_provider(request.provider, onnxruntime)
    sessions = [start(path, request, onnxruntime) for path in request.paths]
    flushed = denormals_flushed()
    fed = feeds(sessions, request)
    warnings = [note for path, feed in zip(request.paths, fed, strict=True) for note in _placement(path, feed, request)]
    for path, session, feed in zip(request.paths, sessions, fed, strict=True):
        check_runs(path, session, feed)
    runs = [_turn(session, feed) for session, feed in zip(sessions, fed, strict=True)]
    begun = time.perf_counter()
    warmup = _warm_up(runs, request.budget_seconds / 10)
    gc.collect()
    gc.disable()
    results = take_turns(
        runs,
        budget_seconds=request.budget_seconds - (time.perf_counter() - begun),
        precision=request.precision,
        seed=request.seed,
    )
    gc.enable()
    weights = [_weights(path) for path in request.paths]
    cpu = request.provider == CPU
    return Outcome(
        batch=_batch(fed[0]),
        rounds=len(results),
        warmup=warmup,
        timings=tuple(_timing(turns) for turns in zip(*results, strict=True)),
        speedup=float(np.median(figures(results))) if len(runs) == 2 else None,
        interval=median_interval(figures(results)) if len(runs) == 2 and len(results) >= MIN_PAIRS else None,
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


def _batch(feed: dict[str, NDArray[Any]]) -> int:
    return next((array.shape[0] for array in feed.values() if array.ndim), 1)


def _turn(session: Any, feed: dict[str, NDArray[Any]]) -> Callable[[], list[float]]:
    """Return a function that has one turn: untimed runs for a while, then timed ones, in seconds."""

    last = 0.0

    def turn() -> list[float]:
        # The other file's turn emptied the caches: without this, a small net after a big one seems 1.4 times slower
        # than it is when deployed alone.
        nonlocal last
        untimed, end = 0, time.perf_counter() + _REFILL_SECONDS
        while last < _LONG and (not untimed or time.perf_counter() < end):
            session.run(None, feed)
            untimed += 1
        timed = []
        for _ in range(max(1, math.ceil(untimed / 2))):
            start = time.perf_counter()
            session.run(None, feed)
            timed.append(time.perf_counter() - start)
        last = timed[-1]
        return timed

    return turn


def _warm_up(runs: Sequence[Callable[[], list[float]]], seconds: float) -> int:
    """Take turns until `seconds` have passed; at least 3 rounds if these are not long, else one. Returns the rounds."""
    begun = time.perf_counter()
    rounds = 0
    while not rounds or time.perf_counter() - begun < seconds * (_OVER if rounds < _MIN_WARMUP else 1):
        for run in runs:
            run()
        rounds += 1
    return rounds


def _placement(path: str, feed: dict[str, NDArray[Any]], request: Request) -> list[str]:
    """Say which nodes did not run on the provider asked for; NotMeasurable if none did."""
    if request.provider == CPU:
        return []
    nodes = Counter(event["args"]["provider"] for event in profile(path, feed, request))
    there = nodes.pop(request.provider, 0)
    if not there:
        raise NotMeasurable(f"no node of {path} runs on {request.provider}: all fall back to {', '.join(nodes)}")
    path = Path(path).name
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


if __name__ == "__main__":
    child.answer(lambda request: dataclasses.asdict(measure(request)))
