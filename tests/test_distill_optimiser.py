"""Distillation's optimiser: matrices move by orthogonal steps, everything else by Adam."""

from __future__ import annotations

import torch
from convnet import noise, seeded
from test_recover import task
from torch import Tensor, nn

from slimc.recovery.optimiser import Optimiser, matrices


def test_a_matrix_moves_as_far_in_every_direction_and_others_by_adam() -> None:
    convolution = nn.Conv2d(6, 4, 3)
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    before, start = weight.detach().clone(), bias.detach().clone()
    optimiser = Optimiser([weight, bias], [weight])
    # Gradients whose directions differ by a factor of 1,000 in size: Adam and plain descent would follow the largest.
    left, right = torch.linalg.qr(noise(4, 4))[0], torch.linalg.qr(noise(54, 4, seed=1))[0]
    weight.grad = (left @ torch.diag(torch.logspace(0, -3, 4)) @ right.T).reshape(weight.shape)
    bias.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    optimiser.step(0.5)
    moved = torch.linalg.svdvals((weight - before).detach().reshape(4, -1)) / (0.5 * 2e-3)
    assert moved.max() < 1.5
    assert moved.min() > 0.1  # of a direction that has a thousandth of the gradient
    assert moved[1] > 0.5
    torch.testing.assert_close((bias - start).detach(), 0.5e-3 * torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    assert weight.grad is None
    assert bias.grad is None


class Mixed(nn.Module):
    """A convolution, a depthwise one and two linear layers, one at every place and one behind pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.each = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.places, self.last = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.each(torch.relu(self.first(x)))).permute(0, 2, 3, 1)
        return self.last(torch.relu(self.places(x)).mean((1, 2)))  # type: ignore[no-any-return]


def test_matrices_are_weights_of_ungrouped_layers_that_many_places_use() -> None:
    work = task(seeded(Mixed), noise(2, 3, 8, 8), noise(64, 3, 8, 8, seed=1))
    names = {id(p): name for name, p in work.slim.named_parameters()}
    assert {names[id(m)] for m in matrices(work, 32)} == {"first.weight", "places.weight"}
    assert not matrices(work, 1)
