"""The recipe: how a phase trains. Rates, shapes and regularisers in one place, the same for every method.

Which recipe a pruned network is fine-tuned with moves its accuracy as much as how channels were chosen (Wang et al.,
"Why is the State of Neural Network Pruning so Confusing?", 2023), so that comparisons must share one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.fx import GraphModule

from slimc.errors import UsageError

Shape = Literal["cosine", "step", "triangle", "constant"]
SHAPES: tuple[Shape, ...] = ("cosine", "step", "triangle", "constant")
_KNOWN = {
    "optimiser": ("auto", "sgd", "adamw"), "keep": ("last", "best"), "precision": ("auto", "float32", "bfloat16"),
}  # fmt: skip
_MILESTONES = (0.5, 0.75)
_FACTOR = 0.1
_LOWEST = 0.1
"""The ends of the triangle, as a share of its peak (Gate Decorator's 1e-3, 1e-2, 1e-3)."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    rate: the peak learning rate; None takes 0.05 for SGD and 5e-4 for AdamW. optimiser: "auto" is AdamW for networks
    with layer norms, else SGD. shape: of the rate over a phase. warmup: the share of a phase's steps in which the
    rate rises (cosine and step). weight_decay: of everything but norms, biases and gates. smoothing: of labels.
    average: decay of an exponential moving average of the weights, 0 for none. distil: the share of the loss that
    draws to the original network's outputs (softened by `temperature`). features: how much the last values of each
    channel group are drawn to the original's beside that. patience: epochs without a
    better validation metric after which fine-tuning ends, 0 for never. keep: "last" or "best" weights of fine-tuning
    by validation. gate_momentum: of a schedule's gates, if not `momentum`.
    precision: "auto" is bfloat16 autocast where the processor computes in it.
    """

    rate: float | None = None
    optimiser: Literal["auto", "sgd", "adamw"] = "auto"
    shape: Shape = "cosine"
    warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    smoothing: float = 0.0
    average: float = 0.0
    distil: float = 0.0
    temperature: float = 4.0
    features: float = 0.0
    patience: int = 0
    keep: Literal["last", "best"] = "last"
    gate_momentum: float | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        for name in ("warmup", "momentum", "smoothing", "average", "distil", "gate_momentum"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; wanted a number from 0 to 1")
        for name in ("weight_decay", "features", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}; wanted a number from 0 up")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}; it must be above 0")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UsageError(f"the learning rate is {self.rate}; it must be above 0")
        if self.average and self.keep == "best":
            raise UsageError(
                "keep='best' chooses among weights as they are trained, not among their averages; "
                "leave one of average and keep out"
            )
        if self.shape not in SHAPES:
            raise UsageError(f"the shape of the learning rate is {self.shape!r}; known are {', '.join(SHAPES)}")
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {getattr(self, name)!r}; known are {', '.join(known)}")
        if self.average == 1:
            raise UsageError("average is 1, which keeps the first weights for good; 0.999 is usual")


def build(recipe: Recipe, module: nn.Module, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimiser of a recipe over the parameters that train."""
    named, rate = list(named), recipe.rate or default_rate(recipe, module)
    if _is_adam(recipe, module):
        return torch.optim.AdamW(parameter_groups(named, recipe.weight_decay), lr=rate)
    apart = {name for name, _ in named if name.endswith(".phi") and recipe.gate_momentum is not None}
    chosen = parameter_groups([(name, p) for name, p in named if name not in apart], recipe.weight_decay)
    gates = [p for name, p in named if name in apart and p.requires_grad]
    if gates:
        chosen.append({"params": gates, "weight_decay": 0.0, "momentum": recipe.gate_momentum})
    return torch.optim.SGD(chosen, lr=rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def with_sgd(recipe: Recipe, method: str) -> Recipe:
    """The recipe for a phase that puts forces into gradients, which AdamW would rescale; UsageError where it must."""
    if recipe.optimiser == "adamw":
        raise UsageError(f"{method} adds forces to gradients, which AdamW rescales: leave optimiser at auto, or sgd")
    return replace(recipe, optimiser="sgd")


def default_rate(recipe: Recipe, module: nn.Module) -> float:
    """The peak rate where the recipe leaves it open."""
    return 5e-4 if _is_adam(recipe, module) else 0.05


def _is_adam(recipe: Recipe, module: nn.Module) -> bool:
    return recipe.optimiser == "adamw" or (recipe.optimiser == "auto" and has_layer_norms(module))


def has_layer_norms(module: nn.Module) -> bool:
    """Whether a model, as modules or as a graph, normalises over features: a transformer, mostly."""
    for part in module.modules():
        if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
            return True
        if isinstance(part, GraphModule) and any(
            name in str(node.target) for node in part.graph.nodes for name in ("layer_norm", "rms_norm")
        ):
            return True
    return False


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, object]]:
    """Parameters with and without weight decay.

    Norm parameters, biases and gates go without. They are told by having at most one axis, which also holds in a
    model that is a bare graph and has no norm modules.
    """
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def factor(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """The factor on the peak rate at each step of a phase."""
    warm = max(1, round(steps * recipe.warmup)) if recipe.warmup else 0

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    def step_wise(step: int) -> float:
        return _FACTOR ** sum(step >= milestone * steps for milestone in _MILESTONES)

    def triangle(step: int) -> float:
        up = 1 - abs(2 * (step + 0.5) / max(1, steps) - 1)
        return _LOWEST + (1 - _LOWEST) * max(0.0, up)

    if recipe.shape == "triangle":
        return triangle
    if recipe.shape == "constant":
        return lambda step: 1.0
    shape = cosine if recipe.shape == "cosine" else step_wise
    return lambda step: (step + 1) / warm if step < warm else shape(step)
