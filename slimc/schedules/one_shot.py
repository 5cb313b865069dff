"""One cut, then training: what every other schedule must beat with the same epochs."""

from __future__ import annotations

from collections.abc import Iterator

from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import schedule


@schedule(
    "one-shot", "one cut by --scorer, then fine-tuning", "Li et al., Pruning Filters, ICLR 2017", "obs", ranks=True
)
def one_shot(run: Run) -> Iterator[Phase]:
    """Cut to the budget at once and train what is left for all epochs."""
    run.cut(run.chosen)
    yield run.phase("finetune", run.left)
