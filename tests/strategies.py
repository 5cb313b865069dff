"""Whole small architectures, drawn by Hypothesis.

A recipe is a list of block names with numbers; `Drawn` builds it into a module whose forward follows the recipe.
Feature maps are 8 x 8 throughout (transposed convolutions and pixel shuffles are followed by pooling), so that any
block can follow any other; tokens are made from the map for attention and turned back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 8


@dataclass(frozen=True)
class Step:
    """One block: what it is, and three numbers that it may use as it likes."""

    kind: str
    a: int
    b: int
    c: int


@dataclass(frozen=True)
class Recipe:
    """An architecture. stem: channels of the first layer; outputs: how many heads; seed: of the weights and the cut."""

    stem: int
    steps: tuple[Step, ...]
    head: str
    outputs: int
    seed: int

    def build(self) -> tuple[nn.Module, Tensor]:
        """The network and its input, the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = Drawn(self)
            for _, tensor in (*model.named_parameters(), *model.named_buffers()):
                if tensor.is_floating_point() and tensor.dim() == 1:
                    tensor.data.uniform_(0.5, 1.5)
            return model.eval(), torch.randn(2, 3, SIDE, SIDE)


class Block(nn.Module):
    """A block that turns `i` channels into `self.o`."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__()
        self.i, self.o = i, i


def divisor(number: int, wish: int) -> int:
    """The largest divisor of a number that is at most the wish."""
    return max(d for d in range(1, max(1, wish) + 1) if number % d == 0)


class Conv(Block):
    """Plain, grouped, depthwise or dilated, with a norm and an activation."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__(i, step)
        groups = (1, divisor(i, 2), divisor(i, 4), i)[step.b % 4]
        self.o = groups * max(1, (2 + step.a) // groups)
        dilation = 1 + step.c % 2
        self.conv = nn.Conv2d(i, self.o, 3, padding=dilation, dilation=dilation, groups=groups, bias=step.c % 3 > 0)
        self.norm = norm(self.o, step.c)
        self.act = activation(self.o, step.b + step.c)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Transposed(Block):
    """Twice as large by a transposed convolution or a pixel shuffle, and back by pooling."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__(i, step)
        groups = divisor(i, 1 + step.b % 3)
        self.o = groups * (1 + step.a % 4)
        self.shuffle = step.c % 2 == 0
        if self.shuffle:
            self.up: nn.Module = nn.Conv2d(i, 4 * self.o, 1)
        else:
            self.up = nn.ConvTranspose2d(i, self.o, 2, stride=2, groups=groups)
        self.pool = nn.MaxPool2d(2) if step.c % 3 else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.pool(F.pixel_shuffle(x, 2) if self.shuffle else x)


class Residual(Block):
    """Two layers beside an identity or a projection, sometimes with a layer scale."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__(i, step)
        self.o = i if step.b % 2 else 2 + step.a
        self.one = Conv(i, step)
        self.two = nn.Conv2d(self.one.o, self.o, 1)
        self.short = nn.Identity() if self.o == i else nn.Conv2d(i, self.o, 1, bias=False)
        self.scale = nn.Parameter(torch.rand(self.o, 1, 1) + 0.5) if step.c % 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        return self.short(x) + (y if self.scale is None else y * self.scale)


class Dense(Block):
    """New channels beside the old ones, before or after them."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__(i, step)
        self.new = nn.Conv2d(i, 1 + step.a % 5, 3, padding=1)
        self.o, self.first, self.flip = i + 1 + step.a % 5, step.b % 2 == 0, step.c % 3 == 0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.new(x))
        y = y.flip(1) if self.flip else y
        return torch.cat([y, x] if self.first else [x, y], 1)


class Split(Block):
    """Pieces of the channels treated apart: multiplied, or one of them convolved, then joined again."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__(i, step)
        self.even = i % 2 == 0 and step.a % 2 == 0
        self.cut = max(1, min(i - 1, 1 + step.b)) if i > 1 else 0
        self.o = i // 2 if self.even else i
        self.conv = nn.Conv2d(self.cut, self.cut, 3, padding=1) if not self.even and self.cut else None

    def forward(self, x: Tensor) -> Tensor:
        if self.even:
            left, right = x.chunk(2, 1)
            return left * torch.sigmoid(right)
        if self.conv is None:
            return x
        left, right = x[:, : self.cut], x[:, self.cut :]
        return torch.cat([right, self.conv(left)], 1)


class Shuffle(Block):
    """Channels in another order: by views, by the operator, rolled, flipped or odd ones first."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__(i, step)
        self.groups, self.kind, self.shift = divisor(i, 2 + step.a % 3), step.b % 5, step.c

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.kind == 0:
            return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        if self.kind == 1:
            return F.channel_shuffle(x, self.groups)
        if self.kind == 2:
            return x.roll(self.shift, 1)
        return x.flip(1) if self.kind == 3 else torch.cat([x[:, 1::2], x[:, ::2]], 1)


class Gate(Block):
    """Squeeze and excite, or a channel mean that weighs places."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__(i, step)
        self.down, self.up, self.places = (
            nn.Conv2d(i, 1 + step.a % 4, 1),
            nn.Conv2d(1 + step.a % 4, i, 1),
            step.b % 3 == 0,
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))
        x = x * torch.sigmoid(gate)
        return x * torch.sigmoid(x.mean(1, keepdim=True)) if self.places else x


