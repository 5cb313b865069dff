"""Roles: where a group's channels are written and where they are read.

A gate is one multiplier for a channel. It can sit where the channel comes into being (its writers) or where it is
consumed (its readers); for streams that are sums, with nothing but positively homogeneous operators on the way, both
give the same derivative.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Node

from .graph.infer import Types, tensors_of
from .graph.rule import Axes, arguments, operator_name
from .graph.terms import Terms

CONVOLUTIONS = frozenset(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3))
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "mv", "dot"})
_SUMS = frozenset({"add", "sub", "cat", "concat", "concatenate", "stack"})
_SHAPES = frozenset(
    {"cat", "concat", "concatenate", "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute"}
    | {"transpose", "contiguous", "clone", "to", "alias", "dropout"}
)
"""Operators that move channels and leave their values alone."""

Places = dict[tuple[Node, Node | None, int], Terms]


@dataclass(frozen=True)
class Site:
    """A place where a gate sits: on a node's result, or on one operand as that node alone sees it.

    operand: None for the node's own result.
    axis: the axis that holds the channels, counted in the value that is gated.
    factors: [indices of the axis, k] the variables behind each index; -1 for none, and for those gated elsewhere.
    """

    node: Node
    operand: Node | None
    axis: int
    factors: Terms

    @property
    def value(self) -> Node:
        """The node whose value is gated."""
        return self.node if self.operand is None else self.operand

    @property
    def is_stretched(self) -> bool:
        """Whether the gated operand is first expanded to the shape of the node's result."""
        return self.operand is not None and operator_name(self.node) in ("add", "sub")

    @property
    def shaped(self) -> Node:
        """A node whose value has the shape of what is gated."""
        return self.node if self.is_stretched else self.value


def writers(types: Types, *, after_norms: bool = True) -> tuple[Site, ...]:
    """Where channels come into being.

    These are convolutions (depthwise ones too) and linear layers, whatever else gives channels that no operand has
    (embeddings, products with a parameter, recurrences), and parameters that are added or concatenated to a stream.
    Where batch norms are the only ones to see a writer's result, the gate sits after them instead, since that is what
    a removed channel amounts to: no constant of the norm survives it. Without `after_norms` it stays at the writer.
    """
    found: Places = {}
    held = _Held(types)
    for node, computed, fixed in _computing(types):
        for axis, factors in _written(types, held, node, computed):
            for place, position in (_norms(types, node) if after_norms else []) or [(node, axis)]:
                own = types.solution.factors(_axes(types, place)[position])
                _put(found, (place, None, position), own, np.unique(factors[factors >= 0]))
        if operator_name(node) in _SUMS:
            stream = np.concatenate([held(operand) for operand in computed])
            for operand in fixed:
                for axis, factors in _added(types, node, operand):
                    _put(found, (node, operand, axis), factors, np.intersect1d(held(operand), stream))
    return tuple(Site(*place, factors) for place, factors in found.items())


def readers(types: Types) -> tuple[Site, ...]:
    """Where channels are consumed: what convolutions, linear layers and products sum over, and where channels end.

    A product of two computed values (attention's query and key) is gated on its first operand.
    """
    found: Places = {}
    held = _Held(types)
    for node, computed, _ in _computing(types):
        contracted = contraction(types, node, computed)
        if contracted is not None:
            source, axis = contracted
            own = types.solution.factors(_axes(types, source)[axis])
            _put(found, (node, source, axis), own, np.unique(own[own >= 0]))
        for source in computed if operator_name(node) != "getitem" else ():
            lost = np.setdiff1d(held(source), held(node))
            if contracted is not None and contracted[0] is source:
                lost = np.setdiff1d(lost, types.solution.factors(_axes(types, source)[contracted[1]]))
            for axis, terms in enumerate(_axes(types, source) if lost.size and _is_single(types, source) else ()):
                _put(found, (node, source, axis), types.solution.factors(terms), lost)
    return tuple(Site(*place, factors) for place, factors in found.items())


def joint(types: Types, sites: Iterable[Site], values: Iterable[Tensor]) -> Tensor:
    """Signed sums over all places of each channel.

    values: for each site, [n, size of its axis]. Gives [n, variables] in float64.
    """
    total: Tensor | None = None
    for site, own in zip(sites, values, strict=True):
        if total is None:
            total = own.new_zeros((len(own), types.solution.variables + 1))  # the last column takes what is no channel
        spread(total, site, own)
    return torch.zeros((1, types.solution.variables)) if total is None else total[:, :-1]


def spread(total: Tensor, site: Site, own: Tensor) -> None:
    """Add one site's values [n, size] to [n, variables + 1]."""
    for column in site.factors.T:
        if (column >= 0).any():
            index = torch.from_numpy(np.where(column >= 0, column, total.shape[1] - 1))
            total.index_add_(1, index, own)


def gated(types: Types, sites: Iterable[Site]) -> npt.NDArray[np.bool_]:
    """Which variables any of the sites holds, [variables]."""
    found = np.zeros(types.solution.variables, np.bool_)
    for site in sites:
        found[site.factors[site.factors >= 0]] = True
    return found


# -- finding them -------------------------------------------------------------------------------------


