"""Schedules by the names that users type.

A schedule is one file in `schedules/`: a generator that yields phases of training and cuts the network between them.
It is run again from its start when an interrupted run goes on; what it did before is told to it, not done again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimc.errors import UsageError
from slimc.registry import Registry

if TYPE_CHECKING:
    from .phase import Phase

Plan = Callable[..., "Iterator[Phase]"]
"""Takes the run and the method's own settings as keywords; yields one phase after the other."""


@dataclass(frozen=True)
class Schedule:
    """A method that trains and cuts, with its name, one line about it, and its source.

    fitted_scorer: the scorer that --scorer is by default where layers are fitted after cuts; else it is magnitude.
    ranks: whether it chooses by --scorer, not by numbers of its own. mends: whether layers may be fitted after its
    cuts; not where what is left is put back, drawn anew, or as it was.
    """

    name: str
    summary: str
    source: str
    plan: Plan
    fitted_scorer: str
    ranks: bool
    mends: bool

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The method's own settings, checked; text is read as the type of the default."""
        known = {
            name: parameter.default
            for name, parameter in inspect.signature(self.plan).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        found = {}
        for name, value in given.items():
            key = name.replace("-", "_")
            if key not in known:
                names = ", ".join(known) or "none"
                raise UsageError(f"--set {name}: {self.name} has no such setting; it has {names}")
            found[key] = _read(name, value, known[key])
        return known | found


def _read(name: str, value: Any, default: Any) -> Any:
    kind = float if default is None else type(default)
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        found = kind(value)
        if isinstance(value, float) and found != value:  # 2.5 ticks, or nan
            raise ValueError
        return found
    except (TypeError, ValueError, KeyError):
        raise UsageError(f"--set {name}={value}: wanted a value like {default}") from None


def demand(low: float, high: float = math.inf, **settings: float) -> None:
    """UsageError that names the first setting which is not from `low` to `high`."""
    wanted = f"{low} up" if high == math.inf else f"{low} to {high}"
    for name, value in settings.items():
        if not low <= value <= high:
            raise UsageError(f"--set {name}={value}: wanted a number from {wanted}")


_REGISTRY = Registry[Schedule]("schedule", "slimc.schedules")
schedules, find = _REGISTRY.all, _REGISTRY.find


def schedule(
    name: str, summary: str, source: str, fitted_scorer: str = "magnitude", *, ranks: bool = False, mends: bool = True
) -> Callable[[Plan], Plan]:
    """Register a schedule under the name that users type."""

    def register(function: Plan) -> Plan:
        _REGISTRY.add(Schedule(name, summary, source, function, fitted_scorer, ranks, mends))
        return function

    return register
