"""Interrupts: the first one is a wish to stop, heard after the next whole step; the second one interrupts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Wish:
    """Whether the user wants a run to stop."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def is_there(self) -> bool:
        """Whether an interrupt has come."""
        return self._event.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take interrupts as a wish for a while; only the main thread gets any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: Any) -> None:
            if self._event.is_set():
                raise KeyboardInterrupt
            self._event.set()

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
