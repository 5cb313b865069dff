"""A generator of weights: one network that stands for all networks with fewer channels.

Each layer's weights are what was trained plus what two linear layers make of the widths around it; channels beyond the
widths are closed. It is put on with `torch.nn.utils.parametrize`, and taken off with the weights for one set of widths.

Source: Liu et al., "MetaPruning" (ICCV 2019), section 3.1 (PruningNet).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimc.graph.groups import Grouping
from slimc.graph.infer import Types, attribute
from slimc.graph.resize import Cut

from .gates import Place, held_at
from .gates import places as places_of

HIDDEN, _LARGEST = 4, 150_000_000
"""Units (32 as published: that many times the network's weights, all of which are trained), fewer for networks whose
generator would have more weights than this."""


@dataclass(frozen=True)
class Generated:
    """A tensor that is generated.

    groups: whose widths it sees. axis, channels: where its channels are closed, and the variables behind each index
    [size, k], -1 for none; None where it is only read through channels that others close.
    """

    name: str
    groups: tuple[int, ...]
    axis: int | None
    channels: npt.NDArray[np.int64] | None


def generated(types: Types, grouping: Grouping, cut: Cut, closing: Sequence[Place]) -> tuple[Generated, ...]:
    """The weights of all layers that write channels, and of the norms behind them.

    closing: where channels are closed, behind norms where there are any.
    """
    where = {name: axis for place in closing for name, axis in place.tensors}
    names = dict.fromkeys(
        name
        for place in (*closing, *places_of(types, after_norms=False))
        for name, _ in place.tensors
        if types.weights[name].requires_grad
    )
    found = []
    for name in names:
        rows = [types.solution.factors(axis)[cut.kept(axis)] for axis in types.tensors[name]]
        seen = np.unique(np.concatenate([grouping.group_of[own[own >= 0]] for own in rows]))
        at = where.get(name)
        groups = tuple(seen[seen >= 0].tolist())
        found.append(Generated(name, groups, at, None if at is None else rows[at]))
    return tuple(found)


def affordable(types: Types, tensors: Sequence[Generated]) -> int:
    """How many hidden units a generator has by default."""
    weights = sum(types.weights[own.name].numel() for own in tensors)
    return max(1, min(HIDDEN, _LARGEST // max(1, weights)))


class Generator:
    """Generated tensors of a module. hidden: units between widths and weights. Weights start as they are."""

    def __init__(self, module: nn.Module, tensors: Sequence[Generated], hidden: int) -> None:
        self.hidden = hidden
        self._tensors = [(*held_at(module, own.name), own) for own in tensors]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for part, last, own in self._tensors:
                tensor = getattr(part, last)
                # A parameter of its own: the graph of the same network goes on holding the old one.
                setattr(part, last, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
                parametrize.register_parametrization(part, last, _Weights(tensor, own, hidden), unsafe=True)

    def open(self, alive: npt.NDArray[np.bool_], shares: npt.NDArray[np.float64]) -> None:
        """Take the weights for other widths. alive: [variables] channels that stay; shares: [groups] that they are."""
        for part, last, own in self._tensors:
            weights = attribute(part, f"parametrizations.{last}.0")
            weights.widths.copy_(torch.from_numpy(shares[list(own.groups)]))
            if own.channels is not None:
                stays = (alive[np.maximum(own.channels, 0)] | (own.channels < 0)).all(axis=1)
                weights.stays.copy_(torch.from_numpy(stays).reshape(weights.stays.shape))

    def close(self) -> None:
        """Take the generator off; every tensor has its weights for the widths that were opened last."""
        for part, last, _ in self._tensors:
            trains = attribute(part, f"parametrizations.{last}.0").trains
            parametrize.remove_parametrizations(part, last, leave_parametrized=True)
            getattr(part, last).requires_grad_(trains)


class _Weights(nn.Module):
    """The parametrization: what was trained plus what is generated, where channels stay."""

    widths: Tensor
    stays: Tensor

    def __init__(self, like: Tensor, own: Generated, hidden: int) -> None:
        super().__init__()
        self.trains = like.requires_grad
        count = len(own.groups)
        self.register_buffer("widths", like.new_ones(count))
        shape = [-1 if position == own.axis else 1 for position in range(like.dim())]
        size = 1 if own.axis is None else like.shape[own.axis]
        self.register_buffer("stays", like.new_ones(size).reshape(shape if own.axis is not None else ()))
        self.inner = nn.Linear(count, hidden).to(like)
        self.outer = nn.Parameter(like.new_zeros(like.numel(), hidden))

    def forward(self, original: Tensor) -> Tensor:
        """The tensor for the widths that are open."""
        made = self.outer @ torch.relu(self.inner(self.widths))
        return (original + made.reshape(original.shape)) * self.stays
