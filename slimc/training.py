"""A plain training loop: what fine-tuning and the demo use when the user brings no loop of their own."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimc.errors import UsageError

WARMUP_SHARE = 0.1  # of all steps; the learning rate rises over these and falls along a cosine afterwards

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Epoch:
    """What one epoch did; `loss` is the mean over the training batches, `accuracy` a share where it was measured."""

    number: int
    of: int
    loss: float
    accuracy: float | None
    seconds: float


Progress = Callable[[Epoch], None]


def train(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.0,
    loss: Loss | None = None,
    validation: Iterable[Any] | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> tuple[Epoch, ...]:
    """Train `model` in place on `loader`, an iterable of (inputs, targets) that has a length.

    Nesterov SGD; the learning rate warms up linearly, then follows a cosine to zero. `loss(outputs, targets)` is
    cross entropy unless given. With `seed`, the run is repeatable and the caller's random state is left as it was.
    `validation` is only measured, never used to choose anything.
    """
    if epochs < 1:
        raise UsageError(f"epochs is {epochs}; at least 1 is needed")
    if not isinstance(loader, Sized) or len(loader) == 0:
        raise UsageError("the training data is empty or has no length; give a DataLoader or a list of batches")
    criterion = loss or nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    optimiser = torch.optim.SGD(
        parameter_groups(model, weight_decay), lr=learning_rate, momentum=momentum, nesterov=momentum > 0
    )
    factor = functools.partial(warmup_cosine, steps=epochs * len(loader))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    history: list[Epoch] = []
    with seeded(seed, device_of(model)), restored_modes(model):
        for number in range(1, epochs + 1):
            started = time.perf_counter()
            model.train()
            mean = _train_epoch(model, loader, criterion, optimiser, scheduler)
            accuracy = None if validation is None else evaluate(model, validation)
            history.append(Epoch(number, epochs, mean, accuracy, time.perf_counter() - started))
            if progress is not None:
                progress(history[-1])
    return tuple(history)


# Fine-tuning is training at a rate that keeps what the weights already know.
finetune = functools.partial(train, learning_rate=0.01)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any]) -> float:
    """Top-1 accuracy as a share, in eval mode; every module's mode is restored."""
    device = device_of(model)
    right = seen = 0
    with restored_modes(model):
        model.eval()
        for inputs, targets in loader:
            predicted = model(inputs.to(device)).argmax(dim=1)
            right += int((predicted == targets.to(device)).sum())
            seen += len(targets)
    if seen == 0:
        raise UsageError("the evaluation data is empty; give at least one batch of (inputs, targets)")
    return right / seen


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Norm parameters and biases go without. They are told by having at most one axis, which also holds in a model that
    is a bare graph and has no norm modules.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, steps: int) -> float:
    """The factor on the learning rate at `step` of `steps`: a linear rise, then half a cosine down to zero."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU for a model without parameters."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the random state inside the block and put the caller's back afterwards; nothing without a seed."""
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Put train or eval mode back, module by module: users freeze single norms by putting just those in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _train_epoch(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: Loss,
    optimiser: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    device = device_of(model)
    total, batches = torch.zeros((), device=device), 0
    for inputs, targets in loader:
        optimiser.zero_grad(set_to_none=True)
        value = criterion(model(inputs.to(device)), targets.to(device))
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        scheduler.step()
        total, batches = total + value.detach(), batches + 1
    return float(total) / max(1, batches)
