"""Norms, reductions, constants and an operator without a rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import library as operators

from zoo.case import case, conv


# One index within each of the 3 groups goes from all groups alike.
@case("~4: a.o gn.* b.i", "5: b.o fc.i")
class GroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.gn, self.b, self.fc = conv(3, 12), nn.GroupNorm(3, 12), conv(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(torch.relu(self.gn(self.a(x)))).mean((2, 3)))


@case("~6: a.o one.* b.i", "4: b.o each.* fc.i")
class GroupNormExtremes(nn.Module):
    """One group over all channels, and one group for each channel (which is exact)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one, self.b = conv(3, 6), nn.GroupNorm(1, 6), conv(6, 4)
        self.each, self.fc = nn.GroupNorm(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.each(self.b(torch.relu(self.one(self.a(x)))))).mean((2, 3)))


@case("6: a.o norm.* b.i", "5: b.o fc.i")
class InstanceNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv(3, 6), nn.InstanceNorm2d(6, affine=True), conv(6, 5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3)))


@case("6: a.o act.* b.i", "5: b.o fc.i")
class PRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b, self.one = conv(3, 6), nn.PReLU(6), conv(6, 5), nn.PReLU()
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.one(self.b(self.act(self.a(x)))).mean((2, 3)))


@case("5: b.o fc.i", frozen_by=("constant",))
class ConstantTensor(nn.Module):
    """A constant made in `forward` is no attribute of the model, and cannot shrink with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).view(1, 6, 1, 1)
        return self.fc(self.b(self.a(x) * scale).mean((2, 3)))


# No slice of the weights is the same channel for a softmax over channels: a stays whole.
@case("5: b.o fc.i")
class ChannelSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).softmax(1)).mean((2, 3)))


# Without their positions, the largest values over channels need no channel to stay.
@case("~6: a.o", "5: b.o fc.i")
class ChannelMax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(1, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).max(1, keepdim=True)[0]).mean((2, 3)))


@case()
class ChannelMaxPosition(nn.Module):
    """Where the largest channel stands depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, position = self.a(x).max(1)
        return value, position


@case("4: a.o fc.i")
class TopKOverTime(nn.Module):
    """The best places of every channel: the channels pass, the places are chosen among all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x).flatten(2).topk(3, -1)[0].mean(-1))


# A standardised weight takes its statistics over its input channels.
@case("~4: a.o b.i", "5: b.o fc.i", own_class=False)
class StandardisedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 4), conv(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.b.weight
        w = nn.functional.batch_norm(w.reshape(1, 5, -1), None, None, training=True).reshape_as(w)
        x = nn.functional.conv2d(self.a(x), w, self.b.bias)
        return self.fc(x.mean((2, 3)))


@operators.custom_op("slimc_zoo::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    """An operator that nobody has a rule for: every channel sees its right neighbour."""
    return x + x.roll(-1, 1)


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@case("4: a.o b.i", "5: c.o fc.i", frozen_by=("slimc_zoo.mystery.default",))
class UnknownOperator(nn.Module):
    """What the operator touches stays; the model around it is compressed all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = conv(3, 4), conv(4, 6), conv(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(torch.relu(mystery(self.b(torch.relu(self.a(x)))))).mean((2, 3)))
