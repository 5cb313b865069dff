"""Operators that only move elements: permutations, slices, splits, shifts.

There is no rule per operator. Each one is run on integer tensors that hold every element's own coordinate
along one input axis; where the coordinates end up says which output axis each input axis feeds and in which
order. That is enough for operators that give each output axis from one input axis; views are in `view.py`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.resize import Resizing
from slimc.graph.rule import Axes, Value, arguments, infers, resizes, set_argument
from slimc.graph.terms import Terms

aten = torch.ops.aten
Places = npt.NDArray[np.float32]
"""Where each element of a result comes from, along one axis of the source."""


@infers("permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint")
@infers(
    "slice", "narrow", "select", "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"
)
@infers("unbind", "flip")
def movement(walk: Inference, node: Node) -> Value:
    """Read from coordinates where every index went."""
    call = arguments(node)
    source = next(name for name in ("self", "input", "tensor") if name in call)
    axes = walk.axes(call[source])
    if any(_is_open(call.get(name)) for name in ("start", "end", "length", "index")):
        walk.freeze(node, axes[int(call["dim"]) % len(axes)], "its bounds are not known before the model runs")
    fixed = {name: walk.number(value) for name, value in call.items() if name != source}
    # An axis that is no channel has nothing to follow; the first one gives the shapes.
    followed = [i for i, axis in enumerate(axes) if i == 0 or axis.any()]
    runs = {i: node.target(**{source: _coordinates(axes, i)}, **fixed) for i in followed}  # type: ignore[operator]
    if isinstance(runs[0], Tensor):
        return _read(walk, node, axes, {i: run.numpy() for i, run in runs.items()})
    results = range(len(runs[0]))
    return tuple(_read(walk, node, axes, {i: run[n].numpy() for i, run in runs.items()}) for n in results)


def _is_open(bound: object) -> bool:
    return isinstance(bound, Node)


def _coordinates(axes: Axes, position: int) -> Tensor:
    """Each element's coordinate along one axis, counted from 1 since 0 is padding.

    The tensor is expanded, not filled, so that an operator that returns a view costs nothing.
    """
    shape = [len(axis) for axis in axes]
    ones = [1] * len(shape)
    ones[position] = shape[position]
    return torch.arange(1, shape[position] + 1, dtype=torch.float32).view(ones).expand(shape)


def _read(walk: Inference, node: Node, axes: Axes, runs: dict[int, Places]) -> Axes:
    """One axis of the result for each axis of the source that it comes from; `runs` by axis of the source."""
    shape = runs[0].shape
    if 0 in shape and len(shape) == len(axes):
        # An empty piece holds no coordinate to read; it was cut along the axes whose size has changed.
        return tuple(a if len(a) == n else walk.store.frozen(n) for a, n in zip(axes, shape, strict=True))
    result = [walk.store.frozen(size) for size in shape]
    for number, run in runs.items():
        axis = axes[number]
        along = [i for i, size in enumerate(shape) if size > 1 and _varies(run, i)]
        if not along:
            _drop(walk, node, axis, run)
            continue
        (position,) = along
        terms = np.concatenate([walk.store.frozen(1), axis])  # coordinate 0 is padding
        moved = terms[_line(run, position).astype(np.int64)]
        result[position] = axis if np.array_equal(moved, axis) else moved
    return tuple(result)


def _line(run: Places, position: int) -> Places:
    """The coordinates along one axis, in the middle of the others, where padding does not reach."""
    line: Places = run[tuple(slice(None) if i == position else size // 2 for i, size in enumerate(run.shape))]
    return line


def _varies(run: Places, position: int) -> bool:
    line = _line(run, position)
    return bool((line != line[0]).any())


def _drop(walk: Inference, node: Node, axis: Terms, run: Places) -> None:
    """An axis that feeds nothing was read at one literal index, which must stay."""
    if len(axis) > 1 and run.size:
        index = int(run.reshape(-1)[0]) - 1
        walk.freeze(node, axis[index : index + 1], "picked by a literal index", "structure")


@resizes("slice", "narrow")
def slice_bounds(work: Resizing, old: Node, new: Node) -> None:
    """Bounds count the kept indices before them; a stride over removed indices becomes a selection."""
    call = arguments(old)
    axes = work.axes(old.args[0])
    dim = int(call["dim"]) % len(axes)
    axis = axes[dim]
    if work.whole(axis):
        return
    if "length" in call:
        start = call["start"]
        set_argument(new, "start", work.position(axis, start))
        set_argument(new, "length", work.position(axis, start + call["length"]) - work.position(axis, start))
        return
    start, end, step = call["start"] or 0, call["end"], call["step"]
    end = len(axis) if end is None else end
    if step == 1:
        new.args = (new.args[0], dim, work.position(axis, start), work.position(axis, end))
        return
    chosen = np.arange(len(axis))[slice(start, end, step)]
    _select_along(work, new, dim, axis, chosen)


def _select_along(work: Resizing, new: Node, dim: int, axis: Terms, chosen: Terms) -> None:
    """Turn a node into a selection of the kept ones of `chosen` input indices."""
    kept = work.kept(axis)
    rank = np.cumsum(kept) - 1
    index = torch.from_numpy(rank[chosen[kept[chosen]]])
    new.target = aten.index_select.default
    new.args = (new.args[0], dim, constant(new, index))
    new.kwargs = {}


def constant(new: Node, tensor: Tensor) -> Node:
    """A tensor as a buffer of the graph's module, read just before a node."""
    module = new.graph.owning_module
    assert module is not None
    name = f"{new.name}_index"
    module.register_buffer(name, tensor)
    with new.graph.inserting_before(new):
        return new.graph.get_attr(name)


