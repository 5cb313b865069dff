"""Processor time of each scorer against the passes that it needs, and peak memory, in fresh processes. Linux only.

    python -m bench.scoring                        (every scorer; an hour)
    python -m bench.scoring --scorers dcp obs

Rows are added to bench/results/scoring.jsonl; the page shows the last one of each scorer.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from bench import networks, page
from bench.memory import Peaks, _status
from slimc import compiler, samples, scores
from slimc.graph.example import Example
from slimc.sensitivities import PROBED

ROWS = page.RESULTS / "scoring.jsonl"
KEY = ("scorer", "model", "batches", "size", "threads")
LIMIT = 3 * 2**30
_GIB = 2**30
_PART = 8
"""Samples of a plain pass: about what a scorer takes at a time, and no slower per sample than a batch of 32."""
CLASSES = 1000
SLOPES = {"obs": PROBED}
"""Samples of which a scorer without labels takes gradients, beside the forward pass over all."""


def data(batches: int, size: int) -> samples.Samples:
    """Random pictures with random labels."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(batches):
        pictures = torch.randn(size, 3, 224, 224, generator=generator)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        found.append(samples.Batch(Example.of(pictures), labels))
    return samples.Samples(tuple(found), "random pictures")


def plain_seconds(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, needs: str) -> float:
    """One eager pass over a batch in parts: forward for inputs, forward and backward for labels."""
    started = time.process_time()
    for part, targets in zip(inputs.split(_PART), labels.split(_PART), strict=True):  # type: ignore[no-untyped-call]
        if needs == "labels":
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(part), targets).backward()  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                model(part)
    return time.process_time() - started


def child(name: str, network: str, batches: int, size: int, threads: int) -> dict[str, float]:
    """Processor seconds of plain passes and of scoring, and the process's largest resident memory while scoring."""
    torch.set_num_threads(threads)
    model = networks.torchvision_model(network).eval()
    analysis = compiler.inspect(model, networks.image(network))
    calibration, method = data(batches, size), scores.find(name)
    picture: Any = calibration.batches[0].example.args[0]
    labels: Any = calibration.batches[0].targets

    def passes() -> list[float]:
        """Two estimates of what the passes over all batches take."""
        found = []
        for _ in range(2):
            one = plain_seconds(model, picture, labels, method.needs)
            probed = SLOPES.get(name, 0) / size
            more = probed * plain_seconds(model, picture, labels, "labels") if probed else 0.0
            found.append(batches * one + more)
        return found

    plain: list[float] = []
    if method.needs != "weights":
        plain_seconds(model, picture[:_PART], labels[:_PART], method.needs)  # the first one warms up
        plain += passes()
    model.zero_grad()
    subject = scores.Subject(analysis.types, analysis.grouping, "l2", 0, samples=calibration)
    peaks = Peaks()
    peaks.enter("score")
    started = time.process_time()
    method.score(subject)
    seconds = time.process_time() - started
    peak = float(_status("VmHWM"))
    # Before and after, since a shared machine is not equally fast all the time.
    plain += passes() if plain else []
    middle = statistics.median(plain) if plain else 0.0
    return {"plain": middle, "runs": len(plain), "seconds": seconds, "peak": peak}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same in a fresh process, with what was measured and when."""
    command = [sys.executable, "-m", "bench.scoring", "--child", name, "--model", options.model]
    command += ["--batches", str(options.batches), "--size", str(options.size), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    case = {"scorer": name, "model": options.model, "batches": options.batches, "size": options.size}
    place = {"threads": options.threads, "machine": page.processor(), "date": datetime.date.today().isoformat()}
    return {**case, **found, **place}


def rows() -> list[dict[str, Any]]:
    """The last row of each case."""
    found = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return sorted({tuple(row[k] for k in KEY): row for row in found}.values(), key=lambda row: row["scorer"])


def write_page() -> None:
    """bench/results/scoring.md: one table for each model and amount of data."""
    known = scores.methods()
    parts = [
        page.header(rows=rows()),
        "Random pictures of 224 x 224, which are in memory. Processor time, so that other programs count little. Plain "
        "passes: the model's own forward (inputs) or forward and backward (labels) over the same pictures in parts of "
        f"{_PART}, one batch times their number: the median of four runs, two of them before scoring and two after it, "
        "or the faster of two before it. For obs forward over all and backward over "
        f"{SLOPES['obs']}. Peak: resident memory of the whole process while scoring, with torch, the "
        "model twice and the data.",
    ]
    header = ("scorer", "needs", "plain passes", "runs", "scoring", "ratio", "peak memory", "under 3 GiB", "date")
    for case, found in itertools.groupby(sorted(rows(), key=_amount), _amount):
        lines = []
        for row in found:
            needs, plain, peak = known[row["scorer"]].needs, row["plain"], row["peak"]
            ratio = f"{row['seconds'] / plain:.2f}" if plain else ""
            passes = (f"{plain:.0f} s", str(row.get("runs", 2))) if plain else ("", "")
            under = "yes" if peak < LIMIT else "**no**"
            lines.append(
                [row["scorer"], needs, *passes, f"{row['seconds']:.1f} s", ratio, f"{peak / _GIB:.2f} GiB", under,
                 row["date"]]
            )  # fmt: skip
        parts += ["## {}, {} batches of {}, threads: {}".format(*case), page.table(header, lines)]
    page.write(page.RESULTS / "scoring.md", "Time and memory of scorers", parts)


def _amount(row: dict[str, Any]) -> tuple[str, int, int, int]:
    return row["model"], row["batches"], row["size"], row["threads"]


def main() -> None:
    """Measure every scorer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--scorers", nargs="+", default=list(scores.methods()), metavar="NAME")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--render", action="store_true", help="only write the page")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.model, options.batches, options.size, options.threads)))
        return
    for name in [] if options.render else options.scorers:
        row = measure(name, options)
        print(f"{name}: {row['seconds']:.1f} s, {row['peak'] / _GIB:.2f} GiB", flush=True)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        write_page()  # after each, since all take an hour
    write_page()


if __name__ == "__main__":
    main()
