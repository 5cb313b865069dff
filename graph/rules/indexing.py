"""Operators that look values up: the axis that is looked up in stays whole, the others pass."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.rule import Axes, arguments, infers

from .elementwise import broadcast


@infers("embedding")
def embedding(walk: Inference, node: Node) -> Axes:
    """weight [words, features], indices [...] -> [..., features]."""
    call = arguments(node)
    weight, indices = walk.axes(call["weight"]), walk.axes(call["indices"])
    walk.freeze(node, weight[0], "rows are looked up by number", "structure")
    return (*indices, weight[1])


@infers("index")
def index(walk: Inference, node: Node) -> Axes:
    """x[i, j, ...] with integer tensors: indexed axes go, the indices' shape takes their place."""
    axes, indices = walk.axes(node.args[0]), node.args[1]
    assert isinstance(indices, (list, tuple))
    used = [i for i, one in enumerate(indices) if one is not None]
    if any(_is_mask(indices[i]) for i in used):
        for axis in axes:
            walk.freeze(node, axis, "chosen by a mask")
        return walk.frozen(walk.out_shape(node))
    for i in used:
        walk.freeze(node, axes[i], "looked up by number", "structure")
    shape = broadcast(walk, node, [walk.axes(indices[i]) for i in used])
    rest = [axis for i, axis in enumerate(axes) if i not in used]
    # Indices side by side put their shape in place; apart, numpy's rule puts it first.
    together = used == list(range(used[0], used[-1] + 1))
    place = used[0] if together else 0
    return (*rest[:place], *shape, *rest[place:])


def _is_mask(node: object) -> bool:
    value = node.meta["val"] if isinstance(node, Node) else None
    return isinstance(value, Tensor) and str(value.dtype) in ("torch.bool", "torch.uint8")


@infers("index_select")
def index_select(walk: Inference, node: Node) -> Axes:
    """One axis is looked up in; the others pass."""
    call = arguments(node)
    axes = list(walk.axes(call["self"]))
    dim = int(call["dim"]) % len(axes)
    walk.freeze(node, axes[dim], "looked up by number", "structure")
    axes[dim] = walk.store.frozen(walk.out_shape(node)[dim])
    return tuple(axes)


@infers("gather")
def gather(walk: Inference, node: Node) -> Axes:
    """One axis is looked up in; along the others index and value go together."""
    call = arguments(node)
    axes, indices = walk.axes(call["self"]), walk.axes(call["index"])
    dim = int(call["dim"]) % len(axes)
    for position, (axis, own) in enumerate(zip(axes, indices, strict=True)):
        if position == dim or len(axis) != len(own):
            walk.freeze(node, axis, "looked up by number", "structure")
            walk.freeze(node, own, "looks up by number", "structure")
        else:
            walk.unify(node, axis, own)
    return indices
