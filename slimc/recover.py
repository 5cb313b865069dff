"""Recovery: what can be done to the kept weights after the cut, by the names that users type.

A step is one file in `recovery/`. It changes the tensors of the rewritten graph in place; the user's module shares
them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.fx import GraphModule

from .errors import InternalError, UsageError
from .graph.capture import Example

Run = Callable[[GraphModule, Iterable[Example]], str]
"""Fits a graph on batches of its inputs and says in one line what it did."""


@dataclass(frozen=True)
class Step:
    """One way of fitting the kept weights again, with one line about it and its source."""

    name: str
    summary: str
    source: str
    run: Run


_STEPS: dict[str, Step] = {}


def step(name: str, summary: str, source: str) -> Callable[[Run], Run]:
    """Register a recovery step under the name that users type."""

    def register(function: Run) -> Run:
        if name in _STEPS:
            raise InternalError(f"two recovery steps are called {name!r}")
        _STEPS[name] = Step(name, summary, source, function)
        return function

    return register


def steps() -> dict[str, Step]:
    """All steps by name; the folder listing is the registry."""
    package = importlib.import_module("slimc.recovery")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"slimc.recovery.{module.name}")
    return dict(sorted(_STEPS.items()))


def find(name: str) -> Step:
    """The step of that name."""
    known = steps()
    if name not in known:
        raise UsageError(f"--recover {name}: known steps are {', '.join(known)}, auto and none")
    return known[name]
