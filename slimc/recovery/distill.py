"""Distillation without labels: the slim model is trained for a short while to give what the original gives.

On the same samples, moved, mirrored and mixed a little (the original says what is right for any input), the slim
model's outputs and the last value of each channel group are drawn to the original's at the kept channels. Batch norms
keep their statistics, so that what is trained is what is deployed.

Sources: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), with squared differences of
logits, which is their limit of high temperature (section 2.1); Romero et al., "FitNets" (ICLR 2015), equation 3, for
values inside; Zhang et al., "mixup" (ICLR 2018) and Yun et al., "CutMix" (ICCV 2019) for the mixing. How parameters
move is in `optimiser`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from slimc.catching import Catching
from slimc.graph.capture import Example
from slimc.graph.infer import tensors_of
from slimc.lockstep import trainable_at_once
from slimc.onednn import Guard
from slimc.recover import Task, step
from slimc.recovery.optimiser import Optimiser, matrices

EPOCHS = 100
_MOST, _MOST_INVENTED = 2e13, 4e12
"""Work of a whole distillation: made-up samples are worth less of it."""
_FEWEST_EPOCHS = 10
"""Fewer do harm: after 6, EfficientNet-Lite0 was further off on pictures unlike those that it was fitted on."""
_BATCH = 32
_WARMUP = 0.1
_PASTED, _BLENDED = 0.75, 0.5
"""The share of batches of pictures that are pasted into each other (others are blended); of other floats, blended."""


@step(
    "distill",
    "train briefly to give the original's outputs and inner values, without labels",
    "Hinton et al., 2015; Romero et al., FitNets, ICLR 2015; Jordan et al., Muon, 2024",
)
def distill(task: Task) -> str:
    """Train all parameters of the slim graph; see the module for what it is drawn to."""
    parameters = [p for p in task.slim.parameters() if p.is_floating_point()]
    batches = _batches(task)
    samples = sum(len(batch.tensors()[0]) for batch in batches)
    epochs = _epochs(task, samples)
    if not epochs:
        return f"left out: {_FEWEST_EPOCHS} epochs, the fewest that are of use, would take too long"
    wanted = _inner(task)
    generator = torch.Generator().manual_seed(task.seed)
    steps = epochs * len(batches)
    trained = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = Optimiser(parameters, matrices(task, max(len(batch.tensors()[0]) for batch in batches)))
    try:
        for done in range(steps):
            if done % len(batches) == 0:
                order = torch.randperm(len(batches), generator=generator).tolist()
            example = _varied(batches[order[done % len(batches)]], generator)
            _loss(task, example, wanted).backward()  # type: ignore[no-untyped-call]
            optimiser.step(_rate(done, steps))
            task.tick(done + 1, steps)
    finally:
        for parameter, before in zip(parameters, trained, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None
    return f"{epochs} epochs of distillation without labels on {samples} samples ({task.samples.source})"


def _rate(done: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    warm = max(1, round(_WARMUP * steps))
    return (done + 1) / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm)))


def _epochs(task: Task, samples: int) -> int:
    """As many as the arithmetic allows; 0 where those that are of use would take too long."""
    whole = sum(product.macs for product in task.types.macs)
    left = sum(product.factor * math.prod(task.cut.shape(product.axes)) for product in task.types.macs)
    slim = left / whole if whole else 1.0
    most = _MOST_INVENTED if task.samples.invented else _MOST
    affordable = int(most / (max(task.work, 1.0) * (1 + 3 * slim) * samples))
    return min(EPOCHS, affordable) if affordable >= _FEWEST_EPOCHS else 0


def _batches(task: Task) -> list[Example]:
    """The samples in batches of training size, or what memory allows, where the model takes any."""
    return list(task.samples.pieces(min(_BATCH, trainable_at_once(task.original))))


def _inner(task: Task) -> dict[Node, Node]:
    """The last value that carries each set of channels, and its twin: what the slim network is drawn to inside."""
    last: dict[bytes, Node] = {}
    solution = task.types.solution
    for node in task.original.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        for axes in tensors_of(task.types.values[node]):
            for axis in axes:
                rows = solution.factors(axis)
                if (rows >= 0).any():
                    last[rows.tobytes()] = node
    return {node: task.twins[node] for node in last.values()}


def _loss(task: Task, example: Example, wanted: dict[Node, Node]) -> Tensor:
    """Relative squared error of the outputs, plus that of the inner values on average."""
    teacher, student = Catching(task.original, set(wanted)), Catching(task.slim, set(wanted.values()))
    with torch.no_grad():
        goals = teacher.results(example)
    with Guard():
        results = student.results(example)
    outer = [_relative(value, goal) for value, goal in zip(results, goals, strict=True)]
    inner = [
        _relative(student.caught[new], task.cut.select(teacher.caught[old], task.types.values[old]))
        for old, new in wanted.items()
    ]
    loss = torch.stack(outer).mean()
    return loss + torch.stack(inner).mean() if inner else loss


def _relative(value: Tensor, goal: Tensor) -> Tensor:
    """The squared error as a share of the goal's variance."""
    spread = goal.var(correction=0) if goal.numel() > 1 else torch.ones((), device=goal.device)
    return functional.mse_loss(value, goal) / spread.clamp_min(1e-12)


