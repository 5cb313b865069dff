"""What aligned widths buy: latency of one budget with any width and with widths that the runtime likes.

    python -m bench.alignment [--models resnet50 mobilenet_v2] [--flops 0.5]

Each slim model is measured beside the original in turn, in a fresh process, with ONNX Runtime on the processor.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench import page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenet_v2"])
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure each pair for")
    parser.add_argument("--out", type=Path, default=page.RESULTS / "alignment.md")
    options = parser.parse_args()
    rows = [row for name in options.models for row in measure(name, options.flops, options.seconds)]
    note = (
        f"{options.flops:g} of the FLOPs, magnitude ranking, batch 1, ONNX Runtime on the processor. The speed-up is "
        "the median of paired ratios with its bootstrap 95% interval."
    )
    columns = ["model", "round to", "FLOPs left", "original ms", "slim ms", "speed-up"]
    page.write(options.out, "Aligned widths", [page.header(), note, page.table(columns, rows)])


def measure(name: str, flops: float, seconds: float) -> list[list[str]]:
    import slimc
    from bench.cases import build

    model, inputs = build(f"torchvision:{name}")
    rows = []
    for round_to in ("1", "auto"):
        slim = slimc.compress(model, inputs, flops=flops, round_to=round_to, scorer="magnitude", recover="none")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "slim.onnx"
            slim.export_onnx(path)
            result = slim.measure_latency(path, budget_seconds=seconds, batch=1)[0]
        assert result.speedup is not None
        assert result.ci95 is not None
        got = f"{slim.report.targets['flops'].got:.4f}"
        speed = page.times((result.speedup, *result.ci95))
        aligned = str(slim.report.method.round_to)
        rows.append([name, aligned, got, f"{result.before_ms:.2f}", f"{result.after_ms:.2f}", speed])
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
