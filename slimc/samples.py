"""Samples: the batches that scorers and recovery look at, checked once and kept in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import UsageError
from .graph.example import Example
from .inputs import KINDS

LIMIT = 512
_AFFORDABLE = 1.7e12
_FEWEST = 32
_MADE_UP = 5e11
FEWEST_MADE_UP = 20
_ROUNDING = 1e-9
_TARGETS = ("labels", "label", "targets", "target")


def made_up(work: float) -> int:
    """How many samples are made up by default: 256, fewer where one takes long, none where 20 take too long.

    work: `Analysis.work`, what one sample takes.
    """
    count = int(min(LIMIT // 2, _MADE_UP / max(work, 1.0)))
    return count if count >= FEWEST_MADE_UP else 0


@dataclass(frozen=True)
class Batch:
    """Model inputs, and their labels if there are any.

    targets: whatever came beside the inputs, on the inputs' device; None without labels. Tensors and lists in it that
        are as long as the batch have an entry for each sample.
    """

    example: Example
    targets: Any | None = None

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.example.count

    def __getitem__(self, rows: slice) -> Batch:
        """Some of its samples."""
        return Batch(self.example.map_rows(lambda t: t[rows]), _rows_of(self.targets, rows, self.count))

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """One batch of the inputs of several; targets are left out."""
        parts = zip(*(batch.example.rows() for batch in batches), strict=True)
        return Batch(batches[0].example.map_rows(lambda _: torch.cat(next(parts))))

    def to(self, device: torch.device | None) -> Batch:
        """The same batch on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        targets = dict(self.targets) if isinstance(self.targets, Mapping) else self.targets
        return Batch(self.example.map(move), pytree.tree_map_only(Tensor, move, targets))


def _rows_of(targets: Any, rows: slice, count: int) -> Any:
    """The targets of some of `count` samples."""
    if isinstance(targets, Tensor):
        return targets[rows] if targets.dim() and len(targets) == count else targets
    if isinstance(targets, Mapping):
        return {name: _rows_of(value, rows, count) for name, value in targets.items()}
    if not isinstance(targets, (tuple, list)):
        return targets
    together = all(isinstance(value, Tensor) and value.dim() and len(value) == count for value in targets)
    if len(targets) == count and not together:  # one for each sample: the boxes of each picture, say
        return targets[rows]
    found = [_rows_of(value, rows, count) for value in targets]
    return type(targets)(*found) if hasattr(targets, "_fields") else type(targets)(found)


@dataclass(frozen=True)
class Samples:
    """Batches in memory.

    source: where they come from, in words for the report. whole: batches must keep their size, the only one that the
    model takes. invented: made up, not the user's.
    """

    batches: tuple[Batch, ...]
    source: str
    whole: bool = False
    invented: bool = False

    @property
    def count(self) -> int:
        """Number of samples in all batches."""
        return sum(batch.count for batch in self.batches)

    @property
    def labelled(self) -> bool:
        """Whether every batch has targets."""
        return all(batch.targets is not None for batch in self.batches)

    def examples(self) -> Iterator[Example]:
        """The inputs alone, batch by batch."""
        return (batch.example for batch in self.batches)

    def pieces(self, most: int) -> Iterator[Example]:
        """The inputs alone in batches of at most `most` samples, where batches may be split."""
        if self.whole:
            return self.examples()
        return (batch[at : at + most].example for batch in self.batches for at in range(0, batch.count, most))

    def with_more(self, others: Sequence[Samples]) -> Samples:
        """All sets together; what was made up is named in the source, and labels are those of the first set alone."""
        if not others:
            return self
        source = " and ".join(
            [f"{self.count} samples of {self.source}", *(f"{other.count} {other.source}" for other in others)]
        )
        batches = (batch for other in (self, *others) for batch in other.batches)
        return replace(self, batches=tuple(batches), source=source)

    def joined(self, least: int) -> Samples:
        """The same samples in batches of at least `least`, as far as there are so many and batches may be joined."""
        if self.whole:
            return self
        waiting: list[Batch] = []
        found: list[Batch] = []
        for batch in self.batches:
            waiting.append(batch)
            if sum(one.count for one in waiting) >= least:
                found.append(Batch.joined(waiting))
                waiting = []
        if waiting:
            found = [*found[:-1], Batch.joined([*found[-1:], *waiting])]
        return replace(self, batches=tuple(found))

    def first(self, count: int) -> Samples:
        """At most so many of them, where batches may be split; else the batches that begin before there are so many."""
        found, left = [], count
        for batch in self.batches:
            if left <= 0:
                break
            found.append(batch if self.whole else batch[:left])
            left -= batch.count
        return replace(self, batches=tuple(found))

    def split(self, share: float) -> tuple[Samples, Samples]:
        """Two parts, the second with `share` of the samples: to fit on, and to judge by.

        Raises UsageError where there is only one sample, or only one batch that must stay whole.
        """
        pieces = len(self.batches) if self.whole else self.count
        if pieces < 2:
            what = "batch" if self.whole else "sample"
            raise UsageError(f"{self.source} gave {pieces} {what}; at least 2 are needed, better a few hundred samples")
        fit: list[Batch] = []
        judge: list[Batch] = []
        if self.whole:
            every = max(2, round(1 / share))
            for number, batch in enumerate(self.batches):
                (judge if number % every == every - 1 or number == len(self.batches) - 1 else fit).append(batch)
            return replace(self, batches=tuple(fit)), replace(self, batches=tuple(judge))
        for batch, held in zip(self.batches, set_apart([b.count for b in self.batches], share), strict=True):
            left = batch.count - held if fit else max(1, batch.count - held)
            if left:
                fit.append(batch[:left])
            if left < batch.count:
                judge.append(batch[left:])
        return replace(self, batches=tuple(fit)), replace(self, batches=tuple(judge))


