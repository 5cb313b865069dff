"""How long does a file take, and is the slim one really faster? Two files measured in turn, with an interval."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimc.errors import LoadError, UsageError
from slimc.exporters import child, fast_path, machine
from slimc.exporters.fast_path import FastPath
from slimc.exporters.paired import MIN_PAIRS, Outcome, Timing
from slimc.exporters.session import CPU, CUDA, TENSORRT, NotMeasurable, Request

PROVIDERS: Mapping[str, str] = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}

# One file against itself gave intervals without 1 in 5 of 30 tries, since two sessions place their memory
# differently, but never one without 0.98 ... 1.02.
_RESOLUTION = 0.02
_BUSY = 1.4


@dataclass(frozen=True)
class LatencyResult:
    """Latency of one or two ONNX files; milliseconds of one call, inputs and outputs in host memory.

    `before_ms` and `after_ms` are medians over all runs, with warm caches, as when the file is deployed alone.
    `speedup` is the median over pairs of before / after (not the quotient of the medians), `ci95` its bootstrap
    95% interval, `rounds` the number of pairs. With one file, `after` and the ratios are None. With `skipped`,
    the reason, there is no figure at all. `precision` is the weights' type, `tiny_weights_*` the share of weights
    with 0 < |w| < 1e-30, `lost_fast_path` the convolutions that are slow only since the cut, `load_average` the
    machine's over the minute before. `warnings` are sentences for people.
    """

    runtime: str
    provider: str
    threads: int
    batch: int | None
    before_ms: float | None = None
    after_ms: float | None = None
    speedup: float | None = None
    ci95: tuple[float, float] | None = None
    before: Timing | None = None
    after: Timing | None = None
    rounds: int = 0
    warmup: int = 0
    precision: str | None = None
    denormals_flushed: bool | None = None
    tiny_weights_before: float | None = None
    tiny_weights_after: float | None = None
    fast_path_before: FastPath | None = None
    fast_path_after: FastPath | None = None
    lost_fast_path: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    load_average: float | None = None
    skipped: str | None = None

    @property
    def conclusive(self) -> bool:
        """Whether the two files differ: enough pairs, and an interval that leaves out 1 ± 2%."""
        if self.ci95 is None or self.rounds < MIN_PAIRS:
            return False
        return self.ci95[0] > 1.0 + _RESOLUTION or self.ci95[1] < 1.0 - _RESOLUTION

    @property
    def busy(self) -> bool:
        """Whether a median is so far above the smallest time that other programs must have had the cores."""
        return any(timing.p50 > _BUSY * timing.min for timing in (self.before, self.after) if timing is not None)


def measure(
    before: Path,
    after: Path | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch: int | None = None,
    budget_seconds: float = 10.0,
    precision: float = 0.02,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ranges: Sequence[tuple[int, int] | None] = (),
    seed: int = 0,
) -> LatencyResult:
    """Measure one file, or two in turn, in a fresh process on random inputs.

    `provider` is cpu, cuda, tensorrt or ONNX Runtime's own name; one that is missing or falls back to another gives
    a result with `skipped`. `threads` None: the physical cores this process may use. `batch` None: 1, or what the
    file fixes. Ends when the interval is within ±`precision`, or after `budget_seconds` of running (loading comes
    on top; six pairs may take three times as long). `input_shapes` gives sizes to free axes other than the batch,
    `ranges` the smallest and largest whole number of each input. Raises UsageError, LoadError.
    """
    runtime = _runtime()
    name = PROVIDERS.get(provider.lower(), provider)
    if not name.endswith("ExecutionProvider"):
        raise UsageError(f"there is no provider {provider!r}; known are {', '.join(PROVIDERS)}")
    request = Request(
        paths=tuple(str(_file(path)) for path in (before, after) if path is not None),
        provider=name,
        threads=_positive("threads", threads if threads is not None else machine.physical_cores()),
        batch=None if batch is None else _positive("batch", batch),
        budget_seconds=budget_seconds,
        precision=precision,
        shapes={name: list(shape) for name, shape in (input_shapes or {}).items()},
        ranges=[None if ends is None else list(ends) for ends in ranges],
        seed=seed,
    )
    load = machine.load_average()
    try:
        outcome = _outcome(child.ask("slimc.exporters.paired", request))
    except NotMeasurable as error:
        return LatencyResult(runtime, request.provider, request.threads, batch, skipped=str(error))
    result = _result(runtime, request, outcome, load)
    return dataclasses.replace(result, warnings=(*result.warnings, *_busy_warning(result)))


def measure_all(before: Path, after: Path | None = None, **options: Any) -> tuple[LatencyResult, ...]:
    """Measure on the CPU and on every accelerator; providers that are not there come back with `skipped`.

    Options are those of `measure`, without the provider.
    """
    return tuple(measure(before, after, provider=provider, **options) for provider in PROVIDERS)


def _runtime() -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(
            "measuring latency needs onnxruntime, which is not installed. Install it with "
            "`pip install onnxruntime` or, for NVIDIA GPUs, `pip install onnxruntime-gpu`."
        )
    return "onnxruntime"


def _file(path: Path) -> Path:
    if not path.is_file():
        raise LoadError(f"{path}: there is no such file")
    return path.resolve()


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"{name} is {value}; at least 1 is needed")
    return value


def _outcome(data: dict[str, Any]) -> Outcome:
    """Rebuild the dataclass that JSON flattened."""
    paths = [
        None if path is None else FastPath(path["convolutions"], tuple(path["slow"])) for path in data["fast_paths"]
    ]
    return Outcome(
        **{
            **data,
            "timings": tuple(Timing(**timing) for timing in data["timings"]),
            "interval": tuple(data["interval"]) if data["interval"] else None,
            "dtypes": tuple(data["dtypes"]),
            "tiny_weights": tuple(data["tiny_weights"]),
            "fast_paths": tuple(paths),
            "warnings": tuple(data["warnings"]),
        }
    )


def _result(runtime: str, request: Request, outcome: Outcome, load: float | None) -> LatencyResult:
    paired = len(request.paths) == 2
    lost = fast_path.lost(outcome.fast_paths[0], outcome.fast_paths[1]) if paired else ()
    return LatencyResult(
        runtime=runtime,
        provider=request.provider,
        threads=request.threads,
        batch=outcome.batch,
        before_ms=outcome.timings[0].p50,
        after_ms=outcome.timings[1].p50 if paired else None,
        speedup=outcome.speedup,
        ci95=outcome.interval,
        before=outcome.timings[0],
        after=outcome.timings[1] if paired else None,
        rounds=outcome.rounds,
        warmup=outcome.warmup,
        precision=" and ".join(dict.fromkeys(outcome.dtypes)),
        denormals_flushed=outcome.denormals_flushed,
        tiny_weights_before=outcome.tiny_weights[0],
        tiny_weights_after=outcome.tiny_weights[1] if paired else None,
        fast_path_before=outcome.fast_paths[0],
        fast_path_after=outcome.fast_paths[1] if paired else None,
        lost_fast_path=lost,
        load_average=load,
        warnings=_warnings(request, outcome, lost),
    )


def _warnings(request: Request, outcome: Outcome, lost: tuple[str, ...]) -> tuple[str, ...]:
    found = list(outcome.warnings)
    for path, share in zip(request.paths, outcome.tiny_weights, strict=True):
        if share > 0.01:
            found.append(
                f"{Path(path).name}: {share:.0%} of the weights are below 1e-30, so products with them are denormal "
                "numbers, which are slow. They are flushed to zero here; deploy with session.set_denormal_as_zero=1."
            )
    if request.provider == CPU and not outcome.denormals_flushed:
        found.append("denormal numbers were not flushed to zero: tiny weights may slow one of the files")
    if len(set(outcome.dtypes)) > 1:
        found.append(f"the files differ in precision: {' and '.join(outcome.dtypes)}")
    if lost:
        shown = ", ".join(lost[:5]) + (" ..." if len(lost) > 5 else "")
        found.append(
            f"{len(lost)} convolutions lost ONNX Runtime's fast path, which needs channels in multiples of 4: {shown}. "
            "Use --round-to auto."
        )
    if len(request.paths) == 2 and outcome.rounds < MIN_PAIRS:
        found.append(f"only {outcome.rounds} pairs fit into the time budget: too few to conclude anything")
    return tuple(found)


def _busy_warning(result: LatencyResult) -> tuple[str, ...]:
    if not result.busy:
        return ()
    return (
        "the machine was busy: the median run took over 1.4 times as long as the fastest. The figures hold for such a "
        "load only; measure again on an idle machine or with fewer --threads.",
    )
