"""From numbers per row of a parameter to numbers per channel, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slimc.errors import UnreachableTarget
from slimc.scores import Scores

from .gates import Place
from .network import Network
from .selection import Selection


def zeros(network: Network, found: tuple[Place, ...]) -> dict[str, Tensor]:
    """A number per row that is left, for each place; nothing is built for it."""
    cut = network.cut_so_far
    return {place.name: torch.zeros(int(cut.kept(place.axis).sum()), dtype=torch.float64) for place in found}


def factors(network: Network, place: Place) -> npt.NDArray[np.int64]:
    """[rows that are left, k] the channels behind each row; -1 for none."""
    cut = network.cut_so_far
    rows: npt.NDArray[np.int64] = network.analysis.types.solution.factors(place.axis)[cut.kept(place.axis)]
    return rows


def summed(network: Network, found: tuple[Place, ...], values: Mapping[str, Tensor]) -> Scores:
    """Sums over the places of each channel, [variables]; NaN for channels that have none."""
    count = network.analysis.types.solution.variables
    total, known = np.zeros(count + 1), np.zeros(count + 1, np.bool_)
    for place in found:
        own = values[place.name].detach().cpu().double().numpy()
        for column in factors(network, place).T:
            np.add.at(total, column, own)  # -1, no channel, is the last entry
            known[column] = True
    total[~known] = np.nan
    return total[:-1]


def check_reachable(network: Network, found: tuple[Place, ...], selection: Selection) -> None:
    """UnreachableTarget where the budget cannot be met by cutting only what has a place; before anything is trained."""
    try:
        selection.choose(summed(network, found, zeros(network, found)))
    except UnreachableTarget as error:
        limit = "That is as far as this schedule goes, which cuts only channels with parameters that it acts on."
        if not all(tensor.requires_grad for tensor in network.analysis.model.parameters()):
            limit = "Channels that frozen parameters make (requires_grad is off) stay."
        raise UnreachableTarget(f"{error} {limit}") from None


def members(network: Network, found: tuple[Place, ...]) -> list[int]:
    """How many places each group has."""
    counts = [0] * len(network.analysis.groups)
    numbers = network.analysis.grouping.group_of
    for place in found:
        rows = network.analysis.types.solution.factors(place.axis)
        for number in np.unique(numbers[rows[rows >= 0]]).tolist():
            if number >= 0:
                counts[number] += 1
    return counts


def members_of_channels(network: Network, found: tuple[Place, ...]) -> Scores:
    """[variables] how many places each channel has; NaN for none."""
    return summed(network, found, {name: torch.ones_like(own) for name, own in zeros(network, found).items()})


def living(network: Network, place: Place, alive: npt.NDArray[np.bool_]) -> Tensor:
    """Which of a place's present rows another choice of channels would keep, [rows]."""
    rows = factors(network, place)
    return torch.from_numpy((alive[np.maximum(rows, 0)] | (rows < 0)).all(axis=1))


def within_groups(network: Network, total: Scores) -> Scores:
    """Each channel's rank in its group, from 0 to 1: one ranking that takes the same share of every group."""
    ranks = np.full_like(total, np.nan)
    for group in network.analysis.groups:
        own = group.variables[network.alive[group.variables]]
        if not np.isnan(total[own]).any():
            order = np.argsort(np.argsort(total[own], kind="stable"), kind="stable")
            # Counted from the top, so that what stays is the same share of groups that are cut already.
            ranks[own] = (order + 1) / len(own)
    return ranks
