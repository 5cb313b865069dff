"""Channel inference: walk the graph once and give every axis of every value its terms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimc.errors import CaptureError

from . import rule
from .capture import Captured
from .rule import Axes, Value, operator_name
from .terms import Cause, Solution, Store, Terms
from .unread import keep_unread, keep_unused, unused


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates of one operator, for the example batch: `factor` times the product of the axes' sizes."""

    factor: float
    axes: tuple[Terms, ...]
    node: Node

    @property
    def macs(self) -> float:
        """How many, before anything is removed."""
        return self.factor * math.prod(map(len, self.axes))


@dataclass(frozen=True)
class Types:
    """What inference found.

    values: axes of each node's value (a tuple of axes for several results, None for what is no tensor).
    tensors: axes of each parameter and buffer that the graph uses, by fully qualified name.
    weights: those tensors themselves.
    aliases: names of the same tensor, for each name in `tensors` that has any.
    renormalising: axes over which statistics are taken, with the node that takes them.
    macs: multiply-accumulates of the example batch; an operator may have several products.
    unknown: operators without a rule, each once per node.
    unused: nodes that the output does not depend on.
    """

    captured: Captured
    values: dict[Node, Value]
    tensors: dict[str, Axes]
    weights: dict[str, Tensor]
    aliases: dict[str, tuple[str, ...]]
    renormalising: tuple[tuple[Node, Terms], ...]
    macs: tuple[Product, ...]
    unknown: tuple[Cause, ...]
    store: Store
    solution: Solution
    unused: frozenset[Node]

    def first(self, name: str) -> str:
        """The name in `tensors` of the tensor that has this name, which may be one of several."""
        return self._first.get(name, name)

    @cached_property
    def _first(self) -> dict[str, str]:
        return {alias: first for first, names in self.aliases.items() for alias in names}


def infer(captured: Captured) -> Types:
    """Infer the channel types of a captured graph."""
    rule.load()
    walk = Inference(captured)
    nodes = captured.module.graph.nodes
    for node in nodes:
        walk.visit(node)
    keep_unread(walk)
    solution = walk.store.solve()
    if keep_unused(walk, solution):
        solution = walk.store.solve()
    return Types(
        captured,
        {node: walk.value(node) for node in nodes},
        {name: walk.made(name) for name in walk.weights},  # in the order in which the graph names them
        walk.weights,
        {name: tuple(walk.aliases[name]) for name in walk.weights if len(walk.aliases.get(name, ())) > 1},
        tuple(walk.renormalising),
        tuple(walk.macs),
        tuple(walk.unknown),
        walk.store,
        solution,
        walk.unused,
    )


