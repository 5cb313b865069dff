"""Random numbers: the state of every generator that a run may draw from, put back where it was."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, epoch: int, loader: Any = None) -> None:
    """Seed torch, numpy and Python from two numbers, and the generators that a DataLoader and its samplers have."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)
    for generator in generators_of(loader):
        generator.manual_seed(mixed)


def generators_of(loader: Any) -> list[torch.Generator]:
    """Those that a DataLoader and its samplers have of their own."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


class kept_random_state(contextlib.ContextDecorator):
    """Puts torch's, numpy's and Python's random state back at the end of a block or a function."""

    def _recreate_cm(self) -> kept_random_state:
        return kept_random_state()  # calls may be nested, each with a state of its own

    def __enter__(self) -> None:
        self._state = random_state()

    def __exit__(self, *_: object) -> None:
        set_random_state(self._state)


class OwnRandomState:
    """Random numbers of a run's own inside of blocks, which may be nested; outside, the caller's are as they were."""

    def __init__(self, seed: int, epoch: int) -> None:
        self._start = seed, epoch
        self._depth = 0
        self._own: dict[str, Any] | None = None

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._outer = random_state()
        if self._own is None:
            seed_all(*self._start)
        else:
            set_random_state(self._own)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._own = random_state()
            set_random_state(self._outer)


def random_state() -> dict[str, Any]:
    """The state of every generator that training may draw from, as tensors and plain data."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, following = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(numbers), following],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, following = state["python"]
    random.setstate((version, tuple(numbers), following))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
