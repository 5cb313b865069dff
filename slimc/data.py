"""Data to calibrate on: batches in whatever shape people have them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError
from .graph.capture import Example


def examples(data: Iterable[Any], like: Example, limit: int = 512) -> Iterator[Example]:
    """Model inputs from batches of tensors, (inputs, targets) or dictionaries, up to `limit` samples.

    A batch is cut to the inputs that the model takes: the first so many items of a tuple, the known keys of a
    dictionary. Raises UsageError where a batch holds none.
    """
    seen = 0
    for batch in data:
        example = _example(batch, like)
        yield example
        seen += example.tensors()[0].shape[0]
        if seen >= limit:
            return


def _example(batch: Any, like: Example) -> Example:
    if isinstance(batch, Tensor):
        return Example((batch,), {})
    if isinstance(batch, Mapping) and like.kwargs:
        known = {name: value for name, value in batch.items() if name in like.kwargs}
        if known:
            return Example((), known)
    if isinstance(batch, (tuple, list)) and like.args and isinstance(batch[0], Tensor):
        return Example(tuple(batch[: len(like.args)]), {})
    raise UsageError(
        f"a batch of --data is {type(batch).__name__}; wanted a tensor, (inputs, targets), or a dictionary with the "
        f"model's arguments{': ' + ', '.join(like.kwargs) if like.kwargs else ''}"
    )


def open_data(text: str, batch_size: int = 64) -> Iterable[Any]:
    """Read --data: `npz:FILE` or `package.module:function` (a function that returns an iterable of batches)."""
    kind, _, rest = text.partition(":")
    if not rest:
        raise UsageError(f"--data {text}: wanted npz:FILE or package.module:function")
    return _npz(Path(rest), batch_size) if kind == "npz" else _function(kind, rest)


def load_arrays(path: Path) -> dict[str, Tensor]:
    """All arrays of an .npz file (or the one of an .npy file), floats as float32; no pickled objects."""
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else {"input": loaded}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as .npz or .npy: {error}") from error
    if not arrays:
        raise UsageError(f"{path} holds no array")
    return {name: torch.from_numpy(a.astype(np.float32) if a.dtype == np.float64 else a) for name, a in arrays.items()}


def _npz(path: Path, batch_size: int) -> list[tuple[Tensor, ...]]:
    tensors = list(load_arrays(path).values())
    if len({t.shape[:1] for t in tensors}) != 1:
        raise UsageError(f"{path}: its arrays differ in length; each must hold one entry per sample")
    return list(zip(*(torch.split(t, batch_size) for t in tensors), strict=True))


def _function(module: str, name: str) -> Iterable[Any]:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--data {module}:{name} cannot be imported: {error}") from error
    batches = found()
    if not isinstance(batches, Iterable):
        raise UsageError(f"--data {module}:{name} returned {type(batches).__name__}; wanted an iterable of batches")
    return batches
