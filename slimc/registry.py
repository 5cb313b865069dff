"""Methods by the names that users type: one file each in a package, whose listing is the registry."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Generic, Protocol, TypeVar

from .errors import InternalError, UsageError


class Named(Protocol):
    """What can be registered."""

    @property
    def name(self) -> str:
        """The name that users type."""


Entry = TypeVar("Entry", bound=Named)


class Registry(Generic[Entry]):
    """The methods of one kind.

    kind: what they are called in messages. package: where their files are. besides: what else users may type there.
    """

    def __init__(self, kind: str, package: str, besides: tuple[str, ...] = ()) -> None:
        self._kind, self._package, self._besides = kind, package, besides
        self.entries: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """Register a method; two of one name are a mistake of ours."""
        if entry.name in self.entries:
            raise InternalError(f"two {self._kind}s are called {entry.name!r}")
        self.entries[entry.name] = entry

    def all(self) -> dict[str, Entry]:
        """All methods by name; their files are read now."""
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        return dict(sorted(self.entries.items()))

    def find(self, name: str) -> Entry:
        """The method of that name; UsageError with those that there are."""
        known = self.all()
        if name not in known:
            raise UsageError(f"there is no {self._kind} {name!r}; known: {', '.join((*known, *self._besides))}")
        return known[name]
