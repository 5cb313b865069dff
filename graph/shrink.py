"""The types and groups of a cut graph: those of the whole graph with the removed indices left out.

They are for reading (scores, roles, reconstruction). A further cut is made in the whole graph again, whose literals
are those that were captured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .groups import Grouping
from .infer import Product, Types, attribute
from .resize import Cut
from .rule import Value
from .terms import Terms

OPEN = "open"
"""In a node's meta: the axes that could have any size before the sizes left were written into it."""


def shrink(
    types: Types, grouping: Grouping, cut: Cut, module: GraphModule, twins: dict[Node, Node]
) -> tuple[Types, Grouping]:
    """Types and groups of `module`, the graph that `cut` leaves; twins: its node for each original node.

    Groups keep their numbers and names; one of which nothing is left has no variables. An axis that several values
    share is one array here too. The nodes of `module` learn their new shapes.
    """
    known: dict[int, Terms] = {}

    def axis(terms: Terms) -> Terms:
        own = known.get(id(terms))
        if own is None:
            own = known[id(terms)] = terms if cut.whole(terms) else terms[cut.kept(terms)]
        return own

    def value(found: Value) -> Value:
        if found is None:
            return None
        return tuple(axis(item) if isinstance(item, np.ndarray) else value(item) for item in found)

    values: dict[Node, Value] = dict.fromkeys(module.graph.nodes)  # sizes that are computed anew have no axes
    for node, found in types.values.items():
        twin = twins[node]
        values[twin] = value(found)
        if found is not None:
            twin.meta[OPEN] = open_axes(node)
            twin.meta["val"] = _shaped(node.meta["val"], values[twin])
    tensors = {name: value(axes) for name, axes in types.tensors.items()}
    smaller = replace(
        types,
        captured=replace(types.captured, module=module),
        values=values,
        tensors=tensors,
        weights={name: attribute(module, name) for name in tensors},
        renormalising=tuple((twins[node], axis(terms)) for node, terms in types.renormalising),
        macs=tuple(Product(product.factor, value(product.axes), twins[product.node]) for product in types.macs),
    )
    groups = tuple(replace(group, variables=group.variables[cut.alive[group.variables]]) for group in grouping.groups)
    # What a normalisation takes its statistics over may be no axis of a value, and has no number.
    numbers = {id(own): grouping.axis_number[whole] for whole, own in known.items() if whole in grouping.axis_number}
    return smaller, replace(grouping, groups=groups, axis_number=numbers)


def open_axes(node: Node) -> tuple[int, ...]:
    """The axes of a node's value that may have any size, as the batch; none for values of several parts."""
    if OPEN in node.meta:
        return tuple(node.meta[OPEN])
    shape: tuple[Any, ...] = tuple(node.meta["val"].shape) if isinstance(node.meta["val"], Tensor) else ()
    is_open = [not isinstance(size, int) and not size.node.expr.is_number for size in shape]
    return tuple(axis for axis, own in enumerate(is_open) if own)


def _shaped(before: Any, axes: Value) -> Any:
    """A value without numbers that has the new sizes, in the example, and the old type."""
    if isinstance(before, Tensor):
        return torch.empty([len(axis) for axis in axes], dtype=before.dtype, device="meta")
    tensors = [item for item in before if isinstance(item, Tensor)]
    return type(before)(_shaped(item, own) for item, own in zip(tensors, axes, strict=True))
