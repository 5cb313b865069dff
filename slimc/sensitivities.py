"""Sensitivities: how much a model's outputs move with each value inside it, without labels.

Taken are derivatives of random combinations of all outputs, each output scaled to deviation 1, so that their expected
squares are what a small error there does to the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .catching import Catching
from .graph.example import Example
from .graph.rule import operator_name
from .lockstep import trainable_at_once
from .samples import Samples
from .scores import Scores, Subject

PROBED = 64
"""Samples whose gradients are taken."""
_TELLING = 256
"""Numbers of an output that tell its deviation; where a batch has fewer, that over all batches counts."""


def sensitivities(
    subject: Subject, read: set[Node], gated: set[tuple[Node, int]]
) -> tuple[dict[Node, Tensor], dict[tuple[Node, int], Scores]]:
    """How much random combinations of the model's outputs move.

    Per reader: the expected squared derivative by each of its outputs, summed over places. Per gated node and axis:
    the expected squared derivative by a gate on each index of the axis.
    """
    assert subject.samples is not None
    module = subject.types.captured.module
    generator = torch.Generator().manual_seed(subject.seed + 1)
    slopes_of = {node: torch.zeros(()) for node in read}
    gates_of = {place: np.zeros(len(subject.types.values[place[0]][place[1]])) for place in gated}
    seen = 0
    # Half of what fits: slopes take as much again as the values that they belong to.
    pieces = list(_probed(subject.samples, max(1, trainable_at_once(module) // 2)))
    pooled: list[Tensor] = []
    for example in pieces:
        seen += example.count
        with torch.enable_grad():
            probing = Catching(module, {*read, *(node for node, _ in gated)}, slopes=True)
            results = probing.results(example)
            if not pooled and any(own.numel() < _TELLING for own in results):
                pooled = _spreads(module, pieces)
            moved = []
            for place, own in enumerate(results):
                if own.requires_grad:
                    spread = pooled[place] if own.numel() < _TELLING else own.detach().std()
                    moved.append(_combination(own, spread, generator))
            if not moved:
                continue
            slopes = torch.autograd.grad(torch.stack(moved).sum(), list(probing.caught.values()), allow_unused=True)
        slope_of = dict(zip(probing.caught, slopes, strict=True))
        for node in read:
            if (slope := slope_of[node]) is not None:
                channel = 1 if operator_name(node).startswith("conv") else slope.dim() - 1
                squares = slope.double().square().movedim(channel, -1).flatten(0, -2)
                slopes_of[node] = slopes_of[node] + squares.sum(0)
        for node, axis in gated:
            if (slope := slope_of[node]) is not None:
                products = (probing.caught[node].detach() * slope).double().movedim(axis, -1)
                # A derivative for each sample, so that samples do not cancel out.
                first = len(products) if axis and products.dim() > 1 else 1
                gate = products.reshape(first, -1, products.shape[-1]).sum(1).square().sum(0)
                gates_of[node, axis] += gate.cpu().numpy()
    return (
        {node: value / seen for node, value in slopes_of.items()},
        {place: value / seen for place, value in gates_of.items()},
    )


def _probed(samples: Samples, most: int) -> Iterator[Example]:
    """The first samples, enough for sensitivities, in pieces of at most `most`."""
    seen = 0
    for example in samples.pieces(most):
        if seen >= PROBED:
            return
        yield example
        seen += example.count


@torch.no_grad()
def _spreads(module: GraphModule, pieces: Sequence[Example]) -> list[Tensor]:
    """The deviation of each output over all pieces; 1 where there is but one number."""
    found = [Catching(module, set()).results(example) for example in pieces]
    whole = [torch.cat([own.flatten() for own in outputs]) for outputs in zip(*found, strict=True)]
    return [own.std() if own.is_floating_point() and own.numel() > 1 else torch.ones(()) for own in whole]


def _combination(output: Tensor, spread: Tensor, generator: torch.Generator) -> Tensor:
    """A random combination of one output's numbers, each in units of the output's deviation."""
    noise = torch.randn(output.shape, generator=generator).to(output)
    per_sample = max(1, output.numel() // max(1, len(output)) if output.dim() else 1)
    combined: Tensor = (output * noise).sum() / (spread.clamp_min(1e-12) * per_sample**0.5)
    return combined
