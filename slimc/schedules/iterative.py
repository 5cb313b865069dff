"""Iterative pruning: score, cut a little, train a little, and again.

Sources: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (ICLR 2017),
section 2.2, for the loop; Liu et al., "Group Fisher Pruning" (ICML 2021), which cuts every few iterations the same
way; Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), section 3.4, for "prune and retrain iteratively".
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule


@schedule(
    "iterative",
    "cut by --scorer in steps with training between, then fine-tuning",
    "Molchanov et al., ICLR 2017",
    "obs",
    ranks=True,
)
def iterative(run: Run, *, steps: int = 10, finetune: float = 0.5) -> Iterator[Phase]:
    """`steps` cuts, each to the same share of what is left; finetune: share of the epochs after the last one."""
    demand(1, steps=steps)
    demand(0, 1, finetune=finetune)
    between = (1 - finetune) * run.options.epochs / max(1, steps - 1)
    run.check_reachable()
    for step in range(1, steps + 1):
        run.cut(partial(run.chosen, step / steps))
        if step < steps:
            yield run.phase("train", between, rate=0.5, shape="constant", continues=True)
    yield run.phase("finetune", run.left)