class Attention(Block):
    """Multi-head attention over places: fused or separate projections, the operator or spelled out."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__(i, step)
        self.heads, self.size, self.kind = 1 + step.a % 3, 2 + step.b % 3, step.c % 3
        inner = self.heads * self.size
        self.norm, self.out = nn.LayerNorm(i), nn.Linear(inner, i)
        self.qkv = nn.Linear(i, 3 * inner) if self.kind == 0 else None
        self.q, self.k, self.v = (nn.Linear(i, inner) if self.kind else None for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.norm(x.flatten(2).transpose(1, 2))
        if self.qkv is not None:
            q, k, v = self.qkv(y).reshape(n, h * w, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            assert self.q is not None
            assert self.k is not None
            assert self.v is not None
            q, k, v = (
                layer(y).view(n, h * w, self.heads, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
        if self.kind == 2:
            y = (q * self.size**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = self.out(y.transpose(1, 2).reshape(n, h * w, -1))
        return x + y.transpose(1, 2).reshape(n, c, h, w)


class Mixer(Block):
    """An inverted bottleneck on the last axis, with GELU or a gated unit."""

    def __init__(self, i: int, step: Step) -> None:
        super().__init__(i, step)
        inner, self.gated = 2 + step.a % 6, step.b % 2 == 0
        self.norm = nn.RMSNorm(i) if step.c % 2 else nn.LayerNorm(i)
        self.up, self.down = nn.Linear(i, inner * (1 + self.gated)), nn.Linear(inner, i)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x.permute(0, 2, 3, 1)))
        y = F.glu(y, -1) if self.gated else F.gelu(y)
        return x + self.down(y).permute(0, 3, 1, 2)


BLOCKS: dict[str, type[Block]] = {
    "conv": Conv, "transposed": Transposed, "residual": Residual, "dense": Dense, "split": Split,
    "shuffle": Shuffle, "gate": Gate, "attention": Attention, "mixer": Mixer,
}  # fmt: skip


def norm(channels: int, choice: int) -> nn.Module:
    """One of the norms of a feature map."""
    made: list[nn.Module] = [
        nn.BatchNorm2d(channels), nn.Identity(), nn.GroupNorm(divisor(channels, 3), channels),
        nn.InstanceNorm2d(channels, affine=True), nn.GroupNorm(1, channels),
    ]  # fmt: skip
    return made[choice % len(made)]


def activation(channels: int, choice: int) -> nn.Module:
    """One of the activations."""
    made: list[nn.Module] = [nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(channels), nn.Hardswish(), nn.Identity()]
    return made[choice % len(made)]


class Drawn(nn.Module):
    """The network of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, recipe.stem, 3, padding=1)
        blocks: list[Block] = []
        channels = recipe.stem
        for step in recipe.steps:
            blocks.append(BLOCKS[step.kind](channels, step))
            channels = blocks[-1].o
        self.blocks = nn.ModuleList(blocks)
        self.kind = recipe.head
        self.pool = nn.AdaptiveAvgPool2d(2)
        features = {"flat": 4 * channels, "mean": channels, "map": channels}[recipe.head]
        make = nn.Linear if recipe.head != "map" else (lambda i, o: nn.Conv2d(i, o, 1))
        self.heads = nn.ModuleList(make(features, 2 + n) for n in range(recipe.outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        if self.kind == "flat":
            x = torch.flatten(self.pool(x), 1)
        elif self.kind == "mean":
            x = x.mean((2, 3))
        return tuple(head(x) for head in self.heads)


numbers = st.integers(0, 11)


def recipes(longest: int = 5) -> st.SearchStrategy[Recipe]:
    """Architectures of one to `longest` blocks."""
    step = st.builds(Step, st.sampled_from(sorted(BLOCKS)), numbers, numbers, numbers)
    return st.builds(
        Recipe,
        st.integers(2, 9),
        st.lists(step, min_size=1, max_size=longest).map(tuple),
        st.sampled_from(["mean", "flat", "map"]),
        st.integers(1, 2),
        st.integers(0, 999),
    )
