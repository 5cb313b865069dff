"""slimc's cut against Torch-Pruning's, in turn in one process: median ratio of the times, with its interval."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench import networks, page, peers
from bench.peers import PeerSeconds, SlimcSeconds


@dataclass(frozen=True)
class Pair:
    """One round: both tools on the same model, one directly after the other."""

    slimc: SlimcSeconds
    peer: PeerSeconds


def measure(name: str, rounds: int) -> list[Pair]:
    """Time both in turn, in random order within a round; a first round warms up and is thrown away."""
    model, inputs = networks.torchvision_model(name), networks.image(name)
    head = peers.head_of(model)
    generator = np.random.default_rng(0)
    pairs = []
    for number in range(rounds + 1):
        if generator.random() < 0.5:
            own = peers.slimc_seconds(model, inputs)
            other = peers.peer_seconds(model, inputs, head)
        else:
            other = peers.peer_seconds(model, inputs, head)
            own = peers.slimc_seconds(model, inputs)
        if number:
            pairs.append(Pair(own, other))
            print(f"{name}: slimc {own.cut:.2f} s + capture {own.capture:.2f} s, peer {other.cut:.2f} s", flush=True)
    return pairs


def render(found: dict[str, list[Pair]], path: Path) -> None:
    """Draw the tables."""
    ratios = [
        [
            name,
            f"{_median(pairs, lambda p: p.slimc.cut):.3f}",
            f"{_median(pairs, lambda p: p.slimc.capture):.3f}",
            f"{_median(pairs, lambda p: p.peer.build):.3f}",
            f"{_median(pairs, lambda p: p.peer.step):.3f}",
            _ratio(pairs, lambda p: p.slimc.cut),
            _ratio(pairs, lambda p: p.slimc.cut_to_class),
            _ratio(pairs, lambda p: p.slimc.cut_and_capture),
            _ratio(pairs, lambda p: p.slimc.all),
        ]
        for name, pairs in found.items()
    ]
    header = ("model", "cut s", "capture s", "peer build s", "peer step s", "peer / cut", "peer / to class",
              "peer / (cut + capture)", "peer / all")  # fmt: skip
    names = ("capture", "infer", "score", "plan", "slice", "shapes", "own")
    stages = [[name, *[f"{_median(pairs, _stage(stage)):.3f}" for stage in names]] for name, pairs in found.items()]
    rounds = min(len(pairs) for pairs in found.values())
    legend = (
        f"Medians over {rounds} rounds; ratios are medians of the rounds' own ratios, with a bootstrap 95% interval; "
        "above 1 slimc is faster.\n\n"
        "- *cut*: channel inference with groups and costs (*infer*), L2 scores, a plan at "
        f"{peers.SHARE:g} of the FLOPs with any width, and the smaller graph with its tensors (*slice*), which an "
        "interpreter can run; Python code is written from it when it is first called, and timed in *shapes*.\n"
        "- *to class*: cut, a check of every shape of the graph (*shapes*), and the model's own class made smaller and "
        "run against the graph (*own*).\n"
        "- *capture*: a copy of the model, two runs of it, and torch.export.\n"
        "- *all*: capture and to class: all that `slimc.compress` does but the proof, which the peer has not.\n"
        f"- *peer*: Torch-Pruning's MagnitudePruner (global, L2, ratio {peers.SHARE:g}, classifier outputs kept; for "
        "ViT what its own example gives: bare parameters, widths in whole heads) made on a fresh copy (*build*), then "
        "one *step*. The copy is not timed."
    )
    parts = [page.header(torch.get_num_threads()), legend, page.table(header, ratios)]
    parts += ["## slimc's stages, median seconds", page.table(("model", *names), stages)]
    page.write(path, "Speed against Torch-Pruning", parts)


def _stage(name: str) -> Callable[[Pair], float]:
    return lambda pair: float(getattr(pair.slimc, name))


def _median(pairs: Sequence[Pair], seconds: Callable[[Pair], float]) -> float:
    return statistics.median(seconds(pair) for pair in pairs)


def _ratio(pairs: Sequence[Pair], seconds: Callable[[Pair], float]) -> str:
    return page.times(page.median_interval([pair.peer.cut / seconds(pair) for pair in pairs]))


def main() -> None:
    """Measure the models one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(networks.SPEED), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=page.RESULTS / "speed.md", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for name in options.models:
        found[name] = measure(name, options.rounds)
        render(found, options.out)


if __name__ == "__main__":
    main()
