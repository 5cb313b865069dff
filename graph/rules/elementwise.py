"""Operators that act on each element alone: shapes broadcast, then channels match axis by axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.rule import Axes, Value, infers


@infers("pointwise", "copy", "fill", "where", "bernoulli", "nan_to_num", "hardswish", "rrelu", "log_sigmoid", "logit")
@infers("__and__", "__or__", "__xor__", "__lshift__", "__rshift__")
def pointwise(walk: Inference, node: Node) -> Axes:
    """Operands align at the right; axes of one index broadcast and stay out of it."""
    return broadcast(
        walk, node, [walk.axes(source) for source in node.all_input_nodes if walk.value(source) is not None]
    )


@infers("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
@infers("to", "type_as", "_to_copy", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh", "zero")
@infers("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_like")
def like_first(walk: Inference, node: Node) -> Value:
    """The first operand's channels; others give a type or a device only."""
    axes = walk.axes(node.args[0])
    value = node.meta["val"]
    return tuple(axes for _ in value) if isinstance(value, (tuple, list)) else axes


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


@infers("prelu")
def prelu(walk: Inference, node: Node) -> Axes:
    """PReLU's weight vector belongs to axis 1."""
    axes, weight = walk.axes(node.args[0]), walk.axes(node.args[1])
    if len(weight) == 1 and len(weight[0]) > 1 and len(axes) > 1:
        walk.unify(node, axes[1], weight[0])
    return axes
