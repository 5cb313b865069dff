"""Coverage sweep: every model captured, cut to half of its FLOPs, proven, exported to ONNX and compared there.

Kept weights stay as the cut leaves them: recovery is measured elsewhere.

    python -m bench.coverage [torchvision timm hf smp yolo] [--only SUBSTRING] [--jobs 2] [--resume]

Each model runs in a child process of its own with a time limit, the smallest models first. Rows are appended to
bench/results/coverage.jsonl as they finish; docs/coverage.md is rendered from them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.children import rows_of, sweep

RESULTS = Path(__file__).parent / "results" / "coverage.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
PROMISED_SECONDS, PROMISED_SHARE, PROMISED_MEMORY, PROMISED_PARITY = 120, 0.95, 4, 1e-5
GRAPHS_MIB = 128  # graphs, code and symbols of torch.export and ONNX, which a small model needs like a large one
LIMIT_SECONDS = 600  # of the clock; what is promised (120) is judged by processor seconds, as other work may run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=["torchvision", "timm", "hf", "smp", "yolo"])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="skip cases that have a row")
    parser.add_argument("--render", action="store_true", help="only write docs/coverage.md from the rows there are")
    parser.add_argument("--retry", action="store_true", help="with --resume: run failed cases again")
    options = parser.parse_args()
    if options.render:
        render()
        return
    from bench.cases import cases, size_hint

    done = (
        {row["case"] for row in rows_of(RESULTS) if not (options.retry and row.get("error"))}
        if options.resume
        else set()
    )
    wanted = [case for case in cases(options.sources) if options.only in case and case not in done]
    wanted.sort(key=size_hint)
    _load_everything(wanted)
    for row in sweep(measure, wanted, RESULTS, options.jobs, LIMIT_SECONDS):
        print(line(row), flush=True)
    render()


def _load_everything(wanted: list[str]) -> None:
    """Import what is imported at need before any model's memory is measured: compress a tiny one, build some cases."""
    import torch

    import slimc
    from bench.cases import build

    torch.set_num_threads(1)  # children are forked off this process, and threads do not survive that
    for case in {case.partition(":")[0]: case for case in reversed(wanted)}.values():
        build(case)  # the smallest of each source, whose library loads much of itself only now
    tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3)).eval()
    slim = slimc.compress(tiny, torch.randn(2, 3, 8, 8), flops=0.6, round_to=1, recover="none")
    with tempfile.TemporaryDirectory() as folder:
        slim.export_onnx(Path(folder) / "model.onnx")


def measure(case: str) -> dict[str, Any]:
    """One model through the public interface; stops at the first stage that fails and says which."""
    import torch

    import slimc
    from bench.cases import build
    from slimc.graph.example import Example

    torch.set_num_threads(1)
    row: dict[str, Any] = {"case": case}
    empty = _peak()
    model, inputs = build(case)
    with torch.no_grad():
        Example.of(inputs).run(model)
    own = _peak() - empty
    start, processor = time.perf_counter(), time.process_time()
    stage = "compress"
    try:
        slim = slimc.compress(model, inputs, flops=0.5, round_to=1, recover="none")
        _describe(row, slim, model)
        stage = "onnx"
        with tempfile.TemporaryDirectory() as folder:
            row["onnx"] = slim.export_onnx(Path(folder) / "model.onnx").max_relative_error
    except Exception as error:
        row["error"] = f"{stage}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["cpu_seconds"] = round(time.process_time() - processor, 1)
    row["own_mib"], row["peak_mib"] = round(own / 2**20), round((_peak() - empty) / 2**20)
    return row