def _varied(example: Example, generator: torch.Generator) -> Example:
    """Pictures are moved and mirrored, each its own way, and floats mixed in pairs; whatever else stays as it is."""
    tensors = example.tensors()
    count = len(tensors[0])
    if not all(t.is_floating_point() and len(t) == count for t in tensors):
        return example
    mirror = torch.rand(count, generator=generator) < 0.5
    shift = torch.rand(2, count, generator=generator) * 2 - 1
    kind = float(torch.rand((), generator=generator))
    order = torch.randperm(count, generator=generator)
    share, across, down = torch.rand(3, count, generator=generator)

    def vary(tensor: Tensor) -> Tensor:
        device = tensor.device
        other = order.to(device)
        if tensor.dim() == 4:
            tensor = torch.where(mirror.to(device)[:, None, None, None], tensor.flip(3), tensor)
            tensor = _moved(tensor, shift.to(device))
            if kind < _PASTED:
                inside = _rectangles(share, across, down, tensor.shape[2], tensor.shape[3])
                return torch.where(inside.to(device)[:, None], tensor[other], tensor)
        if tensor.dim() == 4 or kind < _BLENDED:
            weight = 0.5 * share.to(tensor).reshape(-1, *[1] * (tensor.dim() - 1))
            tensor = (1 - weight) * tensor + weight * tensor[other]
        return tensor

    return example.map(vary)


def _moved(pictures: Tensor, shift: Tensor) -> Tensor:
    """Pictures moved by up to an eighth of their sides, shift [2, count] from -1 to 1; border pixels are repeated."""
    places = []
    for size, own in zip(pictures.shape[2:], shift, strict=True):
        steps = (own * (size // 8)).round().long()
        places.append((torch.arange(size, device=pictures.device) + steps[:, None]).clamp(0, size - 1))
    rows, columns = places
    picture = torch.arange(len(pictures), device=pictures.device)
    moved = pictures.movedim(1, 3)[picture[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.movedim(3, 1).contiguous()


def _rectangles(area: Tensor, across: Tensor, down: Tensor, height: int, width: int) -> Tensor:
    """[count, height, width] whether a pixel is in a rectangle of a quarter to three quarters of the picture."""
    side = (0.25 + 0.5 * area).sqrt()

    def inside(size: int, place: Tensor) -> Tensor:
        length = (side * size).round()
        start = (place * (size - length + 1)).floor()
        pixels = torch.arange(size)
        return (pixels >= start[:, None]) & (pixels < (start + length)[:, None])

    return inside(height, down)[:, :, None] & inside(width, across)[:, None, :]
