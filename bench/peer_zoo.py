"""slimc's cut against Torch-Pruning's on every torchvision model and one timm model per module file.

    python -m bench.peer_zoo [torchvision timm] [--only SUBSTRING] [--jobs 1] [--resume]

Each model runs in a process of its own: both tools cut twice; the quicker run counts. Rows are appended to
bench/results/peer_zoo.jsonl as they finish. Torch-Pruning gets the name of the last layer, whose
outputs it leaves, and no description of any architecture but torchvision's vision transformers, whose bare parameters
and whole heads it cannot find.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import page
from bench.children import rows_of, sweep

RESULTS = page.RESULTS / "peer_zoo.jsonl"
LIMIT_SECONDS, PEER_SECONDS = 400, 30
ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["torchvision", "timm"])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="skip cases that have a row")
    parser.add_argument("--render", action="store_true", help="only write the page from the rows there are")
    options = parser.parse_args()
    if not options.render:
        from bench.cases import cases, size_hint

        done = {row["case"] for row in rows_of(RESULTS)} if options.resume else set()
        wanted = [case for case in cases(options.sources) if options.only in case and case not in done]
        wanted.sort(key=size_hint)
        for row in sweep(measure, wanted, RESULTS, options.jobs, LIMIT_SECONDS):
            print(row, flush=True)
    render()


def measure(case: str) -> dict[str, Any]:
    """Seconds of both tools on one model: the cut with capture apart, and building the graph with one step."""
    import torch

    from bench.cases import build
    from bench.peers import head_of, peer_seconds

    torch.set_num_threads(1)
    model, inputs = build(case)
    model.eval()
    row: dict[str, Any] = {"case": case}
    start = time.perf_counter()
    try:
        row |= own_seconds(model, inputs)
    except Exception as error:
        row["slimc_error"] = said(error)
    try:
        for _ in range(ROUNDS):
            with patience(PEER_SECONDS):
                cut = peer_seconds(model, inputs, head_of(model)).cut
            row["peer"] = round(min(cut, row.get("peer", cut)), 4)
            if cut > PEER_SECONDS / 3:
                break
    except Exception as error:
        row["peer_error"] = said(error)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def own_seconds(model: Any, inputs: Any) -> dict[str, float]:
    """Seconds of capture, once, and of the quicker of several cuts of what was captured."""
    from bench.peers import cut_of
    from slimc.analysis import Stages, analyse
    from slimc.graph.cost import Model
    from slimc.graph.groups import group
    from slimc.graph.infer import infer

    stages = Stages(None)
    analysis = analyse(model, inputs, stages)
    capture = stages.seconds.pop("capture")
    rounds = [stages]
    cut_of(analysis, stages)
    for _ in range(ROUNDS - 1):
        again = Stages(None)
        with again.stage("infer"):
            types = infer(analysis.captured)
            grouping = group(types)
            cost = Model(types, grouping)
        cut_of(replace(analysis, types=types, grouping=grouping, cost=cost), again)
        rounds.append(again)
    return {"capture": round(capture, 4), "slimc": round(min(sum(each.seconds.values()) for each in rounds), 4)}


def said(error: Exception) -> str:
    """A failure in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the work inside takes longer."""

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def render(path: Path = page.RESULTS / "peer_zoo.md") -> None:
    """Write the page from the rows there are."""
    found = sorted(rows_of(RESULTS), key=lambda row: row["case"])
    built = [row for row in found if "error" not in row]
    both = [row for row in found if "slimc" in row and "peer" in row]
    ratios = [row["peer"] / row["slimc"] for row in both]
    slower = max((row["slimc"] - row["peer"] for row in both), default=0.0)
    own, peers = (sum(tool in row for row in built) for tool in ("slimc", "peer"))
    middle = page.times(page.median_interval(ratios)) if ratios else "unknown"
    note = (
        f"Of {len(built)} models that could be built here slimc cuts {own}, Torch-Pruning {peers} (vision transformers "
        f"of torchvision with the help of its own example), both {len(both)}. On those slimc's cut is {middle} times "
        "as fast in the median (bootstrap 95% interval over "
        f"models), quicker on {sum(ratio > 1 for ratio in ratios)} of them, at most {max(0.0, slower):.2f} s slower. "
        "*slimc*: channel inference, scores, plan, new graph; *capture* stands apart, and so does the proof, which "
        "Torch-Pruning has not. *Torch-Pruning*: its dependency graph and one step; that its result is right was not "
        f"checked, only that it runs; it is stopped after {PEER_SECONDS} s. Seconds, one thread, the quicker of "
        f"{ROUNDS} runs."
    )
    if ratios:
        note += f" Half of all ratios lie between {' and '.join(f'{q:.1f}' for q in _quartiles(ratios))}."
    names = ["model", "capture", "slimc", "Torch-Pruning", "ratio", "what failed"]
    page.write(
        path, "The zoo against Torch-Pruning", [page.header(1, found), note, page.table(names, [*map(_cells, found)])]
    )


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str) -> str:
        return f"{row[key]:.3f}" if key in row else ""

    kinds = (("slimc", "slimc_error"), ("Torch-Pruning", "peer_error"), ("both", "error"))
    failed = [f"{tool}: {row[key]}" for tool, key in kinds if key in row]
    ratio = f"{row['peer'] / row['slimc']:.1f}" if "slimc" in row and "peer" in row else ""
    return [row["case"], number("capture"), number("slimc"), number("peer"), ratio,
            "; ".join(failed).replace("|", "/")[:160]]  # fmt: skip


if __name__ == "__main__":
    main()
