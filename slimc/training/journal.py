"""The journal: what a schedule has done, so that it can be told instead of done again.

A schedule is a generator that is started anew when a run goes on. Each of its deeds is an event; events that the
journal holds are told to it one after the other, and with the last of them everything is put back to where the
checkpoint left it (`wake`). From there it does things itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slimc.errors import OutputError


class Journal:
    """Events in order. wake: called with the checkpoint when the last event has been told."""

    def __init__(self, wake: Callable[[Mapping[str, Any]], None]) -> None:
        self.events: list[dict[str, Any]] = []
        self._place = 0
        self._wake = wake
        self._checkpoint: Mapping[str, Any] | None = None

    def recall(self, checkpoint: Mapping[str, Any]) -> None:
        """Start from a checkpoint's events."""
        self.events, self._checkpoint = list(checkpoint["journal"]), checkpoint
        if not self.events:
            self._awake()

    @property
    def is_telling(self) -> bool:
        """Whether the next event has happened already."""
        return self._place < len(self.events)

    def write(self, kind: str, value: Any) -> None:
        """Add an event that has just happened; its value is tensors and plain data."""
        self.events.append({"kind": kind, "value": value})
        self._place += 1

    def told(self, kind: str, heed: Callable[[Any], None] = lambda value: None) -> Any:
        """The value of the next event, which must be of that kind; `heed` sees it before anything wakes."""
        event = self.events[self._place]
        if event["kind"] != kind:
            raise OutputError(
                f"the run's folder tells of {event['kind']!r} where the schedule does {kind!r}: it was begun by "
                "another version of slimc. Begin again in another folder"
            )
        self._place += 1
        heed(event["value"])
        if not self.is_telling:
            self._awake()
        return event["value"]

    def _awake(self) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            self._wake(checkpoint)
