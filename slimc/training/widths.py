"""Widths as shares, one for each group: what they leave at a budget, and a search for good ones by evolution.

A vector says how wide groups are to each other; the budget says how wide they are. So every vector is a network that
meets the budget to the last channel, and none has to be thrown away for being too large.

Source of the search: Liu et al., "MetaPruning" (ICCV 2019), algorithm 1, with the authors' settings.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from slimc.scores import Scores

from .lifts import within_groups
from .network import Network

Genes = npt.NDArray[np.int64]
"""[groups] or [vectors, groups] the step of each share, from 0 to `STEPS` - 1."""

STEPS = 31
_SHARES = np.linspace(0.1, 1.0, STEPS)
_MUTATES = 0.1
_PARENTS = 10
_TRIES = 10


def shares(genes: Genes) -> Scores:
    """0.10, 0.13, ... 1.00."""
    found: Scores = _SHARES[genes]
    return found


def drawn(slots: int, count: int, rng: np.random.Generator) -> Genes:
    """[count, slots] random vectors."""
    return rng.integers(STEPS, size=(count, slots))


def order(network: Network, scores: Scores) -> Scores:
    """[variables] the place of each channel in its group, the best first, from above 0 to 1; NaN for unknown ones."""
    ranks = within_groups(network, scores)
    found = np.full_like(ranks, np.nan)
    for group in network.analysis.groups:
        own = group.variables[network.alive[group.variables]]
        found[own] = 1 + 1 / max(1, len(own)) - ranks[own]
    return found


def preference(network: Network, places: Scores, wanted: Scores) -> Scores:
    """[variables] scores by which a budget leaves the same multiple of each group's share, its first channels.

    places: as `order` gives them. wanted: [groups] shares.
    """
    found = np.full_like(places, np.nan)
    for group, share in zip(network.analysis.groups, wanted.tolist(), strict=True):
        found[group.variables] = share / places[group.variables]
    return found


def bred(genes: Genes, losses: Scores, count: int, rng: np.random.Generator, is_new: Callable[[Genes], bool]) -> Genes:
    """The next vectors, [count, groups]: half of them mutants of the best ten, half crosses of two of them.

    A mutant takes a random step in about every tenth group, a cross each group from one of two parents. What is not
    new is drawn again, at last at random.
    """
    parents = genes[np.argsort(losses, kind="stable")[:_PARENTS]]
    slots = parents.shape[1]

    def mutant() -> Genes:
        parent = parents[rng.integers(len(parents))]
        moves = rng.integers(STEPS, size=slots) * (rng.random(slots) < _MUTATES)
        moved: Genes = (parent + moves) % STEPS
        return moved

    def cross() -> Genes:
        one, other = parents[rng.integers(len(parents), size=2)]
        mixed: Genes = np.where(rng.random(slots) < 0.5, one, other)
        return mixed

    found = []
    for number in range(count):
        draw = mutant if number % 2 == 0 else cross
        tried = (draw() for _ in range(_TRIES))
        found.append(next((own for own in tried if is_new(own)), rng.integers(STEPS, size=slots)))
    return np.array(found, np.int64).reshape(count, slots)
