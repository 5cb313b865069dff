"""Schedules against each other and against Torch-Pruning: the same checkpoints, epochs, data and recipe.

    python -m bench.training --networks resnet20 --budgets 0.5 0.3 --seeds 0 --epochs 3
    python -m bench.training --networks resnet56 --methods tick-tock one-shot tp:magnitude --budgets 0.3 --epochs 10
    python -m bench.training --render                    (the page from the rows measured so far)

A method is a schedule of `slimc methods`, with `:none` as it was published (nothing fitted between cuts) or with our
reconstruction after every cut (no suffix), or `tp:magnitude`, `tp:iterative`, `tp:group-sparsity`. Rows are added to
bench/results/training.jsonl; those that are there are not measured again, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimc
from bench.fashion import EPOCHS, NETWORKS, Fashion, trained
from bench.page import RESULTS, header, processor
from bench.peer_cut import macs, pruner_of, shrink
from slimc.graph.example import Example
from slimc.random_state import kept_random_state
from slimc.samples import batch_of
from slimc.training.feeds import Arrays
from slimc.training.layout import arrange
from slimc.training.loop import Hooks, Loop, evaluate
from slimc.training.recipe import Recipe
from slimc.training.stream import Stream

ROWS, RUNS = RESULTS / "training.jsonl", Path(__file__).parent / "checkpoints" / "runs"
KEY = ("network", "seed", "budget", "method", "epochs")
METHODS = (
    "tick-tock", "one-shot", "iterative", "tp:magnitude", "tp:iterative", "tp:group-sparsity", "tick-tock:none",
    "one-shot:none", "iterative:none", "group-sparsity", "group-sparsity:none", "slimming", "slimming:none", "soft",
    "soft:none", "csgd", "csgd:none", "resrep", "resrep:none", "dcp", "dcp:none", "lottery:none", "scratch:none",
    "meta:none", "joint-search:none",
)  # fmt: skip
RECIPE = Recipe(rate=0.05)
PUBLISHED = {"tick-tock": {"lift": "sum"}}
"""Settings that make a schedule what was published, beside fitting nothing after cuts."""
_STEPS = 10


class Data:
    """Fashion-MNIST as every method here sees it."""

    def __init__(self) -> None:
        whole = Fashion()
        self.train = Arrays([whole.images, whole.labels], 128, trains=True, augmented=True)
        self.val = Arrays(list(whole.validation))
        self.example = whole.images[:2]

    def accuracy(self, module: nn.Module) -> float:
        """Percent right on the validation pictures, in float32."""
        example = Example.of(self.example)
        return 100 * evaluate(module, (batch_of(item, example) for item in self.val))


def measure(network: str, seed: int, budget: float, method: str, epochs: float, data: Data) -> dict[str, Any]:
    """One row."""
    model = trained(network, seed, Fashion())
    before = data.accuracy(model)
    started = time.perf_counter()
    if method.startswith("tp:"):
        module = peer(model, method.removeprefix("tp:"), budget, epochs, seed, data)
    else:
        name, _, plain = method.partition(":")
        folder = RUNS / f"{network}-{seed}-{budget:g}-{name}-{plain or 'mended'}-{epochs:g}"
        run = slimc.schedule(
            name, model, data.example, flops=budget, epochs=epochs, data=data.train, recipe=RECIPE, round_to=1,
            recover="none" if plain else "auto", settings=PUBLISHED.get(name, {}) if plain else {}, seed=seed,
            folder=folder, resume=(folder / "manifest.json").exists(),
        )  # fmt: skip
        module = run.result.module
    whole, left = (slimc.inspect(m, data.example).macs for m in (model, module))
    return {
        "network": network, "seed": seed, "budget": budget, "method": method, "epochs": epochs, "before": before,
        "after": data.accuracy(module.eval()), "got": left / whole, "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(), "machine": processor(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


# -- Torch-Pruning ------------------------------------------------------------------------------------


def peer(model: nn.Module, method: str, budget: float, epochs: float, seed: int, data: Data) -> nn.Module:
    """Torch-Pruning's global pruner, in small steps until the MACs are there, trained with our loop and recipe."""
    ours = copy.deepcopy(model)
    more: dict[str, Any] = {"kind": method, "reg": 5e-4, "alpha": 4} if method == "group-sparsity" else {}
    pruner = pruner_of(ours, data.example, **more)
    whole = macs(ours, data.example)

    def cut(share: float) -> None:
        shrink(pruner, ours, data.example, share * whole)

    with kept_random_state():
        stream = Stream(data.train, Example.of(data.example), seed)
        if method == "magnitude":
            cut(budget)
            _train(ours, stream, epochs, RECIPE)
        elif method == "iterative":
            between = Recipe(rate=0.5 * (RECIPE.rate or 0), shape="constant")
            for step in range(1, _STEPS + 1):
                cut(budget ** (step / _STEPS))
                if step < _STEPS:
                    _train(ours, stream, epochs / 2 / (_STEPS - 1), between)
            _train(ours, stream, epochs / 2, RECIPE)
        else:
            hooks = Hooks(before_step=lambda: pruner.regularize(ours), after_epoch=pruner.update_regularizer)
            _train(ours, stream, epochs / 2, Recipe(rate=RECIPE.rate, weight_decay=0.0), hooks)
            cut(budget)
            _train(ours, stream, epochs / 2, RECIPE)
    return ours


