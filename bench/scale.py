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
GROWTHS = (8, 32)
_STAGES = ("capture", "infer", "score", "plan", "slice", "cut")


def chain(depth: int, growth: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A chain and its 4x4 input."""
    torch.manual_seed(0)
    return networks.ConcatChain(depth, growth).eval(), torch.randn(1, 3, 4, 4)


def measure(depths: tuple[int, ...], growth: int, rounds: int) -> dict[int, list[SlimcSeconds]]:
    """Time slimc at every depth in turn; a first round at the smallest depth warms up."""
    peers.slimc_seconds(*chain(depths[0], growth))
    found: dict[int, list[SlimcSeconds]] = {depth: [] for depth in depths}
    for _ in range(rounds):
        for depth in depths:
            found[depth].append(peers.slimc_seconds(*chain(depth, growth)))
            print(f"{depth} layers, growth {growth}: slimc {found[depth][-1].cut:.3f} s", flush=True)
    return found


def measure_peer(depths: tuple[int, ...], growth: int, rounds: int) -> dict[int, float]:
    """Time Torch-Pruning at these depths, as a median; once where it takes more than ten seconds."""
    peers.peer_seconds(*chain(depths[0], growth), "head")
    found: dict[int, float] = {}
    for depth in depths:
        runs: list[float] = []
        while len(runs) < rounds and sum(runs) < 10:
            runs.append(peers.peer_seconds(*chain(depth, growth), "head").cut)
            print(f"{depth} layers, growth {growth}: peer {runs[-1]:.3f} s", flush=True)
        found[depth] = statistics.median(runs)
    return found


def compare(growth: int, found: dict[int, list[SlimcSeconds]], peer: dict[int, float]) -> str:
    """The table of one growth, with the exponent of each column below it."""
    seconds = {
        name: {depth: statistics.median(getattr(run, name) for run in runs) for depth, runs in found.items()}
        for name in _STAGES
    }
    rows = [
        [
            str(depth),
            f"{sum(p.numel() for p in chain(depth, growth)[0].parameters()):,}",
            *[f"{seconds[name][depth]:.3f}" for name in _STAGES],
            f"{peer[depth]:.2f}" if depth in peer else "",
            f"{peer[depth] / seconds['cut'][depth]:.0f}" if depth in peer else "",
        ]
        for depth in found
    ]
    exponents = [f"{page.exponent(list(by), list(by.values())):.2f}" for by in seconds.values()]
    last = f"{page.exponent(list(peer), list(peer.values())):.2f}" if len(peer) > 1 else ""
    rows.append(["exponent", "", *exponents, last, ""])
    return page.table(("layers", "parameters", *(f"{name} s" for name in _STAGES), "peer s", "peer / cut"), rows)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--growths", nargs="+", type=int, default=list(GROWTHS), help="channels that a layer adds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-all", action="store_true", help="Torch-Pruning at every depth: minutes")
    parser.add_argument("--out", type=Path, default=page.RESULTS / "scale.md", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    depths = tuple(options.depths)
    parts = [
        f"Medians of {options.rounds} runs; Torch-Pruning runs once where it takes over ten seconds. 4x4 input, half "
        "of the FLOPs. *cut* is the sum of infer, score, plan and slice. *exponent*: slope of log time over log depth; "
        "1 is linear. *peer*: Torch-Pruning, graph and one step. Each layer reads all earlier ones, so parameters grow "
        "with the square of the depth: where there are many, scoring reads and slicing copies tens of millions of "
        "weights, and no program that looks at each once can be linear in depth there."
    ]
    for growth in options.growths:
        found = measure(depths, growth, options.rounds)
        peer = measure_peer(
            tuple(d for d in depths if options.peer_all or d in QUICK) or depths[:1], growth, options.rounds
        )
        parts += [f"Growth {growth}:", compare(growth, found, peer)]
    page.write(options.out, "Growth with depth", [page.header(torch.get_num_threads()), *parts])


if __name__ == "__main__":
    main()