class Inference:
    """The state of one walk; rules read axes and sizes from it and unify through it.

    The axes of a parameter or buffer are made when a rule first reads them. Until then a rule that knows what an
    axis is (`tie`) gives it that axis, which is what unifying fresh variables with it would come to, at no cost.
    """

    def __init__(self, captured: Captured) -> None:
        self.module: GraphModule = captured.module
        self.constants = captured.constants
        self.store = Store()
        self.weights: dict[str, Tensor] = {}
        self._values: dict[Node, Value] = {}
        self._tensors: dict[str, Axes] = {}
        self._given: dict[str, dict[int, Terms]] = {}  # axes of tensors that no rule has read, by position
        self._first: dict[Node, str] = {}  # the tensor that a node reads
        # Tied weights reach the graph under one of their names; the model's order says which one is theirs.
        self.aliases: dict[str, list[str]] = {}
        self._name_of: dict[int, str] = {}
        for name, tensor in named_tensors(captured.module):
            first = self._name_of.setdefault(id(tensor), name)
            self.aliases.setdefault(first, []).append(name)
        self.renormalising: list[tuple[Node, Terms]] = []
        self.macs: list[Product] = []
        self.unknown: list[Cause] = []
        self.unused = unused(captured.module.graph)

    # -- what rules ask -------------------------------------------------------------------------------

    def value(self, node: Node) -> Value:
        """What a node gives: axes, a tuple of axes for several results, None for what is no tensor."""
        name = self._first.get(node)
        return self._values[node] if name is None else self.made(name)

    def axes(self, node: Any) -> Axes:
        """The axes of a tensor argument."""
        value = self.value(node)
        assert isinstance(value, tuple)
        return value

    def shape(self, node: Node) -> tuple[int, ...]:
        """The size of each axis of a tensor argument, in the example; asking makes no axes."""
        name = self._first.get(node)
        return tuple(len(axis) for axis in self.axes(node)) if name is None else tuple(self.weights[name].shape)

    def made(self, name: str) -> Axes:
        """The axes of a parameter or buffer, made now if no rule has asked before."""
        axes = self._tensors.get(name)
        if axes is None:
            axes = self._tensors[name] = self._own_axes(name, self.weights[name], self._given.pop(name, {}))
        return axes

    def number(self, argument: Any) -> Any:
        """An argument with symbolic sizes replaced by the example's."""
        if isinstance(argument, Node):
            return hint(argument.meta["val"])
        if isinstance(argument, (list, tuple)):
            return [self.number(item) for item in argument]
        return argument

    def out_shape(self, node: Node) -> tuple[int, ...]:
        """The shape of a node's own (single) result, in the example."""
        return tuple(hint(size) for size in node.meta["val"].shape)

    def cause(self, node: Node, reason: str, kind: str = "limit") -> Cause:
        """A cause that names a node."""
        target = node.target
        name = str(target) if isinstance(target, torch._ops.OpOverload) else rule.operator_name(node)
        return Cause(node.name, name, module_path(node), reason, kind)

    def unify(self, node: Node, left: Terms, right: Terms) -> None:
        """Make two axes one at this node."""
        if left is not right:
            self.store.unify(left, right, self.cause(node, "its channels do not match one to one"))

    def tie(self, node: Node, tensor: Node, position: int, axis: Terms) -> None:
        """Make an axis of a tensor argument one with an axis, at best by taking it over."""
        if self._may_adopt(tensor, position, len(axis)):
            self._given.setdefault(self._first[tensor], {})[position] = axis
        else:
            self.unify(node, axis, self.axes(tensor)[position])

    def keep(self, node: Node, tensor: Node, position: int, reason: str) -> None:
        """Make an axis of a tensor argument stay because it is no channel: a kernel, say."""
        size = self.shape(tensor)[position]
        if self._may_adopt(tensor, position, size):
            self.tie(node, tensor, position, self.store.structure(size, reason))
        else:
            self.freeze(node, self.axes(tensor)[position], reason, "structure")

    def _may_adopt(self, node: Node, position: int, size: int) -> bool:
        """Whether an axis is still to be made, would be made of fresh variables, and is as long as what it is given.

        An axis of one index is left to unification, since it is frozen where a variable would not be.
        """
        name = self._first.get(node)
        if name is None or name in self._tensors or position in self._given.get(name, ()):
            return False
        tensor = self.weights[name]
        return 1 < size == tensor.shape[position] and tensor.is_floating_point() and name not in self.constants

    def freeze(self, node: Node, axis: Terms, reason: str, kind: str = "limit") -> None:
        """Make an axis stay."""
        if axis.any():
            self.store.freeze(axis, self.cause(node, reason, kind))

    def renormalise(self, node: Node, axis: Terms) -> None:
        """Note that statistics are taken over an axis that may shrink."""
        if axis.any():
            self.renormalising.append((node, axis))

    def frozen(self, shape: Sequence[int]) -> Axes:
        """Axes that are no channels."""
        return tuple(self.store.frozen(size) for size in shape)

    # -- walking --------------------------------------------------------------------------------------

    def visit(self, node: Node) -> None:
        """Find the value of one node."""
        if node.op == "get_attr":
            self._name_tensor(node)
        else:
            self._values[node] = self._found(node)

    def _found(self, node: Node) -> Value:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "output":
            self._freeze_all(node, "the model's output keeps its size", "boundary")
            return None
        if not _is_tensor(node.meta.get("val")):
            return self._no_tensor(node)
        name = operator_name(node)
        function = rule.INFER.get(name)
        if function is None and rule.is_pointwise(node) and isinstance(node.meta["val"], Tensor):
            function = rule.INFER["pointwise"]
        if function is None:
            return self.leave(node, "no rule for this operator: its channels are left alone, its work is not counted")
        value = self._values[node] = function(self, node)
        if name in rule.COUNT and node not in self.unused:
            self.macs.extend(Product(c, tuple(axes), node) for c, axes in rule.COUNT[name](self, node))
        return value

    def _name_tensor(self, node: Node) -> None:
        """Note which tensor a node reads; its axes are made when someone asks for them."""
        tensor = attribute(self.module, str(node.target))
        if not isinstance(tensor, Tensor):
            self._values[node] = None
            return
        name = self._first[node] = self._name_of.setdefault(id(tensor), str(node.target))
        self.weights.setdefault(name, tensor)

    def _own_axes(self, name: str, tensor: Tensor, given: dict[int, Terms]) -> Axes:
        if not (tensor.is_floating_point() or tensor.is_complex()):  # integers are positions and counts, never channels
            return self.frozen(tensor.shape)
        axes = tuple(given[i] if i in given else self.store.fresh(size) for i, size in enumerate(tensor.shape))
        if name in self.constants:
            reason = "a constant written in forward() keeps its size; register it as a buffer to let it shrink"
            self._freeze_own(axes, Cause(name, "constant", "", reason, "limit"))
        elif tensor.is_complex():
            self._freeze_own(axes, Cause(name, "complex numbers", "", "complex numbers are left alone", "limit"))
        return axes

    def _freeze_own(self, axes: Axes, cause: Cause) -> None:
        for axis in axes:
            if axis.any():
                self.store.freeze(axis, cause)

    def _input(self, node: Node) -> Value:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        cause = self.cause(node, "the model's input keeps its size", "boundary")
        axes = []
        for position, size in enumerate(self.out_shape(node)):
            axis = self.store.frozen(size)
            if position == 1 and size > 1:  # named, so that a reader's axis can say why it is frozen
                axis = self.store.fresh(size)
                self.store.freeze(axis, cause)
            axes.append(axis)
        return tuple(axes)

    def _no_tensor(self, node: Node) -> Value:
        """Sizes and assertions carry no channels; data that leaves the graph freezes what it came from."""
        if operator_name(node) in ("item", "_local_scalar_dense"):
            self._freeze_all(node, "its value leaves the tensor world", "unknown")
        return None

    def leave(self, node: Node, reason: str) -> Value:
        """Freeze all that an operator sees and gives, and note it among the unknown ones."""
        if self._holds_channels(node):  # else nothing is lost, as with masks and positions
            cause = self.cause(node, reason, "unknown")
            self.unknown.append(cause)
            self._freeze_all(node, cause.reason, "unknown")
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return self.frozen(self.out_shape(node))
        return tuple(
            self.frozen([hint(size) for size in item.shape]) if isinstance(item, Tensor) else None for item in value
        )

    def _holds_channels(self, node: Node) -> bool:
        sources = (axes for source in node.all_input_nodes for axes in tensors_of(self.value(source)))
        return any(axis.any() and not self.store.is_frozen(axis).all() for axes in sources for axis in axes)

    def _freeze_all(self, node: Node, reason: str, kind: str) -> None:
        for source in node.all_input_nodes:
            for axes in tensors_of(self.value(source)):
                for axis in axes:
                    self.freeze(node, axis, reason, kind)


