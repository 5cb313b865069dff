"""A one-stage detector as the YOLO family builds them: C2f blocks, SPPF, a pyramid, heads with a DFL projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width, 3), Conv(width, width, 3)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Keeps its shape."""
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C2f(nn.Module):
    """Half of the channels pass, the rest goes through bottlenecks; everything is joined."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1 = Conv(inputs, 2 * self.c)
        self.cv2 = Conv((2 + depth) * self.c, outputs)
        self.m = nn.ModuleList(Bottleneck(self.c, shortcut) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H, W]."""
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        out: Tensor = self.cv2(torch.cat(y, 1))
        return out


class SPPF(nn.Module):
    """Three poolings in a row, joined."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(inputs, inputs // 2), Conv(inputs * 2, outputs)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H, W]."""
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        out: Tensor = self.cv2(torch.cat(y, 1))
        return out


class DFL(nn.Module):
    """The expected bin of a distribution: softmax, then a fixed 1x1 convolution that holds 0, 1, 2, ..."""

    def __init__(self, bins: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1)
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4 * bins, anchors] to [N, 4, anchors]."""
        batch, _, anchors = x.shape
        out: Tensor = self.conv(x.view(batch, 4, self.bins, anchors).transpose(2, 1).softmax(1)).view(batch, 4, anchors)
        return out


class Detector(nn.Module):
    """Backbone, top-down and bottom-up pyramid, three heads; returns boxes and class scores per anchor."""

    def __init__(self, width: int = 16, classes: int = 20, bins: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(Conv(3, w, 3, 2), Conv(w, 2 * w, 3, 2), C2f(2 * w, 2 * w))
        self.p3 = nn.Sequential(Conv(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, 2))
        self.p4 = nn.Sequential(Conv(4 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w, 2))
        self.p5 = nn.Sequential(Conv(8 * w, 16 * w, 3, 2), C2f(16 * w, 16 * w), SPPF(16 * w, 16 * w))
        self.up = nn.Upsample(scale_factor=2.0)
        self.n4, self.n3 = C2f(24 * w, 8 * w, 1, False), C2f(12 * w, 4 * w, 1, False)
        self.d3, self.d4 = Conv(4 * w, 4 * w, 3, 2), Conv(8 * w, 8 * w, 3, 2)
        self.o4, self.o5 = C2f(12 * w, 8 * w, 1, False), C2f(24 * w, 16 * w, 1, False)
        sizes = (4 * w, 8 * w, 16 * w)
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(s, 4 * w, 3), Conv(4 * w, 4 * w, 3), nn.Conv2d(4 * w, 4 * bins, 1)) for s in sizes
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Conv(s, 4 * w, 3), Conv(4 * w, 4 * w, 3), nn.Conv2d(4 * w, classes, 1)) for s in sizes
        )
        self.dfl = DFL(bins)
        self.no, self.bins, self.classes = classes + 4 * bins, bins, classes

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 4 + classes, anchors]."""
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([self.up(p5), p4], 1))
        n3 = self.n3(torch.cat([self.up(n4), p3], 1))
        o4 = self.o4(torch.cat([self.d3(n3), n4], 1))
        o5 = self.o5(torch.cat([self.d4(o4), p5], 1))
        levels = [torch.cat((a(f), b(f)), 1) for a, b, f in zip(self.cv2, self.cv3, (n3, o4, o5), strict=True)]
        joined = torch.cat([level.view(x.shape[0], self.no, -1) for level in levels], 2)
        box, scores = torch.split(joined, [4 * self.bins, self.classes], 1)
        return torch.cat((self.dfl(box), scores.sigmoid()), 1)
