"""Operators that act on each element alone: shapes broadcast, then channels match axis by axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.rule import Axes, infers


@infers(
    "pointwise",  # every operator that torch tags so
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "to",
    "type_as",
    "_to_copy",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "lift_fresh_copy",
    "copy",
    "bernoulli",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "empty_like",
    "masked_fill",
    "fill",
    "zero",
    "where",
    "nan_to_num",
    "prelu",
    "hardswish",
)
def pointwise(walk: Inference, node: Node) -> Axes:
    """Operands align at the right; axes of one index broadcast and stay out of it."""
    operands = [walk.axes(source) for source in node.all_input_nodes if walk.values[source] is not None]
    if str(node.target).startswith("aten.prelu") and len(walk.shape(node.args[1])) == 1:  # type: ignore[arg-type]
        return _prelu(walk, node)
    return broadcast(walk, node, operands)


def broadcast(walk: Inference, node: Node, operands: Sequence[Axes]) -> Axes:
    """Unify the axes of operands that broadcast against each other."""
    rank = max((len(axes) for axes in operands), default=0)
    result = []
    for position in range(-rank, 0):
        here = [axes[position] for axes in operands if len(axes) >= -position]
        size = max(len(axis) for axis in here)
        wide = [axis for axis in here if len(axis) == size]
        for axis in wide[1:]:
            walk.unify(node, wide[0], axis)
        result.append(wide[0])
    return tuple(result)


def _prelu(walk: Inference, node: Node) -> Axes:
    """PReLU's weight vector belongs to axis 1."""
    axes, weight = walk.axes(node.args[0]), walk.axes(node.args[1])[0]
    if len(weight) > 1 and len(axes) > 1:
        walk.unify(node, axes[1], weight)
    return axes