@resizes("select")
def select_index(work: Resizing, old: Node, new: Node) -> None:
    """The literal index counts the kept indices before it."""
    call = arguments(old)
    axes = work.axes(old.args[0])
    dim = int(call["dim"]) % len(axes)
    index = call["index"]
    if isinstance(index, int):
        new.args = (new.args[0], dim, work.position(axes[dim], index))


@resizes("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split_sizes(work: Resizing, old: Node, new: Node) -> None:
    """Pieces survive unevenly, so their sizes are spelled out."""
    axes = work.axes(old.args[0])
    dim = int(arguments(old)["dim"]) % len(axes)
    if work.whole(axes[dim]):
        return
    sizes = [int(work.kept(piece[dim]).sum()) for piece in work.axes(old)]
    new.target = aten.split_with_sizes.default
    new.args = (new.args[0], sizes, dim)
    new.kwargs = {}


# -- shifts, copies and borders along an axis ----------------------------------------------------------


@infers("roll")
def roll(walk: Inference, node: Node) -> Axes:
    """Every index moves on, the last ones to the front; without dimensions it crosses rows."""
    call = arguments(node)
    axes = list(walk.axes(call["self"]))
    if not call["dims"] or any(_is_open(shift) for shift in call["shifts"]):
        for axis in axes:
            walk.freeze(node, axis, "rolled across rows or by an unknown shift")
        return tuple(axes)
    for shift, dim in zip(call["shifts"], call["dims"], strict=True):
        if axes[dim].any():
            axes[dim] = np.roll(axes[dim], shift)
    return tuple(axes)


@resizes("roll")
def roll_shifts(work: Resizing, old: Node, new: Node) -> None:
    """Along a shrunken axis, roll by the number of kept indices that wrap around."""
    call = arguments(old)
    axes = list(work.axes(old.args[0]))
    shifts = list(call["shifts"])
    for place, dim in enumerate(call["dims"]):
        axis = axes[dim]
        if not work.whole(axis):
            wrap = shifts[place] % len(axis)
            axes[dim] = np.roll(axis, wrap)
            shifts[place] = int(work.kept(axis)[len(axis) - wrap :].sum()) if wrap else 0
    set_argument(new, "shifts", shifts)


@infers("repeat_interleave")
def repeat_interleave(walk: Inference, node: Node) -> Axes:
    """Each index several times in a row; by a tensor of counts, or across rows, its axis stays whole."""
    call = arguments(node)
    source = call.get("self", call["repeats"])
    axes = list(walk.axes(source))
    if isinstance(call["repeats"], int) and call["dim"] is not None:
        dim = int(call["dim"]) % len(axes)
        axes[dim] = np.repeat(axes[dim], call["repeats"])
        return tuple(axes)
    gone = range(len(axes)) if call["dim"] is None else [int(call["dim"]) % len(axes)]
    out = walk.frozen(walk.out_shape(node))
    for dim in gone:
        walk.freeze(node, axes[dim], "repeated a different number of times each", "structure")
    return tuple(out if call["dim"] is None else [out[i] if i in gone else axis for i, axis in enumerate(axes)])


@resizes("repeat_interleave")
def repeated_size(work: Resizing, old: Node, new: Node) -> None:
    """The size of the result, where it is written down."""
    call = arguments(old)
    if isinstance(call.get("output_size"), int) and call["dim"] is not None:
        set_argument(new, "output_size", work.new_shape(old)[int(call["dim"])])


@infers("pad", "constant_pad_nd")
def pad(walk: Inference, node: Node) -> Axes:
    """A constant border is frozen; one made of the values themselves needs its axis whole."""
    call = arguments(node)
    axes = list(walk.axes(call["self"]))
    constant_mode = call.get("mode", "constant") == "constant"
    for place, (before, after) in enumerate(zip(call["pad"][::2], call["pad"][1::2], strict=True)):
        position = len(axes) - 1 - place
        axis = axes[position]
        if before == 0 and after == 0:
            continue
        size = walk.out_shape(node)[position]
        if not constant_mode or any(_is_open(width) or width < 0 for width in (before, after)):
            walk.freeze(node, axis, "cropped, or padded with its own values")
            axes[position] = walk.store.frozen(size)
        elif axis.any():
            axes[position] = np.concatenate([walk.store.frozen(before), axis, walk.store.frozen(after)])
        else:
            axes[position] = walk.store.frozen(size)
    return tuple(axes)


@infers("unfold")
def unfold(walk: Inference, node: Node) -> Axes:
    """Windows along an axis, which stays whole; each window is a new last axis."""
    call = arguments(node)
    axes = list(walk.axes(call["self"]))
    dim = int(call["dimension"]) % len(axes)
    walk.freeze(node, axes[dim], "windows need their axis whole", "structure")
    shape = walk.out_shape(node)
    axes[dim] = walk.store.frozen(shape[dim])
    return (*axes, walk.store.frozen(shape[-1]))


@infers("diagonal")
def diagonal(walk: Inference, node: Node) -> Axes:
    """Two axes that must stay aligned become one, the last."""
    call = arguments(node)
    axes = walk.axes(call["self"])
    gone = {int(call["dim1"]) % len(axes), int(call["dim2"]) % len(axes)}
    for dim in gone:
        walk.freeze(node, axes[dim], "a diagonal needs both axes whole", "structure")
    return (*(axis for i, axis in enumerate(axes) if i not in gone), walk.store.frozen(walk.out_shape(node)[-1]))
