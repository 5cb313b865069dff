"""A phase: a stretch of training with one purpose, and the built-in way of training it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimc.errors import Interrupted, UsageError

from . import workers
from .features import Features
from .layout import arrange
from .loop import Hooks, Loop
from .recipe import Recipe

if TYPE_CHECKING:
    from .run import Run

_TOLD_EVERY = 0.5


class Phase:
    """A stretch of training with one purpose.

    Iterating over a run trains each phase; asking for `metrics` trains it at once. To train it with a loop of your
    own: build an optimiser over `parameters()`, `attach` it, train `module` in place, and call `done()`.

    name: "tock", "tick", "finetune" ... epochs: how long. tally: sums that the method keeps over the phase.
    continues: whether the optimiser remembers what it did in the phase before.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        epochs: float,
        recipe: Recipe,
        hooks: Hooks,
        trains: Callable[[str], bool],
        tally: dict[str, Tensor],
        continues: bool,
    ) -> None:
        self.name, self.epochs, self.recipe, self.hooks, self.trains = name, epochs, recipe, hooks, trains
        self.tally, self.continues = tally, continues
        self._run = run
        self._finished = False
        self._found: dict[str, float | None] = {}

    @property
    def module(self) -> nn.Module:
        """The network of this phase."""
        return self._run.network.module

    @property
    def flops(self) -> float:
        """The share of the original's MACs that is left."""
        return self._run.share

    @property
    def metrics(self) -> dict[str, float | None]:
        """Training loss and validation accuracy at the end of the phase; trains it if nobody has."""
        self.train()
        return self._found

    def parameters(self) -> list[nn.Parameter]:
        """What this phase trains; other parameters must stay as they are."""
        named = self.module.named_parameters()
        return [p for name, p in named if p.is_floating_point() and p.requires_grad and self.trains(name)]

    def attach(self, optimiser: torch.optim.Optimizer) -> None:
        """Let the method do its part of every step of an optimiser of yours: penalties, scores, masks."""
        before = self.hooks.before_step
        while isinstance(inner := getattr(optimiser, "optimizer", None), torch.optim.Optimizer):
            optimiser = inner  # wrappers, such as accelerate's, have no hooks of their own
        if before is not None:
            optimiser.register_step_pre_hook(lambda *_: before())

    def extra(self, targets: Any) -> Tensor | float:
        """What the method adds to your loss of the batch that has just gone through `module`; 0 for most."""
        return 0.0 if self.hooks.extra is None else self.hooks.extra(targets)

    def epoch_done(self) -> None:
        """Tell the method that your loop has seen all data once; some methods act then."""
        if self.hooks.after_epoch:
            self.hooks.after_epoch()

    def done(self) -> None:
        """The phase has been trained by your loop."""
        if not self._finished:
            self._run.trained_elsewhere(self)
            self._finish(None)

    def train(self) -> None:
        """Train the phase with the built-in loop, unless it has been trained."""
        if not self._finished:
            self._finish(self._run.train(self))

    def _finish(self, loss: float | None) -> None:
        self._finished = True
        self._found = {"loss": loss, "accuracy": self._run.measure(self)}


