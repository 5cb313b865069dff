"""Convolutions train in the layout that is fast, and never in one that oneDNN computes wrongly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from slimc.graph.capture import Example
from slimc.samples import batch_of
from slimc.training.layout import arrange, layout, memory_format


class Functional(nn.Module):
    """Holds a convolution's weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Stride 2, which no attribute tells."""
        return nn.functional.conv2d(x, self.weight, stride=2)


@pytest.mark.parametrize(
    ("module", "last"),
    [
        (nn.Conv2d(7, 21, 1, stride=2), False),
        (nn.Conv2d(16, 21, 1, stride=2), True),
        (nn.Conv2d(7, 21, 1), True),
        (nn.Conv2d(7, 21, 3, stride=2, padding=1), True),
        (nn.Conv2d(8, 8, 1, stride=2, groups=8), True),
        (nn.ConvTranspose2d(21, 7, 1, stride=2), True),
        (Functional(), False),
    ],
)
def test_channels_are_last_unless_a_strided_convolution_of_one_pixel_has_few_inputs(
    module: nn.Module, last: bool
) -> None:
    whole = nn.Sequential(nn.Conv2d(3, 8, 3), module)
    assert memory_format(whole) == (torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("inputs", [1, 3, 7, 8, 15, 16, 21])
def test_gradients_of_strided_shortcuts_are_right_in_the_layout_of_training(inputs: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, inputs, 3, padding=1), nn.Conv2d(inputs, 21, 1, stride=2))
    exact = copy.deepcopy(module).double()
    arrange(module)
    pictures = torch.randn(32, 3, 28, 28)
    for _ in range(3):
        batch = layout(batch_of(pictures, Example.of(pictures[:2])), module)
        module.zero_grad()
        batch.example.run(module).square().mean().backward()
    exact(pictures.double()).square().mean().backward()
    for own, wanted in zip(module.parameters(), exact.parameters(), strict=True):
        assert own.grad is not None
        assert wanted.grad is not None
        assert torch.allclose(own.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)
