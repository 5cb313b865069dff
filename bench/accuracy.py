"""Accuracy right after the cut, after recovery without labels, and after one epoch of fine-tuning.

    python -m bench.accuracy --networks resnet20 --scorers auto --budgets 0.7 0.5 0.3 --samples 512
    python -m bench.accuracy --scorers all tp:magnitude tp:taylor --recover reconstruct,bn --finetune   (hours)
    python -m bench.accuracy --render                        (the page from the rows measured so far)

Rows are added to bench/results/accuracy.jsonl; those that are there are not measured again, unless fine-tuning is asked
for and was left out.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import slimc
from bench import peer_cut
from bench.fashion import NETWORKS, Fashion, accuracy, fit, trained
from bench.page import RESULTS, header, processor
from slimc import scores

ROWS = RESULTS / "accuracy.jsonl"
KEY = ("network", "seed", "scorer", "budget", "samples", "recover")


def measure(
    network: str, seed: int, scorer: str, budget: float, samples: int, recover: str, finetune: bool, data: Fashion
) -> dict[str, Any]:
    """One row: a network cut to a share of its FLOPs by one scorer, and what became of its accuracy."""
    model, before = original(network, seed, data)
    started = time.perf_counter()
    batches = calibration(data, samples, seed)
    options: dict[str, Any] = {
        "flops": budget,
        "round_to": 1,
        "data": batches,
        "samples": samples or None,
        "seed": seed,
    }

    def make(scorer: str, recover: str) -> slimc.Compressed:
        if not peer:
            return slimc.compress(model, data.images[:2], scorer=scorer, recover=recover, **options)
        return slimc.apply(model, plan, data.images[:2], recover=recover, data=batches, samples=samples or None)

    peer = scorer.startswith("tp:")
    if peer:
        labelled = calibration(data, 512, seed) or []
        plan = peer_cut.chosen(model, data.images[:2], budget, scorer.removeprefix("tp:"), labelled)
    # What auto is wherever something is recovered; the peer's choice needs no name.
    result = make("obs" if scorer == "auto" else scorer, "none")
    cut = accuracy(result.module.eval(), data)
    recovered = None
    if recover != "none":
        result = make(scorer, recover)
        recovered = accuracy(result.module.eval(), data)
    module, got = result.module, slimc.inspect(result.module, data.images[:2]).macs / result.analysis.full.macs
    seconds = time.perf_counter() - started
    tuned = None
    if finetune:
        tuned_module = copy.deepcopy(module)
        fit(tuned_module, data, epochs=1, rate=0.05, seed=seed)
        tuned = accuracy(tuned_module, data)
    return {
        "network": network, "seed": seed, "scorer": scorer, "budget": budget, "samples": samples, "recover": recover,
        "before": before, "cut": cut, "recovered": recovered, "finetuned": tuned, "got": got,
        "seconds": round(seconds, 1), "threads": torch.get_num_threads(),
        "machine": processor(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


@functools.cache
def original(network: str, seed: int, data: Fashion) -> tuple[nn.Module, float]:
    """The trained network, which no cut changes, and its accuracy."""
    model = trained(network, seed, data)
    return model, accuracy(model, data)


def calibration(data: Fashion, samples: int, seed: int) -> list[tuple[Tensor, Tensor]] | None:
    """Training pictures with labels (recovery does not look at these) in batches of 64; None for no data."""
    if not samples:
        return None
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[:samples]
    return [(data.images[index], data.labels[index]) for index in torch.split(order, 64)]


def main() -> None:
    """Measure what is asked for and write the page."""
    parser = argparse.ArgumentParser(description="accuracy after cutting and recovering, on Fashion-MNIST")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg11_bn"], choices=NETWORKS)
    parser.add_argument(
        "--scorers", nargs="+", default=["auto"], help="of `slimc methods`, auto, all, tp:magnitude, tp:taylor"
    )
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--samples", nargs="+", type=int, default=[512], help="0 for no data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recover", default="auto")
    parser.add_argument("--finetune", action="store_true", help="also one epoch of fine-tuning with labels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.render:
        data = Fashion()
        every = sorted(scores.methods())
        names = [name for given in options.scorers for name in (every if given == "all" else [given])]
        cases = itertools.product(options.seeds, options.networks, options.samples, options.budgets, names)
        for seed, network, samples, budget, scorer in cases:
            # Read each time: another process may be at the same list.
            known = rows().get((network, seed, scorer, budget, samples, options.recover))
            if known and (known["finetuned"] is not None or not options.finetune):
                continue
            row = measure(network, seed, scorer, budget, samples, options.recover, options.finetune, data)
            print(json.dumps(row), flush=True)
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
    write_page()


def rows() -> dict[tuple[Any, ...], dict[str, Any]]:
    """All rows measured so far, the last of each case."""
    found = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return {tuple(row[k] for k in KEY): row for row in found}


def write_page() -> None:
    """bench/results/accuracy.md: means over seeds, and the points lost."""
    grouped = defaultdict(list)
    for row in rows().values():
        grouped[tuple(row[k] for k in KEY if k != "seed")].append(row)
    lines = [
        "# Accuracy on Fashion-MNIST's validation pictures",
        "",
        header(rows=list(rows().values())),
        "",
        "Percent right on 10,000 validation pictures that nothing was fitted on, means over seeds. *cut*: right after",
        "the removal; *left*: of the FLOPs, where as many or fewer were asked for (Torch-Pruning's by its own counter,",
        "here by ours); *recovered*: after recovery without labels on so many training pictures (0: none, pictures are",
        "made up); *lost*: original minus recovered, in points; *fine-tuned*: after one epoch with labels (in",
        "brackets: of so many seeds). Any width (`--round-to 1`). Dates are those of the last row of each line.",
        "",
        "| network | scorer | FLOPs | left | samples | recovery | seeds | original | cut | recovered | lost "
        "| fine-tuned | date |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for (network, scorer, budget, samples, recover), found in sorted(grouped.items(), key=lambda item: str(item[0])):
        before, cut, recovered, tuned, got = (
            _mean(row[k] for row in found) for k in ("before", "cut", "recovered", "finetuned", "got")
        )
        lost = None if before is None or recovered is None else before - recovered
        numbers = " | ".join("–" if n is None else f"{n:.2f}" for n in (before, cut, recovered, lost, tuned))
        seeds_tuned = sum(row["finetuned"] is not None for row in found)
        if 0 < seeds_tuned < len(found):
            numbers += f" ({seeds_tuned})"
        date = max(row["date"] for row in found)
        case = f"| {network} | {scorer} | {budget:g} | {got:.4f} | {samples} | {recover} | {len(found)} "
        lines.append(f"{case}| {numbers} | {date} |")
    (RESULTS / "accuracy.md").write_text("\n".join(lines) + "\n")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


if __name__ == "__main__":
    main()