def _train(module: nn.Module, stream: Stream, epochs: float, recipe: Recipe, hooks: Hooks | None = None) -> None:
    arrange(module)
    loop = Loop(module, stream, max(1, round(epochs * len(stream))), recipe, hooks=hooks)
    while loop.done < loop.steps:
        loop.step()
    loop.finish()


# -- the table ----------------------------------------------------------------------------------------


def main() -> None:
    """Measure what is asked for and write the page."""
    parser = argparse.ArgumentParser(description="schedules and Torch-Pruning with the same epochs, on Fashion-MNIST")
    parser.add_argument("--networks", nargs="+", default=["resnet20"], choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.render:
        data = Data()
        cases = itertools.product(options.networks, options.budgets, options.seeds, options.methods)
        for network, budget, seed, method in cases:
            if (network, seed, budget, method, options.epochs) in {tuple(row[k] for k in KEY) for row in rows()}:
                continue
            row = measure(network, seed, budget, method, options.epochs, data)
            print(json.dumps(row), flush=True)
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            write_page()
    write_page()


def rows() -> list[dict[str, Any]]:
    """All rows measured so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def write_page() -> None:
    """bench/results/training.md: for each network and budget, methods from best to worst."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows():
        grouped[row["network"], row["budget"], row["epochs"], row["method"]].append(row)
    lines = ["# Schedules against each other, with the same epochs", "", header(rows=rows()), ""]
    lines += [
        "Percent right on 10,000 validation pictures of Fashion-MNIST that nothing was chosen by. All methods start",
        "from the same checkpoints and have the same epochs in all, all phases included, the",
        "same recipe (SGD, Nesterov momentum 0.9, peak rate 0.05, cosine, batch 128, mirrored and moved pictures) and",
        "any width. *fitted*: layers are fitted again without labels after every cut (ours); else the method is as it",
        "was published. `tp:` is Torch-Pruning. Minutes are those of busy machines. Baselines were trained for "
        + ", ".join(f"{count} ({name})" for name, count in EPOCHS.items()) + " epochs.",
        "",
    ]  # fmt: skip
    for network, budget, epochs in sorted({key[:3] for key in grouped}, key=str):
        lines += [f"## {network}, {100 * budget:g}% of the FLOPs, {epochs:g} epochs", ""]
        lines += ["| method | fitted | seeds | original | result | lost | FLOPs left | minutes | date |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
        own = {key[3]: found for key, found in grouped.items() if key[:3] == (network, budget, epochs)}
        for method, found in sorted(own.items(), key=lambda item: -_mean(item[1], "after") + _mean(item[1], "before")):
            name, _, plain = method.partition(":")
            fitted = "–" if name == "tp" or plain else "yes"
            before, after = _mean(found, "before"), _mean(found, "after")
            label = method if name == "tp" else name
            date = max(row["date"] for row in found)
            lines.append(
                f"| {label} | {fitted} | {len(found)} | {before:.2f} | {after:.2f} | {before - after:+.2f} | "
                f"{100 * _mean(found, 'got'):.2f}% | {_mean(found, 'seconds') / 60:.1f} | {date} |"
            )
        lines.append("")
    (RESULTS / "training.md").write_text("\n".join(lines))


def _mean(found: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in found)


if __name__ == "__main__":
    main()
