"""Small networks of every kind, and the subject that a scorer sees, for the tests of scorers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import slimc
from slimc import scores
from slimc.analysis import Analysis
from slimc.samples import collect
from slimc.scores import Scores, Subject

CLASSES = 5


class ResNet(nn.Module):
    """One stream with a shortcut: batch norms after every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.bn1 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.b(self.relu(self.bn1(self.a(x)))))
        y += x
        return self.fc(self.relu(y).mean((2, 3)))  # type: ignore[no-any-return]


class MobileNet(nn.Module):
    """An inverted residual: expand, depthwise, project."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        return self.fc(self.last(x).mean((2, 3)))  # type: ignore[no-any-return]


class DenseNet(nn.Module):
    """Batch norms read a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.n1, self.c1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(7), nn.Conv2d(7, 5, 3, padding=1, bias=False)
        self.n3, self.fc = nn.BatchNorm2d(12), nn.Linear(12 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.c1(torch.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.c2(torch.relu(self.n2(x)))], 1)
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.n3(x)), 2)
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Patches, a class token, positions, one block with fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.n1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.n2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.n3, self.fc = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.n1(x)).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape[0], 5, 8))
        x = x + self.down(nn.functional.gelu(self.up(self.n2(x))))
        return self.fc(self.n3(x)[:, 0])  # type: ignore[no-any-return]


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet, "mobilenet": MobileNet, "densenet": DenseNet, "vit": ViT,
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """One of the networks in float64 and eval mode, with vectors and statistics that differ by channel."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NETS[name]().double()
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.data.uniform_(0.2, 1.5) if "var" in key or "weight" in key else tensor.data.normal_(0, 0.4)
        return model.eval()


def pictures(count: int, seed: int = 1, size: int = 8) -> Tensor:
    """[count, 3, size, size] in float64."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(batches: int = 3, size: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of pictures with labels."""
    labels = torch.Generator().manual_seed(seed)
    return [
        (pictures(size, seed + number), torch.randint(CLASSES, (size,), generator=labels)) for number in range(batches)
    ]


def subject_of(analysis: Analysis, data: Sequence[Any] | None = None, **more: Any) -> Subject:
    """What a scorer sees."""
    example = analysis.captured.example
    samples = None if data is None else collect(data, example, 10**6, source="the data")
    return Subject(analysis.types, analysis.grouping, "l2", 0, samples=samples, **more)


def score(name: str, model: nn.Module, data: Sequence[Any] | None = None, **more: Any) -> dict[str, Scores]:
    """Scores by group name; the example is the data's first batch, else one picture."""
    first = pictures(2) if data is None else data[0][0] if isinstance(data[0], tuple) else data[0]
    analysis = slimc.inspect(model, first)
    found = scores.find(name).score(subject_of(analysis, data, **more))
    return {group.name: own for group, own in zip(analysis.groups, found, strict=True)}


def assert_same(left: list[Scores], right: list[Scores], rtol: float = 1e-8) -> None:
    """All groups, with NaN equal to NaN."""
    for own, other in zip(left, right, strict=True):
        np.testing.assert_allclose(own, other, rtol=rtol, atol=1e-12)


def eager_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy, of the user's own module."""
    return nn.functional.cross_entropy(model(x), y)


@functools.cache
def analysed(name: str) -> Analysis:
    """One of the networks, captured once for all tests."""
    return slimc.inspect(build(name), labelled()[0][0])


def run(name: str, net: str, data: Sequence[Any] | None = None, **more: Any) -> list[Scores]:
    """Scores of one of the networks by group."""
    return scores.find(name).score(subject_of(analysed(net), labelled() if data is None else data, **more))
