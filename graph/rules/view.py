"""Views: operators that split and merge axes without moving an element.

A view that splits and merges at once cannot be read off coordinates, so views are solved by their sizes: both
shapes are refined to common factors, the input's axes are split to them and merged to the output's.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import torch
from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.resize import Resizing
from slimc.graph.rule import Axes, arguments, infers, operator_name, resizes, set_argument
from slimc.graph.terms import Terms


@infers("view", "reshape", "_unsafe_view", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze")
def view(walk: Inference, node: Node) -> Axes:
    """Refine both shapes to common factors, split the input's axes to them, merge them to the output's.

    Where that can't be, neighbouring axes that are mixed stay whole, and the others are refined without them.
    """
    axes = walk.axes(node.args[0])
    before, after = [len(axis) for axis in axes], list(walk.out_shape(node))
    if before == after:
        return axes
    factors = refine(before, after)
    if factors is not None:
        return _refined(walk, node, axes, after, factors)
    result: list[Terms] = []
    for old, new in segments(before, after):
        sizes = after[new]
        factors = refine(before[old], sizes)
        if factors is not None:
            result.extend(_refined(walk, node, axes[old], sizes, factors))
            continue
        for axis in axes[old]:
            walk.freeze(node, axis, f"a view from {before[old]} to {sizes} does not split and merge whole axes")
        result.extend(walk.frozen(sizes))
    return tuple(result)


def _refined(walk: Inference, node: Node, axes: Axes, after: list[int], factors: list[int]) -> Axes:
    parts: list[Terms] = []
    for axis, own in zip(axes, _deal(factors, [len(axis) for axis in axes]), strict=True):
        parts.extend(split(walk, node, axis, own))
    merged = []
    for own in _deal(factors, after):
        merged.append(walk.store.grid(parts[: len(own)]) if own else walk.store.frozen(1))
        parts = parts[len(own) :]
    return tuple(merged)


def segments(before: list[int], after: list[int]) -> list[tuple[slice, slice]]:
    """Runs of axes of both shapes that hold the same elements, as short as can be; all axes where a size is 0."""
    whole = [(slice(0, len(before)), slice(0, len(after)))]
    if 0 in before or 0 in after:
        return whole
    left, right = ([int(n) for n in np.cumprod(sizes)] for sizes in (before, after))
    found, start, other = [], 0, 0
    for size in sorted(set(left) & set(right)):
        end, close = left.index(size) + 1, right.index(size) + 1
        found.append((slice(start, end), slice(other, close)))
        start, other = end, close
    if not found:
        return whole
    # What follows the last element is axes of one index.
    old, new = found.pop()
    return [*found, (slice(old.start, len(before)), slice(new.start, len(after)))]


@infers("view_as", "reshape_as")
def view_as(walk: Inference, node: Node) -> Axes:
    """A view whose sizes are read from another value, so both shrink alike."""
    axes = view(walk, node)
    for axis, other in zip(axes, walk.axes(node.args[1]), strict=True):
        walk.unify(node, axis, other)
    return axes


def split(walk: Inference, node: Node, axis: Terms, sizes: list[int]) -> list[Terms]:
    """New axes of these sizes whose products are the axis."""
    if len(sizes) < 2:
        return [axis] if sizes else []
    if not axis.any():
        return [walk.store.frozen(size) for size in sizes]
    parts = [walk.store.fresh(size) for size in sizes]
    walk.unify(node, axis, walk.store.grid(parts))
    return parts


def refine(before: list[int], after: list[int]) -> list[int] | None:
    """Sizes that both shapes are made of, in order; None if there are none."""
    if 0 in before or 0 in after or prod(before) != prod(after):
        return None
    ends = sorted(set(np.cumprod(before).tolist()) | set(np.cumprod(after).tolist()) | {1})
    factors = []
    for small, large in pairwise(ends):
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
        while prod(own) < size:
            own.append(queue.pop(0))
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


@resizes("squeeze")
def squeezed_axes(work: Resizing, old: Node, new: Node) -> None:
    """Drop the axes that were dropped, not those that have shrunk to one index."""
    call = arguments(old)
    shape = [len(axis) for axis in work.axes(old.args[0])]
    wanted = call.get("dim")
    if wanted is None:
        wanted = list(range(len(shape)))
    dims = [dim % len(shape) for dim in ([wanted] if isinstance(wanted, int) else wanted)]
    new.target = torch.ops.aten.squeeze.dims
    new.args, new.kwargs = (new.args[0], [dim for dim in dims if shape[dim] == 1]), {}


# -- broadcasts ---------------------------------------------------------------------------------------


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


@infers("repeat", "tile")
def repeat(walk: Inference, node: Node) -> Axes:
    """Whole copies of an axis follow each other; a single index repeats as often as its readers want."""
    source, out = walk.axes(node.args[0]), walk.out_shape(node)
    written = _repeats(node, len(out))
    axes = []
    for position in range(-len(out), 0):
        inside = source[position] if len(source) >= -position else walk.store.frozen(1)
        size = out[position]
        if len(inside) == size:
            axes.append(inside)
        elif len(inside) == 1:
            literal = isinstance(written[position], int)
            axes.append(walk.store.fresh(size) if literal else walk.store.frozen(size))
        else:
            axes.append(np.tile(inside, size // len(inside)))
    return tuple(axes)


def _repeats(node: Node, rank: int) -> list[object]:
    call = arguments(node)
    written = list(call["repeats"] if "repeats" in call else call["dims"])
    return [*[1] * (rank - len(written)), *written]


@resizes("repeat", "tile")
def repeats(work: Resizing, old: Node, new: Node) -> None:
    """Where a single index is repeated, the number of copies is a size."""
    source, axes = work.axes(old.args[0]), work.axes(old)
    written = _repeats(new, len(axes))
    for position in range(-len(axes), 0):
        single = len(source) < -position or len(source[position]) == 1
        if single and not work.whole(axes[position]):
            written[position] = int(work.kept(axes[position]).sum())
    set_argument(new, "repeats" if "repeats" in arguments(old) else "dims", written)


# -- channels and space ---------------------------------------------------------------------------------


@infers("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(walk: Inference, node: Node) -> Axes:
    """(group, offset) becomes (offset, group); the number of groups is a literal and stays."""
    axes, groups = walk.axes(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    group, offset = walk.store.frozen(groups), walk.store.fresh(len(axes[1]) // groups)
    walk.unify(node, axes[1], walk.store.grid([group, offset]))
    return (axes[0], walk.store.grid([offset, group]), *axes[2:])


@infers("pixel_shuffle")
def pixel_shuffle(walk: Inference, node: Node) -> Axes:
    """[..., C r r, H, W] -> [..., C, H r, W r]; the factor r is a literal and stays."""
    *lead, channel, high, wide = walk.axes(node.args[0])
    factor = walk.store.frozen(int(node.args[1]))  # type: ignore[arg-type]
    inside = walk.store.fresh(len(channel) // len(factor) ** 2)
    walk.unify(node, channel, walk.store.grid([inside, factor, factor]))
    return (*lead, inside, walk.store.grid([high, factor]), walk.store.grid([wide, factor]))


@infers("pixel_unshuffle")
def pixel_unshuffle(walk: Inference, node: Node) -> Axes:
    """[..., C, H r, W r] -> [..., C r r, H, W]."""
    *lead, channel, high, wide = walk.axes(node.args[0])
    factor = walk.store.frozen(int(node.args[1]))  # type: ignore[arg-type]
    spaces = []
    for axis in (high, wide):
        spaces.append(
            walk.store.fresh(len(axis) // len(factor)) if axis.any() else walk.frozen([len(axis) // len(factor)])[0]
        )
        walk.unify(node, axis, walk.store.grid([spaces[-1], factor]))
    return (*lead, walk.store.grid([channel, factor, factor]), *spaces)


@infers("im2col")
def im2col(walk: Inference, node: Node) -> Axes:
    """[N, C, H, W] -> [N, C x kernel, places]."""
    *lead, channel, high, wide = walk.axes(node.args[0])
    for axis in (high, wide):
        walk.freeze(node, axis, "windows need their space axes whole", "structure")
    *_, columns, places = walk.out_shape(node)
    kernel = walk.store.frozen(columns // len(channel))
    return (*lead, walk.store.grid([channel, kernel]), walk.store.frozen(places))


@infers("col2im")
def col2im(walk: Inference, node: Node) -> Axes:
    """[N, C x kernel, places] -> [N, C, H, W]: overlapping windows add up."""
    *lead, columns, places = walk.axes(node.args[0])
    walk.freeze(node, places, "windows need their space axes whole", "structure")
    *_, channels, high, wide = walk.out_shape(node)
    channel = walk.store.fresh(channels)
    walk.unify(node, columns, walk.store.grid([channel, walk.store.frozen(len(columns) // channels)]))
    return (*lead, channel, *walk.frozen([high, wide]))
