"""What resizing rules ask: which indices of each axis survive a cut, and the sizes that follow."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Node

from .infer import Types, tensors_of
from .terms import Terms

Kept = npt.NDArray[np.bool_]


class Cut:
    """A choice of living variables, seen axis by axis."""

    def __init__(self, types: Types, alive: Kept) -> None:
        self.types = types
        self.alive = alive
        self._masks: dict[int, Kept] = {}
        self._indices: dict[int, torch.Tensor] = {}
        self._whole: dict[int, bool] = {}

    def kept(self, axis: Terms) -> Kept:
        """Which indices of an axis survive."""
        mask = self._masks.get(id(axis))
        if mask is None:
            mask = self._masks[id(axis)] = self.types.solution.kept(axis, self.alive)
        return mask

    def whole(self, axis: Terms) -> bool:
        """Whether nothing of an axis is removed."""
        found = self._whole.get(id(axis))
        if found is None:
            found = self._whole[id(axis)] = bool(self.kept(axis).all())
        return found

    def indices(self, axis: Terms) -> torch.Tensor:
        """The surviving indices, ascending."""
        found = self._indices.get(id(axis))
        if found is None:
            found = self._indices[id(axis)] = torch.from_numpy(np.flatnonzero(self.kept(axis)))
        return found

    def shape(self, axes: tuple[Terms, ...]) -> tuple[int, ...]:
        """The sizes that are left."""
        return tuple(int(self.kept(axis).sum()) for axis in axes)

    def select(self, value: torch.Tensor, axes: tuple[Terms, ...]) -> torch.Tensor:
        """The surviving part of a value with these axes."""
        for position, axis in enumerate(axes):
            if not self.whole(axis):
                value = value.index_select(position, self.indices(axis).to(value.device))
        return value

    def fits(self, axes: tuple[Terms, ...], value: torch.Tensor) -> bool:
        """Whether no axis is cut that is the batch times channels, whose size in the example is not that of a value."""
        return all(self.whole(axis) or len(axis) == size for axis, size in zip(axes, value.shape, strict=True))

    def touches(self, node: Node) -> bool:
        """Whether a node reads or makes anything that shrinks."""
        values = [self.types.values[n] for n in (node, *node.all_input_nodes)]
        return any(not self.whole(axis) for value in values for axes in tensors_of(value) for axis in axes)


class Resizing(Cut):
    """A cut while its literals are written into a copy of the graph."""

    def axes(self, node: Any) -> tuple[Terms, ...]:
        """The original axes of a tensor node."""
        value: tuple[Terms, ...] = self.types.values[node]
        return value

    def new_shape(self, node: Any) -> tuple[int, ...]:
        """The shape of a node's value after the cut, in the example."""
        return self.shape(self.axes(node))

    def position(self, axis: Terms, index: int) -> int:
        """Where an index, or a boundary between indices, lies after the cut."""
        size = len(axis)
        index = min(max(index + size if index < 0 else index, 0), size)
        return int(self.kept(axis)[:index].sum())

    def sizes(self, old: Node, new: Node, written: list[Any], copied: list[Any], keeps: bool = False) -> list[Any]:
        """New literals for a list of output sizes.

        `written` are the sizes in the original graph, `copied` the same in the new one. Symbolic sizes stay;
        one that counts channels too (batch times heads) becomes -1 or, where -1 means something else or is
        taken (`keeps`), is scaled.
        """
        axes = self.axes(old)[-len(written) :]
        symbolic = [not isinstance(size, int) for size in old.meta["val"].shape][-len(written) :]
        result: list[Any] = []
        for axis, size, copy, is_symbol in zip(axes, written, copied, symbolic, strict=True):
            left = int(self.kept(axis).sum())
            if size == -1 and (is_symbol or keeps):
                result.append(-1)
            elif isinstance(size, Node) and left != len(axis):
                result.append(self._scaled(new, copy, left, len(axis)) if keeps or -1 in written else -1)
            elif isinstance(size, Node):
                result.append(copy)
            else:
                result.append(left)
        return result

    @staticmethod
    def _scaled(new: Node, size: Node, left: int, full: int) -> Node:
        with new.graph.inserting_before(new):
            times = new.graph.call_function(operator.mul, (size, left))
            return new.graph.call_function(operator.floordiv, (times, full))
