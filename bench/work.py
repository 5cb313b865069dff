"""What a forward and backward pass takes: multiply-accumulates, and how many of them writing one number is worth.

    python -m bench.work

`Analysis.work` counts samples by this. The pair of constants is fitted by least squares of relative errors.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from bench import page
from slimc.analysis import analyse
from slimc.graph.infer import hint

NETWORKS = (
    "resnet50", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "shufflenet_v2_x1_0",
    "mnasnet0_5", "convnext_tiny", "swin_t", "vit_b_16", "squeezenet1_0",
)  # fmt: skip
_SAMPLES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="passes of each network; the quickest counts")
    options = parser.parse_args()
    counted: list[tuple[float, float]] = []
    seconds: list[float] = []
    for name in NETWORKS:
        analysis = analyse(torchvision.models.get_model(name).eval(), torch.randn(1, 3, 224, 224))
        values = (node.meta.get("val") for node in analysis.captured.module.graph.nodes if node.op == "call_function")
        written = sum(math.prod(map(hint, v.shape)) for v in values if isinstance(v, Tensor) and v.is_floating_point())
        counted.append((analysis.full.macs, written / analysis.captured.batch))
        seconds.append(quickest(analysis.captured.module, options.rounds) / _SAMPLES)
        print(f"{name}: {1000 * seconds[-1]:.1f} ms a sample", flush=True)
    inputs, outputs = np.array(counted), np.array(seconds)
    per_mac, per_number = np.linalg.lstsq(inputs / outputs[:, None], np.ones(len(outputs)), rcond=None)[0]
    fitted = inputs @ np.array([per_mac, per_number])
    rows = [
        [name, f"{macs / 1e9:.2f}", f"{written / 1e6:.1f}", f"{1000 * took:.1f}", f"{guess / took:.2f}"]
        for name, (macs, written), took, guess in zip(NETWORKS, counted, seconds, fitted, strict=True)
    ]
    names = ["network", "GMACs", "million numbers written", "ms a sample", "fitted / measured"]
    worth = f"One number written takes as long as {per_number / per_mac:.0f} multiply-accumulates."
    heading = page.header(torch.get_num_threads())
    page.write(page.RESULTS / "work.md", "What a sample takes", [heading, worth, page.table(names, rows)])


def quickest(module: nn.Module, rounds: int) -> float:
    """Seconds of the quickest forward and backward pass of a batch."""
    images = torch.randn(_SAMPLES, 3, 224, 224)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        module(images).sum().backward()
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    main()