class _Held:
    """The variables that a node's value holds, sorted."""

    def __init__(self, types: Types) -> None:
        self._types = types
        self._of_axis: dict[int, Terms] = {}
        self._of_node: dict[Node, Terms] = {}

    def __call__(self, node: Node) -> Terms:
        if node not in self._of_node:
            axes = [axis for own in tensors_of(self._types.values[node]) for axis in own]
            parts = [self._axis(axis) for axis in axes]
            self._of_node[node] = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
        return self._of_node[node]

    def _axis(self, axis: Terms) -> Terms:
        if id(axis) not in self._of_axis:
            factors = self._types.solution.factors(axis)
            self._of_axis[id(axis)] = np.unique(factors[factors >= 0])
        return self._of_axis[id(axis)]


def _computing(types: Types) -> Iterator[tuple[Node, list[Node], list[Node]]]:
    """Every node whose value depends on the model's inputs, with its operands that do so and those that do not."""
    fixed: dict[Node, bool] = {}
    for node in types.captured.module.graph.nodes:
        sources = _tensors(types, node)
        fixed[node] = node.op == "get_attr" or (node.op == "call_function" and all(fixed[s] for s in sources))
        if node.op != "call_function" or fixed[node] or types.values[node] is None:
            continue
        if operator_name(node) == "getitem":  # one of several results comes from what those came from
            inner = node.args[0]
            assert isinstance(inner, Node)
            sources = _tensors(types, inner)
        yield node, [s for s in sources if not fixed[s]], [s for s in sources if fixed[s]]


def _tensors(types: Types, node: Node) -> list[Node]:
    return [source for source in node.all_input_nodes if types.values.get(source) is not None]


def _axes(types: Types, node: Node) -> Axes:
    axes: Axes = types.values[node]
    return axes


def _is_single(types: Types, node: Node) -> bool:
    value = types.values[node]
    return isinstance(value, tuple) and all(isinstance(axis, np.ndarray) for axis in value)


def _written(types: Types, held: _Held, node: Node, computed: Sequence[Node]) -> Iterator[tuple[int, Terms]]:
    """Axes of a node's result with the channels that it gives, others masked."""
    if not _is_single(types, node):
        return
    axes, name = _axes(types, node), operator_name(node)
    if name == "linear" or name in CONVOLUTIONS:
        axis = len(axes) - 1 if name == "linear" else _channel_axis(types, node)
        factors = types.solution.factors(axes[axis])
        if (factors >= 0).any():
            yield axis, factors
        return
    fresh = held(node)
    for operand in computed:
        fresh = np.setdiff1d(fresh, held(operand))
    for axis, terms in enumerate(axes if fresh.size else ()):
        factors = types.solution.factors(terms)
        if np.isin(factors, fresh).any():
            yield axis, np.where(np.isin(factors, fresh), factors, -1)


def _channel_axis(types: Types, node: Node) -> int:
    rank = len(_axes(types, arguments(node)["weight"])) - 2
    return len(_axes(types, node)) - rank - 1


def contraction(types: Types, node: Node, computed: Sequence[Node]) -> tuple[Node, int] | None:
    """The operand and the axis that an operator multiplies and sums over; None for other operators."""
    name, call = operator_name(node), arguments(node)
    if name == "linear":
        place = call["input"], -1
    elif name in CONVOLUTIONS:
        place = call["input"], -(len(_axes(types, call["weight"])) - 1)
    elif name in ("addmm", "baddbmm"):
        place = node.args[1], -1
    elif name == "scaled_dot_product_attention":
        place = call["query"], -1
    elif name in _PRODUCTS:
        left, right = node.args[0], node.args[1]
        place = (left, -1) if left in computed else (right, -2)
    else:
        return None
    if place[0] not in computed:
        return None
    rank = len(_axes(types, place[0]))
    return place[0], max(0, rank + place[1])


def _norms(types: Types, node: Node) -> list[tuple[Node, int]]:
    """The batch norms that a result goes to, if it goes nowhere else."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        users = [user for user in waiting.pop().users if types.values.get(user) is not None or user.op == "output"]
        if not users:
            return []
        for user in users:
            name = operator_name(user) if user.op == "call_function" else ""
            if name == "batch_norm":
                found[user] = None
            elif name in _SHAPES:
                waiting.append(user)
            else:
                return []
    return [(norm, 1) for norm in found]


def _added(types: Types, node: Node, operand: Node) -> Iterator[tuple[int, Terms]]:
    """Axes of an added parameter; a sum stretches it to the result's shape, a concatenation takes it as it is."""
    stretched = operator_name(node) in ("add", "sub")
    own = _axes(types, operand)
    shift = len(_axes(types, node)) - len(own) if stretched else 0
    for axis, terms in enumerate(own):
        factors = types.solution.factors(terms)
        if (factors >= 0).any():
            yield axis + shift, factors


def _put(found: Places, place: tuple[Node, Node | None, int], factors: Terms, chosen: Terms) -> None:
    """Gate some variables at a place, beside those that are gated there already."""
    masked = np.where(np.isin(factors, chosen), factors, -1)
    if place in found:
        masked = np.maximum(masked, found[place])
    if (masked >= 0).any():
        found[place] = masked
