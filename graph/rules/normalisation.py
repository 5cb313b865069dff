"""Operators that take statistics: normalisations, reductions, softmax, pooling over channels.

Batch norm treats each channel alone and is exact. LayerNorm, GroupNorm and RMSNorm over an axis that shrinks
take their statistics over fewer elements; such axes are marked *renormalising*, and verification computes its
reference in the same way.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.resize import Resizing
from slimc.graph.rule import Axes, Value, arguments, infers, resizes, set_argument


@infers("batch_norm", "instance_norm")
def per_channel(walk: Inference, node: Node) -> Axes:
    """input [N, C, ...], every vector [C]: each channel has its own statistics."""
    call = arguments(node)
    axes = walk.axes(call["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            walk.unify(node, axes[1], walk.axes(call[name])[0])
    return axes


@infers("layer_norm", "rms_norm")
def over_last_axes(walk: Inference, node: Node) -> Axes:
    """Statistics run over the last axes, which weight and bias share."""
    call = arguments(node)
    axes = walk.axes(call["input"])
    normalised = axes[len(axes) - len(call["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            for axis, own in zip(normalised, walk.axes(call[name]), strict=True):
                walk.unify(node, axis, own)
    for axis in normalised:
        walk.renormalise(node, axis)
    return axes


@resizes("layer_norm", "rms_norm")
def normalized_shape(work: Resizing, old: Node, new: Node) -> None:
    """The sizes of the normalised axes."""
    call = arguments(old)
    rank = len(call["normalized_shape"])
    set_argument(new, "normalized_shape", list(work.new_shape(call["input"])[-rank:]))


@infers("group_norm")
def group_norm(walk: Inference, node: Node) -> Axes:
    """input [N, groups x offset, ...]: whole groups go exactly, offsets go from every group alike."""
    call = arguments(node)
    axes, groups = walk.axes(call["input"]), int(call["num_groups"])
    for name in ("weight", "bias"):
        if call[name] is not None:
            walk.unify(node, axes[1], walk.axes(call[name])[0])
    size = len(axes[1]) // groups
    if groups == 1:
        walk.renormalise(node, axes[1])
    elif size > 1 and axes[1].any():
        group, offset = walk.store.fresh(groups), walk.store.fresh(size)
        walk.unify(node, axes[1], walk.store.grid([group, offset]))
        # The number of groups is a literal of the model that many readers share; keep it.
        walk.freeze(node, group, "the number of groups of a group norm", "structure")
        walk.renormalise(node, offset)
    return axes


@resizes("group_norm")
def num_groups(work: Resizing, old: Node, new: Node) -> None:
    """One group a channel (instance norm in disguise) shrinks with its channels."""
    call = arguments(old)
    if int(call["num_groups"]) == len(work.axes(call["input"])[1]):
        set_argument(new, "num_groups", work.new_shape(call["input"])[1])


def _reduced(axes: Axes, dims: Any) -> list[int]:
    """Positions of the reduced axes; no dimension given means all."""
    if dims is None or dims == []:
        return list(range(len(axes)))
    return [dim % len(axes) for dim in ([dims] if isinstance(dims, int) else dims)] if axes else []


@infers("sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "var", "std", "var_mean", "std_mean")
@infers("logsumexp", "linalg_vector_norm", "norm", "median", "nanmean")
def reduction(walk: Inference, node: Node) -> Value:
    """Reduced axes go; all but a sum of zeros see that elements are missing."""
    operands = [a for a in node.args if isinstance(a, Node) and walk.values[a] is not None]
    if len(operands) == 2:  # max(a, b) is element by element
        from .elementwise import pointwise

        return pointwise(walk, node)
    call = arguments(node)
    axes = walk.axes(operands[0])
    gone = _reduced(axes, call.get("dim"))
    # A norm of zeros is zero as well, but its power is not known here; count it as a statistic.
    if not str(node.target).startswith("aten.sum"):
        for position in gone:
            walk.renormalise(node, axes[position])
    kept = [axis for i, axis in enumerate(axes) if i not in gone]
    if call.get("keepdim"):
        kept = [walk.store.frozen(1) if i in gone else axis for i, axis in enumerate(axes)]
    value = node.meta["val"]
    return tuple(tuple(kept) for _ in value) if isinstance(value, (tuple, list)) else tuple(kept)


@infers("softmax", "log_softmax", "_softmax", "cumsum", "cumprod", "sort", "argsort", "topk", "argmax", "argmin")
@infers("logcumsumexp", "glu_split", "kthvalue")
def whole_axis(walk: Inference, node: Node) -> Value:
    """What one index gives depends on all of them, so the axis stays."""
    call = arguments(node)
    axes = walk.axes(node.args[0])
    dim = call.get("dim")
    chosen = _reduced(axes, dim)
    name = str(node.target).split(".")[1]
    for position in chosen:
        walk.freeze(node, axes[position], f"{name} needs its axis whole")
    value = node.meta["val"]
    if name in ("argmax", "argmin"):
        kept = [axis for i, axis in enumerate(axes) if i not in chosen]
        if call.get("keepdim"):
            kept = [walk.store.frozen(1) if i in chosen else axis for i, axis in enumerate(axes)]
        return tuple(kept)
    if name in ("topk", "kthvalue"):
        return tuple(walk.frozen([int(s) for s in item.shape]) for item in value)
    return tuple(axes for _ in value) if isinstance(value, (tuple, list)) else axes


@infers("glu")
def glu(walk: Inference, node: Node) -> Axes:
    """The axis is halved and the halves multiply, so they lose the same channels."""
    axes = list(walk.axes(node.args[0]))
    dim = int(arguments(node)["dim"]) % len(axes)
    half = len(axes[dim]) // 2
    first, second = axes[dim][:half], axes[dim][half:]
    walk.unify(node, first, second)
    axes[dim] = first
    return tuple(axes)


@infers("tril", "triu")
def triangle(walk: Inference, node: Node) -> Axes:
    """Depends on places in the last two axes."""
    axes = walk.axes(node.args[0])
    for axis in axes[-2:]:
        walk.freeze(node, axis, "a triangle needs its axes whole", "structure")
    return axes
