"""Tails: what happens to a reader's output up to the residual sum that it ends in.

Between a convolution and the sum lie operators that scale and shift each channel (a batch norm at inference, a layer
scale) or do nothing at inference (dropout). Through them a target at the sum becomes a target at the reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimc.as_trained import has_statistics
from slimc.graph.infer import attribute
from slimc.graph.rule import arguments, operator_name
from slimc.lockstep import Frontier
from slimc.readers import Reader
from slimc.recover import Task

_SAME = {"dropout", "feature_dropout", "clone", "detach", "alias", "contiguous", "lift_fresh_copy"}
_SMALLEST_GAIN = 1e-3
"""Channels whose gain is below this share of the largest cannot answer for an error behind it."""


@dataclass(frozen=True)
class Tail:
    """The tail of one reader.

    gain: [outputs] factor of each channel behind the reader, in the slim graph.
    answers: [outputs] 1 where the channel can be fitted, 0 where its gain is next to nothing.
    goal: from (reader, batch number, the original's outputs [places, outputs], places) to what the reader should give.
    offset: adds a number to each of the reader's outputs, in its bias or in that of the norm behind it; None if there
        is neither.
    """

    gain: Tensor
    answers: Tensor
    goal: Callable[[Reader, int, Tensor, Tensor], Tensor]
    offset: Callable[[Tensor], None] | None


@dataclass
class _Affine:
    """Scale and shift of each channel, in float64."""

    scale: Tensor
    shift: Tensor

    def then(self, scale: Tensor, shift: Tensor | float) -> None:
        self.scale, self.shift = self.scale * scale, self.shift * scale + shift


def tail_of(task: Task, old: Node, reader: Reader, before: Frontier, after: Frontier) -> Tail:
    """Follow the original node and its twin as far as each channel is only scaled and shifted."""
    axis = 1 if reader.kind.startswith("conv") else old.meta["val"].dim() - 1
    kept = task.types.values[old][axis]
    index = task.cut.indices(kept)
    count = len(index)
    device = attribute(task.slim, reader.weight).device
    whole = _Affine(torch.ones(len(kept)).double().to(device), torch.zeros(len(kept)).double().to(device))
    small = _Affine(torch.ones(count).double().to(device), torch.zeros(count).double().to(device))
    norm: Node | None = None
    node = old
    other: Node | None = None
    while len(node.users) == 1:
        user = next(iter(node.users))
        twin = task.twins[user]
        name = operator_name(user)
        if name in _SAME and user.args[0] is node:
            pass
        elif has_statistics(user) and user.args[0] is node and axis == 1:
            if norm is None and node is old:
                norm = twin
            for affine, graph, place in ((whole, task.original, user), (small, task.slim, twin)):
                affine.then(*_batch_norm(graph, place))
        elif name == "mul" and (factors := _factors(task, user, node, twin, axis)) is not None:
            whole.then(factors[0], 0.0)
            small.then(factors[1], 0.0)
        else:
            other = _summand(user, node, name)
            break
        node = user
    twin_of_other = None if other is None else task.twins[other]
    if other is not None and (other not in before.values[0] or twin_of_other not in after.values[0]):
        other = None  # computed later: that one will answer for this one's error
    smallest = _SMALLEST_GAIN * float(small.scale.abs().max())
    answers = (small.scale.abs() > smallest).double()
    gain = torch.where(answers > 0, small.scale, torch.ones_like(small.scale))
    index = index.to(device)

    def goal(reader: Reader, number: int, result: Tensor, places: Tensor) -> Tensor:
        wanted = result * whole.scale[index] + whole.shift[index]
        if other is not None:
            assert twin_of_other is not None
            lost = task.cut.select(before.values[number][other], task.types.values[other])
            error = lost.double() - after.values[number][twin_of_other].double()
            wanted = wanted + reader.results(error, places)
        return (wanted - small.shift) / gain

    return Tail(small.scale, answers, goal, _offset(task.slim, reader, norm))


def _offset(slim: GraphModule, reader: Reader, norm: Node | None) -> Callable[[Tensor], None] | None:
    if reader.bias is not None:
        name, factor = reader.bias, None
    elif norm is not None and isinstance(bias := arguments(norm)["bias"], Node):
        name, factor = str(bias.target), _batch_norm(slim, norm)[0]
    else:
        return None
    bias_tensor: Tensor = attribute(slim, name)
    if sum(len(n.users) for n in slim.graph.nodes if n.op == "get_attr" and str(n.target) == name) != 1:
        return None

    def add(change: Tensor) -> None:
        with torch.no_grad():
            bias_tensor.add_((change if factor is None else change * factor).to(bias_tensor.dtype))

    return add


def _batch_norm(graph: GraphModule, node: Node) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm that uses its running statistics."""
    call = arguments(node)

    def read(name: str) -> Tensor | None:
        value = call[name]
        return None if value is None else attribute(graph, str(value.target)).detach().double()

    mean, variance, weight, bias = (read(name) for name in ("running_mean", "running_var", "weight", "bias"))
    assert mean is not None
    assert variance is not None
    scale = (variance + call["eps"]).rsqrt() * (1.0 if weight is None else weight)
    return scale, (0.0 if bias is None else bias) - mean * scale


def _factors(task: Task, user: Node, node: Node, twin: Node, axis: int) -> tuple[Tensor, Tensor] | None:
    """A parameter's numbers where it scales each channel alike everywhere, in both graphs."""
    other = next((a for a in user.args if isinstance(a, Node) and a is not node), None)
    if other is None or other.op != "get_attr":
        return None
    value: Tensor = attribute(task.original, str(other.target))
    behind = node.meta["val"].dim() - 1 - axis
    channels = value.shape[-1 - behind] if value.dim() > behind else 0
    if value.numel() != channels or channels != node.meta["val"].shape[axis]:
        return None
    slim = next(a for a in twin.args if isinstance(a, Node) and a.op == "get_attr")
    return tuple(
        attribute(graph, str(place.target)).detach().double().flatten()
        for graph, place in ((task.original, other), (task.slim, slim))
    )


def _summand(user: Node, node: Node, name: str) -> Node | None:
    """What the node is added to, where both have the same shape."""
    if name != "add" or arguments(user).get("alpha", 1) != 1:
        return None
    others = [a for a in user.args[:2] if a is not node]
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    value = others[0].meta.get("val")
    return others[0] if isinstance(value, Tensor) and value.shape == node.meta["val"].shape else None
