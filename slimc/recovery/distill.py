"""Distillation without labels: the slim model is trained for a short while to give what the original gives.

On the same samples, moved, mirrored and mixed a little (the original says what is right for any input), the slim
model's outputs and the last value of each channel group are drawn to the original's at the kept channels. Batch norms
keep their statistics, so that what is trained is what is deployed.

Sources: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), with squared differences of
logits, which is their limit of high temperature (section 2.1); Romero et al., "FitNets" (ICLR 2015), equation 3, for
values inside. How samples are mixed is in `varied`, how parameters move in `optimiser`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from slimc.catching import Catching
from slimc.graph.example import Example
from slimc.graph.infer import tensors_of
from slimc.lockstep import trainable_at_once
from slimc.onednn import Guard
from slimc.readers import unhalved
from slimc.recover import Task, step
from slimc.recovery.optimiser import Optimiser, matrices
from slimc.varied import varied

EPOCHS = 100
_MOST, _MOST_INVENTED = 2e13, 4e12
"""Work of a whole distillation: made-up samples are worth less of it."""
_FEWEST_EPOCHS = 10
"""Fewer do harm: after 6, EfficientNet-Lite0 was further off on pictures unlike those that it was fitted on."""
_BATCH = 32
_WARMUP = 0.1


@step(
    "distill",
    "train briefly to give the original's outputs and inner values, without labels",
    "Hinton et al., 2015; Romero et al., FitNets, ICLR 2015; Jordan et al., Muon, 2024",
)
def distill(task: Task) -> str:
    """Train all parameters of the slim graph; see the module for what it is drawn to."""
    parameters = [p for p in task.slim.parameters() if p.is_floating_point()]
    if any(p.dtype == torch.float16 for p in parameters):
        return "left out: gradients are below what float16 can tell from 0; give the model in float32 or bfloat16"
    batches = _batches(task)
    samples = sum(batch.count for batch in batches)
    epochs = _epochs(task, samples)
    if not epochs:
        return f"left out: {_FEWEST_EPOCHS} epochs, the fewest that are of use, would take too long"
    wanted = _inner(task)
    generator = torch.Generator().manual_seed(task.seed)
    steps = epochs * len(batches)
    trained = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        optimiser = Optimiser(parameters, matrices(task, max(batch.count for batch in batches)))
        for done in range(steps):
            if done % len(batches) == 0:
                order = torch.randperm(len(batches), generator=generator).tolist()
            example = varied(batches[order[done % len(batches)]], generator)
            with torch.enable_grad():
                loss = _loss(task, example, wanted)
                if not loss.requires_grad:
                    return "left out: no value of the network is drawn to the original's, since none is comparable"
                loss.backward()  # type: ignore[no-untyped-call]
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
        if task.cut.fits(task.types.values[old], teacher.caught[old])
    ]
    means = [torch.stack(losses).mean() for losses in (outer, inner) if losses]  # outputs may be whole numbers only
    return torch.stack(means).sum() if means else torch.zeros(())


def _relative(value: Tensor, goal: Tensor) -> Tensor:
    """The squared error as a share of the goal's variance."""
    value, goal = unhalved(value), unhalved(goal)
    spread = goal.var(correction=0) if goal.numel() > 1 else torch.ones((), device=goal.device)
    return functional.mse_loss(value, goal) / spread.clamp_min(1e-12)
