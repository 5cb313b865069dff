"""Result pages: a markdown table with the date, the machine, the versions and the command that made it."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimc.exporters import machine

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("torch", "torchvision", "torch-pruning", "onnx", "onnxruntime", "numpy")
_RESAMPLES = 10_000
_UNKNOWN = "not recorded"


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median and its bootstrap 95% interval; with fewer than 6 values that is little more than their range."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(_RESAMPLES, len(array)))
    low, high = np.percentile(np.median(array[picks], axis=1), [2.5, 97.5])
    return float(np.median(array)), float(low), float(high)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The power of `sizes` with which `seconds` grow: the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; all columns but the first are set to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times(values: tuple[float, float, float]) -> str:
    """A ratio with its interval: `5.1 (4.8 to 5.3)`."""
    digits = 1 if values[0] >= 10 or math.isnan(values[0]) else 2
    return f"{values[0]:.{digits}f} ({values[1]:.{digits}f} to {values[2]:.{digits}f})"


def processor() -> str:
    """This machine's processor in words, as rows that are added one by one hold it."""
    here = machine.describe()
    return f"{here.cpu} ({here.simd})"


def header(threads: int | None = None, rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Where, when and how: the lines that stand above every table.

    rows: those of the table where they were measured one by one, perhaps not here: each names its machine and date.
    """
    here = machine.describe()
    found = [f"python {here.versions['python']}"]
    for name in ("slimc", *_LIBRARIES):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = f", {here.memory_bytes / 2**30:.0f} GiB of memory" if here.memory_bytes else ""
    used = f"; {threads} threads used" if threads else ""
    place = f"{processor()}, {here.logical_cores} logical cores{memory}{used}"
    script, date = _script(sys.argv[0]), datetime.date.today().isoformat()
    command = f"`python -m {shlex.join([script, *_arguments(sys.argv[1:])])}`"
    if rows:
        date = max((row["date"] for row in rows if row.get("date")), default=_UNKNOWN)
        options = f"{script.replace('.', '/')}.py"
        command = f"`python -m {script}`, a few rows at a time; its options are at the top of {options}"
        machines = Counter(row.get("machine", _UNKNOWN) for row in rows)
        place = ", ".join(f"{name} ({count} rows)" for name, count in machines.most_common())
    return "\n".join(
        [
            f"- Date: {date}",
            f"- Machine: {place}",
            f"- Versions: {', '.join(found)}",
            f"- Command: {command}",
        ]
    )


def _script(path: str) -> str:
    return f"bench.{Path(path).stem}"


def _arguments(given: Sequence[str]) -> list[str]:
    """What was asked for, without where the page was put."""
    if "--out" not in given:
        return list(given)
    place = given.index("--out")
    return [*given[:place], *given[place + 2 :]]


def write(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page and say where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([f"# {title}", *parts]) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)
