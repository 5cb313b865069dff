"""Coverage sweep: every model captured, cut to half of its FLOPs, proven, exported to ONNX and compared there.

    python -m bench.coverage [torchvision timm hf smp yolo] [--only SUBSTRING] [--jobs 2] [--resume]

Each model runs in a child process of its own with a time limit. Rows are appended to bench/results/coverage.jsonl as
they finish; docs/coverage.md is rendered from them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "coverage.jsonl"
LIMIT_SECONDS = 180


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["torchvision", "timm", "hf", "smp", "yolo"])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="skip cases that have a row")
    parser.add_argument("--retry", action="store_true", help="with --resume: run failed cases again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("ROW " + json.dumps(measure(options.child)))
        return
    from bench.cases import cases

    done = {row["case"] for row in rows() if not (options.retry and row.get("error"))} if options.resume else set()
    wanted = [case for case in cases(options.sources) if options.only in case and case not in done]
    print(f"{len(wanted)} models, {options.jobs} at a time")
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(in_child, wanted):
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)


def rows() -> list[dict[str, Any]]:
    """All rows so far; the last one of each case counts."""
    if not RESULTS.exists():
        return []
    found = [json.loads(text) for text in RESULTS.read_text(encoding="utf-8").splitlines()]
    return list({row["case"]: row for row in found}.values())


def in_child(case: str) -> dict[str, Any]:
    start = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", "bench.coverage", "--child", case]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"case": case, "error": f"took more than {LIMIT_SECONDS} s", "seconds": LIMIT_SECONDS}
    for text in run.stdout.splitlines():
        if text.startswith("ROW "):
            row: dict[str, Any] = json.loads(text[4:])
            return row
    seconds = round(time.perf_counter() - start, 1)
    last = (run.stderr.strip().splitlines() or ["no output"])[-1]
    return {"case": case, "error": f"ended with {run.returncode}: {last[:300]}", "seconds": seconds}


def measure(case: str) -> dict[str, Any]:
    """One model through the public interface; stops at the first stage that fails and says which."""
    import tempfile

    import torch

    import slimc
    from bench.cases import build

    torch.set_num_threads(1)
    row: dict[str, Any] = {"case": case}
    model, inputs = build(case)
    own = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    stage = ["analyse"]
    try:
        graph = slimc.inspect(model, inputs)
        names = {member.tensor for group in graph.groups for member in group.members}
        sizes = dict(model.named_parameters())
        row["params"] = graph.params
        row["prunable"] = sum(sizes[n].numel() for n in names if n in sizes) / max(1, graph.params)
        row["frozen"] = sorted({f"{cause.op}: {cause.reason}" for cause in graph.frozen})
        row["dynamic_batch"] = graph.captured.dynamic_shapes is not None
        stage[0] = "compress"
        slim = slimc.compress(model, inputs, flops=0.5, round_to=1)
        row["got"] = slim.report.targets["flops"].got
        proof = slim.report.verification
        assert proof is not None
        row["verified"], row["moved"] = proof.max_relative_error, proof.moved
        row["eager"] = slim.module is not slim.graph
        row["stages"] = {k: round(v, 3) for k, v in slim.report.seconds.items() if v is not None}
        stage[0] = "onnx"
        with tempfile.TemporaryDirectory() as folder:
            file = slim.export_onnx(Path(folder) / "model.onnx")
        row["onnx"] = file.max_relative_error
    except Exception as error:
        row["error"] = f"{stage[0]}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["memory_ratio"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / max(1, own), 1)
    return row


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    if "error" in row:
        return f"FAIL {row['case']} {row['seconds']} s: {row['error']}"
    return (
        f"ok   {row['case']} {row['seconds']} s, prunable {row['prunable']:.3f}, got {row['got']:.3f}, "
        f"error {row['verified']:.1e}, onnx {row['onnx']:.1e}, {'eager' if row['eager'] else 'graph'}"
        + (f", frozen: {'; '.join(row['frozen'])[:200]}" if row["frozen"] else "")
    )


if __name__ == "__main__":
    main()
