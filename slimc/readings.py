"""Readings: sampled inputs of the layers that read a group, to see what each channel contributes to their outputs.

A convolution or linear layer gives y - b = the sum over its input channels of W_c patch_c. Layers are taken at a few
output positions of each sample, drawn from the sample's own content, so that a sample gives the same rows wherever and
however often it stands in the data.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .activations import Place, See, watch
from .errors import UsageError
from .graph.groups import Group
from .graph.infer import attribute
from .graph.rule import arguments, operator_name
from .graph.terms import Terms
from .passes import batches_of
from .readers import unhalved
from .samples import Batch
from .scores import Subject

POSITIONS = 10
_ROWS = 4096
"""Rows of a layer that are kept; with very many samples fewer positions are drawn of each."""
_BLOCK, _PARTS = 2**24, 16


@dataclass(frozen=True)
class Reading:
    """What one layer, or one group of a grouped convolution, reads.

    rows: [samples x positions, channels, kernel positions], inputs at sampled output positions.
    weight: [outputs, channels, kernel positions].
    factors: [channels, k] the variables behind each input channel; -1 for none.
    parameter: the weight's name, empty if it is computed from others; outputs: which rows of it these are.
    layer: the whole layer's number, the same for all groups of a convolution.
    """

    rows: Tensor
    weight: Tensor
    factors: Terms
    parameter: str
    outputs: slice
    layer: int

    def members(self, group: Group) -> Terms:
        """[channels] the place in the group of each input channel, -1 for others."""
        place = np.full(max(self.factors.max(initial=-1), group.variables.max(initial=-1)) + 2, -1)
        place[group.variables] = np.arange(group.width)
        members: Terms = place[self.factors].max(axis=1, initial=-1)  # -1, for none, is the last place
        return members

    def gram(self, group: Group) -> Tensor | None:
        """Inner products of what the group's channels contribute to the outputs, [width, width]; None if they do not.

        Summed over rows and outputs, in float64.
        """
        members = self.members(group)
        chosen = np.flatnonzero(members >= 0)
        if not chosen.size:
            return None
        rows, weight = self.rows[:, chosen], self.weight[:, chosen]
        flat_rows, flat_weight = rows.flatten(1), weight.flatten(1)
        channels, kernel = rows.shape[1:]
        place = torch.from_numpy(members[chosen]).to(rows.device)
        total = torch.zeros(group.width, group.width, dtype=torch.float64, device=rows.device)
        step = max(1, min(-(-channels // _PARTS), _BLOCK // max(1, channels * kernel * kernel)))
        for start in range(0, channels, step):
            block, rest = slice(start, start + step), slice(start * kernel, None)
            own = slice(start * kernel, (start + step) * kernel)
            # Products are symmetric: each pair of blocks is computed once.
            each = (flat_rows[:, own].T @ flat_rows[:, rest]) * (flat_weight[:, own].T @ flat_weight[:, rest])
            each = each.double().reshape(-1, kernel, channels - start, kernel).sum((1, 3))
            here = each.new_zeros(len(each), group.width)
            other = here.clone().index_add_(1, place[start + step :], each[:, step:])
            here.index_add_(1, place[block], each[:, :step])
            total.index_add_(0, place[block], here + other)
            total.index_add_(1, place[block], other.T)
        return total


def readings(subject: Subject, method: str) -> list[Reading]:
    """Run the data once and sample what every convolution and linear layer reads; raises what `Sampling` raises."""
    sampling = Sampling(subject, method)
    watch(subject, sampling.places)
    return sampling.readings()


class Sampling:
    """Samples what every convolution and linear layer reads in a pass that shows it `places`.

    Depthwise convolutions read nothing in this sense: each of their channels goes with its input. Raises UsageError
    where there is no data, or no layer that can be sampled.
    """

    places: dict[Place, See]

    def __init__(self, subject: Subject, method: str) -> None:
        self._subject = subject
        self._layers = [node for node in subject.types.captured.module.graph.nodes if _is_layer(subject, node)]
        if not self._layers:
            raise UsageError(
                f"--scorer {method} needs convolutions or linear layers that read channels; there are none"
            )
        self._count = batches_of(subject).count
        self._each = max(1, min(POSITIONS, _ROWS // self._count))
        # Room for all samples from the first on: joining parts at the end would need it all a second time.
        self._rows: dict[Node, Tensor] = {}
        self._filled = dict.fromkeys(self._layers, 0)
        self._batch: Batch | None = None
        self._seeds: list[int] = []
        self.places = {(node, node.args[0]): self._seeing(node, i) for i, node in enumerate(self._layers)}

    def _seeing(self, node: Node, number: int) -> See:
        def see(value: Tensor, batch: Batch) -> None:
            if batch is not self._batch:
                self._batch, self._seeds = batch, _seeds(batch, self._subject.seed)
            seeds = [(seed, number) for seed in self._seeds]
            found = unhalved(_sample(node, value, seeds, self._each))
            if node not in self._rows:
                self._rows[node] = found.new_empty(self._count * len(found) // batch.count, *found.shape[1:])
            start = self._filled[node]
            self._filled[node] += len(found)
            self._rows[node][start : self._filled[node]] = found

        return see

    @property
    def parameters(self) -> list[str]:
        """The layers' weights by name, those that are parameters."""
        return sorted({name for node in self._layers if (name := _parameter(self._subject, node))})

    def readings(self) -> list[Reading]:
        """What was sampled."""
        return [
            reading
            for number, node in enumerate(self._layers)
            for reading in _split(self._subject, node, self._rows[node][: self._filled[node]], number)
        ]


