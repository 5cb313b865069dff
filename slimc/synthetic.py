"""Samples made up where there is no data: pictures for image models, tokens for language models.

Pictures are dead leaves: overlapping shapes of all sizes, each with a colour, a shade and a little grain. They have
what makes real pictures special to a network (edges, flat parts, the same at every scale), and no content. Measured on
networks for real pictures they are worth far more than white noise, and less than real data. Pink noise, which has the
spectrum of real pictures and none of their edges, is there by name. So are tokens that are all equally likely, beside
those of falling frequency.

Source: Lee, Mumford and Huang, "Occlusion Models for Natural Images" (IJCV 2001), section 4: sizes with density
r^-3 make the statistics scale invariant. Baradad et al., "Learning to See by Looking at Noise" (NeurIPS 2021), for both
kinds of pictures.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .as_trained import has_statistics
from .errors import UsageError
from .graph.capture import Captured
from .graph.example import Example
from .graph.infer import attribute
from .graph.rule import arguments, operator_name
from .graph.stateless import Stateless
from .samples import Batch, Samples
from .varied import is_picture

_SHAPES = 120
_SMALLEST = 0.03
"""Radius of the smallest shape, as a share of the picture's side; the largest is the whole side."""
_COLOUR = 0.2
"""The share of pink noise's variance that is each channel's own."""
_BATCH = 64
_MATCHING_ROUNDS = 40
_FEWEST_ROUNDS = 10
_MATCHING = 2.5e12
_MATCHING_RATE = 0.1

Picture = npt.NDArray[np.float32]

PICTURES = {"dead-leaves": "overlapping shapes", "pink-noise": "pink noise"}
TOKENS = {"unigram": "random tokens", "uniform": "equally likely random tokens"}


@dataclass(frozen=True)
class Invented:
    """Stands for data of a kind that is to be made up: of `PICTURES` or `TOKENS`. Raises UsageError for others."""

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in (*PICTURES, *TOKENS):
            raise UsageError(
                f"--data synthetic:{self.kind} is no kind of samples; known are {', '.join((*PICTURES, *TOKENS))}"
            )


def synthetic(captured: Captured, count: int, work: float, seed: int = 0, kind: str | None = None) -> Samples | None:
    """Samples of the kind that the model takes; None where its inputs are neither pictures nor tokens.

    captured: gives the shapes, and the vocabulary where tokens are looked up. count: how many samples.
    work: what one sample takes (`Analysis.work`); pictures are fitted to the model only where that is quick.
    kind: of `PICTURES` or `TOKENS`, dead leaves or unigram tokens if not given; None where the model takes the others.
    """
    example = captured.example
    tensors = example.tensors()
    step = _BATCH if captured.dynamic_shapes is not None else captured.batch
    sizes = [min(step, count - start) for start in range(0, count, step)]
    if captured.dynamic_shapes is None:
        sizes = [step] * len(sizes)
    generator, whole = np.random.default_rng(seed), captured.dynamic_shapes is None
    if len(tensors) == 1 and is_picture(tensors[0]) and kind not in TOKENS:
        draw = pink_noise if kind == "pink-noise" else dead_leaves
        made = [draw(size, tuple(tensors[0].shape[1:]), generator).to(tensors[0]) for size in sizes]
        source = f"synthetic pictures of {PICTURES[kind or 'dead-leaves']}"
        rounds = min(_MATCHING_ROUNDS, int(_MATCHING / (max(work, 1.0) * count)))
        is_precise = tensors[0].element_size() >= torch.float32.itemsize  # for small steps of an optimiser
        norms = any(has_statistics(node) for node in captured.module.graph.nodes)
        if is_precise and norms and rounds >= _FEWEST_ROUNDS:
            made = [matched(captured, example, pictures, rounds) for pictures in made]
            source += ", fitted to the model's batch norms"
        return Samples(tuple(Batch(example.map(lambda _, own=own: own)) for own in made), source, whole, True)
    vocabularies = _vocabularies(captured.module)
    if vocabularies and not any(t.is_floating_point() for t in example.rows()) and kind not in PICTURES:
        kind = kind or "unigram"
        found = (Batch(_tokens(example, size, vocabularies, generator, kind)) for size in sizes)
        return Samples(tuple(found), TOKENS[kind], whole, True)
    return None


