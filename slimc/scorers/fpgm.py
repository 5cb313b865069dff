"""FPGM: the filters nearest to all others of their layer can be replaced by them.

Source: He et al., "Filter Pruning via Geometric Median" (CVPR 2019), equations 1 to 9: the score of a filter is the sum
of its Euclidean distances to the layer's filters. Distances come from inner products in double precision, and for near
neighbours from their differences, since rounding would rank those at random.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from slimc.graph.groups import Group
from slimc.roles import Site, writers
from slimc.scores import Scores, Subject, scorer

_SOURCE = "He et al., CVPR 2019"
_NEAR = 1e-6
_NUMBERS = 2**22


@scorer("fpgm", "sum of distances to the group's other channels, all writers' filters as one vector", _SOURCE)
def fpgm(subject: Subject) -> list[Scores]:
    """Filters of all writers of a channel, each layer's divided by its root mean square, make one vector.

    With one writer this is the paper's score, up to a factor.
    """
    written = _written(subject)
    return [_of_group(group, [torch.cat(_filters(subject, group, written), 1)]) for group in subject.grouping.groups]


@scorer("fpgm-sum", "sum of distances to the group's other channels, summed over writers", _SOURCE)
def fpgm_sum(subject: Subject) -> list[Scores]:
    """Sums of distances of each writer on its own, each layer divided by its root mean square, then summed."""
    written = _written(subject)
    return [_of_group(group, _filters(subject, group, written)) for group in subject.grouping.groups]


def _of_group(group: Group, vectors: list[Tensor]) -> Scores:
    if not sum(own.shape[1] for own in vectors):
        return np.full(group.width, np.nan)
    return np.asarray(torch.stack([distances(own).sum(1) for own in vectors]).sum(0))


def distances(rows: Tensor) -> Tensor:
    """Euclidean distances between all rows, [n, n], from [n, d] in float64."""
    centred = rows - rows.mean(0)
    lengths = centred.square().sum(1)
    sums = lengths[:, None] + lengths
    squares = (sums - 2 * centred @ centred.T).clamp_min(0)
    near = torch.triu(squares < _NEAR * sums, 1).nonzero()
    step = max(1, _NUMBERS // max(1, rows.shape[1]))
    for start in range(0, len(near), step):
        first, second = near[start : start + step].T
        squares[first, second] = squares[second, first] = (rows[first] - rows[second]).square().sum(1)
    return squares.fill_diagonal_(0).sqrt()


def _written(subject: Subject) -> dict[str, set[int]]:
    """For each parameter with two axes or more that writes channels, the variables it writes."""
    found: dict[str, set[int]] = {}
    for site in writers(subject.types, after_norms=False):
        variables = set(np.unique(site.factors[site.factors >= 0]).tolist())
        for source in _parameters(site):
            name = subject.types.first(str(source.target))
            if name in subject.types.tensors and subject.is_parameter(name) and subject.tensor(name).dim() > 1:
                found.setdefault(name, set()).update(variables)
    return found


def _parameters(site: Site) -> list[Node]:
    """The parameters that a writer's values are made of, besides its input."""
    waiting = [site.operand] if site.operand is not None else list(site.node.all_input_nodes)
    found = []
    while waiting:
        node = waiting.pop()
        if node.op == "get_attr":
            found.append(node)
        elif node.op == "call_function" and all(_is_fixed(source) for source in node.all_input_nodes):
            waiting.extend(node.all_input_nodes)
    return found


def _is_fixed(node: Node) -> bool:
    return node.op == "get_attr" or (
        node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_fixed, node.all_input_nodes))
    )


def _filters(subject: Subject, group: Group, written: dict[str, set[int]]) -> list[Tensor]:
    """[width, numbers of one channel] for each parameter that writes the group; a first one of no numbers."""
    vectors = [torch.zeros(group.width, 0, dtype=torch.float64)]
    place = np.full(subject.types.solution.variables + 1, -1)
    place[group.variables] = np.arange(group.width)
    for name, variables in written.items():
        if variables.isdisjoint(group.variables.tolist()):
            continue
        tensor = subject.tensor(name)
        for axis, terms in enumerate(subject.types.tensors[name]):
            factors = subject.types.solution.factors(terms)
            channels = place[np.where(np.isin(factors, list(variables)), factors, -1)].max(1)
            indices = np.flatnonzero(channels >= 0)
            if not indices.size:
                continue
            order = indices[np.argsort(channels[indices], kind="stable")]
            rows = tensor.index_select(axis, torch.from_numpy(order).to(tensor.device)).movedim(axis, 0)
            own = rows.reshape(group.width, -1).cpu().double()
            vectors.append(own / own.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny))
    return vectors
