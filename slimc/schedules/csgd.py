"""Centripetal SGD: filters of a cluster are drawn together until they are one, then all but one are cut.

Source: Ding et al., "Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated Structure"
(CVPR 2019), equation 4: the members of a cluster move by their mean gradient and towards their mean; when they are
equal, the readers' weights of the dropped ones are added to those of the one that stays, and nothing changes.
Clusters are k-means of the filters (section 3.2) and are shared by everything in a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx import Node

from slimc.graph.infer import Types, attribute
from slimc.graph.rule import arguments, operator_name
from slimc.roles import CONVOLUTIONS
from slimc.training import gates, lifts
from slimc.training.loop import Hooks
from slimc.training.network import Alive, Network
from slimc.training.phase import Phase
from slimc.training.recipe import with_sgd
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule

_PRODUCTS = frozenset({"matmul", "mm", "bmm", "mv", "addmm", "baddbmm"})
_FOR_VECTORS = 0.1
"""Biases and norms are drawn together by a tenth of epsilon, as in the authors' code."""


@schedule("csgd", "filters of a cluster are drawn together until they are one, then merged", "Ding et al., CVPR 2019")
def csgd(run: Run, *, epsilon: float = 0.05, finetune: float = 0.3) -> Iterator[Phase]:
    """Train with centripetal force `epsilon`, merge clusters, fine-tune for that share of the epochs (0 published).

    The same share of every group goes; the share follows from the budget.
    """
    demand(0, epsilon=epsilon)
    demand(0, 1, finetune=finetune)
    recipe = with_sgd(run.options.recipe, "csgd")
    labels = run.event("clusters", lambda: torch.from_numpy(clusters(run)))
    mixings: dict[tuple[str, int], Tensor] = {}

    def draw() -> None:
        if not mixings:
            mixings.update(_mixings(run.network, labels.numpy()))
        for (name, axis), mixing in mixings.items():
            parameter = attribute(run.network.module, name)
            if parameter.grad is not None:
                strength = epsilon if parameter.dim() > 1 else epsilon * _FOR_VECTORS
                parameter.grad.copy_(centripetal(parameter.detach(), parameter.grad, mixing, axis, strength))

    epochs = (1 - finetune) * run.options.epochs
    yield run.phase("centripetal", epochs, hooks=Hooks(before_step=draw), optimiser=recipe.optimiser)
    run.event("merge clusters", lambda: merge(run.network, labels.numpy()))
    run.cut(lambda: representatives(run.network, labels.numpy()))
    yield run.phase("finetune", run.left)


def centripetal(weight: Tensor, gradient: Tensor, mixing: Tensor, axis: int, epsilon: float) -> Tensor:
    """The mean gradient of each row's cluster, plus epsilon times how far the row is from its cluster's mean.

    mixing: [rows, rows] averages over clusters. Under plain SGD two rows of a cluster come nearer by exactly
    1 - rate * epsilon in every step, whatever the data.
    """
    rows, moves = (t.transpose(0, axis).reshape(t.shape[axis], -1) for t in (weight, gradient))
    drawn = mixing @ moves + epsilon * (rows - mixing @ rows)
    return drawn.reshape(weight.transpose(0, axis).shape).transpose(0, axis)


def clusters(run: Run) -> npt.NDArray[np.int64]:
    """[variables] the representative of each channel's cluster: a channel that stays."""
    network = run.network
    ranks = lifts.within_groups(network, run.score("magnitude"))
    filters = _filters(network)
    ranks[[variable for variable in range(len(ranks)) if variable not in filters]] = np.nan  # their groups stay whole
    ranks[_frozen(network)] = np.nan
    for group in network.analysis.groups:
        # A norm over merged channels counts them once, and a product of two streams (query and key) is not a sum of
        # readers: equal channels of these cannot be merged without a change.
        if not group.exact or group.number in _multiplied(network):
            ranks[group.variables] = np.nan
    left = run.selection.choose(ranks)
    labels = np.arange(len(ranks))
    for group in network.analysis.groups:
        count = int(left[group.variables].sum())
        if not 0 < count < group.width:
            continue
        own = np.stack([filters[variable] for variable in group.variables.tolist()])
        for members in _clustered(own, count, run.options.seed):
            labels[group.variables[members]] = group.variables[members[0]]
    return labels


