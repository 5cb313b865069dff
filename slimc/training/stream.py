"""The stream of training batches: any loader, read again and again, that can be put back to where it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from slimc.analysis import Analysis
from slimc.data import Readable
from slimc.errors import UsageError, first_line
from slimc.graph.example import Example
from slimc.losses import check_labels
from slimc.passes import check_splits
from slimc.random_state import generators_of, kept_random_state, seed_all, set_random_state
from slimc.samples import Batch, Samples, affordable, batch_of, check_alike, check_finite, collect

from . import workers
from .aside import aside

SAMPLES_SEED = 1_000_003
"""In place of an epoch's number, for what is drawn apart from training."""


class Stream:
    """Batches without end; an epoch is one pass over the loader.

    Every epoch starts from random state of its own, given by seed and number, so that order and augmentation are the
    same however often the run was interrupted; a generator that the loader has is seeded like that too. With several
    processes each reads the whole epoch and takes its share of every batch, so that together they see what one process
    would.
    """

    def __init__(self, loader: Iterable[Any], like: Example, seed: int, device: torch.device | None = None) -> None:
        if isinstance(loader, Iterator):
            raise UsageError("the training data can be read only once; give a DataLoader or a list of batches")
        self._loader, self._like, self._seed, self._device = _apart(loader), like, seed, device
        self.epoch, self.index = 0, 0
        self._last = 0
        self.began_anew = False
        self._batches: Iterator[Any] | None = None
        try:
            self._length: int | None = len(loader) if isinstance(loader, Sized) else None
        except TypeError:  # a DataLoader over an iterable dataset has the method, and no answer
            self._length = None

    def __len__(self) -> int:
        """Batches in an epoch; a loader that does not say is counted once."""
        if self._length is None:
            with kept_random_state():
                self._seed_all(0)
                self._length = sum(1 for _ in self._loader)
        if not self._length:
            raise UsageError("the training data is empty; give at least one batch of (inputs, targets)")
        return self._length

    @property
    def ended(self) -> bool:
        """Whether the batch that was given last ends an epoch, as far as the loader's length says; else `began_anew`
        is true of the next one."""
        return self.index == len(self)

    def next(self) -> Batch:
        """The next batch, this process's share of it.

        `began_anew`: whether it begins an epoch whose end before it was not told, since that had fewer batches than the
        loader says, or an empty one at its end.
        """
        self.began_anew = False
        return self._next()

    def _next(self) -> Batch:
        if self._batches is None:
            self._open()
        assert self._batches is not None
        item = next(self._batches, None)
        if item is None:
            if self.index == 0:
                raise UsageError("the training data is empty; give at least one batch of (inputs, targets)")
            self.began_anew = self._last != len(self)
            self.epoch, self.index, self._batches = self.epoch + 1, 0, None
            return self._next()
        self.index += 1
        whole = batch_of(item, self._like)
        if not whole.count:  # what a loader that filters gives when nothing is left
            return self._next()
        if whole.count < workers.count() and self.index > 1:  # what is left over at the end
            return self._next()
        self._last = self.index
        check_alike(whole.example.tensors(), self._like.tensors())
        return workers.share(whole).to(self._device)

    def seek(self, epoch: int, index: int, state: dict[str, Any]) -> None:
        """Go to a place: batches before it are read and dropped, then the random state is put as it was there."""
        self.epoch, self.index = epoch, index
        self._last = index
        if index:
            self._open()
        set_random_state(state)

    def _seed_all(self, epoch: int) -> None:
        seed_all(self._seed, epoch, self._loader.batches if isinstance(self._loader, Readable) else self._loader)

    def _open(self) -> None:
        self._seed_all(self.epoch)
        self._batches = iter(self._loader)
        for _ in range(self.index):
            next(self._batches, None)


def training_samples(data: Iterable[Any], analysis: Analysis, seed: int) -> Samples:
    """Some of the training data, in memory: for scores and for mending. The same whenever they are asked for."""
    captured = analysis.captured
    fixed = captured.batch if captured.dynamic_shapes is None else None
    loader = data.batches if isinstance(data, Readable) else data
    with kept_random_state():
        own = [(generator, generator.get_state()) for generator in generators_of(loader)]
        seed_all(seed, SAMPLES_SEED, loader)
        found = collect(data, captured.example, affordable(analysis.work), fixed, "training data")
        for generator, state in own:  # the stream may be in the middle of an epoch
            generator.set_state(state)
    check_splits(captured, found)
    return found


def _apart(loader: Any) -> Iterable[Any]:
    """A loader whose workers are its own and begin with each epoch.

    Persistent ones serve one reader at a time, and go on from where random numbers were, which no restart can repeat.
    """
    if isinstance(loader, Readable):
        return Readable(_apart(loader.batches), loader.where)
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader.__dict__.update(persistent_workers=False, _iterator=None)  # which a loader does not let be set
    found: Iterable[Any] = loader
    return found


def check_first(
    data: Iterable[Any],
    like: Example,
    output: tuple[int, ...] | None,
    source: str,
    give: str,
    fixed: nn.Module | None = None,
) -> Batch:
    """Look at the first batch before anything slow; UsageError where it does not fit the model.

    output: sizes of what labels are compared with; None where a loss or metric of the user's reads them. give: what to
    do where labels are no class numbers.
    fixed: a model that may take batches of the example's size only.
    """
    if not isinstance(data, Iterable):
        raise UsageError(f"{source} is a {type(data).__name__}; wanted an iterable of batches")
    with kept_random_state():
        item = next(iter(data), None)
    if item is None:
        raise UsageError(f"{source} is empty; give at least one batch of (inputs, targets)")
    batch = batch_of(item, like)
    check_alike(batch.example.tensors(), like.tensors())
    check_finite(batch, f"batch 1 of {source}")
    if fixed is not None and batch.count != like.count:
        _check_taken(fixed, batch, like, source)
    if output is not None:
        check_labels(batch.targets, batch.count, output, f"batch 1 of {source}", give)
    return batch


def takes(model: nn.Module, batch: Batch) -> bool:
    """Whether a model runs on a batch, at inference."""
    return _fault(model, batch) is None


def _fault(model: nn.Module, batch: Batch) -> Exception | None:
    batch = batch.to(next((parameter.device for parameter in model.parameters()), None))
    try:
        with aside(model):
            batch.example.run(model)
    except Exception as error:  # of the user's own code
        return error
    return None


def _check_taken(model: nn.Module, batch: Batch, like: Example, source: str) -> None:
    error = _fault(model, batch)
    if error is not None:
        raise UsageError(
            f"the model does not take batch 1 of {source}, {batch.count} samples ({first_line(error)}). Give batches "
            f"of {like.count} as in the example, all of them (drop_last=True of a DataLoader)"
        ) from error
