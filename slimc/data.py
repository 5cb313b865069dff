"""Data to calibrate on: batches in whatever shape people have them."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError
from .graph.capture import Example


def examples(data: Iterable[Any], like: Example, limit: int = 512, batch: int | None = None) -> Iterator[Example]:
    """Model inputs from batches of tensors, (inputs, targets) or dictionaries, up to `limit` samples.

    A batch is cut to the inputs that the model takes: the first so many items of a tuple, the known keys of a
    dictionary; (dictionary, targets) is a dictionary too. `batch` is the only size that the model takes, if there
    is one: larger batches are split to it and what is left over is not used. Raises UsageError where a batch holds
    other inputs.
    """
    seen = 0
    device = next((tensor.device for tensor in like.tensors()), None)
    for item in data:
        example = _example(item, like)
        _check_alike(example.tensors(), like.tensors())
        for part in _parts(example, batch):
            yield part.map(lambda tensor: tensor.to(device))
            seen += len(part.tensors()[0])
        if seen >= limit:
            return


def _parts(example: Example, size: int | None) -> list[Example]:
    if size is None:
        return [example]
    starts = range(0, len(example.tensors()[0]) - size + 1, size)
    return [example.map(lambda tensor, at=start: tensor[at : at + size]) for start in starts]


def _example(batch: Any, like: Example) -> Example:
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping):
        batch = batch[0]
    if isinstance(batch, Tensor):
        batch = (batch,)
    # What is no tensor in the example (a flag, None) need not be in a batch.
    if isinstance(batch, Mapping) and like.kwargs:
        missing = [name for name, value in like.kwargs.items() if isinstance(value, Tensor) and name not in batch]
        if not missing:
            return Example((), {name: batch.get(name, value) for name, value in like.kwargs.items()})
        raise UsageError(
            f"a batch of --data lacks {', '.join(missing)}; it has {', '.join(map(str, batch)) or 'nothing'}"
        )
    if isinstance(batch, (tuple, list)) and like.args:
        rest = like.args[len(batch) :]
        if batch and not any(isinstance(value, Tensor) for value in rest):
            return Example((*batch[: len(like.args)], *rest), {})
    raise UsageError(
        f"a batch of --data is {_kind(batch)}; wanted "
        + (f"a dictionary with {', '.join(like.kwargs)}" if like.kwargs else _wanted(len(like.args)))
    )


def _kind(batch: Any) -> str:
    sized = isinstance(batch, (tuple, list))
    return f"a {type(batch).__name__} of {len(batch)}" if sized else f"a {type(batch).__name__}"


def _wanted(inputs: int) -> str:
    return "a tensor or (inputs, targets)" if inputs == 1 else f"a tuple of {inputs} inputs, targets after them or not"


def _check_alike(given: list[Tensor], like: list[Tensor]) -> None:
    """A captured graph takes any batch size at best; types and other sizes are those of the example."""
    seen, wanted = ([f"{str(t.dtype)[6:]} [N, {str(list(t.shape[1:]))[1:]}" for t in ts] for ts in (given, like))
    if seen != wanted:
        raise UsageError(f"a batch of --data holds {'; '.join(seen)}; the example input is {'; '.join(wanted)}")


def open_data(text: str, batch_size: int = 64) -> Iterable[Any]:
    """Read --data: `npz:FILE` or `package.module:function` (a function that returns an iterable of batches)."""
    kind, _, rest = text.partition(":")
    if not kind or not rest:
        raise UsageError(f"--data {text}: wanted npz:FILE or package.module:function")
    return _npz(Path(rest), batch_size) if kind == "npz" else _function(kind, rest)


def load_arrays(path: Path) -> dict[str, Tensor]:
    """All arrays of an .npz file (or the one of an .npy file), floats as float32; no pickled objects."""
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else {"input": loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as .npz or .npy: {error}") from error
    if not arrays:
        raise UsageError(f"{path} holds no array")
    try:
        return {n: torch.from_numpy(a.astype(np.float32) if a.dtype == np.float64 else a) for n, a in arrays.items()}
    except TypeError as error:
        raise UsageError(f"{path} holds arrays that are no numbers: {error}") from error


def _npz(path: Path, batch_size: int) -> list[tuple[Tensor, ...]]:
    tensors = list(load_arrays(path).values())
    if len({t.shape[:1] for t in tensors}) != 1 or not tensors[0].dim():
        raise UsageError(f"{path}: each of its arrays must hold one entry per sample, as many as the others")
    return list(zip(*(torch.split(t, batch_size) for t in tensors), strict=True))


def _function(module: str, name: str) -> Iterable[Any]:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--data {module}:{name} cannot be imported: {error}") from error
    try:
        batches = found()
    except Exception as error:
        raise UsageError(f"--data {module}:{name} failed with {type(error).__name__}: {error}") from error
    if not isinstance(batches, Iterable):
        raise UsageError(f"--data {module}:{name} returned {type(batches).__name__}; wanted an iterable of batches")
    return batches
