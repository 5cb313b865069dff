"""What the command line does with `--schedule` and `--epochs`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from slimc.errors import Interrupted, UsageError
from slimc.graph.example import Example
from slimc.result import Compressed

from . import schedule as registry
from . import workers
from .api import schedule
from .feeds import open_training
from .folder import RunFolder
from .recipe import Recipe


@dataclass(frozen=True)
class Training:
    """The command line's options for training."""

    schedule: str
    epochs: float
    rate: float | None
    batch_size: int | None
    distil: float
    settings: Sequence[str]
    resume: bool

    def __post_init__(self) -> None:
        registry.find(self.schedule).settings(self._settings())
        Recipe(rate=self.rate, distil=self.distil)

    def _settings(self) -> dict[str, str]:
        found = {}
        for text in self.settings:
            name, equals, value = text.partition("=")
            if not equals:
                raise UsageError(f"--set {text}: wanted NAME=VALUE")
            found[name] = value
        return found

    def run(self, model: nn.Module, example: Example, *, data: str, folder: Path, **options: Any) -> Compressed | None:
        """Train and cut; None in processes that only helped with that."""
        feeds = open_training(data, example, self.batch_size)
        with workers.joined():
            found: Compressed = schedule(
                self.schedule, model, example, epochs=self.epochs, data=feeds.train, val=feeds.validation,
                test=feeds.test, recipe=Recipe(rate=self.rate, distil=self.distil), settings=self._settings(),
                folder=folder, resume=self.resume, device=workers.device(),
                data_name=f"{data} in batches of {self.batch_size or 'the usual size'}", **options,
            ).result  # fmt: skip
            return found if workers.rank() == 0 else None


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """An interrupt at any moment says how to go on, where anything has been kept; a run that succeeds is cleared."""
    try:
        yield
    except KeyboardInterrupt:
        if not RunFolder.holds_run(folder):
            raise
        raise Interrupted(
            f"interrupted; the run is kept in {folder} up to its last checkpoint. To go on: the same command with "
            "--resume"
        ) from None
    # Of several processes the first one writes the result; the others end before it is safe.
    if os.environ.get("RANK", "0") == "0":
        RunFolder.clear(folder)
