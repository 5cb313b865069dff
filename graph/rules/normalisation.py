"""Operators that take statistics: normalisations, reductions, softmax, pooling over channels.

Batch norm treats each channel alone and is exact. LayerNorm, GroupNorm and RMSNorm over an axis that shrinks
take their statistics over fewer elements; such axes are marked *renormalising*, and verification computes its
reference in the same way.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from slimc.graph.infer import Inference, hint
from slimc.graph.resize import Resizing
from slimc.graph.rule import Axes, Value, arguments, infers, operator_name, resizes, set_argument
from slimc.graph.rules.elementwise import broadcast


@infers("batch_norm", "instance_norm")
def per_channel(walk: Inference, node: Node) -> Axes:
    """input [N, C, ...], every vector [C]: each channel has its own statistics."""
    call = arguments(node)
    axes = walk.axes(call["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            walk.tie(node, call[name], 0, axes[1])
    if call.get("training") or call.get("use_input_stats") or call["running_mean"] is None:
        for axis in (axes[0], *axes[2:]):  # a standardised weight's inputs, say
            walk.renormalise(node, axis)
    return axes


@infers("layer_norm", "rms_norm")
def over_last_axes(walk: Inference, node: Node) -> Axes:
    """Statistics run over the last axes, which weight and bias share."""
    call = arguments(node)
    axes = walk.axes(call["input"])
    normalised = axes[len(axes) - len(call["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            for position, axis in enumerate(normalised):
                walk.tie(node, call[name], position, axis)
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
            walk.tie(node, call[name], 0, axes[1])
    for axis in axes[2:]:
        walk.renormalise(node, axis)
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
@infers("logsumexp", "linalg_vector_norm", "norm", "median", "nanmean", "nansum", "count_nonzero", "aminmax", "mode")
@infers("nanmedian", "frobenius_norm", "linalg_norm")
def reduction(walk: Inference, node: Node) -> Value:
    """Reduced axes go; all but a sum of zeros see that elements are missing."""
    operands = [a for a in node.args if isinstance(a, Node) and walk.value(a) is not None]
    if len(operands) == 2:  # max(a, b) is element by element
        return broadcast(walk, node, [walk.axes(operand) for operand in operands])
    call = arguments(node)
    axes = walk.axes(operands[0])
    gone = _reduced(axes, call.get("dim"))
    for position in gone:
        if _reads_positions(node):
            walk.freeze(node, axes[position], "where the chosen value stands depends on all of the axis")
        elif not str(node.target).startswith("aten.sum"):
            # A norm of zeros is zero as well, but its power is not known here; count it as a statistic.
            walk.renormalise(node, axes[position])
    kept = _without(walk, axes, gone, bool(call.get("keepdim")))
    value = node.meta["val"]
    return tuple(kept for _ in value) if isinstance(value, (tuple, list)) else kept


def _without(walk: Inference, axes: Axes, gone: list[int], keepdim: bool) -> Axes:
    if keepdim:
        return tuple(walk.store.frozen(1) if i in gone else axis for i, axis in enumerate(axes))
    return tuple(axis for i, axis in enumerate(axes) if i not in gone)


def _reads_positions(node: Node) -> bool:
    """Whether anyone reads the second result, the positions, of max, min, median or mode along an axis."""
    name = str(node.target).split(".")[1].rstrip("_")
    chosen = name in ("max", "min", "median", "nanmedian", "mode") and isinstance(node.meta["val"], (tuple, list))
    return chosen and any(user.args[1] == 1 and user.users for user in node.users if operator_name(user) == "getitem")


@infers(
    "softmax", "log_softmax", "_softmax", "cumsum", "cumprod", "sort", "argsort", "logcumsumexp", "cummax", "cummin"
)
@infers("softmin", "special_softmax", "special_log_softmax")
def whole_axis(walk: Inference, node: Node) -> Value:
    """What one index gives depends on all of them, so the axis stays."""
    axes, _ = _chosen(walk, node)
    value = node.meta["val"]
    return tuple(axes for _ in value) if isinstance(value, (tuple, list)) else axes


@infers("argmax", "argmin")
def position_of(walk: Inference, node: Node) -> Axes:
    """A position among all indices, so the axis stays."""
    axes, chosen = _chosen(walk, node)
    return _without(walk, axes, chosen, bool(arguments(node)["keepdim"]))


@infers("topk", "kthvalue")
def some_of(walk: Inference, node: Node) -> Value:
    """The best among all indices, so the axis stays; the others pass."""
    axes, chosen = _chosen(walk, node)
    results = []
    for item in node.meta["val"]:
        shape = [hint(size) for size in item.shape]
        kept = axes if len(shape) == len(axes) else _without(walk, axes, chosen, False)
        in_full = len(shape) == len(axes)
        results.append(tuple(walk.store.frozen(shape[i]) if in_full and i in chosen else a for i, a in enumerate(kept)))
    return tuple(results)


def _chosen(walk: Inference, node: Node) -> tuple[Axes, list[int]]:
    """Freeze the axes that an operator works along; returns all axes and which those are."""
    axes = walk.axes(node.args[0])
    chosen = _reduced(axes, arguments(node).get("dim"))
    for position in chosen:
        walk.freeze(node, axes[position], f"{operator_name(node)} needs its axis whole")
    return axes, chosen


@infers("_weight_norm")
def weight_norm(walk: Inference, node: Node) -> Axes:
    """v [C, ...] scaled so that every row has the length that g [C, 1, ...] says."""
    call = arguments(node)
    axes, length = walk.axes(call["v"]), walk.axes(call["g"])
    for position, (axis, own) in enumerate(zip(axes, length, strict=False)):
        if position == call["dim"] % len(axes):
            walk.unify(node, axis, own)
        else:
            walk.renormalise(node, axis)
    return axes


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
