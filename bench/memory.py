"""Peak memory beyond the model, stage by stage, each tool in a fresh process. Linux only."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench import networks, page, peers

LIMIT = 2**30
_MIB = 2**20
_CUT = ("capture", "infer", "score", "plan", "rewrite")


class Peaks:
    """The largest resident memory within each stage, beyond what was resident when the object was made.

    The kernel's high-water mark (VmHWM) is reset at the start of every stage.
    """

    def __init__(self) -> None:
        gc.collect()
        self.base = _status("VmRSS")
        self.stages: dict[str, int] = {}
        self._stage: str | None = None

    def enter(self, stage: str | None) -> None:
        """End the stage that runs and begin another."""
        if self._stage is not None:
            peak = _status("VmHWM") - self.base
            self.stages[self._stage] = max(self.stages.get(self._stage, 0), peak)
        Path("/proc/self/clear_refs").write_text("5")
        self._stage = stage


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def child(tool: str, name: str, threads: int) -> dict[str, int]:
    """Bytes by stage, in this process: `forward` is one plain run of the model, to compare with."""
    torch.set_num_threads(threads)
    model, inputs = networks.torchvision_model(name), networks.image(name)
    peaks = Peaks()
    if tool == "forward":
        peaks.enter("forward")
        with torch.no_grad():
            model(inputs)
    elif tool == "torch-pruning":
        peaks.enter("prune")
        peers.peer_seconds(model, inputs, peers.head_of(model))
    else:
        import slimc

        def entered(kind: str, text: str) -> None:
            if kind == "stage":
                peaks.enter(text)

        peaks.enter("capture")  # from here on: the imports that compressing brings are slimc's
        slimc.compress(model, inputs, flops=peers.SHARE, round_to=1, recover="none", progress=entered)
    peaks.enter(None)
    return peaks.stages


def measure(tool: str, name: str, threads: int) -> dict[str, int]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "bench.memory", "--child", tool, name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stages: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return stages


def render(found: dict[str, dict[str, dict[str, int]]], rounds: int, threads: int, path: Path) -> None:
    """Draw the table."""
    rows = []
    for name, tools in found.items():
        own = tools["slimc"]
        cut = max(own[stage] for stage in _CUT)
        cells = [own[stage] for stage in _CUT] + [cut, own["verify"]]
        cells += [tools["torch-pruning"]["prune"], tools["forward"]["forward"]]
        rows.append([name, *[f"{cell / _MIB:.0f}" for cell in cells], "yes" if cut < LIMIT else "**no**"])
    header = ("model", *_CUT, "largest of these", "verify (apart)", "Torch-Pruning", "one forward run", "under 1 GiB")
    legend = (
        "MiB of resident memory beyond the process with torch, the model and its input loaded: the high-water mark "
        f"within each stage, the largest of {rounds} fresh processes. Memory that earlier stages keep counts in "
        "the later ones, as do the imports, slimc's copy of the model and the slim model itself. Torch-Pruning works "
        "on a copy too. Verification runs in float64 beside the original."
    )
    page.write(path, "Memory beyond the model", [page.header(threads), legend, page.table(header, rows)])


def main() -> None:
    """Measure every model with every tool."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(networks.SPEED), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=page.RESULTS / "memory.md", metavar="FILE")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], options.child[1], options.threads)))
        return
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name in options.models:
        found[name] = {}
        for tool in ("slimc", "torch-pruning", "forward"):
            runs = [measure(tool, name, options.threads) for _ in range(options.rounds)]
            found[name][tool] = {stage: max(run[stage] for run in runs) for stage in runs[0]}
            print(f"{name}, {tool}: {max(found[name][tool].values()) / _MIB:.0f} MiB at most", flush=True)
    render(found, options.rounds, options.threads, options.out)


if __name__ == "__main__":
    main()
