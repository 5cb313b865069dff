"""Network Slimming: batch norms' gammas are drawn to zero while training, the smallest are cut.

Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (ICCV 2017), equation 1 and
figure 2. The cut is global by |gamma|, summed over the batch norms of a group.
"""

from __future__ import annotations

from collections.abc import Iterator

from slimc.errors import UsageError
from slimc.graph.infer import attribute
from slimc.training import lifts
from slimc.training.loop import Hooks
from slimc.training.network import Alive
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule


@schedule("slimming", "batch-norm scales are drawn to zero while training, the smallest cut", "Liu et al., ICCV 2017")
def slimming(run: Run, *, penalty: float = 1e-4, finetune: float = 0.5) -> Iterator[Phase]:
    """Train with `penalty` (lambda) times the sum of |gamma|, cut once, fine-tune for that share of the epochs.

    Raises UsageError for a network without batch norms.
    """
    demand(0, penalty=penalty)
    demand(0, 1, finetune=finetune)
    norms = tuple(place for place in run.network.places if place.norm)
    if not norms:
        raise UsageError(
            "--schedule slimming needs batch norms that scale and train; this network has none. Take group-sparsity"
        )
    lifts.check_reachable(run.network, norms, run.selection)

    def add() -> None:
        for place in norms:
            gamma = attribute(run.network.module, place.name)
            if gamma.grad is not None:
                gamma.grad.add_(gamma.detach().sign(), alpha=penalty)

    yield run.phase("sparse", (1 - finetune) * run.options.epochs, hooks=Hooks(before_step=add))

    def smallest() -> Alive:
        gammas = {place.name: attribute(run.network.module, place.name).detach().abs() for place in norms}
        return run.selection.choose(lifts.summed(run.network, norms, gammas))

    run.cut(smallest)
    yield run.phase("finetune", run.left)
