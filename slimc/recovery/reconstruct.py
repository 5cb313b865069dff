"""Least-squares reconstruction: every layer's weights fitted again, from the slim network's inputs to what the
original network computed.

From the first layer to the last, each reader is the solution of a ridge regression: its inputs are those of the slim
network, whose earlier layers are fitted already, and its targets are the original network's outputs at the kept
channels, so that a layer corrects what those before it lost. Where a branch ends in a residual sum, the target
includes the error of the other summand. The penalty draws to the present weights; its strength is chosen for each
layer on samples that are not fitted.

Source: He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017), equation 4 and
section 3.3 for residual sums; the penalty towards the present weights and its choice are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from slimc.graph.infer import attribute
from slimc.graph.rule import Axes
from slimc.lockstep import Frontier, lockstep
from slimc.readers import Reader, readers
from slimc.recover import Task, step
from slimc.recovery.tails import Tail, tail_of
from slimc.regression import Fit, Moments, choose
from slimc.samples import set_apart

ROWS = 40_000
_ROWS_PER_INPUT = 10
_NUMBERS = 12_000_000
"""At most so many inputs are gathered at once: a depthwise convolution has few for each of many groups."""
WIDEST = 6_144
"""Inputs of a reader beyond which its normal equations (inputs squared, in float64) are too large."""
_WIDE_NUMBERS = 32_000_000
"""At most so many inputs of a reader beyond that are gathered, in fewer rows than it has inputs."""
_JUDGED = 0.2
_ROUNDING = 1e-6
"""A share of a layer's values that float32 does not tell from nothing."""


@dataclass(frozen=True)
class Layer:
    """What a layer's fit may depend on besides moments.

    matrix: [groups, outputs, inputs] its weights now, float64. each: inputs that belong to one channel (the kernel's
    positions). importance: [groups, outputs] how much each output's error counts. offset: whether there is a bias.
    pads: whether places at the borders of its output see fewer inputs.
    """

    matrix: Tensor
    each: int
    importance: Tensor
    offset: bool
    pads: bool


Choose = Callable[[Moments, Moments, Layer], Fit]


@dataclass
class Tally:
    """How many readers were fitted, and how many not and why; on how many samples."""

    fitted: int = 0
    unchanged: int = 0
    wide: int = 0
    samples: int = 0

    def __str__(self) -> str:
        parts = [f"{self.fitted} of {self.fitted + self.unchanged + self.wide} layers fitted"]
        if self.wide:
            parts.append(f"{self.wide} with more than {WIDEST} inputs left as cut")
        return ", ".join(parts)


@step(
    "reconstruct", "fit every layer again by least squares, from unlabelled samples", "He et al., ICCV 2017, equation 4"
)
def reconstruct(task: Task) -> str:
    """Fit every convolution, linear layer and product with a parameter that nothing else shares.

    Raises UsageError where the samples lead to values that are not finite.
    """
    tally = refit(task, lambda fitted, judged, layer: choose(fitted, judged, layer.importance, layer.offset))
    return f"{tally} by least squares on {tally.samples} samples ({task.samples.source})"


def refit(task: Task, choose: Choose, widest: float = math.inf) -> Tally:
    """Fit each reader of at most `widest` inputs in turn with one way of choosing the change."""
    found = readers(task.slim)
    total = len([old for old, new in task.twins.items() if new in found])
    tally = Tally()
    generator = torch.Generator().manual_seed(task.seed)

    def visit(old: Node, before: Frontier, after: Frontier) -> None:
        reader = found[task.twins[old]]
        if reader.matrix(task.slim).shape[2] > widest:
            tally.wide += 1
        elif _fit(task, reader, old, before, after, generator, choose):
            tally.fitted += 1
        else:
            tally.unchanged += 1
        task.tick(tally.fitted + tally.unchanged + tally.wide, total)

    tally.samples = lockstep(
        task.original, task.slim, task.twins, task.samples, visit, lambda old: task.twins.get(old) in found
    )
    return tally


