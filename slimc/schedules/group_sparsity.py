"""Group sparsity: all weights that go with a channel are drawn to zero together, the weakest groups most.

Source: Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023), section 3.3: the penalty of each channel is
2 to the power of alpha (I_max - I) / (I_max - I_min), times the squared norm of everything that is removed with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from slimc.graph.infer import attribute
from slimc.scores import Scores
from slimc.training.loop import Hooks
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule


@schedule(
    "group-sparsity",
    "all weights of a channel are drawn to zero together, the weakest channels cut",
    "Fang et al., CVPR 2023",
)
def group_sparsity(run: Run, *, penalty: float = 5e-4, alpha: float = 4.0, finetune: float = 0.5) -> Iterator[Phase]:
    """Train with the penalty, cut to the budget by group norms, fine-tune for that share of the epochs."""
    demand(0, penalty=penalty, alpha=alpha)
    demand(0, 1, finetune=finetune)
    weights = torch.zeros(run.analysis.types.solution.variables + 1, dtype=torch.float64)
    factors: dict[str, Tensor] = {}

    def weigh() -> None:
        weights.copy_(torch.from_numpy(_weights(run, alpha)))
        factors.clear()

    def add() -> None:
        if not weights.any():
            weigh()
        if not factors:
            factors.update(_factors(run, weights.numpy()))
        for name, factor in factors.items():
            tensor = attribute(run.network.module, name)
            if isinstance(tensor, torch.nn.Parameter) and tensor.grad is not None:
                tensor.grad.add_(factor * tensor.detach(), alpha=penalty)

    hooks = Hooks(before_step=add, after_epoch=weigh)
    yield run.phase(
        "sparse", (1 - finetune) * run.options.epochs, hooks=hooks, tally={"weights": weights}, weight_decay=0.0
    )
    run.cut(lambda: run.selection.choose(run.score("magnitude")))
    yield run.phase("finetune", run.left)


def gammas(importance: Scores, alpha: float) -> Scores:
    """2^(alpha (I_max - I) / (I_max - I_min)) for the channels of one group; 1 where all are alike."""
    low, high = importance.min(initial=np.inf), importance.max(initial=-np.inf)
    if not high > low:
        return np.ones_like(importance)
    found: Scores = 2 ** (alpha * (high - importance) / (high - low))
    return found


def _weights(run: Run, alpha: float) -> Scores:
    """[variables + 1] the factor of each channel; 0 for what is none, which is also the last entry."""
    norms = run.score("magnitude", "none")
    weights = np.zeros(len(norms) + 1)
    for group in run.selection.grouping().groups:
        weights[group.variables] = gammas(norms[group.variables], alpha)
    return weights


def _factors(run: Run, weights: Scores) -> dict[str, Tensor]:
    """For each parameter, the sum over its axes of the factor of each index, ready to be multiplied with it."""
    network = run.network
    types, cut = network.analysis.types, network.cut_so_far
    found: dict[str, Tensor] = {}
    tensors = network.tensors()
    for name, axes in types.tensors.items():
        tensor = tensors[name]
        if not isinstance(tensor, torch.nn.Parameter):
            continue
        for position, axis in enumerate(axes):
            rows = types.solution.factors(axis)[cut.kept(axis)]
            if not (rows >= 0).any():
                continue
            shape = [-1 if place == position else 1 for place in range(tensor.dim())]
            own = torch.from_numpy(weights[rows].sum(axis=1)).to(tensor).reshape(shape)
            found[name] = found[name] + own if name in found else own
    return found
