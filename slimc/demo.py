"""The demo: a small residual network and real data that ship with a library, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slimc.random_state import kept_random_state, seed_all
from slimc.training.loop import Epoch, fit
from slimc.training.recipe import Recipe

if TYPE_CHECKING:
    from slimc.result import Compressed

SIDE = 24  # the 8x8 digits are enlarged: two strided stages still leave 6x6, and latency is large enough to measure
SPLITS = (0.6, 0.15, 0.25)  # train, validation, test
TRAIN_EPOCHS = 8
FINETUNE_EPOCHS = 4


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for 24x24 grey pictures of ten digits: a stem, three stages and a linear head."""

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = _stage(width, width, blocks, stride=1)
        self.stage2 = _stage(width, 2 * width, blocks, stride=2)
        self.stage3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 1, 24, 24] to [N, 10]."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: torch.Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(ResidualBlock(outputs, outputs) for _ in range(blocks - 1)))


@dataclass(frozen=True)
class Digits:
    """The three parts of the data; `test` is for the numbers that are reported and for nothing else."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def digits(seed: int = 0) -> Digits:
    """The 1797 handwritten digits of scikit-learn as [N, 1, 24, 24], normalised, split by class.

    The 8x8 originals are enlarged by bilinear interpolation. Mean and deviation are those of the training part.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    indices, labels = list(range(len(data.target))), data.target
    fitted, test = train_test_split(indices, test_size=SPLITS[2], stratify=labels, random_state=seed)
    share = SPLITS[1] / (SPLITS[0] + SPLITS[1])
    training, validation = train_test_split(fitted, test_size=share, stratify=labels[fitted], random_state=seed)

    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    images = nn.functional.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    images = (images - images[training].mean()) / images[training].std()
    targets = torch.tensor(labels, dtype=torch.int64)
    return Digits(*(TensorDataset(images[part], targets[part]) for part in (training, validation, test)))


def batches(data: TensorDataset, *, shuffle: bool = False, batch_size: int = 64) -> DataLoader[Any]:
    """Batches of (images, labels); the order of a shuffled loader comes from torch's global random state.

    A shuffled loader drops the last, smaller batch: a batch norm over very few pictures is noise.
    """
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, drop_last=shuffle)


def trained_digits_net(
    data: Digits, *, epochs: int = TRAIN_EPOCHS, seed: int = 0, progress: Callable[[Epoch], None] | None = None
) -> DigitsNet:
    """A `DigitsNet` trained on the training part; the same seed gives the same network on the same machine."""
    with kept_random_state():
        seed_all(seed, 0)
        model = DigitsNet()
    loader, validation = batches(data.train, shuffle=True), batches(data.validation, batch_size=256)
    recipe = Recipe(rate=0.1, precision="float32")
    fit(
        model,
        loader,
        data.validation.tensors[0][:2],
        epochs=epochs,
        recipe=recipe,
        val=validation,
        seed=seed,
        progress=progress,
    )
    return model.eval()


def run(
    out: Path,
    *,
    flops: str | float = 0.4,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = True,
    progress: Callable[[str, str], None] | None = None,
) -> Compressed:
    """The whole pipeline on the digits: train, cut, fine-tune, prove, export, measure, report.

    Accuracy in the report is that on the test part, which nothing else looks at.
    """
    from slimc.training.api import schedule

    tell = progress or (lambda _kind, _text: None)

    def epoch(done: Epoch) -> None:
        tell("detail", f"epoch {done.number} of {done.of}, validation accuracy {100 * (done.accuracy or 0):.2f}%")

    tell("stage", "data")
    data = digits(seed)
    test, validation = (batches(part, batch_size=256) for part in (data.test, data.validation))
    tell("stage", "train")
    model = trained_digits_net(data, seed=seed, progress=epoch)
    example = data.test.tensors[0][:2]
    training = schedule(
        "one-shot", model, example, flops=flops, epochs=FINETUNE_EPOCHS, data=batches(data.train, shuffle=True),
        val=validation, test=test, scorer="magnitude", recover="none", recipe=Recipe(rate=0.02), seed=seed,
        model_name="digits", progress=progress,
    )  # fmt: skip
    pruned = None
    for phase in training:  # the one phase, fine-tuning, not trained yet
        pruned = training.accuracy_on(phase.module, test)
    slim: Compressed = training.result
    assert slim.report.accuracy is not None
    slim.report = replace(slim.report, accuracy=replace(slim.report.accuracy, pruned=pruned))
    slim.save(out, overwrite=overwrite, latency=True, threads=threads)
    return slim