def set_apart(sizes: Sequence[int], share: float) -> list[int]:
    """How many of the last samples of each batch to judge by: a share of it, or of small batches all together."""
    found, seen = [], 0
    for size in sizes:
        if size * share >= 1:
            found.append(round(size * share))
        else:
            found.append(int((seen + size) * share + _ROUNDING) - int(seen * share + _ROUNDING))
            seen += size
    if not any(found):
        found[-1] = 1
    return found


def affordable(work: float) -> int:
    """How many samples are looked at unless the user says: 512, fewer where one takes long, never fewer than 32.

    work: `Analysis.work`, what one sample takes.
    """
    return int(min(LIMIT, max(_FEWEST, _AFFORDABLE / max(work, 1.0))))


def collect(
    data: Iterable[Any], like: Example, limit: int = LIMIT, batch: int | None = None, source: str = "--data"
) -> Samples:
    """Read up to `limit` samples from batches of tensors, (inputs, targets) or dictionaries.

    like: the model's example inputs; types and sizes must be the same. batch: the only batch size that the model
    takes, if there is one: larger batches are split to it and what is left over is not used.
    Raises UsageError where a batch holds other inputs, or numbers that are not finite, or there is none.
    """
    found: list[Batch] = []
    left = limit
    device = next((tensor.device for tensor in like.tensors()), None)
    if not isinstance(data, Iterable):
        raise UsageError(f"data is a {type(data).__name__}; wanted an iterable of batches")
    for number, item in enumerate(data, 1):
        whole = batch_of(item, like)
        check_alike(whole.example.tensors(), like.tensors())
        if not whole.count:  # what a loader that filters gives when nothing is left
            continue
        check_finite(whole, f"batch {number} of --data")
        for part in _parts(whole, batch, left):
            found.append(part.to(device))
            left -= part.count
        if left <= 0:
            break
    if not found:
        wanted = f" with {batch} samples, the only batch size that the model takes" if batch else ""
        raise UsageError(f"{source} gave no batch{wanted}")
    return Samples(tuple(found), source, whole=batch is not None)