def _is_layer(subject: Subject, node: Node) -> bool:
    """A linear layer or a convolution, not transposed and not depthwise, that reads channels."""
    name = operator_name(node) if node.op == "call_function" else ""
    if name not in ("linear", "conv1d", "conv2d", "conv3d"):
        return False
    call = arguments(node)
    axes = subject.types.values[call["input"]]
    weight = subject.types.values[call["weight"]]
    if len(weight) < 2 or (name != "linear" and len(axes) != len(weight)):
        return False
    axis = axes[-1] if name == "linear" else axes[1]
    is_depthwise = name != "linear" and int(call["groups"]) > 1 and len(weight[1]) == 1
    return not is_depthwise and bool((subject.types.solution.factors(axis) >= 0).any())


def _seeds(batch: Batch, seed: int) -> list[int]:
    """One number per sample, from the bits of its inputs."""
    tensors = batch.example.rows()
    seeds = []
    for sample in range(batch.count):
        bits = seed
        for tensor in tensors:
            bits = zlib.crc32(tensor[sample].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, bits)
        seeds.append(bits)
    return seeds


def _sample(node: Node, value: Tensor, seeds: Sequence[tuple[int, int]], each: int) -> Tensor:
    """[samples x positions, channels, kernel positions]."""
    if operator_name(node) == "linear":
        # Where samples are not the first axis, rows are still spread over all of them.
        value = value.reshape(len(seeds), -1, value.shape[-1])
        chosen = _draw(seeds, value.shape[1], each, value.device)
        return value.gather(1, chosen[:, :, None].expand(-1, -1, value.shape[2])).reshape(-1, value.shape[2], 1)
    call = arguments(node)
    kernel = call["weight"].meta["val"].shape[2:]
    rank = len(kernel)
    stride, dilation = (_spread(call[name], rank) for name in ("stride", "dilation"))
    reach = [d * (int(k) - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = _padding(call["padding"], reach)
    whole = [size + sum(own) for size, own in zip(value.shape[2:], padding, strict=True)]
    sizes = [(size - reach[i] - 1) // stride[i] + 1 for i, size in enumerate(whole)]
    chosen = _draw(seeds, int(np.prod(sizes)), each, value.device)
    where = np.unravel_index(chosen.cpu().numpy().reshape(-1), sizes)
    first = torch.arange(len(seeds)).repeat_interleave(chosen.shape[1]).reshape(-1, *[1] * rank)
    index: list[Any] = [first, slice(None)]
    outside = torch.zeros(len(first), *kernel, dtype=torch.bool)
    for i, start in enumerate(where):
        corner, inner = torch.from_numpy(start * stride[i] - padding[i][0]), torch.arange(int(kernel[i])) * dilation[i]
        steps = (corner[:, None] + inner).reshape(len(corner), *[-1 if j == i else 1 for j in range(rank)])
        last = value.shape[2 + i] - 1
        outside |= (steps < 0) | (steps > last)
        index.append(steps.clamp(0, last))
    patches = value[tuple(index)]  # [rows, *kernel, channels], as indexing with a slice between has it
    # The padding is zero; a padded copy of every map would take longer than the sampling.
    patches = patches.masked_fill_(outside.to(value.device)[..., None], 0)
    return patches.movedim(-1, 1).flatten(2)


def _draw(seeds: Sequence[tuple[int, int]], positions: int, each: int, device: torch.device) -> Tensor:
    """[samples, positions to take]; all where there are no more than `each`."""
    if positions <= each:
        return torch.arange(positions, device=device).expand(len(seeds), -1)
    drawn = [np.random.default_rng(seed).choice(positions, each, replace=False) for seed in seeds]
    return torch.from_numpy(np.stack(drawn)).to(device)


def _spread(value: Any, rank: int) -> list[int]:
    given = [int(number) for number in (value if isinstance(value, (list, tuple)) else [value])]
    return given * rank if len(given) == 1 else given


def _padding(value: Any, reach: Sequence[int]) -> list[tuple[int, int]]:
    if value == "same":
        return [(r // 2, r - r // 2) for r in reach]
    if value == "valid":
        return [(0, 0) for _ in reach]
    return [(side, side) for side in _spread(value, len(reach))]


def _split(subject: Subject, node: Node, rows: Tensor, layer: int) -> Iterator[Reading]:
    """One reading for each group of a convolution."""
    call = arguments(node)
    module = subject.types.captured.module
    source = call["weight"]
    weight = _value(module, source).flatten(2) if source.meta["val"].dim() > 2 else _value(module, source)[:, :, None]
    axes = subject.types.values[node.args[0]]  # type: ignore[index]
    groups = 1 if operator_name(node) == "linear" else int(call["groups"])
    factors = subject.types.solution.factors(axes[-1] if operator_name(node) == "linear" else axes[1])
    name, weight = _parameter(subject, node), unhalved(weight)
    inputs, outputs = len(factors) // groups, len(weight) // groups
    for number in range(groups):
        read, made = (slice(number * size, (number + 1) * size) for size in (inputs, outputs))
        yield Reading(rows[:, read], weight[made], factors[read], name, made, layer)


def _parameter(subject: Subject, node: Node) -> str:
    """The name of a layer's weight; empty if it is computed from others."""
    source = arguments(node)["weight"]
    return subject.types.first(str(source.target)) if source.op == "get_attr" else ""


def _value(module: torch.nn.Module, node: Node) -> Tensor:
    """The value of a node that depends on parameters only."""
    if node.op == "get_attr":
        value: Tensor = attribute(module, str(node.target)).detach()
        return value
    sources = {source: _value(module, source) for source in node.all_input_nodes}
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: sources[source])
    with torch.no_grad():
        found: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return found


def running_worst(errors: Sequence[float]) -> list[float]:
    """The largest so far, each a little above the one before, so that the order survives ties."""
    worst = list(itertools.accumulate(errors, max))
    step = 1e-9 * max([*worst, 1e-12]) / max(1, len(worst))
    return [value + step * (place + 1) for place, value in enumerate(worst)]
