"""A small network, its data and a run over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slimc
from slimc.demo import ResidualBlock
from slimc.random_state import kept_random_state, seed_all
from slimc.training.loop import Loop
from slimc.training.run import Run
from slimc.training.schedule import schedules

METHODS = sorted(schedules())
BRIEF: dict[str, dict[str, Any]] = {
    "meta": {"population": 4, "generations": 2, "hidden": 4},
    "joint-search": {"networks": 2},
}
"""Settings under which a schedule does all that it does, in a moment."""


def network(seed: int = 0) -> nn.Module:
    with kept_random_state():
        seed_all(seed, 0)
        layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        blocks = [ResidualBlock(8, 8), nn.Dropout(0.1), ResidualBlock(8, 12, 2)]
        return nn.Sequential(*layers, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))


def dataset(count: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator) + labels[:, None, None, None].float()
    return TensorDataset(images, labels)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(dataset(), batch_size=16, shuffle=True), DataLoader(dataset(48), batch_size=48)


def begin(name: str = "tick-tock", **options: Any) -> Run:
    train, val = loaders()
    given: dict[str, Any] = {
        "flops": 0.5, "epochs": 4, "data": train, "val": val, "round_to": 1, "recover": "none",
        "settings": BRIEF.get(name, {}),
    } | options  # fmt: skip
    return slimc.schedule(name, network(), torch.zeros(2, 1, 8, 8), **given)


def weights(run: Run) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = run.result.module.state_dict()
    return found


class Stop(Exception):
    """A crash in the middle of a run."""


def crash_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training ends in an error in the step after so many."""
    step, left = Loop.step, [steps]

    def crashing(self: Loop) -> None:
        if not left[0]:
            raise Stop
        left[0] -= 1
        step(self)

    monkeypatch.setattr(Loop, "step", crashing)
