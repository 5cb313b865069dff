"""MetaPruning: a network that makes weights for any widths is trained, and evolution searches the widths with it.

Source: Liu et al., "MetaPruning: Meta Learning for Automatic Neural Network Channel Pruning" (ICCV 2019), sections 3.1
and 3.2, and the authors' code for settings. Ours: the generator starts at the weights that the network came with, and
its channels stand in the order of --scorer; widths are drawn at the budget, in training too (`widths`); coupled
channels share one width; vectors are compared by the loss of training samples, and the best one's weights are kept
unless `scratch` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from slimc import recover
from slimc.scores import Scores
from slimc.training import lifts, widths
from slimc.training.judge import Judge
from slimc.training.loop import Hooks
from slimc.training.network import Alive
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule
from slimc.training.widths import Genes

from .scratch import draw

_SEARCH = 1_000_033
_RATE = 0.1
"""Of the generator, as a share of the peak: it starts at trained weights, which other widths at every step disturb."""


@schedule(
    "meta",
    "a network that makes weights for any widths is trained, and evolution searches the widths",
    "Liu et al., MetaPruning, ICCV 2019",
    ranks=True,
    mends=False,
)
def meta(
    run: Run,
    *,
    hidden: int = 0,
    population: int = 20,
    generations: int = 6,
    scratch: bool = False,
    finetune: float = 0.5,
) -> Iterator[Phase]:
    """Train the generator, search, cut once, and fine-tune for that share of the epochs.

    hidden: units between widths and weights; 0 for 4 (published: 32), fewer in large networks. population: vectors
    in each of the `generations` after the first (published: 50, 20). scratch: new random weights after the cut, as
    published.
    Raises UsageError where there are no labelled samples to compare vectors on.
    """
    demand(0, hidden=hidden, generations=generations)
    demand(1, population=population)
    demand(0, 1, finetune=finetune)
    lifts.check_reachable(run.network, run.network.places, run.selection)
    search = _Search(run)
    search.places = run.event("order", lambda: torch.from_numpy(search.order())).numpy()
    run.event("generate", partial(search.begin, hidden))
    steps = torch.zeros((), dtype=torch.int64)

    def other() -> None:
        steps.add_(1)
        search.draw(int(steps))

    epochs = (1 - finetune) * run.options.epochs
    yield run.phase("generator", epochs, rate=_RATE, hooks=Hooks(before_step=other), tally={"steps": steps})
    found: Mapping[str, Tensor] = {}
    for number in range(generations + 1):
        found = run.event("generation", partial(search.generation, number, population, found))
        run.stages.detail(f"generation {number} of {generations}: loss {float(found['losses'][0]):.4f}")
        if run.is_due():
            run.save(None)
    best = search.alive(found["genes"][0].numpy())
    run.event("settle", partial(search.end, best))
    run.cut(lambda: best)
    if scratch:
        run.event("draw", lambda: draw(run.network.module))
    else:
        run.event("norms", lambda: run.network.refit(recover.find("bn").run, run.samples))
    yield run.phase("finetune", run.left)


class _Search:
    """Vectors of widths on one generator. places: of the channels in their groups, as `widths.order` gives them."""

    def __init__(self, run: Run) -> None:
        self._run, self._loss = run, Judge(run)
        self.places: Scores = np.empty(0)

    def order(self) -> Scores:
        """By --scorer; groups that the generator cannot close stay whole."""
        network = self._run.network
        found = widths.order(network, self._run.score(self._run.options.scorer))
        found[np.isnan(lifts.members_of_channels(network, network.places))] = np.nan
        return found

    def begin(self, hidden: int) -> None:
        """Put the generator on."""
        self._run.network.generate(hidden)
        self.draw(0)

    def draw(self, step: int) -> None:
        """Open the widths of a step of training, the same in all processes."""
        rng = np.random.default_rng([self._run.options.seed, step])
        self._open(self.alive(widths.drawn(self._slots, 1, rng)[0]))

    def end(self, alive: Alive) -> None:
        """Take the generator off, with the weights for these channels."""
        self._open(alive)
        self._run.network.settle()

    def alive(self, genes: Genes) -> Alive:
        """The channels that a vector leaves at the budget."""
        wanted = widths.preference(self._run.network, self.places, widths.shares(genes))
        return self._run.selection.choose(wanted)

    def generation(self, number: int, population: int, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The best vectors ever and their losses, with those of one more generation; the best first."""
        rng = np.random.default_rng([self._run.options.seed, _SEARCH, number])
        if before:
            genes, found = before["genes"].numpy(), before["losses"].numpy()
            seen = {self.alive(own).tobytes() for own in genes}

            def is_new(own: Genes) -> bool:
                count = len(seen)
                seen.add(self.alive(own).tobytes())
                return len(seen) > count

            fresh = widths.bred(genes, found, population, rng, is_new)
        else:
            genes, found = np.empty((0, self._slots), np.int64), np.empty(0)
            fresh = widths.drawn(self._slots, population, rng)
            fresh[0] = widths.STEPS - 1  # the same share of every group
        values = []
        for own in fresh:
            self._open(self.alive(own))
            values.append(self._loss())
            self._run.stages.tick(len(values), len(fresh))
        genes, found = np.concatenate([genes, fresh]), np.concatenate([found, values])
        best = np.argsort(found, kind="stable")[:population]
        return {"genes": torch.from_numpy(genes[best]), "losses": torch.from_numpy(found[best])}

    @property
    def _slots(self) -> int:
        return len(self._run.analysis.groups)

    def _open(self, alive: Alive) -> None:
        groups = self._run.analysis.groups
        left = np.array([alive[group.variables].mean() for group in groups], np.float64)
        assert self._run.network.generator is not None
        self._run.network.generator.open(alive, left)
