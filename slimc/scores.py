"""Scores: how much each channel matters, on one footing for all groups.

A scorer is one file in `scorers/`: it gives every channel of every group a number, larger for what matters more.
The scores of a group's members are summed; `normalise` then makes groups comparable for the global ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import UsageError
from .graph.groups import Grouping
from .graph.infer import Types
from .graph.terms import Terms
from .registry import Registry
from .samples import Samples

Need = Literal["weights", "inputs", "labels"]
"""What a scorer looks at besides the model: nothing, batches of inputs, or inputs with labels."""
Loss = Callable[[Any, Any], Tensor]
"""Takes the model's outputs and the targets of a batch, gives the mean over its samples."""

Scores = npt.NDArray[np.float64]
"""[width] one number per channel of a group; all NaN where the method says nothing of a group."""


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
        return self.by_group(total)

    def sum_over_weights(self, values: Mapping[str, Tensor]) -> list[Scores]:
        """As `sum_over_members`, of a number for each weight by the name of its tensor; other tensors do not count."""

        def along(name: str, axes: list[int]) -> dict[int, Scores] | None:
            if name not in values:
                return None
            own = values[name]
            sums = {axis: [other for other in range(own.dim()) if other != axis] for axis in axes}
            return {
                axis: np.asarray((own.sum(others) if others else own).double().cpu()) for axis, others in sums.items()
            }

        return self.sum_over_members(along)

    def by_group(self, total: Scores, known: npt.NDArray[np.bool_] | None = None) -> list[Scores]:
        """Scores of all variables, [variables or more], by group; NaN for groups with a channel that is not `known`."""
        return [
            total[group.variables] if known is None or known[group.variables].all() else np.full(group.width, np.nan)
            for group in self.grouping.groups
        ]


Scorer = Callable[[Subject], list[Scores]]


@dataclass(frozen=True)
class Method:
    """A scorer with its name, one line about it, and its source.

    normalisation: how its scores are made comparable between groups unless the user says otherwise.
    """

    name: str
    summary: str
    source: str
    score: Scorer
    needs: Need
    normalisation: str


_REGISTRY = Registry[Method]("scorer", "slimc.scorers")
methods, find = _REGISTRY.all, _REGISTRY.find


def scorer(
    name: str, summary: str, source: str, needs: Need = "weights", normalisation: str = "mean"
) -> Callable[[Scorer], Scorer]:
    """Register a scorer under the name that users type."""

    def register(function: Scorer) -> Scorer:
        _REGISTRY.add(Method(name, summary, source, function, needs, normalisation))
        return function

    return register


def check(method: Method, how: str, has_data: bool) -> None:
    """Refuse a scorer without the data that it needs, or an unknown normalisation, before anything slow."""
    if how != "auto":
        normalise([], how)
    if method.needs == "labels" and not has_data:
        raise UsageError(
            f"--scorer {method.name} needs data: give --data, or data= in Python, with batches of (inputs, targets)"
        )


def unscored(scores: Sequence[Scores]) -> list[int]:
    """Numbers of the groups that a method says nothing of; they stay whole."""
    return [number for number, own in enumerate(scores) if own.size and np.isnan(own).any()]


def normalise(scores: Sequence[Scores], how: str = "mean") -> list[Scores]:
    """Make groups of different size and scale comparable for one ranking.

    how: "mean", "max", "l2" divide each group's scores by their mean, largest value, or root of the sum of squares;
    "none" leaves them as they are, and so do "cost", after which each score is divided by what a channel of the group
    frees (`planner.per_cost`), and "isomorphic", after which groups are compared with those like them alone
    (`planner.isomorphic`). A group without a score, or with zeros only, gets ones.
    Raises UsageError for another name.
    """
    if how not in NORMALISATIONS:
        raise UsageError(f"--normalise {how}: known are auto, {', '.join(NORMALISATIONS)}")
    result = []
    for own in scores:
        scale = NORMALISATIONS[how](own) if own.size else 0.0
        result.append(own / scale if scale > 0 else np.ones_like(own))  # a comparison with NaN is false
    return result


NORMALISATIONS: dict[str, Callable[[Scores], float]] = {
    "mean": lambda own: float(own.mean()),
    "max": lambda own: float(own.max()),
    "l2": lambda own: float(np.linalg.norm(own)),
    "none": lambda own: 1.0 - float(np.isnan(own).any()),
    "cost": lambda own: 1.0 - float(np.isnan(own).any()),
    "isomorphic": lambda own: 1.0 - float(np.isnan(own).any()),
}
