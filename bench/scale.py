"""How time grows with depth: chains of concatenated 3x3 convolutions, where each layer reads all that came before."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from bench import networks, page, peers
from bench.peers import SlimcSeconds

DEPTHS = (16, 32, 64, 96)
QUICK = (16, 32)
"""Depths at which Torch-Pruning answers within seconds."""
_STAGES = ("capture", "infer", "score", "plan", "slice", "cut")


def chain(depth: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A chain and its 4x4 input."""
    torch.manual_seed(0)
    return networks.ConcatChain(depth).eval(), torch.randn(1, 3, 4, 4)


def measure(depths: tuple[int, ...], rounds: int) -> dict[int, list[SlimcSeconds]]:
    """Time slimc at every depth in turn; a first round at the smallest depth warms up."""
    peers.slimc_seconds(*chain(depths[0]))
    found: dict[int, list[SlimcSeconds]] = {depth: [] for depth in depths}
    for _ in range(rounds):
        for depth in depths:
            found[depth].append(peers.slimc_seconds(*chain(depth)))
            print(f"{depth} layers: slimc {found[depth][-1].cut:.3f} s", flush=True)
    return found


def measure_peer(depths: tuple[int, ...], rounds: int) -> dict[int, list[float]]:
    """Time Torch-Pruning at these depths; once where it takes more than ten seconds."""
    peers.peer_seconds(*chain(depths[0]), "head")
    found: dict[int, list[float]] = {depth: [] for depth in depths}
    for depth in depths:
        while len(found[depth]) < rounds and sum(found[depth]) < 10:
            found[depth].append(peers.peer_seconds(*chain(depth), "head").cut)
            print(f"{depth} layers: peer {found[depth][-1]:.3f} s", flush=True)
    return found


def render(found: dict[int, list[SlimcSeconds]], peer: dict[int, list[float]], path: Path) -> None:
    """Draw the table, with the exponent of each column below it."""
    seconds = {
        name: {depth: statistics.median(getattr(run, name) for run in runs) for depth, runs in found.items()}
        for name in _STAGES
    }
    others = {depth: statistics.median(runs) for depth, runs in peer.items()}
    rows = [
        [
            str(depth),
            str(sum(p.numel() for p in chain(depth)[0].parameters())),
            *[f"{seconds[name][depth]:.3f}" for name in _STAGES],
            f"{others[depth]:.2f}" if depth in others else "",
            f"{others[depth] / seconds['cut'][depth]:.0f}" if depth in others else "",
        ]
        for depth in found
    ]
    exponents = [f"{page.exponent(list(by), list(by.values())):.2f}" for by in seconds.values()]
    last = f"{page.exponent(list(others), list(others.values())):.2f}" if len(others) > 1 else ""
    rows.append(["exponent", "", *exponents, last, ""])
    header = ("layers", "parameters", *(f"{name} s" for name in _STAGES), "peer s", "peer / cut")
    legend = (
        f"Medians of {min(map(len, found.values()))} runs; Torch-Pruning runs once where it takes over ten seconds. "
        "Growth 32, 4x4 input, half of the FLOPs. *cut* is the sum of infer, score, plan and slice. *exponent*: slope "
        "of log time over log depth; 1 is linear. Each layer reads all earlier ones: parameters grow with the square "
        "of the depth, and what reads or copies them has a quadratic part. *peer*: Torch-Pruning, graph and one step."
    )
    page.write(path, "Growth with depth", [page.header(torch.get_num_threads()), legend, page.table(header, rows)])


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-all", action="store_true", help="Torch-Pruning at every depth: minutes")
    parser.add_argument("--out", type=Path, default=page.RESULTS / "scale.md", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    depths = tuple(options.depths)
    found = measure(depths, options.rounds)
    peer = measure_peer(tuple(d for d in depths if options.peer_all or d in QUICK) or depths[:1], options.rounds)
    render(found, peer, options.out)


if __name__ == "__main__":
    main()
