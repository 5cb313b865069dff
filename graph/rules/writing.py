"""Operators that write into a part of a tensor: at indices, at a slice, or at one place of an axis.

The axis that is written along stays whole where the places are data; a slice of literal bounds moves with the
channels that it covers. Along every other axis, what is written has the channels of what it is written into.
"""

from __future__ import annotations

from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.resize import Resizing
from slimc.graph.rule import Axes, arguments, infers, resizes, set_argument
from slimc.graph.rules.elementwise import broadcast
from slimc.graph.rules.indexing import _is_mask
from slimc.graph.terms import Terms


@infers("index_put")
def index_put(walk: Inference, node: Node) -> Axes:
    """x[i, j, ...] = values: indexed axes stay; values broadcast to the indices' shape and the other axes."""
    call = arguments(node)
    axes, indices = walk.axes(call["self"]), call["indices"]
    used = [i for i, one in enumerate(indices) if one is not None]
    if any(_is_mask(indices[i]) for i in used):
        for axis in (*axes, *walk.axes(call["values"])):
            walk.freeze(node, axis, "written by a mask")
        return axes
    for i in used:
        walk.freeze(node, axes[i], "written by number", "structure")
    rest = [axis for i, axis in enumerate(axes) if i not in used]
    shape = broadcast(walk, node, [walk.axes(indices[i]) for i in used])
    place = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    broadcast(walk, node, [(*rest[:place], *shape, *rest[place:]), walk.axes(call["values"])])
    return axes


@infers("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce", "index_fill")
def along_one_axis(walk: Inference, node: Node) -> Axes:
    """One axis is written by number; along the others what is written goes with what it is written into."""
    call = arguments(node)
    axes = walk.axes(call["self"])
    dim = int(call["dim"]) % max(1, len(axes))
    others = [call["index"]] if len(walk.axes(call["index"])) == len(axes) and "scatter" in str(node.target) else []
    others += [call[name] for name in ("src", "source") if isinstance(call.get(name), Node)]
    for other in others:
        for position, (axis, own) in enumerate(zip(axes, walk.axes(other), strict=True)):
            if position == dim or len(axis) != len(own):
                walk.freeze(node, axis, "written by number", "structure")
                walk.freeze(node, own, "written by number", "structure")
            else:
                walk.unify(node, axis, own)
    if axes:
        walk.freeze(node, axes[dim], "written by number", "structure")
    return axes


@infers("slice_scatter", "select_scatter")
def into_a_part(walk: Inference, node: Node) -> Axes:
    """A slice takes the channels of what is written there; one literal place stays."""
    call = arguments(node)
    axes, source = walk.axes(call["self"]), list(walk.axes(call["src"]))
    dim = int(call["dim"]) % len(axes)
    if "index" in call:
        source.insert(dim, part := axes[dim][_place(call["index"], axes[dim])])
        walk.freeze(node, part, "picked by a literal index", "structure")
        if not isinstance(call["index"], int):
            walk.freeze(node, axes[dim], "its bounds are not known before the model runs")
    elif _is_literal(call):
        walk.unify(node, axes[dim][slice(call["start"], call["end"])], source[dim])
    else:
        walk.freeze(node, axes[dim], "written in steps, or its bounds are not known before the model runs")
        walk.freeze(node, source[dim], "written in steps, or its bounds are not known before the model runs")
    for position, (axis, own) in enumerate(zip(axes, source, strict=True)):
        if position != dim:
            walk.unify(node, axis, own)
    return axes


def _is_literal(call: dict[str, object]) -> bool:
    return call["step"] == 1 and not any(isinstance(call[name], Node) for name in ("start", "end"))


def _place(index: object, axis: Terms) -> slice:
    if not isinstance(index, int):
        return slice(0, 1)
    index %= len(axis)
    return slice(index, index + 1)


@resizes("slice_scatter", "select_scatter")
def bounds(work: Resizing, old: Node, new: Node) -> None:
    """Bounds count the kept indices before them."""
    call = arguments(old)
    axes = work.axes(call["self"])
    axis = axes[int(call["dim"]) % len(axes)]
    if work.whole(axis):
        return
    if "index" in call:
        set_argument(new, "index", work.position(axis, call["index"] % len(axis)))
        return
    end = len(axis) if call["end"] is None else call["end"]
    source, dim = new.args[1], call["dim"]
    new.args = (new.args[0], source, dim, work.position(axis, call["start"] or 0), work.position(axis, end))
    new.kwargs = {}


@infers("masked_scatter", "masked_select", "put", "take")
def by_order(walk: Inference, node: Node) -> Axes:
    """Elements are counted across all axes, so nothing may go."""
    for source in node.all_input_nodes:
        for axis in walk.value(source) or ():
            walk.freeze(node, axis, "its elements are counted across all axes")
    return walk.frozen(walk.out_shape(node))
