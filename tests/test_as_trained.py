"""What batch norms remember: moments against samples of normally distributed values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimc.as_trained import Moments, moments_as_trained, overlap
from slimc.graph.capture import capture
from slimc.graph.rule import operator_name

CHANNELS, PLACES = 5, 200_000


def norm(seed: int, channels: int = CHANNELS) -> nn.BatchNorm2d:
    """A batch norm whose outputs have all kinds of means and deviations."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(channels, generator=generator) * 2)
        layer.bias.copy_(torch.randn(channels, generator=generator))
        layer.running_mean.copy_(torch.randn(channels, generator=generator))  # type: ignore[union-attr]
        layer.running_var.copy_(torch.rand(channels, generator=generator) + 0.1)  # type: ignore[union-attr]
    return layer.eval()


class Net(nn.Module):
    """Two batch norms and what a function makes of their outputs, read by a convolution."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], channels: int = CHANNELS) -> None:
        super().__init__()
        self.a, self.b, self.function = norm(0), norm(1), function
        self.read = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[N, 2, H, W]."""
        result: Tensor = self.read(self.function(self.a(x), self.b(y)))
        return result


def as_trained(net: nn.Module, *inputs: Tensor) -> Moments | None:
    """The moments of what the convolution or linear layer reads."""
    module = capture(net.eval(), inputs).module
    found = moments_as_trained(module)
    (reader,) = (n for n in module.graph.nodes if operator_name(n) in ("conv2d", "linear"))
    return found.get(reader.args[0])


def drawn(layer: nn.BatchNorm2d, seed: int) -> Tensor:
    """[PLACES, C, 1, 1] inputs as they were in training."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    noise = torch.randn(PLACES, len(layer.running_mean), generator=torch.Generator().manual_seed(seed))
    return (noise * layer.running_var.sqrt() + layer.running_mean)[:, :, None, None]


FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "norm": (lambda a, b: a, CHANNELS),
    "relu": (lambda a, b: functional.relu(a), CHANNELS),
    "relu in place": (lambda a, b: functional.relu_(a), CHANNELS),
    "relu6": (lambda a, b: functional.relu6(a), CHANNELS),
    "clamp": (lambda a, b: a.clamp(-0.5, 1.0), CHANNELS),
    "silu": (lambda a, b: functional.silu(a), CHANNELS),
    "gelu": (lambda a, b: functional.gelu(a), CHANNELS),
    "times a number": (lambda a, b: a * 3 - 1, CHANNELS),
    "sum": (lambda a, b: a + b, CHANNELS),
    "sum of activations": (lambda a, b: functional.relu(a) + functional.relu6(b), CHANNELS),
    "sum with itself": (lambda a, b: a + a, CHANNELS),
    "joined": (lambda a, b: torch.cat([functional.relu(a), b], 1), 2 * CHANNELS),
    "dropout": (lambda a, b: functional.dropout(a, 0.5, training=False), CHANNELS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_moments_are_those_of_sampled_normal_values(name: str) -> None:
    function, channels = FUNCTIONS[name]
    net = Net(function, channels)
    found = as_trained(net, torch.randn(2, CHANNELS, 4, 4), torch.randn(2, CHANNELS, 4, 4))
    assert found is not None
    with torch.no_grad():
        values = function(net.a(drawn(net.a, 2)), net.b(drawn(net.b, 3)))[:, :, 0, 0].double()
    deviation = values.std(0)
    assert ((found.mean - values.mean(0)).abs() <= 0.01 * deviation + 1e-6).all()
    assert torch.allclose(found.variance, values.var(0), rtol=0.02, atol=1e-6)
    assert torch.allclose(found.square, values.square().mean(0), rtol=0.02, atol=1e-6)


UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda a, b: a * b,
    "softmax": lambda a, b: a.softmax(1),
    "largest of places": lambda a, b: functional.max_pool2d(a, 2),
    "zeros around": lambda a, b: functional.pad(a, [1, 1, 1, 1]),
    "turned": lambda a, b: a.transpose(2, 3),
    "random": lambda a, b: torch.bernoulli(a.sigmoid()),
    "joined places": lambda a, b: torch.cat([a, b], 2),
    "difference": torch.sub,
    "comparison": lambda a, b: torch.where(a > 0, a, 0.1 * a),
    "weighted sum": lambda a, b: torch.add(a, b, alpha=2),
    "sum over places": lambda a, b: a + b.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_said_of_other_operators(name: str) -> None:
    assert as_trained(Net(UNKNOWN[name]), torch.randn(2, CHANNELS, 4, 4), torch.randn(2, CHANNELS, 4, 4)) is None


def test_nothing_is_said_of_inputs_and_of_what_only_a_convolution_made() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert as_trained(net, torch.randn(2, 3, 4, 4)) is None


def test_what_is_written_into_is_no_longer_known() -> None:
    def written(a: Tensor, b: Tensor) -> Tensor:
        a.mul_(b)
        return a

    net = Net(written)
    assert as_trained(net, torch.randn(2, CHANNELS, 4, 4), torch.randn(2, CHANNELS, 4, 4)) is None


def test_pooled_and_flattened_channels_keep_their_order() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.read = norm(0, 3), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Any:
            return self.read(functional.adaptive_avg_pool2d(self.norm(x), 2).flatten(1))

    net = Head()
    found = as_trained(net, torch.randn(2, 3, 4, 4))
    assert found is not None
    bias = net.norm.bias.detach().double()
    assert torch.equal(found.mean, bias[torch.arange(12) // 4])


def test_overlap_is_1_for_equal_squares_and_the_common_share_for_others() -> None:
    own = torch.tensor([1.0, 2.0, 0.0])
    assert float(overlap(own, own)) == 1.0
    assert float(overlap(own, torch.tensor([1.0, 0.0, 3.0]))) == pytest.approx(1 / 6)  # (1 + 0 + 0) / (1 + 2 + 3)
    assert float(overlap(torch.zeros(3), torch.zeros(3))) == 0.0