def dead_leaves(count: int, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Pictures [count, channels, height, width] with mean 0 and deviation 1 over all of them."""
    pictures = np.stack([_picture(shape, generator) for _ in range(count)])
    flat = pictures - pictures.mean(axis=(0, 2, 3), keepdims=True)
    return torch.from_numpy((flat / (flat.std() + 1e-6)).astype(np.float32))


def pink_noise(count: int, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Pictures [count, channels, height, width] with mean 0 and deviation 1 over all of them, the amplitude of a
    frequency f falling as 1/f; the channels of a picture are alike for the most part."""
    height, width = shape[1:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    white = np.sqrt(1 - _COLOUR) * generator.standard_normal((count, 1, height, width))
    white = white + np.sqrt(_COLOUR) * generator.standard_normal((count, *shape))
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency, (height, width))
    noise -= noise.mean(axis=(0, 2, 3), keepdims=True)
    return torch.from_numpy((noise / (noise.std() + 1e-6)).astype(np.float32))


def _picture(shape: tuple[int, ...], generator: np.random.Generator) -> Picture:
    channels, height, width = shape
    side = max(height, width)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    picture = np.empty(shape, np.float32)
    picture[:] = generator.uniform(size=(channels, 1, 1))
    # The inverse of the distribution function of r^-3 between the smallest and 1.
    uniform = generator.uniform(size=_SHAPES)
    sizes = side * _SMALLEST / np.sqrt(1 - uniform * (1 - _SMALLEST**2))
    for radius in np.sort(sizes)[::-1] if generator.uniform() < 0.5 else sizes:
        y, x = generator.uniform(-0.1, 1.1, 2) * (height, width)
        reach = 1.5 * radius
        top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 2)
        left, right = max(0, int(x - reach)), min(width, int(x + reach) + 2)
        if top >= bottom or left >= right:
            continue
        dy, dx = rows[top:bottom, left:right] - y, columns[top:bottom, left:right] - x
        angle = generator.uniform(0, np.pi)
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        stretch = generator.uniform(0.3, 1.0)
        if generator.uniform() < 0.5:
            inside = along**2 + (across / stretch) ** 2 < radius**2
        else:
            inside = (np.abs(along) < radius) & (np.abs(across) < radius * stretch)
        colour = generator.uniform(size=(channels, 1, 1)) + generator.normal(0, 0.15) * along / radius
        grain = generator.normal(0, generator.uniform(0, 0.1), size=(1, *along.shape))
        window = picture[:, top:bottom, left:right]
        np.copyto(window, (colour + grain).astype(np.float32), where=inside)
    return picture


def matched(captured: Captured, example: Example, pictures: Tensor, rounds: int) -> Tensor:
    """Change pictures until the inputs of the model's batch norms have the statistics that these stored in training.

    Source: Cai et al., "ZeroQ" (CVPR 2020), equation 3, with differences relative to the stored variance.
    """
    pictures = pictures.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([pictures], lr=_MATCHING_RATE)
    for done in range(rounds):
        for group in optimiser.param_groups:
            group["lr"] = _MATCHING_RATE * (1 - done / rounds)
        with torch.enable_grad():
            statistics = _Statistics(captured.module)
            leaves = pytree.tree_leaves(example.map(lambda _: pictures.clone()).args + tuple(example.kwargs.values()))
            statistics.run(*leaves, enable_io_processing=False)
            if not statistics.losses:
                break
            (gradient,) = torch.autograd.grad(torch.stack(statistics.losses).mean(), [pictures])
        pictures.grad = gradient
        optimiser.step()
    return pictures.detach()


class _Statistics(Stateless):
    """Runs a graph and measures how far each batch norm's input is from its stored statistics."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.losses: list[Tensor] = []

    def run_node(self, n: Node) -> Any:
        """Compare before the norm runs, since it may write in place."""
        if has_statistics(n):
            call = arguments(n)
            x = self.env[call["input"]]
            mean, variance = (self.env[call[name]].detach() for name in ("running_mean", "running_var"))
            if x.numel() == x.shape[1]:  # one value has no variance
                return super().run_node(n)
            others = [axis for axis in range(x.dim()) if axis != 1]
            off = (x.mean(others) - mean).square() / (variance + 1e-5)
            wide = (((x.var(others) + 1e-5) / (variance + 1e-5)).log()).square()
            self.losses.append((off + wide).mean())
        return super().run_node(n)


def _vocabularies(module: GraphModule) -> dict[int, int]:
    """For each tensor (by place among the inputs) that embeddings look up: the rows of the smallest of these tables."""
    found: dict[int, int] = {}
    inputs = (n for n in module.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor))
    places = {node: place for place, node in enumerate(inputs)}
    for node in module.graph.nodes:
        if node.op != "call_function" or operator_name(node) != "embedding":
            continue
        call = arguments(node)
        table, index = call["weight"], call["indices"]
        if isinstance(table, Node) and table.op == "get_attr" and index in places:
            rows = len(attribute(module, str(table.target)))
            found[places[index]] = min(rows, found.get(places[index], rows))
    return found


def _tokens(
    example: Example, count: int, vocabularies: dict[int, int], generator: np.random.Generator, kind: str
) -> Example:
    """Tokens where a table is looked up, of falling frequency (Zipf's law) if unigram; other inputs repeat the
    example's."""
    places, shared = itertools.count(), example.without_rows()

    def fill(tensor: Tensor) -> Tensor:
        place = next(places)
        if place in shared:
            return tensor
        if place not in vocabularies:
            return tensor[torch.arange(count) % len(tensor)]
        rows = vocabularies[place]
        weights = np.ones(rows) if kind == "uniform" else 1.0 / np.arange(1, rows + 1)
        order = generator.permutation(rows)
        drawn = order[generator.choice(rows, size=(count, *tensor.shape[1:]), p=weights / weights.sum())]
        return torch.from_numpy(drawn).to(tensor)

    return dataclasses.replace(example.map(fill), shared=shared)
