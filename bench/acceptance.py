"""Compress many networks to many budgets through the public interface, and check every result.

Rows are written to a .jsonl file as they finish (--resume keeps those that are there) and drawn as a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimc
from bench import networks, page
from bench.checks import counted_macs, never_removable, normalisations_after_convolutions, one_more_step, parity_error
from slimc.exporters import machine

BUDGETS = (0.7, 0.4, 0.15)
SECONDS = 90.0
TOLERANCE = 1e-5
CLOSE = 0.002
"""With any width allowed, what is left must come this close to the budget, as a share of the original."""
_SMALLEST = re.compile(r"the smallest that can be reached is (?P<share>[\d.e+-]+)")
_ROOM = 1.001  # the message gives four digits


@dataclass(frozen=True)
class Row:
    """One compression and what was found wrong with it; MACs are of one sample, counted here and not by slimc.

    asked: share of the MACs that may stay; `unreachable` tells that `budget` was too low and the smallest was asked.
    seconds: of the compression, `export_seconds` of writing the folder with the ONNX file (None: not written);
    cpu_seconds: processor time of both, all threads; load: processes that wanted a core in the last minute.
    """

    model: str
    budget: float
    round_to: str
    asked: float = math.nan
    unreachable: bool = False
    macs_before: int = 0
    macs_after: int = 0
    predicted_after: int = 0
    aligned_to: int = 0
    verification_error: float = math.nan
    seconds: float = math.nan
    export_seconds: float | None = None
    parity_error: float | None = None
    normalisations_after_convolutions: int | None = None
    frozen: int = 0
    eager: bool = False
    one_more_step: str | None = None
    speedup: tuple[float, float, float] | None = None
    cpu_seconds: float | None = None
    load: float | None = None
    stages: dict[str, float | None] = field(default_factory=dict)
    error: str | None = None
    failures: tuple[str, ...] = ()
    machine: str = "not recorded"
    date: str = ""

    @property
    def key(self) -> tuple[str, float, str]:
        """What identifies a row."""
        return self.model, self.budget, self.round_to


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of the processor over all threads."""

    wall: float
    cpu: float


# -- one row ------------------------------------------------------------------------------------------


def run(name: str, budget: float, round_to: str, with_onnx: bool, latency: bool) -> Row:
    """Compress one network to one budget and check the result."""
    model, inputs = networks.torchvision_model(name), networks.image(name)
    networks.awaken(model, inputs)
    start, cpu = time.perf_counter(), time.process_time()
    asked, unreachable = budget, False
    try:
        try:
            slim = _compress(model, inputs, asked, round_to)
        except slimc.SlimcError as error:
            found = _SMALLEST.search(str(error))
            if found is None:
                raise
            asked, unreachable = float(found["share"]) * _ROOM, True
            start, cpu = time.perf_counter(), time.process_time()
            slim = _compress(model, inputs, asked, round_to)
        spent = Spent(time.perf_counter() - start, time.process_time() - cpu)
        return _checked(name, budget, round_to, asked, unreachable, model, inputs, slim, spent, with_onnx, latency)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Row(name, budget, round_to, asked, unreachable, error=text, failures=("error",))


def _compress(model: nn.Module, inputs: Tensor, asked: float, round_to: str) -> slimc.Compressed:
    return slimc.compress(model, inputs, flops=asked, round_to=round_to, recover="none")


