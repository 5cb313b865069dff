"""Channels that are moved: views, shuffles, slices, splits, shifts, padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.case import case, conv, features


# The shuffled channels are (2, 4) seen as (4, 2): both are groups, the order is the model's.
@case("2: a.o b.i", "4: a.o b.i", "5: b.o fc.i", own_class=False)
class ShuffleByViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(self.b(x).mean((2, 3)))


# The operator's number of groups is a literal, so only the offsets may go.
@case("4: a.o b.i", "5: b.o fc.i")
class ShuffleOperator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle, self.b, self.fc = conv(3, 8), nn.ChannelShuffle(2), conv(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.shuffle(self.a(x))).mean((2, 3)))


# 12 channels are 3 channels x 2 x 2 places; the places are a literal of pixel_shuffle.
@case("3: a.o b.i", "5: b.o fc.i")
class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b, self.fc = conv(3, 12), nn.PixelShuffle(2), conv(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.up(self.a(x))).mean((2, 3)))


@case("3: a.o fc.i")
class PixelShuffleThenMean(nn.Module):
    """Nothing after the shuffle needs its space axes whole, but the factor 2 is still a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(3, 12), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.pixel_shuffle(self.a(x), 2).square().mean((2, 3)))


@case("3: a.o b.i", "5: b.o fc.i")
class PixelUnshuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 3), conv(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(torch.pixel_unshuffle(self.a(x), 2)).mean((2, 3)))


@case("6: a.o b.i", "5: b.o fc.i", own_class=False)
class Roll(nn.Module):
    """Channel i becomes channel i + 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).roll(2, 1)).mean((2, 3)))


@case(inputs=features(4, 4))
class RollOfEverything(nn.Module):
    """Rolling without a dimension moves across rows, so nothing of the axis it crosses may go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x).roll(1).mean(1))


@case("6: a.o b.i", "5: b.o fc.i")
class Flip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).flip(1)).mean((2, 3)))


# Even channels are read by b; odd ones by nobody, but they are still channels of a.
@case("3: a.o", "3: a.o b.i", "5: b.o fc.i", own_class=False, inferred_again=False)
class StridedSlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x)[:, ::2]).mean((2, 3)))


@case("6: a.o b.i", "5: b.o fc.i")
class CatWithFlip(nn.Module):
    """Channel i stands at i and at 11 - i."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(self.b(torch.cat([x, x.flip(1)], 1)).mean((2, 3)))


@case("4: a.o b.i", "5: b.o fc.i")
class ChunkAndMultiply(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return self.fc(self.b(left * torch.tanh(right)).mean((2, 3)))


@case("4: a.o b.i", "5: b.o fc.i")
class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.glu, self.b, self.fc = conv(3, 8), nn.GLU(1), conv(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.glu(self.a(x))).mean((2, 3)))


@case("2: a.o b.i", "5: a.o c.i", "3: b.o c.o fc.i", own_class=False)
class UnevenSplit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = conv(3, 7), conv(2, 3), conv(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).split([2, 5], 1)
        return self.fc((self.b(left) + self.c(right)).mean((2, 3)))


# 4 + 4 + 2: the last piece is smaller, and all pieces are read apart.
@case("4: a.o b.i", "4: a.o c.i", "2: a.o d.i", "3: b.o c.o d.o fc.i", own_class=False)
class ChunkWithRest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 10), conv(4, 3), conv(4, 3), conv(2, 3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, d = self.a(x).chunk(3, 1)
        return self.fc((self.b(b) + self.c(c) + self.d(d)).mean((2, 3)))


# The shortcut fills channels 0 and 7 with zeros, which never go; its six channels are those of the stem.
@case("6: stem.o a.i b.o fc.i", "5: a.o b.i")
class PaddingShortcut(nn.Module):
    """ResNet option A: the shortcut takes every second place and pads its channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = conv(3, 6), conv(6, 5, stride=2), conv(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return self.fc(torch.relu(self.b(torch.relu(self.a(x))) + short).mean((2, 3)))


@case("3: b.o fc.i", inputs=features(5, 8))
class ReflectedChannels(nn.Module):
    """Reflecting along channels copies neighbours, which other channels would be after a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(8, 4), nn.Linear(6, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(nn.functional.pad(self.a(x), (1, 1), mode="reflect")))


# The chosen channels keep their places; the others of `a` are read whole by nobody but this operator.
@case("5: b.o fc.i", frozen_by=())
class IndexSelect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(3, 5), nn.Linear(5, 2)
        self.register_buffer("chosen", torch.tensor([4, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).index_select(1, self.chosen)).mean((2, 3)))


@case("4: a.o fc.i", own_class=False)
class SqueezeEverything(nn.Module):
    """`squeeze()` drops the axes that had one index; one that shrinks to one index must not go with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).mean((2, 3), keepdim=True)
        return self.fc(x.squeeze().squeeze(-1))


@case("4: a.o b.i", "3: b.o fc.i")
class Unfolded(nn.Module):
    """im2col, a matrix product and col2im: a convolution spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 4), nn.Linear(36, 27), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        columns = nn.functional.unfold(self.a(x), 3, padding=1)
        columns = self.b(columns.transpose(1, 2)).transpose(1, 2)
        return self.fc(nn.functional.fold(columns, (8, 8), 3, padding=1).mean((2, 3)))
