"""The inputs that a model is called with, as one value."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from slimc.errors import UsageError


@dataclass(frozen=True)
class Example:
    """Inputs to run a model on: positional and keyword arguments.

    shared: places (among all tensors) of those that have no row for each sample, such as a mask or a scalar; None for
        those that are not as long as the first tensor with axes. Data is told by the example that the model was
        captured with, since a mask can happen to be as long as a batch.
    names: what the model calls its positional arguments, where that is known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shared: frozenset[int] | None = None
    names: tuple[str, ...] = ()

    @staticmethod
    def of(inputs: Any) -> Example:
        """A tensor, a tuple or list of arguments, or a dictionary of keyword arguments."""
        if isinstance(inputs, Example):
            return inputs
        if isinstance(inputs, Tensor):
            return Example((inputs,), {})
        if isinstance(inputs, Mapping):
            return Example((), dict(inputs))
        if isinstance(inputs, (tuple, list)):
            return Example(tuple(inputs), {})
        raise UsageError(
            f"example inputs are {type(inputs).__name__}; give a tensor, a tuple of arguments or a dictionary"
        )

    def ranges(self) -> tuple[tuple[int, int] | None, ...]:
        """The smallest and largest whole number of each tensor; None for those of other numbers."""
        return tuple(
            None
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or not tensor.numel()
            else (int(tensor.min()), int(tensor.max()))
            for tensor in self.tensors()
        )

    def map(self, change: Any) -> Example:
        """The same arguments with every tensor replaced by `change(tensor)`."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Example:
        """As `map`, with every tensor left alone that has no row for each sample."""
        places, shared = itertools.count(), self.without_rows()
        changed = self.map(lambda tensor: tensor if next(places) in shared else change(tensor))
        return dataclasses.replace(changed, shared=shared)

    @property
    def count(self) -> int:
        """The number of samples; 1 if no tensor has an axis."""
        shared = self.shared or ()
        return next((len(t) for place, t in enumerate(self.tensors()) if t.dim() and place not in shared), 1)

    def without_rows(self) -> frozenset[int]:
        """See `shared`."""
        if self.shared is not None:
            return self.shared
        count = self.count
        return frozenset(place for place, t in enumerate(self.tensors()) if not t.dim() or len(t) != count)

    def rows(self) -> list[Tensor]:
        """The tensors that have a row for each sample."""
        shared = self.without_rows()
        return [tensor for place, tensor in enumerate(self.tensors()) if place not in shared]

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def leaves(self) -> list[Any]:
        """All arguments one after another, as a graph takes them: the tensors, and what else there is."""
        return list(pytree.tree_leaves((self.args, self.kwargs)))

    def copies(self) -> list[Any]:
        """As `leaves`, of copies: operators may write into their arguments."""
        return self.map(lambda tensor: tensor.detach().clone()).leaves()

    def run(self, model: Any) -> Any:
        """Call a model with copies of these inputs, since it may write into them."""
        own = self.map(torch.clone)
        return model(*own.args, **own.kwargs)
