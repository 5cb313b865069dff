"""Training data as `--data` names it: what to train on, what to validate on, what to report on.

The three parts never mix: training batches are augmented, validation is what early stopping and the best weights go
by, and the test part is looked at once, at the end, by the report alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimc.data import Readable, function_of
from slimc.datasets import fashion_mnist, image_folder, load_arrays, picture
from slimc.errors import UsageError
from slimc.graph.example import Example

BATCH, _DIGITS = 128, 64
_HELD_OUT = 1 / 6
"""The share for validation where the data does not say: 10,000 of Fashion-MNIST's 60,000."""
_SHIFT = 14
_CHECK = 500


@dataclass(frozen=True)
class Feeds:
    """Batches of (inputs, targets) that can be read again and again; test is None where there is none."""

    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any] | None


def open_training(text: str, like: Example, batch_size: int | None = None) -> Feeds:
    """Read --data for training.

    `fashion-mnist:DIR` has 50,000 pictures to train on and 10,000 for each other part; `imagefolder:DIR` takes the
    folders train, val (or valid, validation) and test, each with a folder for each class, or splits DIR itself;
    `digits` is scikit-learn's; `npz:FILE` holds arrays of inputs, then labels, in order or by the names of the model's
    inputs and "labels", and is split; a function gives
    (train, validation) or (train, validation, test).
    """
    kind, _, rest = text.partition(":")
    asked, batch_size = batch_size, batch_size or BATCH
    if kind == "fashion-mnist":
        images, labels = fashion_mnist(Path(rest)) if rest else fashion_mnist()
        test = fashion_mnist(Path(rest), "t10k") if rest else fashion_mnist(split="t10k")
        held = 10_000
        return Feeds(
            Arrays([images[:-held], labels[:-held]], batch_size, trains=True, augmented=True),
            Arrays([images[-held:], labels[-held:]]), Arrays(list(test)),
        )  # fmt: skip
    if kind == "digits":
        from slimc.demo import digits

        parts = digits()
        train, validation, test_part = (list(part.tensors) for part in (parts.train, parts.validation, parts.test))
        return Feeds(Arrays(train, asked or _DIGITS, trains=True), Arrays(validation), Arrays(test_part))
    if kind == "synthetic":
        raise UsageError(
            f"--data {text}: what is made up has no labels to train on; it is for one cut, without --epochs"
        )
    if kind == "npz":
        return _split(load_arrays(Path(rest)), like, batch_size, Path(rest))
    if kind == "imagefolder":
        return _folders(Path(rest), tuple(like.tensors()[0].shape[1:]), batch_size)
    if not all(part.isidentifier() for part in f"{kind}.{rest}".split(".")):
        raise UsageError(
            f"--data {text}: wanted fashion-mnist[:DIR], digits, npz:FILE, imagefolder:DIR or package.module:function"
        )
    if asked is not None:
        raise UsageError(f"--batch-size {asked}: --data {text} makes its own batches; leave it out")
    found = function_of(kind, rest)
    if not isinstance(found, (tuple, list)) or len(found) not in (2, 3):
        raise UsageError(
            f"--data {text} returned {type(found).__name__}; "
            "to train it must give (train, validation) or (train, validation, test)"
        )
    loaders = [
        part if isinstance(part, Iterator) or not isinstance(part, Iterable) else Readable(part, f"--data {text}")
        for part in found
    ]
    return Feeds(loaders[0], loaders[1], loaders[2] if len(loaders) == 3 else None)


