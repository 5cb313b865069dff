"""Networks to cut while they train, and what tests of schedules do with them."""

from __future__ import annotations

import copy
from typing import Any

import scoring
import torch
from torch import Tensor, nn

import slimc
from slimc.graph.groups import Group
from slimc.training.phase import Phase
from slimc.training.recipe import Recipe
from slimc.training.run import Run

PLAIN = Recipe(
    rate=0.1, optimiser="sgd", shape="constant", warmup=0.0, momentum=0.0, weight_decay=0.0, precision="float32"
)
"""Plain SGD: what closed forms are about."""


class Wide(nn.Module):
    """A stream of 16 with two writers, and a branch of 12."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.bn1 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b, self.bn2 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.bn2(self.b(torch.relu(self.bn1(self.a(x))))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Plain(nn.Module):
    """Two layers with 40 and 60 channels, each its own group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(3, 40, 3, padding=1, bias=False), nn.BatchNorm2d(40)
        self.b, self.bn2 = nn.Conv2d(40, 60, 3, padding=1, bias=False), nn.BatchNorm2d(60)
        self.fc = nn.Linear(60, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.b(torch.relu(self.bn1(self.a(x))))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class PreActivation(nn.Module):
    """A batch norm and a scale that read the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.a = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2, self.b = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.scale, self.bn3 = nn.Parameter(torch.rand(8, 1, 1)), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale * self.b(torch.relu(self.bn2(self.a(torch.relu(self.bn1(x))))))
        out: Tensor = self.fc(torch.relu(self.bn3(x)).mean((2, 3)))
        return out


def seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        return model


def begin(name: str, model: nn.Module, *, flops: float = 0.5, epochs: float = 2, **more: Any) -> Run:
    """A run over three batches of four."""
    data = scoring.labelled()
    options: dict[str, Any] = {"data": data, "recover": "none", "round_to": 1, "recipe": PLAIN} | more
    run: Run = slimc.schedule(name, model, data[0][0], flops=flops, epochs=epochs, **options)
    return run


def nothing(outputs: Any, targets: Any) -> Tensor:
    """A loss without a gradient: what moves, the method moves."""
    zero: Tensor = 0.0 * outputs.sum()
    return zero


def first(run: Run, name: str) -> Phase:
    """The first phase of that name; those before it are trained."""
    return next(phase for phase in run if phase.name == name)


def steps(phase: Phase, count: int = 1, rate: float = 0.1) -> torch.optim.Optimizer:
    """Train a phase with a loop of our own, up to the end of an epoch."""
    optimiser = torch.optim.SGD(phase.parameters(), lr=rate)
    phase.attach(optimiser)
    step(phase, optimiser, count)
    return optimiser


def step(phase: Phase, optimiser: torch.optim.Optimizer, count: int = 1) -> None:
    for x, y in scoring.labelled(count):
        optimiser.zero_grad()
        scoring.eager_loss(phase.module.train(), x, y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(module).eval()(scoring.pictures(6, seed=7))
    return found


def group_of(run: Run, width: int) -> Group:
    return next(group for group in run.analysis.groups if group.width == width)


def dearest(run: Run) -> float:
    """The share of the MACs that the most expensive channel costs at the present widths."""
    widths, found = run.network.widths, 0.0
    for number in range(len(widths)):
        more = widths.copy()
        more[number] += 1
        found = max(found, run.analysis.cost(more).macs - run.network.costs.macs)
    return found / run.analysis.full.macs
