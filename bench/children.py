"""Benchmark cases, each in a process of its own with a time limit."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.page import processor

Row = dict[str, Any]
Measure = Callable[[str], Row]


def sweep(measure: Measure, wanted: list[str], results: Path, jobs: int, limit: float) -> Iterator[Row]:
    """A row per case, appended to a file of JSON lines as it is there."""
    print(f"{len(wanted)} models, {jobs} at a time", flush=True)
    for row in in_children(measure, wanted, jobs, limit):
        row |= {"machine": processor(), "date": datetime.date.today().isoformat()}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        yield row


def rows_of(results: Path) -> list[Row]:
    """All rows so far; the last one of each case counts."""
    if not results.exists():
        return []
    found = [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()]
    return list({row["case"]: row for row in found}.values())


def in_children(measure: Measure, wanted: list[str], jobs: int, limit: float) -> Iterator[Row]:
    """A row per case, each from a process forked off this one, so that imports are paid for once.

    limit: seconds of the clock after which a process is killed.
    """
    import slimc.compiler
    import slimc.exporters.formats.onnx  # noqa: F401

    context = multiprocessing.get_context("fork")
    waiting, running = list(wanted), dict[str, tuple[Any, Any, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(theirs, measure, case))
            process.start()
            theirs.close()
            running[case] = (process, ours, time.perf_counter())
        for case, (process, ours, start) in list(running.items()):
            seconds = time.perf_counter() - start
            if ours.poll(0.1):
                yield _receive(ours, process, case, seconds)
            elif seconds > limit:
                process.kill()
                yield {"case": case, "error": f"took more than {limit:g} s", "seconds": limit}
            else:
                continue
            process.join()
            del running[case]


def _send(pipe: Any, measure: Measure, case: str) -> None:
    warnings.simplefilter("ignore")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            pipe.send(measure(case))
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            pipe.send({"case": case, "error": f"build: {type(error).__name__}: {text}", "seconds": 0.0})


def _receive(pipe: Any, process: Any, case: str, seconds: float) -> Row:
    try:
        row: Row = pipe.recv()
    except EOFError:
        process.join()
        row = {"case": case, "error": f"ended with {process.exitcode}", "seconds": round(seconds, 1)}
    return row
