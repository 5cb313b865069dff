"""Data sets as files: what `--data fashion-mnist:DIR`, `imagefolder:DIR` and `npz:FILE` read."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    except (OSError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    axes = magic & 0xFF
    head = 4 * (1 + axes)
    if len(content) < head or struct.unpack(">I", content[:4])[0] != magic:
        raise UsageError(f"{path} is no idx file of {axes}-axis bytes")
    size = struct.unpack(f">{axes}I", content[4:head])
    if len(content) != head + int(np.prod(size)):
        raise UsageError(f"{path} should hold {'x'.join(map(str, size))} bytes after its head; it has another length")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).reshape(size).copy())


IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pictures, from 0 to 1: what torchvision's models and most others are trained on."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def image_folder(folder: Path, shape: tuple[int, ...]) -> list[Path]:
    """The pictures under a folder, at any depth, in order of a hash of their names, so that any few are mixed.

    shape: [channels, height, width] of what the model takes. Raises UsageError where there is no picture, or the
    model takes none.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(f"imagefolder:{folder}: the model takes {list(shape)} for each sample, which is no picture")
    if not folder.is_dir():
        raise UsageError(f"imagefolder:{folder} is no folder")
    found = [path for path in _files(folder) if path.suffix.lower() in _SUFFIXES and path.is_file()]
    if not found:
        raise UsageError(f"imagefolder:{folder} holds no picture ({', '.join(sorted(_SUFFIXES))})")
    return sorted(found, key=lambda path: hashlib.sha256(str(path.relative_to(folder)).encode()).digest())


def _files(folder: Path) -> Iterator[Path]:
    """Files at any depth, also behind links to folders; what is hidden (caches, checkpoints) apart."""
    for place, folders, files in os.walk(folder, followlinks=True):
        above = os.path.join(os.path.realpath(place), "")
        folders[:] = [
            name for name in folders
            if not name.startswith(".") and not above.startswith(os.path.join(os.path.realpath(Path(place, name)), ""))
        ]  # fmt: skip
        yield from (Path(place, name) for name in files if not name.startswith("."))


def picture(path: Path, shape: tuple[int, ...]) -> Tensor:
    """One picture [channels, height, width]: scaled to cover the size, the middle cut out, normalised.

    Three channels by `IMAGE_MEAN` and `IMAGE_STD`, one by their means. UsageError where the file is no picture.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UsageError("reading pictures needs Pillow; install it with: pip install pillow") from error
    channels, height, width = shape
    try:
        with Image.open(path) as image:
            is_deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
            if image.mode in ("I", "F") and not is_deep:
                raise UsageError(f"{path} holds 32-bit values, whose range is not known; convert it to 8 or 16 bits")
            if is_deep:  # of 16 bits; Pillow would take all above 255 for white
                whole: Image.Image = Image.fromarray((np.asarray(image, np.uint16) // 257).astype(np.uint8))
            else:
                whole = image
            fitted = ImageOps.fit(whole.convert("RGB" if channels == 3 else "L"), (width, height))
    except UsageError:
        raise
    except Exception as error:  # what a decoder raises on damaged files is of many kinds
        raise UsageError(f"{path} cannot be read as a picture: {error}") from error
    values = torch.from_numpy(np.asarray(fitted, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / 255)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (IMAGE_MEAN, IMAGE_STD))
    return (values - mean) / std if channels == 3 else (values - mean.mean()) / std.mean()


def load_arrays(path: Path) -> dict[str, Tensor]:
    """All arrays of an .npz file (or the one of an .npy file), floats as float32; no pickled objects.

    Other types stay, in the byte order of this machine.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else {"input": loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as .npz or .npy: {error}") from error
    if not arrays:
        raise UsageError(f"{path} holds no array")
    if others := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise UsageError(f"{path} is no .npz file: {others[0]} in it is no array")
    try:
        return {n: torch.from_numpy(a.astype(_ours(a.dtype), copy=False)) for n, a in arrays.items()}
    except TypeError as error:
        raise UsageError(f"{path} holds arrays that are no numbers: {error}") from error


def _ours(kind: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float32) if kind.kind == "f" else kind.newbyteorder("=")