def _checked(
    name: str,
    budget: float,
    round_to: str,
    asked: float,
    unreachable: bool,
    model: nn.Module,
    inputs: Tensor,
    slim: slimc.Compressed,
    spent: Spent,
    with_onnx: bool,
    latency: bool,
) -> Row:
    before = counted_macs(model, inputs)
    # The graph may have the batch of its example built in.
    batch = slim.analysis.captured.batch
    after = counted_macs(slim.graph, networks.image(name, batch))
    with torch.no_grad():
        outputs = {leaf.shape[1] for leaf in pytree.tree_leaves(model(inputs)) if isinstance(leaf, Tensor)}
    export_seconds = parity = after_convolution = speedup = None
    cpu_seconds = spent.cpu
    if with_onnx:
        with tempfile.TemporaryDirectory(prefix="slimc-bench-") as folder:
            start, cpu = time.perf_counter(), time.process_time()
            path = slim.save(Path(folder) / "out", latency=latency) / "model.onnx"
            export_seconds = time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu
            after_convolution = normalisations_after_convolutions(path)
            sizes = (1, 3) if slim.report.onnx and slim.report.onnx.dynamic_batch else (batch,)
            parity = parity_error(path, slim.module.eval(), [networks.image(name, size, seed=7) for size in sizes])
            if slim.report.latency:
                measured = slim.report.latency[0]
                speedup = (measured.speedup, *measured.ci95)
    loose = never_removable(slim, model, outputs)
    step = one_more_step(slim, asked * before)
    proof = slim.report.verification
    row = Row(
        name, budget, round_to, asked, unreachable, before, after, slim.report.macs.after, slim.report.method.round_to,
        proof.max_relative_error if proof else math.nan, spent.wall, export_seconds, parity, after_convolution,
        len(slim.report.frozen) + len(loose), slim.module is not slim.graph and slim.plan.attributes is not None,
        step, speedup, cpu_seconds, machine.load_average(), dict(slim.report.seconds),
    )  # fmt: skip
    return replace(row, failures=tuple(_failures(row, slim.report.macs.before)))


def _failures(row: Row, predicted_before: int) -> list[str]:
    got = row.macs_after / row.macs_before
    total = row.seconds + (row.export_seconds or 0.0)
    claims = {
        f"{got:.5f} of the MACs are left, more than the {row.asked:.5f} asked": got > row.asked,
        f"{row.asked - got:.4f} of the MACs below the budget": row.round_to == "1" and row.asked - got > CLOSE,
        f"room for one more step: {row.one_more_step}": row.one_more_step is not None,
        f"predicted {row.predicted_after} MACs, counted {row.macs_after}": row.predicted_after != row.macs_after,
        f"predicted {predicted_before} MACs before, counted {row.macs_before}": predicted_before != row.macs_before,
        f"verification error {row.verification_error:.1e}": not row.verification_error <= TOLERANCE,
        f"parity error {row.parity_error}": row.parity_error is not None and not row.parity_error <= TOLERANCE,
        "batch normalisation after a convolution": bool(row.normalisations_after_convolutions),
        f"{row.frozen} frozen": row.frozen > 0,
        f"{total:.0f} s": total > SECONDS,
    }
    return [text for text, holds in claims.items() if holds]


# -- the page -----------------------------------------------------------------------------------------


def render(rows: Sequence[Row], path: Path, notes: Sequence[str]) -> None:
    """Draw the table."""
    failed = [row for row in rows if row.failures]
    summary = f"{len(rows) - len(failed)} of {len(rows)} rows hold."
    legend = (
        "MACs are counted on the model before and on the graph after, by torch's FLOP counter. *asked* ends in ↑ where "
        "the budget cannot be reached and the smallest that can was asked instead. *gap*: asked less left, in percent "
        f"of the original; at most {100 * CLOSE:g} where any width is allowed. *align*: widths are multiples of this. "
        "*step*: whether no group can keep one rounding step more within the budget, by slimc's cost model. "
        "*predicted*: whether the report's MACs equal those counted. *BN*: batch normalisations after a "
        "convolution in the ONNX file. *frozen*: "
        "parameters that no cut can shrink, and operators that block one, besides inputs and outputs. *class*: the "
        "result is the model's own class (else the graph as a module). Errors are relative to the largest output. "
        f"*s*: seconds of compression and of writing everything; at most {SECONDS:g} in all. "
        "*processor s*: the same as time of the processor, over all threads. *load*: processes that wanted one of the "
        "cores meanwhile."
    )
    columns = ("model", "round to", "asked", "left", "gap %", "align", "step", "predicted", "verify error",
               "parity error", "BN", "frozen", "class", "s", "processor s", "load", "verdict")  # fmt: skip
    body = page.table(columns, [_cells(row) for row in rows])
    speed = [row for row in rows if row.speedup]
    extra = []
    if speed:
        cells = [[r.model, r.round_to, f"{r.asked:.3g}", page.times(r.speedup)] for r in speed if r.speedup]
        extra = ["## Latency, ONNX Runtime, batch 1", page.table(("model", "round to", "asked", "speed-up"), cells)]
    wrong = [f"- {r.model} at {r.budget:g}, round to {r.round_to}: {r.error or '; '.join(r.failures)}" for r in failed]
    extra += ["## Rows that do not hold", "\n".join(wrong)] if wrong else []
    page.write(
        path,
        "Acceptance",
        [page.header(torch.get_num_threads(), [*map(asdict, rows)]), *notes, summary, legend, body, *extra],
    )


