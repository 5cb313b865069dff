"""Operators that multiply and sum over an axis: linear layers, convolutions, matrix products, einsum.

The contracted axes are the same channels on both sides; what is left of each operand makes the output. A
grouped convolution is a split into (groups, channels per group) on its input and on its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.resize import Resizing
from slimc.graph.rule import Axes, arguments, counts, infers, resizes, set_argument
from slimc.graph.terms import Terms

from .elementwise import broadcast

Products = list[tuple[float, Sequence[Terms]]]


@infers("linear")
def linear(walk: Inference, node: Node) -> Axes:
    """input [..., in], weight [out, in], bias [out] -> [..., out]."""
    call = arguments(node)
    x, rank = walk.axes(call["input"]), len(walk.shape(call["weight"]))
    walk.tie(node, call["weight"], rank - 1, x[-1])
    if rank == 1:
        return x[:-1]
    out = walk.axes(call["weight"])[0]
    if call["bias"] is not None:
        walk.tie(node, call["bias"], 0, out)
    return (*x[:-1], out)


@counts("linear")
def linear_macs(walk: Inference, node: Node) -> Products:
    """Every weight once per row."""
    return [(1.0, [*walk.axes(node.args[0])[:-1], *walk.axes(node.args[1])])]


# -- matrix products ----------------------------------------------------------------------------------


@infers("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(walk: Inference, node: Node) -> Axes:
    """[..., m, k] times [..., k, n] -> [..., m, n]; vectors as numpy has them."""
    left, right = walk.axes(node.args[0]), walk.axes(node.args[1])
    walk.unify(node, left[-1], right[-2] if len(right) > 1 else right[-1])
    batch = broadcast(walk, node, [left[:-2], right[:-2]])
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    return (*batch, *rows, *columns)


@counts("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul_macs(walk: Inference, node: Node) -> Products:
    """m times k times n for each matrix."""
    left, right = walk.axes(node.args[0]), walk.axes(node.args[1])
    batch = wider(left[:-2], right[:-2])
    return [(1.0, [*batch, *left[-2:], *(right[-1:] if len(right) > 1 else ())])]


@infers("addmm", "baddbmm")
def addmm(walk: Inference, node: Node) -> Axes:
    """A matrix product plus a term that broadcasts."""
    left, right = walk.axes(node.args[1]), walk.axes(node.args[2])
    walk.unify(node, left[-1], right[-2])
    product = (*broadcast(walk, node, [left[:-2], right[:-2]]), left[-2], right[-1])
    return broadcast(walk, node, [product, walk.axes(node.args[0])])


@counts("addmm", "baddbmm")
def addmm_macs(walk: Inference, node: Node) -> Products:
    """m times k times n; the addition is free."""
    left, right = walk.axes(node.args[1]), walk.axes(node.args[2])
    return [(1.0, [*left, right[-1]])]


def wider(left: Axes, right: Axes) -> list[Terms]:
    """The axes of two operands that broadcast, as far as sizes go."""
    rank = max(len(left), len(right))
    pairs = [[axes[i] for axes in (left, right) if len(axes) >= -i] for i in range(-rank, 0)]
    return [max(pair, key=len) for pair in pairs]


@infers("einsum")
def einsum(walk: Inference, node: Node) -> Axes:
    """Letters are axes: the same letter is the same channels."""
    letters = _letters(walk, node)
    _, output = _equation(walk, node)
    return tuple(letters[letter] for letter in output)


@counts("einsum")
def einsum_macs(walk: Inference, node: Node) -> Products:
    """One multiply-accumulate per combination of letters of each pair, in the order in which torch multiplies pairs.

    That is from left to right, or the path that opt_einsum found when the model was captured. A letter that only one
    operand has and that nothing needs afterwards is summed over before.
    """
    letters, (inputs, output) = _letters(walk, node), _equation(walk, node)
    waiting = [set(names) for names in inputs]
    given: Any = node.kwargs.get("path")
    path = list(given or ())
    products: Products = []
    while len(waiting) > 1:
        first, second = sorted((path.pop(0), path.pop(0)) if path else (0, 1))
        right, left = waiting.pop(second), waiting.pop(first)
        needed = set(output).union(*waiting)
        used = [letter for letter in letters if letter in (left & right) | ((left | right) & needed)]
        products.append((1.0, [letters[letter] for letter in used]))
        result = (left | right) & needed
        waiting = [*waiting, result] if given else [result, *waiting]
    return products


def _letters(walk: Inference, node: Node) -> dict[str, Terms]:
    inputs, _ = _equation(walk, node)
    operands = node.args[1]
    assert isinstance(operands, (list, tuple))
    letters: dict[str, Terms] = {}
    for names, operand in zip(inputs, operands, strict=True):
        for name, axis in zip(names, walk.axes(operand), strict=True):
            known = letters.get(name)
            if known is None or len(known) == 1:
                letters[name] = axis
            elif len(axis) > 1:
                walk.unify(node, known, axis)
    return letters


def _equation(walk: Inference, node: Node) -> tuple[list[list[str]], list[str]]:
    """Index names of each operand and of the output; an ellipsis becomes one name per axis it stands for."""
    text = str(node.args[0]).replace(" ", "")
    left, arrow, right = text.partition("->")
    operands = node.args[1]
    assert isinstance(operands, (list, tuple))
    inputs = []
    for names, operand in zip(left.split(","), operands, strict=True):
        hidden = len(walk.axes(operand)) - len(names.replace("...", ""))
        inputs.append(_spell(names, hidden))
    if arrow:
        widest = max((n for names in inputs for n in names if n.startswith(".")), default="", key=_dots)
        return inputs, _spell(right, _dots(widest) if widest else 0)
    dots = max(([n for n in names if n.startswith(".")] for names in inputs), key=len)
    own = [n for names in inputs for n in names if not n.startswith(".")]
    return inputs, [*dots, *sorted(n for n in set(own) if own.count(n) == 1)]


def _dots(name: str) -> int:
    return int(name[1:]) if name else 0


def _spell(names: str, hidden: int) -> list[str]:
    before, dots, after = names.partition("...")
    return [*before, *([f".{i}" for i in range(hidden, 0, -1)] if dots else []), *after]


# -- convolutions -------------------------------------------------------------------------------------


@infers("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(walk: Inference, node: Node) -> Axes:
    """input [N, C_in, ...], weight [C_out, C_in/groups, ...] (transposed: [C_in, C_out/groups, ...])."""
    call = arguments(node)
    x, weight = walk.axes(call["input"]), call["weight"]
    if isinstance(call["groups"], Node):
        walk.leave(node, "its number of groups is computed from its inputs, so its channels are left alone")
        return walk.frozen(walk.out_shape(node))
    rank = len(walk.shape(weight)) - 2
    channel, space = x[-rank - 1], x[len(x) - rank :]
    reason = "a convolution needs its space and kernel axes whole"
    for axis in space:
        walk.freeze(node, axis, reason, "structure")
    for position in range(2, 2 + rank):
        walk.keep(node, weight, position, reason)
    out = _tied(walk, node, channel, int(call["groups"]))
    if call["bias"] is not None:
        walk.tie(node, call["bias"], 0, out)
    shape = walk.out_shape(node)
    return (*x[: -rank - 1], out, *walk.frozen(shape[len(shape) - rank :]))


def _is_transposed(node: Node) -> bool:
    return "transpose" in str(node.target)


def _tied(walk: Inference, node: Node, channel: Terms, groups: int) -> Terms:
    """Tie the weight's two channel axes to the input; returns the output's channels."""
    weight: Node = arguments(node)["weight"]
    transposed = _is_transposed(node)
    if groups == 1:
        walk.tie(node, weight, 0 if transposed else 1, channel)
        return walk.axes(weight)[1 if transposed else 0]
    if transposed:
        walk.tie(node, weight, 0, channel)
        group, inside = walk.store.fresh(groups), walk.store.fresh(len(channel) // groups)
        walk.unify(node, channel, _split(walk, group, inside))
        return _split(walk, group, walk.axes(weight)[1])
    outputs, each = walk.shape(weight)[:2]
    group = channel
    if each > 1:
        group, inside = walk.store.fresh(groups), walk.store.fresh(each)
        walk.tie(node, weight, 1, inside)
        walk.unify(node, channel, _split(walk, group, inside))
    walk.tie(node, weight, 0, _split(walk, group, walk.store.fresh(outputs // groups)))
    return walk.axes(weight)[0]


def _split(walk: Inference, group: Terms, offset: Terms) -> Terms:
    """(group, offset) pairs in order; one offset a group is the group itself (depthwise)."""
    return group if len(offset) == 1 else walk.store.grid([group, offset])


@resizes("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution_groups(work: Resizing, old: Node, new: Node) -> None:
    """The number of groups that are left: input channels over channels per group."""
    call = arguments(old)
    if call["groups"] == 1 or isinstance(call["groups"], Node):
        return
    weight = work.new_shape(call["weight"])
    if _is_transposed(old):
        groups = work.new_shape(old)[-(len(weight) - 1)] // weight[1]
    else:
        groups = work.new_shape(call["input"])[-(len(weight) - 1)] // weight[1]
    set_argument(new, "groups", groups)


@counts("conv1d", "conv2d", "conv3d")
def convolution_macs(walk: Inference, node: Node) -> Products:
    """Every weight once per output position."""
    weight, out = walk.axes(node.args[1]), walk.axes(node)
    rank = len(weight) - 2
    return [(1.0, [*weight, *out[len(out) - rank :], *out[: -rank - 1]])]


@counts("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_macs(walk: Inference, node: Node) -> Products:
    """Every weight once per input position."""
    weight, x = walk.axes(node.args[1]), walk.axes(node.args[0])
    rank = len(weight) - 2
    return [(1.0, [*weight, *x[len(x) - rank :], *x[: -rank - 1]])]