def _clustered(filters: npt.NDArray[np.float64], count: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """The rows of each of `count` clusters, which are halved where equal rows make fewer."""
    from sklearn.cluster import KMeans

    distinct = len(np.unique(filters, axis=0))
    found = KMeans(min(count, distinct), n_init=1, random_state=seed).fit_predict(filters)
    clusters = [np.flatnonzero(found == number) for number in np.unique(found)]
    while len(clusters) < count:
        clusters.sort(key=len)
        largest = clusters.pop()
        clusters += np.array_split(largest, 2)
    return clusters


def _frozen(network: Network) -> npt.NDArray[np.int64]:
    """Channels that a frozen parameter makes, which cannot be drawn together."""
    types, read = network.analysis.types, _read(network.analysis.types)
    found = [np.empty(0, np.int64)]
    for name, axes in types.tensors.items():
        if isinstance(types.weights[name], nn.Parameter) and not types.weights[name].requires_grad:
            found += [types.solution.factors(axis).ravel() for i, axis in enumerate(axes) if (name, i) not in read]
    variables = np.unique(np.concatenate(found))
    return variables[variables >= 0]


def _multiplied(network: Network) -> set[int]:
    """Numbers of the groups that stand in products of groups, as heads and sizes of heads do."""
    axes = network.analysis.grouping.axes
    return {number for axis in axes for _, names in axis.terms if len(names) > 1 for number in names}


def _filters(network: Network) -> dict[int, npt.NDArray[np.float64]]:
    """The weights that make each channel, end to end over all of its writers."""
    parts: dict[int, list[npt.NDArray[np.float64]]] = {}
    for place in gates.places(network.analysis.types, after_norms=False):
        weight = attribute(network.module, place.name).detach().transpose(0, place.tensors[0][1]).flatten(1)
        numbers = weight.double().cpu().numpy()
        for row, variables in zip(numbers, lifts.factors(network, place), strict=True):
            for variable in variables[variables >= 0].tolist():
                parts.setdefault(variable, []).append(row)
    return {variable: np.concatenate(rows) for variable, rows in parts.items()}


def _twins(factors: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each index of an axis, the index that takes its place once clusters are one; itself for those that stay.

    Where a channel has several indices (a flattened map, heads times sizes), they correspond in order.
    """
    wanted = np.where(factors >= 0, labels[np.maximum(factors, 0)], -1)
    places: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(factors.tolist()):
        places.setdefault(tuple(row), []).append(index)
    seen: dict[tuple[int, ...], int] = {}
    found = np.arange(len(factors))
    for index, (own, target) in enumerate(zip(factors.tolist(), wanted.tolist(), strict=True)):
        key = tuple(own)
        number = seen[key] = seen.get(key, -1) + 1
        found[index] = places[tuple(target)][number]
    return found


def _mixings(network: Network, labels: npt.NDArray[np.int64]) -> dict[tuple[str, int], Tensor]:
    """[rows, rows] the matrices that average over clusters, for each axis where a parameter writes channels."""
    types, found = network.analysis.types, {}
    read, known = _read(types), dict[tuple[bytes, torch.dtype], Tensor]()
    tensors = network.tensors()
    for name, axes in types.tensors.items():
        parameter = tensors[name]
        for position, axis in enumerate(axes if isinstance(parameter, nn.Parameter) else ()):
            if (name, position) in read:
                continue
            twins = _twins(types.solution.factors(axis), labels)
            if (twins == np.arange(len(twins))).all():
                continue
            key = twins.tobytes(), parameter.dtype
            if key not in known:
                same = torch.from_numpy(twins[:, None] == twins[None, :]).to(parameter)
                known[key] = same / same.sum(1, keepdim=True)
            found[name, position] = known[key]
    return found


def _read(types: Types) -> set[tuple[str, int]]:
    """Tensors with the axis that an operator multiplies with a stream and sums over.

    Along all other axes channels are written: rows of layers, norms, biases, scales, tables, positions.
    """
    found = set()
    for node in types.captured.module.graph.nodes:
        name = operator_name(node) if node.op == "call_function" else ""
        places: list[tuple[object, int]] = []
        if name == "linear" or name in CONVOLUTIONS:
            places = [(arguments(node)["weight"], 0 if "transpose" in name else 1)]
        elif name in _PRODUCTS:
            left, right = [source for source in node.args if isinstance(source, Node)][-2:]
            places = [(left, -1), (right, -2)]
        for source, axis in places:
            if isinstance(source, Node) and source.op == "get_attr":
                tensor = types.first(str(source.target))
                rank = len(types.tensors[tensor])
                found.add((tensor, axis if axis >= 0 else max(0, rank + axis)))
    return found


@torch.no_grad()
def merge(network: Network, labels: npt.NDArray[np.int64]) -> None:
    """Give the one that stays the mean of its cluster wherever it is written, and the sum wherever it is read."""
    types = network.analysis.types
    read, tensors = _read(types), network.tensors()
    for name, axes in types.tensors.items():
        tensor = tensors[name]
        for position, axis in enumerate(axes):
            factors = types.solution.factors(axis)
            if not (factors >= 0).any() or not tensor.is_floating_point():
                continue
            twins = torch.from_numpy(_twins(factors, labels)).to(tensor.device)
            mixed = torch.zeros_like(tensor).index_add_(position, twins, tensor)
            if (name, position) not in read:
                counts = torch.zeros(len(factors), device=tensor.device).index_add_(
                    0, twins, torch.ones(len(factors), device=tensor.device)
                )
                shape = [-1 if place == position else 1 for place in range(tensor.dim())]
                mixed = mixed / counts.clamp_min(1).reshape(shape).to(mixed)
            tensor.copy_(mixed)


def representatives(network: Network, labels: npt.NDArray[np.int64]) -> Alive:
    """The channels that stand for their clusters."""
    alive: Alive = network.alive & (labels == np.arange(len(labels)))
    return alive
