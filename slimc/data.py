"""Where `--data` leads: files and functions that give batches."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .datasets import fashion_mnist, image_folder, load_arrays, picture
from .errors import UsageError
from .graph.example import Example

_BATCH = 64
_FORMS = "npz:FILE, fashion-mnist:DIR, imagefolder:DIR, synthetic:KIND or package.module:function"


def open_data(text: str, like: Example, batch_size: int | None = None) -> Iterable[Any]:
    """Read --data: `npz:FILE`, `fashion-mnist:DIR`, `imagefolder:DIR` or `package.module:function`.

    The function takes nothing and returns an iterable of batches, or (train, validation) as for training, of which the
    first is read. like: the model's inputs, which say how large pictures are, and how many the model takes where it
    takes so many only. Pictures of an image folder are read as they are needed, without labels.
    """
    batch_size = batch_size or like.count * max(1, _BATCH // like.count)
    kind, _, rest = text.partition(":")
    if not kind or (not rest and kind != "digits"):
        raise UsageError(f"--data {text}: wanted {_FORMS}")
    if kind == "digits":
        raise UsageError(f"--data {text}: digits are for training: give --epochs too")
    if kind == "npz":
        return _npz(Path(rest), batch_size, like)
    if kind == "fashion-mnist":
        images, labels = fashion_mnist(Path(rest))
        return list(zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True))
    if kind == "imagefolder":
        shape = tuple(like.tensors()[0].shape[1:])
        return _pictures(image_folder(Path(rest), shape), shape, batch_size)
    return _function(kind, rest)


def _pictures(paths: Sequence[Path], shape: tuple[int, ...], batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(paths), batch_size):
        yield torch.stack([picture(path, shape) for path in paths[start : start + batch_size]])


def _npz(path: Path, batch_size: int, like: Example) -> list[Any]:
    """Batches of all arrays in order, or by name where the model's inputs have the names of arrays."""
    arrays = load_arrays(path)
    tensors = list(arrays.values())
    if len({t.shape[:1] for t in tensors}) != 1 or not tensors[0].dim():
        raise UsageError(f"{path}: each of its arrays must hold one entry per sample, as many as the others")
    batches = list(zip(*(torch.split(t, batch_size) for t in tensors), strict=True))
    if like.kwargs and all(name in arrays for name, value in like.kwargs.items() if isinstance(value, Tensor)):
        return [dict(zip(arrays, batch, strict=True)) for batch in batches]
    return batches


def _function(module: str, name: str) -> Iterable[Any]:
    batches = function_of(module, name)
    if isinstance(batches, tuple | list) and 2 <= len(batches) <= 3 and all(map(_is_loader, batches)):
        batches = batches[0]
    if not isinstance(batches, Iterable):
        raise UsageError(f"--data {module}:{name} returned {type(batches).__name__}; wanted an iterable of batches")
    return _read(batches, f"--data {module}:{name}")


def _is_loader(part: Any) -> bool:
    """Whether it gives batches, and is none."""
    if isinstance(part, list) and part:  # of batches, which are tuples, lists or dictionaries themselves
        return all(isinstance(batch, tuple | list | Mapping) for batch in part)
    return isinstance(part, Iterable) and not isinstance(part, Tensor | tuple | list | Mapping | str | np.ndarray)


class Readable:
    """A loader of the user's that can be read again and again; errors in it are the user's."""

    def __init__(self, batches: Iterable[Any], where: str) -> None:
        self.batches, self.where = batches, where

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # TypeError where it does not say

    def __iter__(self) -> Iterator[Any]:
        return _read(self.batches, self.where)


def _read(batches: Iterable[Any], where: str) -> Iterator[Any]:
    """The same batches; what goes wrong in the user's code while they are read is not taken for a fault of ours."""
    try:
        yield from batches
    except Exception as error:
        raise UsageError(f"{where} failed with {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What an error says; those of a DataLoader's workers hold a traceback, whose last line says it."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if "Original Traceback" in str(error) else lines[0]


def function_of(module: str, name: str) -> Any:
    """What a function of the user's gives; UsageError where it cannot be imported or fails."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--data {module}:{name} cannot be imported: {error}") from error
    except Exception as error:  # the user's module may fail in any way while it is imported
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise UsageError(f"--data {module}:{name}: importing {module} fails with {said}") from error
    try:
        return found()
    except Exception as error:
        raise UsageError(f"--data {module}:{name} failed with {type(error).__name__}: {_first_line(error)}") from error
