"""Scores: how much each channel matters, on one footing for all groups.

A scorer is one file in `scorers/`: it gives every channel of every group a number, larger for what matters more.
The scores of a group's members are summed; `normalise` then makes groups comparable for the global ranking.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import InternalError, UsageError
from .graph.groups import Grouping
from .graph.infer import Types
from .graph.terms import Terms
from .samples import Samples

Need = Literal["weights", "inputs", "labels"]
"""What a scorer looks at besides the model: nothing, batches of inputs, or inputs with labels."""
Loss = Callable[[Any, Any], Tensor]
"""Takes the model's outputs and the targets of a batch, gives a scalar."""

Scores = npt.NDArray[np.float64]
"""[width] one number per channel of a group."""


@dataclass(frozen=True)
class Subject:
    """What a scorer may look at.

    samples: batches where there are any; with targets for scorers that need labels.
    loss: the user's own, or None for cross entropy.
    tick: called after each batch with how many are done and how many there are.
    """

    types: Types
    grouping: Grouping
    norm: str
    seed: int
    samples: Samples | None = None
    loss: Loss | None = None
    tick: Callable[[int, int], None] = lambda done, of: None

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its fully qualified name."""
        return self.types.weights[name].detach()

    def is_parameter(self, name: str) -> bool:
        """Whether it is trained, not a buffer."""
        return isinstance(self.types.weights[name], torch.nn.Parameter)

    def sum_over_members(self, per_index: Callable[[str, list[int]], dict[int, Scores] | None]) -> list[Scores]:
        """Lift numbers per index of tensor axes to channels: the sum over everything that goes with each channel.

        per_index: takes a tensor's name and its axes that hold channels, gives [size] for each of these axes; None
            where the tensor does not count.
        """
        sums: dict[int, tuple[Terms, Scores]] = {}  # axes that are one are summed first and looked up once
        for name, axes in self.types.tensors.items():
            held = [position for position, axis in enumerate(axes) if self.grouping.size(axis).holds_channels]
            for position, own in ((per_index(name, held) if held else None) or {}).items():
                axis = axes[position]
                _, before = sums.get(id(axis), (axis, None))
                sums[id(axis)] = axis, own if before is None else before + own
        total = np.zeros(self.types.solution.variables + 1)
        for axis, own in sums.values():
            for column in self.types.solution.factors(axis).T:
                np.add.at(total, column, own)  # -1, no variable, is the last entry
        return [total[group.variables] for group in self.grouping.groups]


Scorer = Callable[[Subject], list[Scores]]


@dataclass(frozen=True)
class Method:
    """A scorer with its name, one line about it, and its source.

    absolute: its numbers are in one unit for all groups, so that they are ranked as they are.
    """

    name: str
    summary: str
    source: str
    score: Scorer
    needs: Need
    absolute: bool = False


_METHODS: dict[str, Method] = {}


def scorer(
    name: str, summary: str, source: str, needs: Need = "weights", absolute: bool = False
) -> Callable[[Scorer], Scorer]:
    """Register a scorer under the name that users type."""

    def register(function: Scorer) -> Scorer:
        if name in _METHODS:
            raise InternalError(f"two scorers are called {name!r}")
        _METHODS[name] = Method(name, summary, source, function, needs, absolute)
        return function

    return register


def methods() -> dict[str, Method]:
    """All scorers by name; the folder listing is the registry."""
    package = importlib.import_module("slimc.scorers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"slimc.scorers.{module.name}")
    return dict(sorted(_METHODS.items()))


def find(name: str) -> Method:
    """The scorer of that name."""
    known = methods()
    if name not in known:
        raise UsageError(f"there is no scorer {name!r}; known: {', '.join(known)}")
    return known[name]


def normalise(scores: Sequence[Scores]) -> list[Scores]:
    """Divide each group's scores by their mean, so that groups of different size and scale can be ranked together."""
    result = []
    for own in scores:
        mean = own.mean() if own.size else 0.0
        result.append(own / mean if mean > 0 else np.ones_like(own))
    return result
