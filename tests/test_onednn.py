"""Gradients of convolutions are right also where oneDNN computes them wrongly, crashes or does not end."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scoring import CLASSES, score
from torch import Tensor, nn
from torch.nn import functional

from slimc import Recipe
from slimc.onednn import Guard
from slimc.training.layout import arrange
from slimc.training.loop import fit


def usual(inputs: int) -> Tensor:
    """As torch makes them."""
    return torch.randn(32, inputs, 28, 28)


def last(inputs: int) -> Tensor:
    """Channels last, as training has them."""
    return usual(inputs).contiguous(memory_format=torch.channels_last)


def part_of_last(inputs: int) -> Tensor:
    """Some channels of pictures with channels last: not contiguous in either layout."""
    return last(inputs + 3)[:, :inputs]


@pytest.mark.parametrize("outputs", [4, 21, 37])
@pytest.mark.parametrize("inputs", [1, 2, 4, 7, 8, 15, 16, 21])
@pytest.mark.parametrize("make", [usual, last, part_of_last])
def test_gradients_of_shortcuts_are_right(make: Callable[[int], Tensor], inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(inputs, outputs, 1, stride=2)
    exact, pictures = copy.deepcopy(module).double(), make(inputs).requires_grad_()
    wide = pictures.detach().double().contiguous().requires_grad_()
    if make is last:
        module.to(memory_format=torch.channels_last)
    with Guard():
        result = module(pictures)
    result.square().mean().backward()
    exact(wide).square().mean().backward()
    pairs = zip([pictures, *module.parameters()], [wide, *exact.parameters()], strict=True)
    for own, wanted in pairs:
        assert own.grad is not None
        assert wanted.grad is not None
        assert torch.allclose(own.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)


def test_the_layout_that_came_in_goes_on() -> None:
    module = nn.Conv2d(7, 21, 1, stride=2)
    with Guard():
        assert module(last(7)).is_contiguous(memory_format=torch.channels_last)
        assert module(usual(7)).is_contiguous()


@pytest.mark.parametrize(
    ("call", "inputs", "kernel", "copies"),
    [
        (lambda x, w: functional.conv2d(x, w, stride=2), 4, 1, True),
        (lambda x, w: functional.conv2d(x, weight=w, stride=(1, 2)), 4, 1, True),
        (lambda x, w: functional.conv2d(input=x, weight=w, bias=None, stride=2), 4, 1, True),
        (lambda x, w: torch.ops.aten.conv2d.default(x, w, None, [2, 2]), 4, 1, True),
        (lambda x, w: torch.convolution(x, w, None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1), 4, 1, True),
        (functional.conv2d, 4, 1, False),
        (lambda x, w: functional.conv_transpose2d(x, w.transpose(0, 1), stride=2), 4, 1, False),
        (lambda x, w: functional.conv2d(x, w, stride=2), 4, 3, False),
        (lambda x, w: functional.conv2d(x, w, stride=2), 16, 1, False),
    ],
)
def test_only_strided_convolutions_of_one_pixel_with_few_inputs_see_a_copy(
    call: Callable[[Tensor, Tensor], Tensor], inputs: int, kernel: int, copies: bool
) -> None:
    x, w = last(inputs), torch.randn(8, inputs, kernel, kernel, requires_grad=True)
    with Guard():
        result = call(x, w)
    x.zero_()  # the backward pass refuses, unless it has a copy
    if copies:
        result.sum().backward()  # type: ignore[no-untyped-call]
        assert w.grad is not None
        assert w.grad.any()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            result.sum().backward()  # type: ignore[no-untyped-call]


def slim_network(channels: int) -> nn.Module:
    """With a shortcut as heavy cuts leave it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 37, 1, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(37, CLASSES),
    )  # fmt: skip


def labelled(channels: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of pictures that were made channels last."""
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(32, 28, 28, channels, generator=draw).permute(0, 3, 1, 2),
            torch.randint(CLASSES, (32,), generator=draw),
        )
        for _ in range(4)
    ]


def widened(data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """In float64, which oneDNN does not compute."""
    return [(x.double(), y) for x, y in data]


def test_training_is_right_also_on_pictures_of_one_channel() -> None:
    """These are in both layouts at once, and torch may take them for either."""
    module, data = slim_network(1), labelled(1)
    exact = copy.deepcopy(module).double()
    recipe = Recipe(rate=0.05, precision="float32")
    arrange(module)
    fit(module, data, data[0][0], epochs=1, recipe=recipe)
    fit(exact, widened(data), data[0][0].double(), epochs=1, recipe=recipe)
    for own, wanted in zip(module.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(own.double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scorer", ["snip-sum", "taylor-sum"])
def test_scoring_is_right_in_a_model_with_channels_last(scorer: str) -> None:
    module, data = slim_network(3).eval(), labelled(3)
    exact = score(scorer, copy.deepcopy(module).double(), widened(data))
    found = score(scorer, module.to(memory_format=torch.channels_last), data)
    for name, own in found.items():
        np.testing.assert_allclose(own, exact[name], rtol=1e-3)