def _cells(row: Row) -> list[str]:
    if row.error is not None:
        return [row.model, row.round_to, f"{row.budget:g}", *[""] * 13, "**fails**"]
    got = row.macs_after / row.macs_before
    seconds = f"{row.seconds:.1f}" + (f" + {row.export_seconds:.1f}" if row.export_seconds is not None else "")
    return [
        row.model, row.round_to, f"{row.asked:.4f} ↑" if row.unreachable else f"{row.asked:g}", f"{got:.5f}",
        f"{100 * (row.asked - got):.4f}", str(row.aligned_to), _yes(row.one_more_step is None),
        _yes(row.predicted_after == row.macs_after), f"{row.verification_error:.1e}",
        "" if row.parity_error is None else f"{row.parity_error:.1e}",
        "" if row.normalisations_after_convolutions is None else str(row.normalisations_after_convolutions),
        str(row.frozen), _yes(row.eager), seconds,
        "" if row.cpu_seconds is None else f"{row.cpu_seconds:.1f}", "" if row.load is None else f"{row.load:.1f}",
        "**fails**" if row.failures else "holds",
    ]  # fmt: skip


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


# -- driver -------------------------------------------------------------------------------------------


def main() -> None:
    """Run what is asked for, row by row."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text(encoding="utf-8").splitlines() if options.resume and out.exists() else []
    rows = [_row(json.loads(line)) for line in lines]
    if options.retry:
        rows = [row for row in rows if not row.failures]
    done = {row.key for row in rows}
    # Every network at one budget first, so that a fault shows early.
    work = [(n, b, r) for r in options.round_to for b in options.budgets for n in options.models]
    with out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
        for name, budget, round_to in work:
            if (name, budget, round_to) in done:
                continue
            with_onnx = options.all_onnx or round_to != "1" or budget == BUDGETS[1]
            row = run(name, budget, round_to, with_onnx, options.latency)
            row = replace(row, machine=page.processor(), date=datetime.date.today().isoformat())
            rows.append(row)
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            print(_said(row), flush=True)
    place = {name: number for number, name in enumerate(networks.ACCEPTANCE)}
    rows.sort(key=lambda row: (place.get(row.model, len(place)), row.round_to == "1", -row.budget))
    render(rows, out.with_suffix(".md"), ["Weights are random, the same in every run; see `bench/README.md`."])
    sys.exit(any(row.failures for row in rows))


def _said(row: Row) -> str:
    share = f"{row.macs_after / row.macs_before:.5f}" if row.macs_before else "nothing"
    verdict = row.error or "; ".join(row.failures) or "holds"
    return f"{row.model} {row.budget:g} round to {row.round_to}: {share} left, {row.seconds:.1f} s: {verdict}"


def _row(data: dict[str, Any]) -> Row:
    speedup = tuple(data["speedup"]) if data["speedup"] else None
    return Row(**{**data, "failures": tuple(data["failures"]), "speedup": speedup})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(networks.ACCEPTANCE), metavar="NAME")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), metavar="SHARE")
    parser.add_argument("--round-to", nargs="+", default=["auto", "1"], metavar="N|auto")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if not given")
    parser.add_argument("--latency", action="store_true", help="also measure the ONNX files, where they are written")
    parser.add_argument("--all-onnx", action="store_true", help="write ONNX for every row, not only auto and 0.4")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    parser.add_argument("--retry", action="store_true", help="with --resume: run rows again that did not hold")
    parser.add_argument("--out", type=Path, default=page.RESULTS / "acceptance.jsonl", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
