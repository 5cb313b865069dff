"""Running a model without a trace in its buffers: counters and averages that `forward` moves are the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from slimc.graph.rule import writes


class Stateless(Interpreter):
    """Runs a graph with copies of the buffers that it writes into."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._written = written(module)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the model, or a copy."""
        return self.apart(target, super().get_attr(target, args, kwargs))

    def apart(self, target: Any, value: Any) -> Any:
        """A value that the graph may write into."""
        return value.clone() if str(target) in self._written else value


def written(module: GraphModule) -> frozenset[str]:
    """Names of buffers that operators of a graph write into, themselves or (to be safe) what is computed from them."""
    found, parameters = set(), {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for node in module.graph.nodes:
        source: Any = node
        if not writes(node):
            continue
        while isinstance(source, Node) and source.op == "call_function" and source.args:
            source = source.args[0]
        if isinstance(source, Node) and source.op == "get_attr" and str(source.target) not in parameters:
            found.add(str(source.target))
    return frozenset(found)


@contextmanager
def modes_kept(module: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Every part of a module gets its own mode back; training: the mode of all parts in the block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        if training is not None:
            module.train(training)
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def buffers_kept(*models: nn.Module) -> Iterator[None]:
    """Buffers that are written into or replaced in the block are put back."""
    owners = [module for model in models for module in model.modules()]
    before = [
        (owner, name, buffer, buffer.detach().clone(), buffer._version)
        for owner in owners
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value, version in before:
                owner._buffers[name] = buffer
                # What is not touched stays usable for gradients; batch norms write without counting a version.
                if buffer._version != version or not torch.equal(buffer, value):
                    buffer.copy_(value)