def _fit(
    task: Task, reader: Reader, old: Node, before: Frontier, after: Frontier, generator: torch.Generator, choose: Choose
) -> bool:
    """Change a reader's weight and bias; False where they stay as they are."""
    axes = task.types.values[old]
    if not all(task.cut.fits(axes, value) for value in before.of(old)):
        return False
    matrix = reader.matrix(task.slim)
    groups, outputs, inputs = matrix.shape
    wide = torch.float64 if inputs <= WIDEST else torch.float32
    tail = tail_of(task, old, reader, before, after)
    gathered = _gathered(task, reader, old, before, after, generator, matrix.to(wide), tail)
    if gathered is None:
        return False
    importance = tail.gain.square().to(wide).reshape(groups, outputs)
    shape = attribute(task.slim, reader.weight).shape
    each = math.prod(shape[2:]) if reader.kind.startswith("conv") else 1
    fit = choose(*gathered, Layer(matrix.to(wide), each, importance, tail.offset is not None, reader.pads(shape[2:])))
    if fit.change is None and not bool(fit.offset.any()):
        return False
    if fit.change is not None:
        reader.write(task.slim, (matrix.to(wide) + fit.change.transpose(1, 2)).to(matrix.dtype))
    if tail.offset is not None:
        tail.offset(fit.offset.flatten())
    return True


def _gathered(
    task: Task,
    reader: Reader,
    old: Node,
    before: Frontier,
    after: Frontier,
    generator: torch.Generator,
    matrix: Tensor,
    tail: Tail,
) -> tuple[Moments, Moments] | None:
    """Moments of a reader's inputs and of what its results miss, to fit on and to judge by; None if they miss nothing.

    matrix: [groups, outputs, inputs] in the precision to compute in.
    """
    axes, (groups, outputs, inputs) = task.types.values[old], matrix.shape
    weight: Tensor = attribute(task.slim, reader.weight)
    bias = None if reader.bias is None else attribute(task.slim, reader.bias).detach()
    sizes = [_left(task, axes, value) for value in before.of(old)]
    counts = [reader.places(shape) for shape in sizes]
    share = min(1.0, _rows(groups, inputs) / sum(counts))
    fitted, judged = (Moments(groups, inputs, outputs, matrix.device) for _ in range(2))
    apart = set_apart([shape[0] for shape in sizes], _JUDGED)
    lost = size = 0.0
    for number, (value, source) in enumerate(zip(before.of(old), after.of(reader.source), strict=True)):
        target = task.cut.select(value, axes)
        places = torch.randperm(counts[number], generator=generator)[: max(2, round(share * counts[number]))]
        # Whole samples are set aside: places of one picture are alike.
        each = counts[number] // len(target)
        last = places // each >= len(target) - apart[number]
        for moments, own in ((fitted, places[~last]), (judged, places[last])):
            if not len(own):
                continue
            part = own.to(target.device)
            x = reader.rows(source, weight, target.shape[2:], part)
            now = (x.to(matrix.dtype) @ matrix.transpose(1, 2)).transpose(0, 1).flatten(1)
            if bias is not None:
                now = now + bias.to(matrix.dtype)
            goal = tail.goal(reader, number, reader.results(target, part).to(matrix.dtype), part)
            residual = (goal - now) * tail.answers
            lost, size = lost + float(residual.square().sum()), size + float(goal.square().sum())
            moments.add(x, residual.reshape(len(part), groups, outputs).transpose(0, 1))
    if lost <= _ROUNDING**2 * size:  # nothing before it has changed
        return None
    return fitted if fitted.count else judged, judged


def _left(task: Task, axes: Axes, value: Tensor) -> Sequence[int]:
    """The sizes of what the cut leaves of a value, of which any axis may be cut, such as the tokens of a mixer."""
    kept = task.cut.shape(axes)
    return [size if task.cut.whole(axis) else own for axis, size, own in zip(axes, value.shape, kept, strict=True)]


def _rows(groups: int, inputs: int) -> int:
    """How many places a layer is fitted on."""
    if inputs > WIDEST:
        return min(inputs - 1, _WIDE_NUMBERS // (groups * inputs))
    enough = min(ROWS, max(ROWS // 4, _ROWS_PER_INPUT * inputs))
    return max(min(enough, _NUMBERS // (groups * inputs)), 2 * _ROWS_PER_INPUT * inputs)
