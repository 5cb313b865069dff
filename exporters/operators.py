"""How long each operator of an ONNX file takes: ONNX Runtime's own profile, taken in a fresh process.

Run as `python -m slimc.exporters.operators`; see `child`.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimc.exporters import child
from slimc.exporters.session import CPU, Request, check_provider, check_runs, feeds, profile, start

PRODUCTS = frozenset(
    {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "TransposeMatMul", "Einsum",
     "Attention", "MultiHeadAttention", "LSTM", "GRU", "RNN"}
)  # fmt: skip
"""Types of operators that multiply and accumulate."""

_CALLS = 5, 60
_WARM_UP = 0.2
"""The part of the calls that are not counted."""


@dataclass(frozen=True)
class Operator:
    """One operator as it runs, after ONNX Runtime has fused what it can.

    ms: the median over calls. macs: multiply-accumulates of one call, None where shapes don't tell; outputs: how many
    numbers it writes.
    """

    kind: str
    ms: float
    macs: int | None
    outputs: int


def measure(
    path: Path, *, threads: int, budget_seconds: float = 3.0, ranges: Sequence[tuple[int, int] | None] = ()
) -> tuple[Operator, ...]:
    """The operators of a file on the CPU, batch 1 or what the file fixes. Raises UsageError, NotMeasurable.

    ranges: as for `latency.measure`.
    """
    ends = [None if own is None else list(own) for own in ranges]
    request = Request((str(path.resolve()),), CPU, threads, None, budget_seconds, 0.0, {}, 0, ends)
    return tuple(Operator(**found) for found in child.ask("slimc.exporters.operators", request))


def _measure(request: Request) -> list[dict[str, Any]]:
    """The child's side: as many calls as fit in the time."""
    import onnxruntime

    check_provider(request.provider, onnxruntime)
    path = request.paths[0]
    session = start(path, request, onnxruntime)
    feed = feeds([session], request)[0]
    check_runs(path, session, feed)
    begun = time.perf_counter()
    session.run(None, feed)
    few, many = _CALLS
    calls = min(many, max(few, int(request.budget_seconds / max(time.perf_counter() - begun, 1e-6))))
    del session
    return [asdict(found) for found in summed(profile(path, feed, request, calls), calls)]


def summed(events: Sequence[Mapping[str, Any]], calls: int) -> list[Operator]:
    """One entry for each operator; one that runs several times in a call (in a loop) counts with all of them."""
    runs: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        runs[event["name"], str(event["args"].get("node_index"))].append(event)
    found = []
    for own in runs.values():
        each = max(1, round(len(own) / calls))
        taken = [sum(event["dur"] for event in own[i : i + each]) for i in range(0, len(own), each)]
        kind, outputs = own[-1]["args"]["op_name"], _shapes(own[-1], "output_type_shape")
        ms = float(np.median(taken[int(_WARM_UP * len(taken)) :])) / 1e3
        numbers = sum(map(math.prod, outputs)) * each
        macs = _macs(kind, _shapes(own[-1], "input_type_shape"), outputs)
        found.append(Operator(kind, ms, macs if each == 1 else None, numbers))
    return found


def _shapes(event: Mapping[str, Any], which: str) -> list[list[int]]:
    return [shape for value in event["args"].get(which, ()) for shape in value.values()]


def _macs(kind: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> int | None:
    """By the shapes that ONNX Runtime notes, where weights that it has packed for a product are missing."""
    if kind in ("Conv", "FusedConv") and len(inputs) > 1 and len(inputs[1]) > 2 and outputs:
        return math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if kind in ("Gemm", "FusedGemm", "MatMul", "FusedMatMul") and inputs and outputs and outputs[0]:
        return math.prod(inputs[0]) * outputs[0][-1]  # wherever the first factor's axes stand
    return None


if __name__ == "__main__":
    child.answer(_measure)
