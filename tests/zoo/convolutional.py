"""Convolutional networks: chains, shortcuts, groups, gates, concatenations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.case import case, conv


@case("8: a.o bn.* b.i", "6: b.o fc.i")
class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.fc = conv(3, 8), nn.BatchNorm2d(8), conv(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.bn(self.a(x))))
        return self.fc(x.mean((2, 3)))


@case("8: stem.o a.i b.o bn.* fc.i", "5: a.o b.i")
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 5), conv(5, 8)
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.bn(self.b(torch.relu(self.a(x)))))
        return self.fc(x.mean((2, 3)))


@case("4: stem.o a.i down.i", "5: a.o b.i", "6: b.o down.o fc.i")
class DownsampleShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 4), conv(4, 5, stride=2), conv(5, 6)
        self.down, self.fc = nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.b(torch.relu(self.a(x))) + self.down(x))
        return self.fc(x.mean((2, 3)))


# A grouped convolution's input is (group, input offset), its output (group, output offset).
@case("4: a.o g.o b.i", "2: a.o g.i", "3: g.o b.i", "5: b.o fc.i")
class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b, self.fc = conv(3, 8), conv(8, 12, groups=4), conv(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(torch.relu(self.g(self.a(x)))).mean((2, 3)))


@case("6: a.o d.o bn.* b.i", "5: b.o fc.i")
class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.bn = conv(3, 6), conv(6, 6, groups=6), nn.BatchNorm2d(6)
        self.b, self.fc = conv(6, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(torch.relu(self.bn(self.d(self.a(x))))).mean((2, 3)))


# Two outputs per input channel: (channel, multiple).
@case("4: a.o d.o b.i", "2: d.o b.i", "5: b.o fc.i")
class DepthMultiplier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.b, self.fc = conv(3, 4), conv(4, 8, groups=4), conv(8, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(torch.relu(self.d(self.a(x)))).mean((2, 3)))


@case("4: stem.o n1.* c1.i n2.* c2.i n3.* fc.i", "3: c1.o n2.* c2.i n3.* fc.i", "5: c2.o n3.* fc.i")
class DenseConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n1, self.c1 = conv(3, 4), nn.BatchNorm2d(4), conv(4, 3)
        self.n2, self.c2, self.n3, self.fc = nn.BatchNorm2d(7), conv(7, 5), nn.BatchNorm2d(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.c1(torch.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.c2(torch.relu(self.n2(x)))], 1)
        return self.fc(torch.relu(self.n3(x)).mean((2, 3)))


@case("8: a.o down.i up.o b.i", "3: down.o up.i", "5: b.o fc.i")
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = conv(3, 8), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.b, self.fc = conv(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.fc(self.b(x * gate).mean((2, 3)))


@case("4: a.o fc.i")
class FlattenedMap(nn.Module):
    """Each channel owns 2 x 2 neighbouring inputs of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.fc = conv(3, 4), nn.AdaptiveAvgPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.a(x)), 1))


@case("6: a.o up.i", "4: up.o b.i", "5: b.o fc.i")
class TransposedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = conv(3, 6), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.b, self.fc = conv(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.up(self.a(x))).mean((2, 3)))


# weight [C_in, C_out / groups, ...]: in = (group, inside), out = (group, offset).
@case(
    "2: a.o up.weight:0 up.bias:0 b.i", "3: a.o up.weight:0", "4: up.weight:1 up.bias:0 b.i", "5: b.o fc.i"
)  # fmt: skip
class GroupedTransposedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = conv(3, 6), nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.b, self.fc = conv(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.up(self.a(x))).mean((2, 3)))


@case("4: a.o scale:0 shift:1 b.i", "5: b.o fc.i")
class RawParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 4), conv(4, 5), nn.Linear(5, 2)
        self.scale, self.shift = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x) * self.scale + self.shift).mean((2, 3)))


@case("8: twice.i twice.o stem.o fc.i")
class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.twice(torch.relu(self.twice(x))).mean((2, 3)))


@case("3: a.o head1.i head2.i", "4: head2.o out.i")
class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head1, self.head2, self.out = conv(3, 3), conv(3, 2), conv(3, 4), conv(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.a(x))
        return {"one": self.head1(x), "two": self.out(torch.relu(self.head2(x)))}
