"""Data sets as files: what `--data fashion-mnist:DIR`, `imagefolder:DIR` and `npz:FILE` read."""

from __future__ import annotations

import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""
_MEAN, _STD = 0.2860, 0.3530  # of the 60,000 training pictures, from 0 to 1
_IMAGES, _LABELS = 0x803, 0x801  # the magic numbers of the format: unsigned bytes in three axes, in one


def fashion_mnist(folder: Path = FASHION_MNIST, split: str = "train") -> tuple[Tensor, Tensor]:
    """Pictures [N, 1, 28, 28], shifted and scaled to mean 0 and deviation 1 over the training set, and labels [N].

    split: `train` (60,000) or `t10k` (10,000, the test set). Raises UsageError where the files are not what they
    should be.
    """
    images = _idx(folder / f"{split}-images-idx3-ubyte.gz", _IMAGES)
    labels = _idx(folder / f"{split}-labels-idx1-ubyte.gz", _LABELS)
    if len(images) != len(labels):
        raise UsageError(f"{folder}: {len(images)} pictures but {len(labels)} labels in the files of {split}")
    return (images[:, None].float() / 255 - _MEAN) / _STD, labels.long()


def _idx(path: Path, magic: int) -> Tensor:
    """One file of the idx format: a magic number, the size of each axis, then bytes."""
    plain = path.with_suffix("")  # people unpack them
    try:
        content = plain.read_bytes() if plain.exists() else gzip.decompress(path.read_bytes())
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    axes = magic & 0xFF
    head = 4 * (1 + axes)
    if len(content) < head or struct.unpack(">I", content[:4])[0] != magic:
        raise UsageError(f"{path} is no idx file of {axes}-axis bytes")
    size = struct.unpack(f">{axes}I", content[4:head])
    if len(content) != head + int(np.prod(size)):
        raise UsageError(f"{path} should hold {'x'.join(map(str, size))} bytes after its head; it has another length")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).reshape(size).copy())


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