def _parts(whole: Batch, size: int | None, left: int) -> list[Batch]:
    if size is None:
        return [whole[:left]]
    starts = range(0, whole.count - size + 1, size)
    return [whole[at : at + size] for at in starts][: -(-left // size)]


def batch_of(item: Any, like: Example) -> Batch:
    """What a loader gives (a tensor, a tuple, a dictionary) as inputs for the model, and targets if there are any.

    Raises UsageError where the inputs are not there.
    """
    targets: Any | None = None
    is_nested = isinstance(item, (tuple, list)) and 0 < len(item) <= 2 and isinstance(item[0], (tuple, list))
    if is_nested and len(item[0]) == len(like.args) and not isinstance(like.args[0], (tuple, list)):
        item = (*item[0], *item[1:])  # ((inputs ...), targets)
    if like.names and not like.kwargs and not any(isinstance(value, Mapping) for value in like.args):
        item = _by_position(item, like)
    if isinstance(item, (tuple, list)) and item and isinstance(item[0], Mapping) and like.kwargs:
        targets = item[1] if len(item) > 1 else None
        item = item[0]
    if isinstance(item, Tensor) or (isinstance(item, Mapping) and like.args and isinstance(like.args[0], Mapping)):
        item = (item,)
    names = [name for name, value in like.kwargs.items() if isinstance(value, Tensor)]
    if isinstance(item, (tuple, list)) and item and not like.args and len(names) == 1:  # the only input needs no name
        targets = None if len(item) == 1 else item[1] if len(item) == 2 else tuple(item[1:])
        item = {names[0]: item[0]}
    if isinstance(item, Mapping) and like.kwargs:
        _check_held(item, like.kwargs)
        if targets is None:
            targets = next((item[name] for name in _TARGETS if name in item and name not in like.kwargs), None)
        found = {name: item.get(name, value) for name, value in like.kwargs.items()}
        return Batch(Example((), found, like.without_rows()), targets)
    if isinstance(item, (tuple, list)) and like.args:
        given, rest, beside = item[: len(like.args)], like.args[len(item) :], item[len(like.args) :]
        if item and not any(isinstance(value, Tensor) for value in rest):
            targets = None if not beside else beside[0] if len(beside) == 1 else tuple(beside)
            return Batch(Example((*given, *rest), {}, like.without_rows()), targets)
    raise UsageError(
        f"a batch of --data is {_kind(item)}; wanted "
        + (f"a dictionary with {', '.join(like.kwargs)}" if like.kwargs else _wanted(len(like.args)))
    )


def _by_position(item: Any, like: Example) -> Any:
    """A dictionary, perhaps with targets beside or inside it, as the tuple that a model without keywords takes."""
    is_beside = isinstance(item, (tuple, list)) and len(item) > 0 and isinstance(item[0], Mapping)
    given, targets = (item[0], item[1:]) if is_beside else (item, ())
    if not isinstance(given, Mapping):
        return item
    wanted = dict(zip(like.names, like.args, strict=False))
    _check_held(given, wanted)
    targets = targets or [given[name] for name in _TARGETS if name in given and name not in wanted][:1]
    return (*(given.get(name, value) for name, value in wanted.items()), *targets)


def _check_held(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    # What is no tensor in the example (a flag, None) need not be in a batch.
    if missing := [name for name, value in wanted.items() if isinstance(value, Tensor) and name not in given]:
        held = ", ".join(map(str, given)) or "nothing"
        raise UsageError(f"a batch of --data lacks {', '.join(missing)}; it has {held}")


def _kind(batch: Any) -> str:
    sized = isinstance(batch, (tuple, list))
    return f"a {type(batch).__name__} of {len(batch)}" if sized else f"a {type(batch).__name__}"


def _wanted(inputs: int) -> str:
    return "a tensor or (inputs, targets)" if inputs == 1 else f"a tuple of {inputs} inputs, targets after them or not"


def check_alike(given: list[Tensor], like: list[Tensor]) -> None:
    """A captured graph takes any batch size at best; types and other sizes are those of the example."""
    seen, wanted = ([f"{str(t.dtype)[6:]} [N, {str(list(t.shape[1:]))[1:]}" for t in ts] for ts in (given, like))
    if seen != wanted:
        fitting = " ".join(f"--input {_text(tensor)}" for tensor in given)
        known = given and all(t.dim() > 1 and str(t.dtype)[6:] in KINDS for t in given)
        other = f", or an example like the data, if the model takes it: {fitting}" if known else "."
        raise UsageError(
            f"a batch of --data holds {'; '.join(seen) or 'no tensors'}; the example input is {'; '.join(wanted)}. "
            f"Give data like the example{other}"
        )


def _text(tensor: Tensor) -> str:
    """A tensor's shape for two samples and its type as `--input` takes them."""
    kind = str(tensor.dtype)[6:]
    return "x".join(map(str, (2, *tensor.shape[1:]))) + ("" if kind == "float32" else f":{kind}")


def check_finite(batch: Batch, where: str) -> None:
    """Raise UsageError where an input holds NaN or infinity."""
    for tensor in batch.example.tensors():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite().reshape(len(tensor) if tensor.dim() else 1, -1).all(1)).nonzero()[0])
            raise UsageError(f"{where} holds NaN or infinity in its sample {bad}")