class Trainer:
    """The built-in training of one phase: steps, checkpoints, the wish to stop, early stopping and the best weights."""

    def __init__(self, run: Run, phase: Phase) -> None:
        if run.stream is None:
            raise UsageError(f"there is no data= to train the phase {phase.name!r} with; train it and call done()")
        self._run, self._phase, self._stream = run, phase, run.stream
        module = run.network.module
        arrange(module)
        start = round(run.spent * len(self._stream))
        steps = max(1, round((run.spent + phase.epochs) * len(self._stream)) - start) if phase.epochs > 0 else 0
        self._loop = Loop(
            module, self._stream, steps, phase.recipe, loss=run.loss, hooks=phase.hooks, trains=phase.trains,
            teacher=run.analysis.model, features=Features(run.network) if phase.recipe.features else None,
            memory=run.network.optimiser if phase.continues else None,
        )  # fmt: skip
        self._last: float | None = None
        self._best: float | None = None
        self._weights: dict[str, Tensor] = {}
        self._worse = 0
        self._told_at = 0.0

    @property
    def steps(self) -> int:
        """How many steps the phase has."""
        return self._loop.steps

    def run(self) -> float | None:
        """Train to the end; gives the mean loss of the last epoch. Interrupted where the user wants to stop."""
        loop, stream, recipe = self._loop, self._stream, self._phase.recipe
        while loop.done < loop.steps and not (recipe.patience and self._worse >= recipe.patience):
            if workers.any_of(self._run.wish.is_there):
                self._run.save(self.state())
                raise Interrupted(self._how_to_go_on())
            loop.step()
            self._tell()
            ended = stream.ended or (stream.began_anew and loop.done > 1)
            if ended:
                self._end_epoch()
            if self._run.is_due() or (ended and self._run.folder is not None):
                self._run.save(self.state())
        loss = loop.loss if loop.loss is not None else self._last
        if loop.done and not stream.ended:  # a part of an epoch
            self._compare()
        loop.finish()
        workers.same(self._phase.module.buffers())  # each process has batch statistics of its own
        if recipe.keep == "best" and self._best is not None:
            self._phase.module.load_state_dict(self._weights)
        self._run.network.optimiser = loop.memory()
        return loss

    def close(self) -> None:
        """Leave the network as it was, but for what was trained."""
        self._loop.close()

    def state(self) -> dict[str, Any]:
        """Where the phase is."""
        return {
            "loop": self._loop.state(), "tally": self._phase.tally, "last": self._last, "best": self._best,
            "weights": self._weights, "worse": self._worse,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from where a phase was."""
        self._loop.load(state["loop"])
        for name, value in state["tally"].items():
            self._phase.tally[name].copy_(value)
        self._last, self._best, self._weights = state["last"], state["best"], state["weights"]
        self._worse = state["worse"]

    def _end_epoch(self) -> None:
        run, loop = self._run, self._loop
        self._last = loop.loss
        run.log({"event": "epoch", "phase": self._phase.name, "epochs": self._epochs(), "loss": self._last})
        loop.forget()
        self._compare()

    def _compare(self) -> None:
        """Measure the network where the recipe chooses by that."""
        run, recipe = self._run, self._phase.recipe
        if recipe.keep == "best" or recipe.patience:
            accuracy = run.accuracy_of(run.network.module)
            if accuracy is None:
                raise UsageError("keep='best' and patience need validation data (val=)")
            if self._best is None or accuracy > self._best or math.isnan(self._best):
                self._best, self._worse = accuracy, 0
                self._weights = {name: t.detach().clone() for name, t in self._phase.module.state_dict().items()}
            else:
                self._worse += 1

    def _epochs(self) -> float:
        return self._run.spent + self._loop.done / len(self._stream)

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told_at < _TOLD_EVERY or workers.rank() != 0:
            return
        self._told_at = now
        run, loop, total = self._run, self._loop, self._run.options.epochs
        known = next((point.accuracy for point in reversed(run.history) if point.accuracy is not None), None)
        parts = [
            f"{self._phase.name}", f"{100 * run.share:.1f}% FLOPs",
            "" if known is None else run.shown(known),
            "" if loop.loss is None else f"loss {loop.loss:.3f}", f"rate {loop.rate:.2g}",
        ]  # fmt: skip
        run.stages.live(", ".join(part for part in parts if part), self._epochs() / total)

    def _how_to_go_on(self) -> str:
        where = f"in {self._phase.name}, after {self._epochs():.2f} of {self._run.options.epochs:g} epochs"
        if self._run.folder is None:
            return f"interrupted {where}; without a run folder nothing was kept"
        return f"interrupted {where}; it is kept in {self._run.folder.path}. To go on: the same command with --resume"
