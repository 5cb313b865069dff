"""Joins of several tensors, and tensors made from nothing."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.fx import Node

from slimc.graph.infer import Inference, hint
from slimc.graph.rule import Axes, Value, arguments, infers, operator_name


@infers("cat", "concat", "concatenate")
def cat(walk: Inference, node: Node) -> Axes:
    """Axes follow each other along one dimension and are the same along the others."""
    call = arguments(node)
    parts = [walk.axes(part) for part in call["tensors"]]
    parts = [axes for axes in parts if not (len(axes) == 1 and len(axes[0]) == 0)] or parts
    return _joined(walk, node, parts, int(call["dim"]) % len(parts[0]))


def _joined(walk: Inference, node: Node, parts: list[Axes], dim: int) -> Axes:
    joined = []
    for position in range(len(parts[0])):
        here = [axes[position] for axes in parts]
        if position == dim:
            joined.append(np.concatenate(here) if len(here) > 1 else here[0])
            continue
        for axis in here[1:]:
            if axis is not here[0]:  # as nearly always; a join may have hundreds of parts
                walk.unify(node, here[0], axis)
        joined.append(here[0])
    return tuple(joined)


@infers("hstack", "vstack", "dstack", "column_stack")
def stack_along(walk: Inference, node: Node) -> Axes:
    """Along the second, first or third axis, where all parts have it; else the parts stay whole."""
    parts = [walk.axes(part) for part in arguments(node)["tensors"]]
    dim = {"vstack": 0, "dstack": 2}.get(operator_name(node), 1)
    if min(len(axes) for axes in parts) > dim and not (dim == 0 and len(parts[0]) < 2):
        return _joined(walk, node, parts, dim)
    for axes in parts:
        for axis in axes:
            walk.freeze(node, axis, "vectors become rows or columns")
    return walk.frozen(walk.out_shape(node))


@infers("stack")
def stack(walk: Inference, node: Node) -> Axes:
    """A new axis of whole tensors, all of the same channels."""
    call = arguments(node)
    parts = [walk.axes(part) for part in call["tensors"]]
    for axes in parts[1:]:
        for left, right in zip(parts[0], axes, strict=True):
            walk.unify(node, left, right)
    dim = int(call["dim"]) % (len(parts[0]) + 1)
    return (*parts[0][:dim], walk.store.frozen(len(parts)), *parts[0][dim:])


@infers("getitem")
def getitem(walk: Inference, node: Node) -> Value:
    """One of several results."""
    value = walk.value(node.args[0])  # type: ignore[arg-type]
    return value[node.args[1]]


@infers("broadcast_tensors")
def broadcast_tensors(walk: Inference, node: Node) -> Value:
    """Every result has the channels of all; what was broadcast by literal sizes is never written down."""
    from slimc.graph.rules.elementwise import broadcast

    parts = [walk.axes(part) for part in arguments(node)["tensors"]]
    joined = broadcast(walk, node, parts)
    return tuple(joined for _ in parts)


@infers("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def constant_fill(walk: Inference, node: Node) -> Axes:
    """The same value everywhere: as many indices as its readers want, where the size is a literal."""
    sizes = arguments(node).get("size")
    if not isinstance(sizes, (list, tuple)):
        return walk.frozen(walk.out_shape(node))
    return tuple(
        walk.store.fresh(size) if isinstance(size, int) else walk.store.frozen(out)
        for size, out in zip(sizes, walk.out_shape(node), strict=True)
    )


@infers("arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm", "scalar_tensor")
@infers("tril_indices", "triu_indices", "meshgrid", "one_hot", "hann_window")
def positions(walk: Inference, node: Node) -> Value:
    """Values that depend on their place keep every place."""
    for source in node.all_input_nodes:
        for axis in walk.value(source) or ():
            walk.freeze(node, axis, "its values are places", "structure")
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return walk.frozen(walk.out_shape(node))
    return tuple(walk.frozen([hint(size) for size in item.shape]) for item in value)
