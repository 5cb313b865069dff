"""Operators that only move elements: views, permutations, slices, joins.

There is no rule per operator. Each one is run on integer tensors that hold every element's own coordinate
along one input axis; where the coordinates end up says which output axis each input axis feeds. Several
feeding one is a merge (products), one feeding several is a split (its terms are products of the new axes).
Views alone are solved by their sizes, since a view that splits and merges at once leaves coordinates
ambiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from slimc.graph.infer import Inference
from slimc.graph.resize import Resizing
from slimc.graph.rule import Axes, Value, arguments, infers, operator_name, resizes, set_argument
from slimc.graph.terms import Terms

aten = torch.ops.aten


# -- views: common refinement of two shapes -----------------------------------------------------------


@infers("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def view(walk: Inference, node: Node) -> Axes:
    """Refine both shapes to common factors, split the input's axes to them, merge them to the output's."""
    axes = walk.axes(node.args[0])
    before, after = [len(axis) for axis in axes], list(walk.out_shape(node))
    if before == after:
        return axes
    factors = _refine(before, after)
    if factors is None:
        for axis in axes:
            walk.freeze(node, axis, f"a view from {before} to {after} does not split and merge whole axes")
        return walk.frozen(after)
    parts: list[Terms] = []
    for axis, own in zip(axes, _deal(factors, before), strict=True):
        parts.extend(_split(walk, node, axis, own))
    merged = []
    for own in _deal(factors, after):
        merged.append(walk.store.grid(parts[: len(own)]) if own else walk.store.frozen(1))
        parts = parts[len(own) :]
    return tuple(merged)


def _split(walk: Inference, node: Node, axis: Terms, sizes: list[int]) -> list[Terms]:
    if len(sizes) < 2:
        return [axis] if sizes else []
    if not axis.any():
        return [walk.store.frozen(size) for size in sizes]
    parts = [walk.store.fresh(size) for size in sizes]
    walk.unify(node, axis, walk.store.grid(parts))
    return parts


def _refine(before: list[int], after: list[int]) -> list[int] | None:
    """Sizes that both shapes are made of, in order; None if there are none."""
    if 0 in before or 0 in after:
        return None
    ends = sorted(set(np.cumprod(before).tolist()) | set(np.cumprod(after).tolist()) | {1})
    factors = []
    for small, large in zip(ends, ends[1:], strict=False):
        if large % small:
            return None
        factors.append(large // small)
    return factors


def _deal(factors: list[int], shape: list[int]) -> list[list[int]]:
    """The factors that make each axis of a shape."""
    queue = list(factors)
    dealt = []
    for size in shape:
        own: list[int] = []
        while size > 1:
            own.append(queue.pop(0))
            size //= own[-1]
        dealt.append(own)
    return dealt


@resizes("view", "reshape", "_unsafe_view", "unflatten", "expand", "zeros", "ones", "full", "empty")
@resizes("new_zeros", "new_ones", "new_full", "new_empty")
def literal_sizes(work: Resizing, old: Node, new: Node) -> None:
    """Write the new sizes where the old ones stood."""
    name = operator_name(old)
    argument = {"unflatten": "sizes"}.get(name, "size")
    if argument not in arguments(old):
        argument = "shape"
    written, copied = list(arguments(old)[argument]), list(arguments(new)[argument])
    if name == "unflatten":
        dim = arguments(old)["dim"]
        rank = len(work.axes(old.args[0]))
        start = dim % rank
        shape = work.new_shape(old)[start : start + len(written)]
        set_argument(new, argument, [s if s == -1 else n for s, n in zip(written, shape, strict=True)])
        return
    set_argument(new, argument, work.sizes(old, new, written, copied, keeps=name == "expand"))


# -- everything that keeps or drops whole indices: coordinates ----------------------------------------


@infers("permute", "transpose", "t", "numpy_T", "swapaxes", "movedim", "slice", "narrow", "select", "split")
@infers("split_with_sizes", "chunk", "tensor_split", "unbind", "roll", "flip", "pixel_shuffle", "pixel_unshuffle")
@infers("pad", "constant_pad_nd", "repeat", "tile", "repeat_interleave", "unfold", "im2col", "diagonal", "as_strided")
def movement(walk: Inference, node: Node) -> Value:
    """Read from coordinates where every index went."""
    call = {name: walk.number(value) for name, value in arguments(node).items() if not isinstance(value, Node)}
    source, *symbols = [a for a in node.args if isinstance(a, Node) and walk.values[a] is not None] or [None]
    axes = walk.axes(source)
    for name, value in arguments(node).items():
        if isinstance(value, Node):
            call[name] = None if value is source else walk.number(value)
    del symbols
    runs = [_coordinates(node, call, axes, position) for position in range(len(axes))]
    if isinstance(runs[0], Tensor):
        return _read(walk, node, axes, runs)
    return tuple(_read(walk, node, axes, [run[i] for run in runs]) for i in range(len(runs[0])))


def _coordinates(node: Node, call: dict[str, Any], axes: Axes, position: int) -> Any:
    """Run the operator on each element's coordinate along one axis, counted from 1; 0 is padding.

    The tensor is expanded, not filled, so that an operator that returns a view costs nothing.
    """
    shape = [len(axis) for axis in axes]
    ones = [1] * len(shape)
    ones[position] = shape[position]
    # im2col and padding modes exist for floating point only; coordinates are exact up to 2 ** 24.
    kind = torch.float32 if operator_name(node) in ("im2col", "pad", "constant_pad_nd") else torch.int32
    grid = torch.arange(1, shape[position] + 1, dtype=kind).view(ones).expand(shape)
    named = {name: grid if value is None and name in ("self", "input") else value for name, value in call.items()}
    if "value" in named:
        named["value"] = 0
    return node.target(**named)  # type: ignore[operator]


def _read(walk: Inference, node: Node, axes: Axes, runs: list[Tensor]) -> Axes:
    shape = list(runs[0].shape)
    feeds: list[list[Terms]] = [[] for _ in shape]
    for axis, run in zip(axes, runs, strict=True):
        along = _depends(run, exact=bool(axis.any()))
        if not along:
            _drop(walk, node, axis, run)
            continue
        padded = torch.zeros(1, dtype=torch.int64).numpy()
        terms = np.concatenate([padded, axis])  # coordinate 0 is padding, which is frozen
        moved = terms[_restrict(run, along)]
        if len(along) == 1:
            feeds[along[0]].append(axis if moved.size == axis.size and np.array_equal(moved, axis) else moved)
            continue
        parts = _split_to(walk, node, moved.ravel(), [shape[i] for i in along])
        for position, part in zip(along, parts, strict=True):
            feeds[position].append(part)
    return tuple(
        walk.store.product(fed) if fed else walk.store.frozen(size) for fed, size in zip(feeds, shape, strict=True)
    )


def _drop(walk: Inference, node: Node, axis: Terms, run: Tensor) -> None:
    """An axis that feeds nothing was read at one literal index, which must stay."""
    if len(axis) > 1 and run.numel():
        index = int(run.reshape(-1)[0]) - 1
        walk.freeze(node, axis[index : index + 1], "picked by a literal index", "structure")


def _split_to(walk: Inference, node: Node, moved: Terms, sizes: list[int]) -> list[Terms]:
    if not moved.any():
        return [walk.store.frozen(size) for size in sizes]
    parts = [walk.store.fresh(size) for size in sizes]
    walk.unify(node, moved, walk.store.grid(parts))
    return parts


def _depends(run: Tensor, exact: bool) -> list[int]:
    """The axes along which a coordinate varies.

    Varying along the first row of an axis is enough to see most; where the axis holds channels (`exact`), all
    elements are compared. A frozen axis that is missed loses its place in a product, which is still sound.
    """
    moving = [i for i, size in enumerate(run.shape) if size > 1 and run.stride(i) != 0]
    if len(moving) < 2:
        return moving
    origin = [0] * run.dim()
    seen = [i for i in moving if _varies(run[tuple(slice(None) if i == j else o for j, o in enumerate(origin))])]
    if not exact or bool(
        (run == run[tuple(slice(None) if i in seen else slice(0, 1) for i in range(run.dim()))]).all()
    ):
        return seen
    return [i for i in moving if not bool((run == run.narrow(i, 0, 1)).all())]


def _varies(row: Tensor) -> bool:
    return bool((row != row[0]).any())


def _restrict(run: Tensor, along: list[int]) -> Terms:
    index = tuple(slice(None) if i in along else 0 for i in range(run.dim()))
    found: Terms = run[index].to(torch.int64).numpy()
    return found


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


@resizes("split", "split_with_sizes", "chunk", "tensor_split")
def split_sizes(work: Resizing, old: Node, new: Node) -> None:
    """Pieces survive unevenly, so their sizes are spelled out."""
    axes = work.axes(old.args[0])
    dim = int(arguments(old).get("dim", 0)) % len(axes)
    if work.whole(axes[dim]):
        return
    sizes = [int(work.kept(piece[dim]).sum()) for piece in work.axes(old)]  # type: ignore[call-overload]
    new.target = aten.split_with_sizes.default
    new.args = (new.args[0], sizes, dim)
    new.kwargs = {}


@resizes("roll")
def roll_shifts(work: Resizing, old: Node, new: Node) -> None:
    """Along a shrunken axis, roll by the number of kept indices that wrap around."""
    call = arguments(old)
    axes = work.axes(old.args[0])
    dims = call["dims"] or []
    shifts = list(call["shifts"])
    if not dims:
        return
    for place, dim in enumerate(dims):
        axis = axes[dim % len(axes)]
        if isinstance(shifts[place], int) and not work.whole(axis):
            wrap = shifts[place] % len(axis)
            shifts[place] = int(work.kept(axis)[len(axis) - wrap :].sum()) if wrap else 0
    set_argument(new, "shifts", shifts)


# -- joins, broadcasts and constants ------------------------------------------------------------------


@infers("cat", "concat")
def cat(walk: Inference, node: Node) -> Axes:
    """Axes follow each other along one dimension and are the same along the others."""
    call = arguments(node)
    parts = [walk.axes(part) for part in call["tensors"]]
    parts = [axes for axes in parts if not (len(axes) == 1 and len(axes[0]) == 0)] or parts
    dim = int(call["dim"]) % len(parts[0])
    joined = []
    for position in range(len(parts[0])):
        here = [axes[position] for axes in parts]
        if position == dim:
            joined.append(np.concatenate(here) if len(here) > 1 else here[0])
            continue
        for axis in here[1:]:
            walk.unify(node, here[0], axis)
        joined.append(here[0])
    return tuple(joined)


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
    value = walk.values[node.args[0]]  # type: ignore[index]
    return value[node.args[1]]


@infers("expand")
def expand(walk: Inference, node: Node) -> Axes:
    """A repeated axis has as many indices as its readers want, unless the size is symbolic."""
    call = arguments(node)
    source, sizes = walk.axes(call["self"]), call["size"]
    out = walk.out_shape(node)
    axes = []
    for position in range(-len(out), 0):
        inside = source[position] if len(source) >= -position else None
        if inside is not None and len(inside) == out[position]:
            axes.append(inside)
        else:
            literal = isinstance(sizes[position], int)
            axes.append(walk.store.fresh(out[position]) if literal else walk.store.frozen(out[position]))
    return tuple(axes)


@infers("expand_as")
def expand_as(walk: Inference, node: Node) -> Axes:
    """Broadcast to another value's shape."""
    source, other = walk.axes(node.args[0]), walk.axes(node.args[1])
    for position in range(-len(source), 0):
        if len(source[position]) > 1:
            walk.unify(node, source[position], other[position])
    return other


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


@infers("arange", "linspace", "eye", "rand", "randn", "scalar_tensor", "tril_indices", "meshgrid")
def positions(walk: Inference, node: Node) -> Value:
    """Values that depend on their place keep every place."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return walk.frozen(walk.out_shape(node))
    return pytree.tree_map_only(Tensor, lambda t: walk.frozen([int(s) for s in t.shape]), tuple(value))


@infers("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(walk: Inference, node: Node) -> Axes:
    """(group, offset) becomes (offset, group); the number of groups is a literal and stays."""
    axes, groups = walk.axes(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    parts = _split(walk, node, axes[1], [groups, len(axes[1]) // groups])
    walk.freeze(node, parts[0], "the number of groups of a channel shuffle", "structure")
    mixed = walk.store.grid([parts[1], parts[0]])
    return (axes[0], mixed, *axes[2:])
