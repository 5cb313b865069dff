"""What cutting physically between ticks saves: a whole tick-tock run beside the same phases on the uncut network.

    python -m bench.rewriting --budget 0.3 --epochs 1 --repeats 3

The second run has the same phases, steps, gates and scores, and its network keeps its size, as with masks; the cost of
masking itself is left out, which favours it. Both run in turn in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch

import slimc
from bench.fashion import NETWORKS, Fashion, trained
from bench.page import RESULTS, header, write
from bench.training import RECIPE, Data
from slimc.schedules import tick_tock
from slimc.training import lifts
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import schedule

TICKS, TOCKS, FINETUNE = 5, 2, 0.7


@schedule("masks-only", "the phases of tick-tock on the uncut network", "bench/rewriting.py")
def masks_only(run: Run) -> Iterator[Phase]:
    """The phases that tick-tock has, without its cuts."""
    before = (1 - FINETUNE) * run.options.epochs
    run.gate()
    for _ in range(TOCKS):
        yield run.phase("tock", 0.6 * before / TOCKS, rate=0.2, shape="triangle", hooks=tick_tock.sparse(run, 1e-3))
        for _ in range(TICKS):
            tick = tick_tock.scored(run, 0.4 * before / (TICKS * TOCKS))
            yield tick
    run.merge()
    yield run.phase("finetune", run.left)
    scores = lifts.summed(run.network, run.network.places, lifts.zeros(run.network, run.network.places))
    run.cut(lambda: run.selection.choose(scores))


def seconds(network: str, name: str, budget: float, epochs: float, data: Data) -> float:
    """One run, without the building of its result."""
    model = trained(network, 0, Fashion())
    run = slimc.schedule(
        name, model, data.example, flops=budget, epochs=epochs, data=data.train, recipe=RECIPE, round_to=1,
        recover="none",
    )  # fmt: skip
    started = time.perf_counter()
    for phase in run:
        phase.train()
        if phase.name == "finetune":
            return time.perf_counter() - started
    raise AssertionError("a run ends with fine-tuning")


def main() -> None:
    """Measure in turn and write the page."""
    parser = argparse.ArgumentParser(description="tick-tock with physical cuts beside the same phases without")
    parser.add_argument("--network", default="resnet20", choices=NETWORKS)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Data()
    ratios, lines = [], ["| repeat | masks only | physical cuts | ratio |", "| ---: | ---: | ---: | ---: |"]
    for repeat in range(1, options.repeats + 1):
        masked = seconds(options.network, "masks-only", 0.999, options.epochs, data)
        cut = seconds(options.network, "tick-tock", options.budget, options.epochs, data)
        ratios.append(masked / cut)
        lines.append(f"| {repeat} | {masked:.1f} s | {cut:.1f} s | {masked / cut:.2f} |")
        print(lines[-1], flush=True)
    note = (
        f"{options.network} on Fashion-MNIST, tick-tock to {100 * options.budget:g}% of the FLOPs in "
        f"{options.epochs:g} epochs, one thread: the run with physical cuts is {min(ratios):.2f} to {max(ratios):.2f} "
        "times as fast as the same phases on the uncut network, cuts included."
    )
    write(
        RESULTS / f"rewriting_{options.network}.md", "Physical cuts between ticks", [header(), note, "\n".join(lines)]
    )


if __name__ == "__main__":
    main()
