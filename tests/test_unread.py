"""Branches that the output does not depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import slimc


class Supervised(nn.Module):
    """An auxiliary head, which is computed at inference too but returned in training only."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3)
        self.aux = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.ReLU(inplace), nn.Conv2d(64, 4, 3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        aux = self.aux(x)
        found: Tensor = self.head(torch.relu(self.body(x)).mean((2, 3)))
        return (found, aux) if self.training else found


@pytest.mark.parametrize("inplace", [False, True])
def test_a_head_that_nothing_depends_on_stays_whole_and_does_not_count(inplace: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = Supervised(inplace).eval()
    analysis = slimc.inspect(model, x)
    assert [group.name for group in analysis.groups] == ["stem.weight", "body.weight"]
    assert analysis.macs == 8 * 27 * 64 + 16 * 72 * 36 + 16 * 4
    plain = Supervised(inplace).eval()
    plain.aux = nn.Identity()  # type: ignore[assignment]
    assert analysis.full.memory == slimc.inspect(plain, x).full.memory
    assert not analysis.frozen  # nothing that is deployed was left alone
    slim = slimc.compress(model, x, flops=0.5, round_to=1, recover="none", scorer="magnitude")
    assert slim.report.verification is not None
    assert slim.report.verification.passed
    own = slim.module.train()
    assert isinstance(own, Supervised)
    assert own.aux[0].weight.shape == (64, own.stem.weight.shape[0], 3, 3)  # it follows what it reads
    assert own(x)[1].shape == (2, 4, 4, 4)
    # What is left of the work that the output needs is no more than was asked for.
    kept, inner = own.stem.weight.shape[0], own.body.weight.shape[0]
    assert kept * 27 * 64 + inner * kept * 9 * 36 + inner * 4 <= analysis.macs / 2


class Scaled(nn.Module):
    """Writes into a part of a value that it returns, and into one that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.side, self.b = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, :4].mul_(self.side(y)[:, :1])
        self.side(y)[:, 2:].mul_(2)
        return self.b(y)  # type: ignore[no-any-return]


def test_what_is_written_into_a_value_that_is_read_counts() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    analysis = slimc.inspect(Scaled().eval(), x)
    assert analysis.macs == 4 * 8 + 8 * 6 + 8 * 3


def test_a_branch_that_is_added_to_what_is_read_leaves_its_channels_free() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            _ = y + self.b(x)
            return self.c(y)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    analysis = slimc.inspect(Added().eval(), torch.randn(2, 4))
    (group,) = analysis.groups
    assert group.name == "a.weight"
    assert analysis.macs == 4 * 8 + 8 * 3
