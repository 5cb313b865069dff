"""Tick-Tock: trained gates say which channels matter, in small steps between stretches of training.

Source: You, Yan, Ye, Ma and Wang, "Gate Decorator: Global Filter Pruning Method for Accelerating Deep Convolutional
Neural Networks" (NeurIPS 2019), equations 6 to 9, and the authors' code for what the paper leaves open: which
parameters move, the triangular rate, the first Tock, the score once per mini-batch. Three things are ours: how far each
Tick cuts follows from the budget unless `fraction` is given (the authors cut a fixed share of the filters until they
arrive), phases are shares of the epochs that the user has, and scores of coupled gates are averaged (`lift`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from slimc.errors import UsageError
from slimc.scores import Scores
from slimc.training import lifts
from slimc.training.gates import gates_of, plain_name
from slimc.training.loop import Hooks
from slimc.training.network import Alive
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule

_TOCKS = 0.6
"""Tocks' share of the epochs before fine-tuning; Ticks have the rest."""


@schedule(
    "tick-tock",
    "trained gates choose channels in small steps (ticks) between stretches of training (tocks)",
    "You et al., Gate Decorator, NeurIPS 2019",
)
def tick_tock(
    run: Run,
    *,
    ticks: int = 5,
    tocks: int = 2,
    fraction: float = 0.0,
    penalty: float = 1e-3,
    lift: str = "mean",
    per_cost: bool = False,
    finetune: float = 0.7,
) -> Iterator[Phase]:
    """Tock, then `ticks` Ticks, and again until the budget holds, `tocks` times at most; then fine-tuning.

    fraction: the share of the filters that are left that each Tick removes, as published (0.002 there), but for the
    last of all, which meets the budget; 0 cuts so that `tocks` rounds reach it. penalty: of the gates' absolute
    values in Tocks (lambda). lift: a channel's score is the "sum" over its gates (equation 9, under which a stream that
    many layers write to keeps nearly all of its channels) or their "mean". per_cost: scores are divided by what a
    channel frees of the budget. finetune: share of the epochs after the last cut.
    """
    demand(1, ticks=ticks, tocks=tocks)
    demand(0, 0.999, fraction=fraction)
    demand(0, penalty=penalty)
    demand(0, 1, finetune=finetune)
    if lift not in ("sum", "mean"):
        raise UsageError(f"--set lift={lift}: known are sum and mean")
    lifts.check_reachable(run.network, run.network.places, run.selection)
    run.gate()
    before = (1 - finetune) * run.options.epochs
    planned = ticks * tocks
    done = 0
    while not run.reached:
        if done % ticks == 0:
            yield run.phase("tock", _TOCKS * before / tocks, rate=0.2, shape="triangle", hooks=sparse(run, penalty))
        tick = scored(run, (1 - _TOCKS) * before / planned)
        yield tick
        done += 1
        if not any(bool(own.any()) for own in tick.tally.values()):
            raise UsageError(
                "no gradient reached the gates of --schedule tick-tock: give it epochs before the last cut (--epochs, "
                "--set finetune), and attach the optimiser of a loop of yours (phase.attach)"
            )
        values = lifts.summed(run.network, run.network.places, tick.tally)
        if lift == "mean":
            values /= lifts.members_of_channels(run.network, run.network.places)
        if fraction and done < planned:  # after that there are no epochs to score with
            run.cut(partial(_published, run, values, fraction))
        else:
            run.cut(partial(run.selection.choose, values, min(1.0, done / planned), per_cost=per_cost))
    run.merge()
    yield run.phase("finetune", run.left)


def sparse(run: Run, penalty: float) -> Hooks:
    """The gradient of `penalty` times the sum of the gates' absolute values (equation 8)."""

    def add() -> None:
        for _, phi in gates_of(run.network.module, run.network.places):
            if phi.grad is not None:
                phi.grad.add_(phi.detach().sign(), alpha=penalty)

    return Hooks(before_step=add)


def scored(run: Run, epochs: float) -> Phase:
    """A Tick: only gates, the betas beside them and the last layer move; |phi dL/dphi| of every step is summed."""
    tally = lifts.zeros(run.network, run.network.places)

    def add() -> None:
        for place, phi in gates_of(run.network.module, run.network.places):
            if phi.grad is not None:
                tally[place.name] += (phi.detach() * phi.grad).abs().double().cpu()

    return run.phase(
        "tick", epochs, rate=0.02, shape="constant", warmup=0.0, weight_decay=0.0,
        hooks=Hooks(before_step=add), trains=_moves(run), tally=tally, continues=True,
    )  # fmt: skip


def _moves(run: Run) -> Callable[[str], bool]:
    """Whether a parameter moves in a Tick."""
    betas = {name for place in run.network.places if place.norm for name, _ in place.tensors[1:]}
    last = set(run.network.last_layer())

    def moves(name: str) -> bool:
        plain, is_gate = plain_name(name)
        return is_gate or plain in betas or plain in last

    return moves


def _published(run: Run, values: Scores, fraction: float) -> Alive:
    """Remove a share of the filters that are left, counted over all members of every group, but not past the budget."""
    counts = lifts.members(run.network, run.network.places)
    left = sum(count * width for count, width in zip(counts, run.network.widths.tolist(), strict=True))
    return run.selection.lowest(values, max(1, int(fraction * left)), counts)