class Arrays:
    """Tensors with one row for each sample, in batches.

    trains: in random order, without a last, smaller batch (a batch norm over very few samples is noise).
    augmented: pictures are mirrored and moved. names: of the tensors, where batches are dictionaries.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        batch_size: int = _CHECK,
        *,
        trains: bool = False,
        augmented: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        self.tensors, self.batch_size, self.trains, self.augmented = list(tensors), batch_size, trains, augmented
        self.names, self._whole = names, trains

    def in_batches_of(self, size: int) -> Arrays:
        """The same in batches of this size alone; what is left over is not used."""
        found = copy.copy(self)
        found.batch_size, found._whole = size, True
        return found

    def __len__(self) -> int:
        return _batches(len(self.tensors[0]), self.batch_size, self._whole)

    def __iter__(self) -> Iterator[Any]:
        count = len(self.tensors[0])
        order = torch.randperm(count) if self.trains else torch.arange(count)
        for place in range(len(self)):
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            first, *others = (tensor[rows] for tensor in self.tensors)
            found = (augment(first) if self.augmented else first, *others)
            yield dict(zip(self.names, found, strict=True)) if self.names else found


class Pictures:
    """Picture files with class numbers, read batch by batch."""

    def __init__(
        self, paths: Sequence[tuple[Path, int]], shape: tuple[int, ...], batch_size: int, trains: bool
    ) -> None:
        self.paths, self.shape, self.batch_size, self.trains = list(paths), shape, batch_size, trains
        self._whole = trains

    def in_batches_of(self, size: int) -> Pictures:
        """The same in batches of this size alone; what is left over is not used."""
        found = copy.copy(self)
        found.batch_size, found._whole = size, True
        return found

    def __len__(self) -> int:
        return _batches(len(self.paths), self.batch_size, self._whole)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.paths)).tolist() if self.trains else list(range(len(self.paths)))
        for place in range(len(self)):
            chosen = [self.paths[i] for i in order[place * self.batch_size : (place + 1) * self.batch_size]]
            images = torch.stack([picture(path, self.shape) for path, _ in chosen])
            yield (augment(images) if self.trains else images), torch.tensor([label for _, label in chosen])


def _batches(count: int, size: int, whole: bool) -> int:
    """How many batches there are; whole: without a smaller one at the end, unless it is the only one."""
    return max(1, count // size) if whole else -(-count // size)


def augment(images: Tensor) -> Tensor:
    """Pictures [N, C, H, W], each mirrored half the time and moved by up to a fourteenth of its side."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    far = max(1, min(height, width) // _SHIFT)
    padded = functional.pad(images, (far, far, far, far), value=float(images.min()))
    rows, columns = (torch.randint(0, 2 * far + 1, (count, 1)) + torch.arange(side) for side in (height, width))
    moved = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def _split(arrays: Mapping[str, Tensor], like: Example, batch_size: int, path: Path) -> Feeds:
    tensors = list(arrays.values())
    wanted = [name for name, value in like.kwargs.items() if isinstance(value, Tensor)]
    names = tuple(arrays) if wanted and all(name in arrays for name in wanted) else ()
    if len(tensors) < 2 or len({tensor.shape[:1] for tensor in tensors}) != 1 or not tensors[0].dim():
        raise UsageError(f"{path}: to train it must hold inputs, then labels, one entry of each for every sample")
    if len(tensors[0]) < 2:
        raise UsageError(f"{path} holds {len(tensors[0])} sample; at least 2 are needed, one of them to validate on")
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    held = max(1, round(_HELD_OUT * len(order)))
    train, validation = ([tensor[part] for tensor in tensors] for part in (order[held:], order[:held]))
    trained = Arrays(train, min(batch_size, len(train[0])), trains=True, names=names)
    return Feeds(trained, Arrays(validation, names=names), None)


def _folders(folder: Path, shape: tuple[int, ...], batch_size: int) -> Feeds:
    names = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
    found = {part: next((folder / n for n in known if (folder / n).is_dir()), None) for part, known in names.items()}
    root = found["train"] or folder
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    classes = sorted(path.name for path in folders if not path.name.startswith("."))
    if len(classes) < 2:
        raise UsageError(f"imagefolder:{folder}: to train it needs a folder for each class, at {root}")

    def labelled(part: Path) -> list[tuple[Path, int]]:
        paths = [path for path in image_folder(part, shape) if path.parent != part]
        names = [path.relative_to(part).parts[0] for path in paths]
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise UsageError(f"imagefolder:{part} holds the class {unknown[0]!r}, which {root} does not")
        return [(path, classes.index(name)) for path, name in zip(paths, names, strict=True)]

    train = labelled(root)
    present = {label for _, label in train}
    if empty := [name for number, name in enumerate(classes) if number not in present]:
        raise UsageError(f"imagefolder:{root}: the class folder {empty[0]!r} holds no picture; fill it or take it away")
    validation = None if found["validation"] is None else labelled(found["validation"])
    if validation is None:  # the order is that of a hash, so that any part is a mixture
        held = max(1, round(_HELD_OUT * len(train)))
        train, validation = train[held:], train[:held]
    test = None if found["test"] is None else Pictures(labelled(found["test"]), shape, 64, trains=False)
    return Feeds(
        Pictures(train, shape, min(batch_size, len(train)), trains=True),
        Pictures(validation, shape, 64, trains=False), test,
    )  # fmt: skip
