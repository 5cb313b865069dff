"""ResRep: remembering and forgetting are apart: masked gates are drawn to zero, while everything else trains on.

Source: Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting" (ICCV 2021), equations 6
to 9: behind each convolution with its norm stands a compactor that starts as the identity; masked channels of it get
no gradient of the loss any more, only that of a penalty on their norm. Ours: the compactor is a gate per channel, the
diagonal of the published matrix, so that it can be multiplied into the norm before it, and coupled channels share one
mask; masks come at even distances until the budget holds with them; a masked gate is drawn as much as it takes to close
by the end, and stays closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from slimc.scores import Scores
from slimc.training import lifts
from slimc.training.gates import gates_of
from slimc.training.loop import Hooks
from slimc.training.phase import Phase
from slimc.training.recipe import Recipe, default_rate, factor, with_sgd
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule

_MOMENTUM = 0.99
"""Of the gates, as published: with 0.9 a masked gate takes ten times as many steps to close."""
_WAITS, _ENOUGH = 0.1, 0.5
"""The shares of the phase before the first mask, and by which the masks meet the budget."""


@schedule(
    "resrep", "gates are masked, a few more at a time, drawn to zero where they are, and cut", "Ding et al., ICCV 2021"
)
def resrep(run: Run, *, penalty: float = 1e-4, masks: int = 20, finetune: float = 0.3) -> Iterator[Phase]:
    """Train with gates behind every norm, mask the weakest in `masks` steps, cut them, fine-tune for that share.

    penalty: of the gates' absolute values (lambda); on masked ones at least what closes them by the end of the phase.
    finetune: 0 as published.
    """
    demand(0, penalty=penalty)
    demand(1, masks=masks)
    demand(0, 1, finetune=finetune)
    recipe = with_sgd(run.options.recipe, "resrep")
    network = run.network
    lifts.check_reachable(network, network.places, run.selection)
    run.gate(identity=True)
    epochs = (1 - finetune) * run.options.epochs
    steps = max(1, round(epochs * (1 if run.stream is None else len(run.stream))))
    alive = torch.ones(len(network.alive), dtype=torch.bool)
    done = torch.zeros((), dtype=torch.int64)
    strength = max(penalty, closing(run, recipe, steps))

    def mask() -> None:
        before, now = (_asked(int(done) + ahead, steps, masks) for ahead in (-1, 0))
        if now > before:
            alive.copy_(torch.from_numpy(run.selection.choose(strengths(run), now)))

    def reset() -> None:
        if run.stream is not None:
            done.add_(1)
            mask()
        for place, phi in gates_of(network.module, network.places):
            if phi.grad is None:
                continue
            kept = lifts.living(network, place, alive.numpy()).to(phi.device)
            with torch.no_grad():
                phi.copy_(torch.where(kept, phi, phi.clamp_min(0)))  # its momentum would carry it far past zero
                drawn = torch.where(kept, penalty, strength).to(phi)
                phi.grad.mul_(kept).add_(drawn * phi.sign())

    def passed() -> None:
        if run.stream is None:  # a loop of the user's own is counted by its epochs
            done.add_(1)
            mask()

    yield run.phase(
        "compact", epochs, hooks=Hooks(before_step=reset, after_epoch=passed), tally={"alive": alive, "steps": done},
        gate_momentum=_MOMENTUM, optimiser=recipe.optimiser,
    )  # fmt: skip
    run.cut(lambda: run.selection.choose(strengths(run)))
    run.merge()
    yield run.phase("finetune", run.left)


def _asked(done: int, steps: int, masks: int) -> float:
    """How far masks go towards the budget after so many steps, in `masks` jumps."""
    share = (done / steps - _WAITS) / (_ENOUGH - _WAITS)
    return min(1.0, max(0, math.floor(masks * share + 1e-9)) / masks)


def strengths(run: Run) -> Scores:
    """[variables] the root mean square of each channel's gates; NaN for channels without any."""
    network = run.network
    squares = {place.name: phi.detach().square() for place, phi in gates_of(network.module, network.places)}
    counts = lifts.members_of_channels(network, network.places)
    found: Scores = np.sqrt(lifts.summed(network, network.places, squares) / counts)
    return found


def closing(run: Run, recipe: Recipe, steps: int) -> float:
    """The penalty that moves a gate by 1 in the steps after the last mask, under SGD with Nesterov's momentum."""
    rate, shape = recipe.rate or default_rate(recipe, run.analysis.model), factor(recipe, steps)
    velocity = moved = 0.0
    for step in range(int(_ENOUGH * steps), steps):
        velocity = _MOMENTUM * velocity + 1
        moved += rate * shape(step) * (1 + _MOMENTUM * velocity)
    return 1 / moved if moved > 0 else 0.0
