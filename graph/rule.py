"""The tables from operator to rule, filled by the files in `rules/`.

An operator has up to three functions: how channel terms flow through it (`infers`), how its literal sizes are
rewritten (`resizes`) and how many multiply-accumulates it does (`counts`). An operator in no table freezes
what it touches.
"""

from __future__ import annotations

import functools
import importlib
import operator
import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.fx import Node

from slimc.errors import InternalError

if TYPE_CHECKING:
    from .infer import Inference
    from .resize import Resizing
    from .terms import Terms

Axes = tuple["Terms", ...]
Value = Any  # Axes, a tuple of Axes for several results, None for what is no tensor

Infer = Callable[["Inference", Node], Value]
Resize = Callable[["Resizing", Node, Node], None]
Count = Callable[["Inference", Node], list[tuple[float, Sequence["Terms"]]]]
"""MACs as a sum of constant times product of axis sizes."""

INFER: dict[str, Infer] = {}
RESIZE: dict[str, Resize] = {}
COUNT: dict[str, Count] = {}

Function = TypeVar("Function", bound=Callable[..., Any])


def infers(*names: str) -> Callable[[Function], Function]:
    """Register how terms flow through the operators."""
    return _into(INFER, names)


def resizes(*names: str) -> Callable[[Function], Function]:
    """Register how the operators' literal sizes are rewritten."""
    return _into(RESIZE, names)


def counts(*names: str) -> Callable[[Function], Function]:
    """Register how many multiply-accumulates the operators do."""
    return _into(COUNT, names)


def _into(table: dict[str, Any], names: Sequence[str]) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for name in names:
            if name in table:
                raise InternalError(f"{name} has two rules: {table[name].__module__} and {function.__module__}")
            table[name] = function
        return function

    return register


def load() -> None:
    """Import every rule family; the folder listing is the registry."""
    package = importlib.import_module("slimc.graph.rules")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"slimc.graph.rules.{module.name}")


def operator_name(node: Node) -> str:
    """`conv2d` for aten.conv2d.default, `torchvision::roi_align` for others; in-place as out-of-place."""
    target = node.target
    if target is operator.getitem:
        return "getitem"
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    full, bare = _names(target)
    return bare if full not in INFER and not full.startswith("_") else full


def is_pointwise(node: Node) -> bool:
    """Whether torch itself tags the operator, or its out-of-place form, as acting on each element alone."""
    return isinstance(node.target, torch._ops.OpOverload) and _is_pointwise(node.target)


def writes(node: Node) -> bool:
    """Whether an operator writes into its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and bool(node.args)


def arguments(node: Node) -> dict[str, Any]:
    """An operator's arguments by name, defaults filled in; to be read only."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(enumerate(node.args)) | node.kwargs  # type: ignore[return-value]
    defaults = _defaults(node.target)
    return {**defaults, **node.kwargs, **dict(zip(defaults, node.args, strict=False))}


# What torch says of an operator never changes, and asking takes longer than most rules.


@functools.cache
def _names(target: torch._ops.OpOverload) -> tuple[str, str]:
    """The operator's name, without `aten`; and the same out of place."""
    space, name = target._schema.name.split("::")
    full = name if space == "aten" else f"{space}::{name}"
    return full, full.removesuffix("_")


@functools.cache
def _is_pointwise(target: torch._ops.OpOverload) -> bool:
    if torch.Tag.pointwise in target.tags:
        return True
    space, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


@functools.cache
def _defaults(target: torch._ops.OpOverload) -> dict[str, Any]:
    return {parameter.name: parameter.default_value for parameter in target._schema.arguments}


def set_argument(node: Node, name: str, value: Any) -> None:
    """Write one argument by its schema name, wherever the call has it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    position = next(i for i, p in enumerate(node.target._schema.arguments) if p.name == name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
