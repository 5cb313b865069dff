"""Small hand-written models, each with the channel groups that it must have, worked out by hand.

A group is written as its width and the places that it shrinks, for example `"8: conv.o bn.* fc.i"`:

    name.o   the output channels of a layer: axis 0 of its weight (axis 1 if transposed) and its bias
    name.i   its input channels: axis 1 of its weight (axis 0 if transposed)
    name.*   axis 0 of every parameter and floating-point buffer of a module (batch norm, layer norm, PReLU)
    name:2   axis 2 of the tensor `name`

A `~` before the width marks a group that is not exact: a norm takes its statistics over its channels.
The models are found by `CASES`; a bug fix starts with one more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laws import Signature

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    inputs: what it runs on. groups: expected groups, in the notation above.
    own_class: whether the user's class comes back smaller (False: sizes are written into its forward).
    frozen_by: operators that must be named as the reason why something is left alone.
    inferred_again: False where the cut leaves an operator behind that freezes what it reads.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    groups: tuple[str, ...]
    own_class: bool = True
    frozen_by: tuple[str, ...] = ()
    inferred_again: bool = True

    def build(self) -> tuple[nn.Module, Any]:
        """The model and its inputs, the same at every call, with weights that show every mistake."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.model()
            scatter_weights(model)
            return model.eval(), self.inputs()

    def expected(self, model: nn.Module) -> list[Signature]:
        """The expected groups as the laws compare them."""
        return sorted((_signature(text, model) for text in self.groups), key=lambda s: (s[0], sorted(s[2])))


def case(*groups: str, inputs: Callable[[], Any] | None = None, **more: Any) -> Callable[[type], type]:
    """Register a model class, by its name, with its expected groups."""

    def register(model: type) -> type:
        assert model.__name__ not in CASES
        CASES[model.__name__] = Case(model.__name__, model, inputs or image, groups, **more)
        return model

    return register


def image() -> Tensor:
    """Two pictures of 3 channels, 8 x 8."""
    return torch.randn(2, 3, 8, 8)


def features(*shape: int) -> Callable[[], Tensor]:
    """A batch of two of some shape."""
    return lambda: torch.randn(2, *shape)


def words(count: int, length: int) -> Callable[[], Tensor]:
    """A batch of two sequences of word numbers."""
    return lambda: torch.arange(2 * length).reshape(2, length) % count


def scatter_weights(model: nn.Module) -> None:
    """Give every vector and statistic its own values: ones and zeros would hide swapped channels."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() <= 1 and "index" not in name:
            tensor.data.uniform_(0.5, 1.5)


def _signature(text: str, model: nn.Module) -> Signature:
    size, _, places = text.partition(":")
    found: set[tuple[str, int]] = set()
    for token in places.split():
        found.update(_places(token, model))
    return int(size.lstrip("~")), not size.startswith("~"), frozenset(found)


def _places(token: str, model: nn.Module) -> set[tuple[str, int]]:
    if ":" in token:
        name, axis = token.split(":")
        return {(name, int(axis))}
    path, _, kind = token.rpartition(".")
    module = model.get_submodule(path)
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if kind == "*":
        return {(f"{path}.{name}", 0) for name, tensor in own.items() if tensor.dim()}
    transposed = "Transpose" in type(module).__name__
    if kind == "i":
        return {(f"{path}.weight", 0 if transposed else 1)}
    bias = {(f"{path}.bias", 0)} if getattr(module, "bias", None) is not None else set()
    return {(f"{path}.weight", 1 if transposed else 0), *bias}


def conv(i: int, o: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    """A convolution that keeps the picture's size."""
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, **more)


# -- convolutional networks ---------------------------------------------------------------------------


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


@case("4: fc.i", inputs=features(4, 4))
class RollOfEverything(nn.Module):
    """Rolling without a dimension moves across rows, so nothing of the axis it crosses may go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x).roll(1).mean(1))


CASES["RollOfEverything"] = Case("RollOfEverything", RollOfEverything, features(4, 4), ())


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
@case("4: a.o b.i", "4: a.o c.i", "2: a.o d.i", "3: b.o c.o d.o fc.i")
class ChunkWithRest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 10), conv(4, 3), conv(4, 3), conv(2, 3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, d = self.a(x).chunk(3, 1)
        return self.fc((self.b(b) + self.c(c) + self.d(d)).mean((2, 3)))


CASES["ChunkWithRest"] = Case(
    "ChunkWithRest",
    ChunkWithRest,
    image,
    ("4: a.o b.i", "4: a.o c.i", "2: a.o d.i", "3: b.o c.o d.o fc.i"),
    own_class=False,
)


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


@case("5: b.o fc.i", inputs=image)
class ReflectedChannels(nn.Module):
    """Reflecting along channels copies neighbours, which other channels would be after a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 4), conv(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).transpose(1, 3)
        x = nn.functional.pad(x, (1, 1), mode="reflect").transpose(1, 3)
        return self.fc(self.b(x).mean((2, 3)))


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


# The chosen channels keep their places; the others of `a` are read whole by nobody but this operator.
@case("5: b.o fc.i", frozen_by=())
class IndexSelect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(3, 5), nn.Linear(5, 2)
        self.register_buffer("chosen", torch.tensor([4, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).index_select(1, self.chosen)).mean((2, 3)))


@case("3: a.o head1.i head2.i", "4: head2.o out.i")
class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head1, self.head2, self.out = conv(3, 3), conv(3, 2), conv(3, 4), conv(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.a(x))
        return {"one": self.head1(x), "two": self.out(torch.relu(self.head2(x)))}


@case("4: a.o fc.i")
class SqueezeEverything(nn.Module):
    """`squeeze()` drops the axes that had one index; one that shrinks to one index must not go with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).mean((2, 3), keepdim=True)
        return self.fc(x.squeeze().squeeze(-1))


@case("6: a.o b.i", "5: b.o fc.i")
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
@case("~6: a.o", "5: b.o fc.i", inputs=image)
class ChannelMax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(1, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).max(1, keepdim=True)[0]).mean((2, 3)))


@case(inputs=image)
class ChannelMaxPosition(nn.Module):
    """Where the largest channel stands depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, position = self.a(x).max(1)
        return value, position


@case("4: a.o fc.i", inputs=image)
class TopKOverTime(nn.Module):
    """The best places of every channel: the channels pass, the places are chosen among all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.a(x).flatten(2).topk(3, -1)[0].mean(-1))


# A standardised weight takes its statistics over its input channels.
@case("~4: a.o b.i", "5: b.o fc.i")
class StandardisedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 4), conv(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.b.weight
        w = nn.functional.batch_norm(w.reshape(1, 5, -1), None, None, training=True).reshape_as(w)
        x = nn.functional.conv2d(self.a(x), w, self.b.bias)
        return self.fc(x.mean((2, 3)))


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


@torch.library.custom_op("slimc_zoo::mystery", mutates_args=())
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


# -- attention, recurrence, text ----------------------------------------------------------------------


# qkv.weight rows are (3, head, size): the three parts are literal, heads are shared, q and k share their sizes.
@case(
    "2: qkv.o out.i", "4: qkv.o", "4: qkv.o out.i", "~8: norm.* qkv.i",
    inputs=features(5, 8), own_class=False,
)  # fmt: skip
class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(b, n, 8))


CASES["FusedAttention"] = Case(
    "FusedAttention",
    FusedAttention,
    features(5, 8),
    ("2: qkv.o out.i", "4: qkv.o", "4: qkv.o out.i"),
    own_class=False,
)
