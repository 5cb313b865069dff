"""Channel inference: parameters take over the axes that they are tied to, and what they share with others is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import slimc
from slimc.analysis import analyse

X = torch.randn(2, 3, 8, 8)


def test_batch_norm_and_readers_have_the_very_axis_of_the_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten())
    tensors = analyse(model.eval(), X).types.tensors
    (axis, *_), (first, second, *_) = tensors["0.weight"], tensors["3.weight"]
    vectors = ("weight", "bias", "running_mean", "running_var")
    assert all(tensors[f"1.{name}"][0] is axis for name in vectors)
    assert tensors["0.bias"] == (axis,)
    assert second is axis
    assert first is not axis


class ReadTwice(nn.Module):
    """A norm whose weight also scales the values, before the norm reads it or after."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.norm.weight.view(1, -1, 1, 1)
        x = self.conv(x)
        x = self.norm(x * scale) if self.before else self.norm(x) * scale
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("before", [True, False])
def test_a_parameter_with_two_readers_has_one_axis_whoever_reads_it_first(before: bool) -> None:
    analysis = analyse(ReadTwice(before).eval(), X)
    (group,) = analysis.groups
    assert group.width == 6
    vectors = {("conv.bias", 0), *((f"norm.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var"))}
    assert {(m.tensor, m.axis) for m in group.members} == {("conv.weight", 0), ("head.weight", 1), *vectors}


class Norms(nn.Module):
    """One weight that two separate branches share."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.norm(self.left(x)), self.norm(self.right(x))], 1))
        return out


def test_a_module_called_twice_joins_what_its_callers_give() -> None:
    (group,) = analyse(Norms().eval(), X).groups
    assert {(m.tensor, m.axis, m.each) for m in group.members} >= {
        ("left.weight", 0, 1), ("right.weight", 0, 1), ("norm.weight", 0, 1), ("head.weight", 1, 2)
    }  # fmt: skip


class OneChannel(nn.Module):
    """Its second convolution reads the first channel alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.second(x[:, :1]).mean(1) + x[:, 1:, 1:-1, 1:-1].mean(1)
        return out


def test_an_axis_of_one_index_stays() -> None:
    analysis = analyse(OneChannel().eval(), X)
    types = analysis.types
    held = (types.solution.factors(types.tensors["first.weight"][0]) >= 0).any(axis=1)
    assert held.tolist() == [False] + [True] * 5


def test_kernel_axes_stay_and_say_why() -> None:
    types = analyse(nn.Conv2d(3, 6, 3).eval(), X).types
    kernel = types.tensors["weight"][2]
    assert not (types.solution.factors(kernel) >= 0).any()
    cause = types.store.cause(int(kernel[0]))
    assert (cause.kind, "kernel" in cause.reason) == ("structure", True)


def test_a_convolution_whose_groups_are_the_batch_is_left_alone_and_named() -> None:
    class Modulated(nn.Module):
        """Each sample has its own kernel, as in StyleGAN2."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.style, self.h = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 16), nn.Linear(24, 4)
            self.inner = nn.Linear(24, 24)
            self.w = nn.Parameter(torch.randn(24, 16, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            n, c, h, w = y.shape
            kernels = self.w[None] * self.style(y.mean((2, 3)))[:, None, :, None, None]
            y = functional.conv2d(y.reshape(1, n * c, h, w), kernels.reshape(-1, c, 3, 3), padding=1, groups=n)
            return self.h(torch.relu(self.inner(y.reshape(n, -1, h, w).mean((2, 3)))))  # type: ignore[no-any-return]

    analysis = slimc.inspect(Modulated(), torch.randn(2, 3, 8, 8))
    assert any("number of groups" in cause.reason for cause in analysis.types.unknown)
    assert [group.width for group in analysis.groups] == [24]  # behind it, all is as ever
