"""Rarer products: bilinear layers, tensordot, outer and inner products, distances between all pairs of rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.rule import Axes, arguments, counts, infers
from slimc.graph.rules.elementwise import broadcast
from slimc.graph.terms import Terms


@infers("bilinear")
def bilinear(walk: Inference, node: Node) -> Axes:
    """input1 [..., in1], input2 [..., in2], weight [out, in1, in2], bias [out] -> [..., out]."""
    call = arguments(node)
    left, right, weight = (walk.axes(call[name]) for name in ("input1", "input2", "weight"))
    walk.unify(node, left[-1], weight[1])
    walk.unify(node, right[-1], weight[2])
    if call["bias"] is not None:
        walk.unify(node, weight[0], walk.axes(call["bias"])[0])
    return (*broadcast(walk, node, [left[:-1], right[:-1]]), weight[0])


@counts("bilinear")
def bilinear_macs(walk: Inference, node: Node) -> list[tuple[float, Sequence[Terms]]]:
    """For each row and output, input1 times a matrix, and what comes of it times input2."""
    call = arguments(node)
    rows, weight = walk.axes(node)[:-1], walk.axes(call["weight"])
    return [(1.0, [*rows, *weight]), (1.0, [*rows, weight[0], weight[2]])]


@infers("tensordot")
def tensordot(walk: Inference, node: Node) -> Axes:
    """The named axes are contracted pair by pair; what is left of each side follows in order."""
    left, right, pairs = _contracted(walk, node)
    for one, other in pairs:
        walk.unify(node, left[one], right[other])
    gone = {one for one, _ in pairs}, {other for _, other in pairs}
    return (
        *(axis for i, axis in enumerate(left) if i not in gone[0]),
        *(axis for i, axis in enumerate(right) if i not in gone[1]),
    )


@counts("tensordot")
def tensordot_macs(walk: Inference, node: Node) -> list[tuple[float, Sequence[Terms]]]:
    """Every element of the left with every one of the right along the axes that are not contracted."""
    left, right, pairs = _contracted(walk, node)
    gone = {other for _, other in pairs}
    return [(1.0, [*left, *(axis for i, axis in enumerate(right) if i not in gone)])]


def _contracted(walk: Inference, node: Node) -> tuple[Axes, Axes, list[tuple[int, int]]]:
    call = arguments(node)
    left, right = walk.axes(call["self"]), walk.axes(call["other"])
    pairs = zip(call["dims_self"], call["dims_other"], strict=True)
    return left, right, [(one % len(left), other % len(right)) for one, other in pairs]


@infers("outer", "ger")
def outer(walk: Inference, node: Node) -> Axes:
    """[m] and [n] -> [m, n]."""
    return (*walk.axes(node.args[0]), *walk.axes(node.args[1]))


@infers("inner")
def inner(walk: Inference, node: Node) -> Axes:
    """[..., k] and [..., k] -> the other axes of both."""
    left, right = walk.axes(node.args[0]), walk.axes(node.args[1])
    if not left or not right:
        return (*left, *right)
    walk.unify(node, left[-1], right[-1])
    return (*left[:-1], *right[:-1])


@counts("inner")
def inner_macs(walk: Inference, node: Node) -> list[tuple[float, Sequence[Terms]]]:
    """All axes of the left with all but the last of the right."""
    return [(1.0, [*walk.axes(node.args[0]), *walk.axes(node.args[1])[:-1]])]


@infers("cdist")
def cdist(walk: Inference, node: Node) -> Axes:
    """[..., P, features] and [..., R, features] -> [..., P, R]: a difference of zeros adds nothing."""
    call = arguments(node)
    left, right = walk.axes(call["x1"]), walk.axes(call["x2"])
    walk.unify(node, left[-1], right[-1])
    return (*broadcast(walk, node, [left[:-2], right[:-2]]), left[-2], right[-2])


@infers("cosine_similarity")
def cosine_similarity(walk: Inference, node: Node) -> Axes:
    """Products and squares of zeros add nothing to what is summed along `dim`."""
    call = arguments(node)
    axes = broadcast(walk, node, [walk.axes(call["x1"]), walk.axes(call["x2"])])
    gone = int(call["dim"]) % len(axes)
    return tuple(axis for position, axis in enumerate(axes) if position != gone)


@infers("pairwise_distance")
def pairwise_distance(walk: Inference, node: Node) -> Axes:
    """[..., features] twice -> [...]; a little is added to every difference, so that removed ones do count."""
    call = arguments(node)
    axes = broadcast(walk, node, [walk.axes(call["x1"]), walk.axes(call["x2"])])
    walk.renormalise(node, axes[-1])
    return (*axes[:-1], *walk.frozen([1])) if call["keepdim"] else axes[:-1]


@infers("embedding_bag")
def embedding_bag(walk: Inference, node: Node) -> tuple[Axes, ...]:
    """weight [words, features], words in bags -> [bags, features] and three tables of numbers."""
    call = arguments(node)
    weight = walk.axes(call["weight"])
    walk.freeze(node, weight[0], "rows are looked up by number", "structure")
    bags, *tables = node.meta["val"]
    shapes = [walk.frozen([int(size) for size in table.shape]) for table in tables]
    return ((*walk.frozen([int(bags.shape[0])]), weight[1]), *shapes)


@infers("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2")
@infers("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "diff")
def transform(walk: Inference, node: Node) -> Axes:
    """Every result along the transformed axes depends on all of them; the other axes pass."""
    call = arguments(node)
    axes, out = walk.axes(call["self"]), walk.out_shape(node)
    dims = call.get("dim")
    chosen = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(axes) for dim in chosen}
    for dim in gone:
        walk.freeze(node, axes[dim], "a transform needs its axis whole")
    return tuple(walk.frozen([out[i]])[0] if i in gone else axis for i, axis in enumerate(axes))
