"""Soft Filter Pruning: after every epoch the weakest filters are set to zero and may grow back.

Sources: He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks" (IJCAI 2018), algorithm
1; He et al., "Filter Pruning via Geometric Median" (CVPR 2019) for the other way to select. The same share of every
group goes, as published; the share follows from the budget.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from slimc.errors import UsageError
from slimc.graph.infer import attribute
from slimc.scores import Scores
from slimc.training import gates, lifts
from slimc.training.gates import Place
from slimc.training.loop import Hooks
from slimc.training.network import Alive, Network
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule

SELECT = ("magnitude", "fpgm")


@schedule("soft", "the weakest filters are zeroed after every epoch and may grow back", "He et al., IJCAI 2018")
def soft(run: Run, *, select: str = "magnitude", finetune: float = 0.3) -> Iterator[Phase]:
    """Train with soft zeroing, cut the last selection for good, fine-tune for that share of the epochs (0 published).

    select: "magnitude", by the filters' own norms (readers and norms do not count), or "fpgm".
    """
    if select not in SELECT:
        raise UsageError(f"--set select={select}: known are {', '.join(SELECT)}")
    demand(0, 1, finetune=finetune)
    layers = gates.places(run.analysis.types, after_norms=False)

    def weakest() -> Alive:
        found = run.score("fpgm") if select == "fpgm" else norms(run.network, layers)
        return run.selection.choose(lifts.within_groups(run.network, found))

    def zero() -> None:
        alive = weakest()
        with torch.no_grad():
            for place in layers:
                weight = attribute(run.network.module, place.name)
                axis = place.tensors[0][1]
                gone = ~lifts.living(run.network, place, alive).to(weight.device)
                # Weights only: the batch norm behind goes on training, as published.
                weight.index_fill_(axis, gone.nonzero().flatten(), 0.0)

    run.event("zero", zero)
    yield run.phase("soft", (1 - finetune) * run.options.epochs, hooks=Hooks(after_epoch=zero))
    run.cut(weakest)
    yield run.phase("finetune", run.left)


def norms(network: Network, layers: tuple[Place, ...]) -> Scores:
    """[variables] the norm of each channel's filters, all of a group together; NaN for channels without any."""
    squares = {}
    for place in layers:
        weight = attribute(network.module, place.name).detach()
        axis = place.tensors[0][1]
        squares[place.name] = weight.square().sum([other for other in range(weight.dim()) if other != axis])
    found: Scores = np.sqrt(lifts.summed(network, layers, squares))
    return found