def _peak() -> int:
    """The most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _describe(row: dict[str, Any], slim: Any, model: Any) -> None:
    graph, report = slim.analysis, slim.report
    names = {member.tensor for group in graph.groups for member in group.members}
    sizes = dict(model.named_parameters())
    row["params"] = graph.params
    row["prunable"] = sum(sizes[n].numel() for n in names if n in sizes) / max(1, graph.params)
    left = sorted((n for n in sizes if n not in names), key=lambda n: -sizes[n].numel())
    row["whole"] = [
        f"{n} {tuple(sizes[n].shape)} stays: {_why(graph.types, n)}" for n in left[:3] if sizes[n].dim() > 1
    ]
    row["frozen"] = sorted({f"{cause.op}: {cause.reason}" for cause in graph.frozen})
    row["dynamic_batch"] = graph.captured.dynamic_shapes is not None
    row["got"] = report.targets["flops"].got
    row["verified"], row["moved"] = report.verification.max_relative_error, report.verification.moved
    row["eager"] = slim.plan.attributes is not None
    row["eager_note"] = slim.plan.attributes_note
    row["stages"] = {k: round(v, 3) for k, v in report.seconds.items() if v is not None}


def _why(types: Any, name: str) -> str:
    """What froze the axes of a tensor."""
    axes = types.tensors.get(name, ())
    terms = [int(axis[axis > 0][0]) for axis in axes if (axis > 0).any()]
    frozen = [term for term in terms if types.solution.row_of[term] == 0]
    reasons = sorted({types.store.cause(term).reason for term in frozen})
    return ", ".join(reasons) or ("its axes do not count channels" if axes else "it is not used at inference")


def render() -> None:
    """Write docs/coverage.md from the rows there are."""
    from bench import page

    found = sorted(rows_of(RESULTS), key=lambda row: row["case"])
    done = [row for row in found if "error" not in row]
    shares = [row["prunable"] for row in found if "prunable" in row]
    proven = sum(row.get("verified") is not None for row in found)
    rounded = [row["case"].partition(":")[2] for row in done if row["onnx"] > PROMISED_PARITY]
    note = (
        f"{len(done)} of {len(found)} models are captured, cut to half of their FLOPs with any width, proven (removal "
        "equals masking, float64), exported to ONNX and equal there within 1e-5"
        + (f", or within float32's own rounding where that is more ({', '.join(rounded)})" if rounded else "")
        + f"; {proven} are proven. In the median model "
        f"{statistics.median(shares):.1%} of the parameters can be removed. Weights are random. Nothing is fitted "
        "after the cut. Detectors of "
        "torchvision are compressed as backbone and heads, with post-processing left outside. *prunable*: parameters "
        "in tensors that can shrink. *class*: the result is the model's own class; else the graph as a module. *s*: "
        "processor seconds of all of it with one thread (of the clock where marked ~, with other work beside it). "
        f"*memory*: MiB at the peak beyond what the imports hold, and how often that is what building and running the "
        f"model once takes; {GRAPHS_MIB} MiB on top of {PROMISED_MEMORY} times are no shortfall, since graphs and "
        "code take as much in a model without weights."
    )
    columns = [
        "model",
        "parameters",
        "prunable",
        "FLOPs left",
        "proof",
        "ONNX",
        "class",
        "any batch",
        "s",
        "memory",
        "frozen or failed",
    ]
    page.write(
        PAGE,
        "Coverage",
        [
            page.header(rows=found),
            note,
            page.table(["source", "models", "run", "hold"], _by_source(found)),
            "Shortfalls:",
            "\n".join(f"- {text}" for row in found for text in _shortfalls(row)) or "none",
            page.table(columns, [_cells(row) for row in found]),
        ],
    )


def _by_source(found: list[dict[str, Any]]) -> list[list[str]]:
    from bench.cases import SOURCES, cases

    counts = []
    for source in SOURCES:
        rows_here = [row for row in found if row["case"].startswith(f"{source}:")]
        held = sum("error" not in row for row in rows_here)
        counts.append([source, str(len(cases([source]))), str(len(rows_here)), str(held)])
    return counts


def _shortfalls(row: dict[str, Any]) -> Iterator[str]:
    """What of the promises does not hold for one model, with its cause."""
    if row.get("error"):
        cause = f" Cause: {row['cause']}." if row.get("cause") else ""
        yield f"{row['case']}: {row['error'].replace('|', '/')[:240]}{cause}"
        return
    if row.get("cpu_seconds", 0) > PROMISED_SECONDS:
        slowest = sorted(row["stages"].items(), key=lambda stage: -stage[1])[:2]
        where = " and ".join(f"{name} {seconds:.0f} s" for name, seconds in slowest)
        yield f"{row['case']}: {row['cpu_seconds']:.0f} processor seconds, {where} by the clock"
    if row["prunable"] < PROMISED_SHARE:
        yield f"{row['case']}: {row['prunable']:.1%} prunable; " + (
            "; ".join([*row["frozen"], *row.get("whole", ())]) or "see the frozen axes with `slimc inspect`"
        )
    if row.get("own_mib") and row["peak_mib"] > PROMISED_MEMORY * row["own_mib"] + GRAPHS_MIB:
        times = row["peak_mib"] / row["own_mib"]
        yield f"{row['case']}: {row['peak_mib']} MiB, {times:.1f} times its own {row['own_mib']}"


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else ""

    note = row.get("error") or "; ".join(row.get("frozen", ()))
    return [
        row["case"], number("params", ","), number("prunable", ".1%"), number("got", ".3f"), number("verified", ".0e"),
        number("onnx", ".0e"), "yes" if row.get("eager") else "no" if "eager" in row else "",
        "yes" if row.get("dynamic_batch") else "no" if "dynamic_batch" in row else "",
        str(row["cpu_seconds"]) if "cpu_seconds" in row else f"~{row['seconds']}",
        f"{row['peak_mib']} ({row['peak_mib'] / max(1, row['own_mib']):.1f}x)" if "own_mib" in row else "",
        note.replace("|", "/")[:200],
    ]  # fmt: skip


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
