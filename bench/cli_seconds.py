"""Time the real command line on many networks: `slimc compress torchvision:NAME --flops B`, process start to end."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import networks, page

LIMIT = 90.0


@dataclass(frozen=True)
class Timed:
    """One run: wall seconds, exit code, what was fitted after the cut, the last line of its error output."""

    model: str
    seconds: float
    exit_code: int
    fitted_on: str
    message: str

    @property
    def holds(self) -> bool:
        """Whether it succeeded in time."""
        return self.exit_code == 0 and self.seconds <= LIMIT


def run(name: str, budget: float) -> Timed:
    """Time one network with everything that the command does by default."""
    with tempfile.TemporaryDirectory(prefix="slimc-bench-") as folder:
        command = [sys.executable, "-m", "slimc", "compress", f"torchvision:{name}", "--flops", f"{budget:g}"]
        start = time.perf_counter()
        done = subprocess.run([*command, "--out", f"{folder}/out"], capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        report = json.loads(Path(folder, "out", "report.json").read_text()) if not done.returncode else {}
    last = (done.stderr.strip().splitlines() or [""])[-1]
    kept = [step["method"] for step in report.get("recovery") or () if step["kept"]]
    fitted_on = f"{sum(report['calibration'][key] for key in ('fitted', 'judged'))} samples" if kept else "nothing"
    return Timed(name, seconds, done.returncode, fitted_on, last if done.returncode else "")


def render(rows: Sequence[Timed], budget: float, path: Path) -> None:
    """Draw the table."""
    cells = [
        [r.model, r.fitted_on, f"{r.seconds:.1f}", str(r.exit_code), "yes" if r.holds else f"**no** {r.message}"]
        for r in rows
    ]
    note = (
        f"`slimc compress torchvision:NAME --flops {budget:g}`, once each, from the start of the process to its end: "
        "loading, capture, cut, proof, recovery (on so many made-up samples as *fitted on* says), every file, parity, "
        "latency of the original and the slim ONNX file, report. "
        f"{sum(r.holds for r in rows)} of {len(rows)} end within {LIMIT:g} s."
    )
    body = page.table(("model", "fitted on", "seconds", "exit code", "in time"), cells)
    page.write(path, "The command line against the clock", [page.header(), note, body])


def main() -> None:
    """Time one network after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(networks.ACCEPTANCE), metavar="NAME")
    parser.add_argument("--budget", type=float, default=0.4, metavar="SHARE")
    parser.add_argument("--out", type=Path, default=page.RESULTS / "cli_seconds.md", metavar="FILE")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows.append(run(name, options.budget))
        print(f"{name}: {rows[-1].seconds:.1f} s, exit code {rows[-1].exit_code} {rows[-1].message}", flush=True)
        render(rows, options.budget, options.out)
    sys.exit(not all(row.holds for row in rows))


if __name__ == "__main__":
    main()
