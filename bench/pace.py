"""Latency targets: what a ranking by time is worth beside one by FLOPs, and how near the estimate comes.

    python -m bench.pace [--networks resnet20 vgg11_bn] [--seeds 0 1 2] [--budgets 0.7 0.5 0.3]      (hours)
    python -m bench.pace --render                        (the page from the rows measured so far)

Each trained network is cut to a share of its FLOPs and measured; then the time that this took is the target of another
cut. Both are recovered on the same unlabelled pictures and measured again, beside the original and beside each other.
Rows are added to bench/results/pace.jsonl; those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

import slimc
from bench import page
from bench.accuracy import calibration, original
from bench.fashion import NETWORKS, Fashion, accuracy
from slimc.exporters import latency

ROWS = page.RESULTS / "pace.jsonl"
KEY = ("network", "seed", "budget")
_SECONDS = 20.0
_ESTIMATE = re.compile(r"estimated ([\d.]+)% of the time, measured ([\d.]+)%")


def measure(network: str, seed: int, budget: float, data: Fashion) -> dict[str, Any]:
    """One row: a network cut to a share of its FLOPs, and to the time that this takes."""
    model, before = original(network, seed, data)
    options: dict[str, Any] = {
        "data": calibration(data, 512, seed), "samples": 512, "seed": seed, "recover": "reconstruct,bn"
    }  # fmt: skip
    trials: list[tuple[float, float]] = []

    def listen(kind: str, text: str) -> None:
        if kind == "detail" and (found := _ESTIMATE.fullmatch(text)):
            trials.append((float(found[1]), float(found[2])))

    with tempfile.TemporaryDirectory() as folder:
        whole, by_flops, by_time = (Path(folder) / name for name in ("whole.onnx", "flops.onnx", "time.onnx"))
        first = slimc.compress(model, data.images[:2], flops=budget, **options)
        first.export_onnx(by_flops)
        _export_original(model, data, whole)
        beside = _timed(whole, by_flops)
        second = slimc.compress(model, data.images[:2], latency=beside["share"], progress=listen, **options)
        second.export_onnx(by_time)
        return {
            "network": network, "seed": seed, "budget": budget, "before": before,
            "flops": {"macs": first.report.macs.share, "accuracy": accuracy(first.module.eval(), data), **beside},
            "time": {
                "macs": second.report.macs.share, "accuracy": accuracy(second.module.eval(), data),
                **_timed(whole, by_time),
            },
            "against": _timed(by_flops, by_time), "trials": trials,
            "threads": torch.get_num_threads(), "machine": page.processor(), "date": datetime.date.today().isoformat(),
        }  # fmt: skip


def _export_original(model: torch.nn.Module, data: Fashion, path: Path) -> None:
    from slimc.exporters.formats import onnx
    from slimc.graph.capture import program_of

    captured = slimc.inspect(model, data.images[:2]).captured
    onnx.export(program_of(captured.module, captured), path)


def _timed(before: Path, after: Path) -> dict[str, Any]:
    found = latency.measure(before, after, threads=torch.get_num_threads(), budget_seconds=_SECONDS)
    assert found.speedup is not None
    assert found.ci95 is not None
    low, high = found.ci95
    return {"share": 1 / found.speedup, "interval": [1 / high, 1 / low], "ms": found.after_ms}


def rows() -> dict[tuple[Any, ...], dict[str, Any]]:
    """All rows measured so far."""
    found = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return {tuple(row[k] for k in KEY): row for row in found}


def write_page() -> None:
    """bench/results/pace.md."""
    columns = [
        "network", "seed", "FLOPs asked", "by FLOPs: time left", "accuracy", "by time: FLOPs left", "time left",
        "accuracy", "time against by FLOPs", "first trial: estimated", "measured", "trials",
    ]  # fmt: skip
    found = sorted(rows().values(), key=lambda row: (row["network"], row["seed"], -row["budget"]))
    lines = [
        [
            row["network"], str(row["seed"]), f"{row['budget']:g}", _share(row["flops"]), _accuracy(row, "flops"),
            f"{row['time']['macs']:.3f}", _share(row["time"]), _accuracy(row, "time"), _share(row["against"]),
            f"{row['trials'][0][0] / 100:.3f}", f"{row['trials'][0][1] / 100:.3f}", str(len(row["trials"])),
        ]
        for row in found
    ]  # fmt: skip
    note = (
        "Fashion-MNIST, 512 unlabelled pictures, `obs` ranking by cost, `--recover reconstruct,bn`; batch 1, ONNX "
        "Runtime on the processor. Shares of the original's time are medians of paired ratios with bootstrap 95% "
        "intervals; the time of the cut by FLOPs is the target of the other. In brackets: points lost. The two shares "
        "of the original's time are measured at different moments, which their intervals do not cover: where the "
        "machine changes meanwhile, as in the rows of VGG-11, only *time against by FLOPs*, in turn, compares the cuts."
    )
    page.write(
        page.RESULTS / "pace.md", "Latency targets",
        [page.header(found[0]["threads"] if found else None, found), note, page.table(columns, lines)],
    )  # fmt: skip


def _share(timed: dict[str, Any]) -> str:
    return f"{timed['share']:.3f} ({timed['interval'][0]:.3f} to {timed['interval'][1]:.3f})"


def _accuracy(row: dict[str, Any], which: str) -> str:
    return f"{row[which]['accuracy']:.2f} ({row['before'] - row[which]['accuracy']:.2f})"


def main() -> None:
    """Measure what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg11_bn"], choices=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.render:
        data = Fashion()
        for network, seed, budget in itertools.product(options.networks, options.seeds, options.budgets):
            if (network, seed, budget) not in rows():
                row = measure(network, seed, budget, data)
                print(json.dumps(row), flush=True)
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    write_page()


if __name__ == "__main__":
    main()