def tensors_of(value: Value) -> list[Axes]:
    """The axes of every tensor in a value."""
    if value is None:
        return []
    if not value or isinstance(value[0], np.ndarray):
        return [value]
    return [axes for item in value for axes in tensors_of(item)]


def hint(size: Any) -> Any:
    """The example's number behind a symbolic size; raises CaptureError where only the data gives one."""
    if isinstance(size, (int, float, bool)):
        return size
    known = size.node.hint if size.node.has_hint() else None
    if known is None:
        raise CaptureError(
            f"the size {size} depends on the data (a mask, nonzero or the like), so channels cannot be followed. "
            "Compute it outside of forward(), or use a fixed number of indices."
        )
    return known


def module_path(node: Node) -> str:
    """The innermost module that ran this node; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def attribute(module: nn.Module, name: str) -> Any:
    """The parameter, buffer or constant of that fully qualified name; AttributeError if there is none."""
    *path, last = name.split(".")
    for part in path:  # straight to the tables: `get_submodule` checks every step, and this runs thousands of times
        child = module._modules.get(part)
        module = child if child is not None else getattr(module, part)
    for table in (module._parameters, module._buffers):
        if (found := table.get(last)) is not None:
            return found
    return getattr(module, last)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, by every name they have."""
    modules = list(_named_modules(module, ""))
    for table in ("_parameters", "_buffers"):
        for prefix, owner in modules:
            for name, tensor in getattr(owner, table).items():
                if tensor is not None:
                    yield prefix + name, tensor


def _named_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_modules(child, f"{prefix}{name}.")


def _is_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value)
