"""A run: a schedule's phases one after the other, with everything that it takes to go on after an interruption."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimc import recover, scores
from slimc.analysis import Analysis, Stages
from slimc.errors import UsageError
from slimc.graph.stateless import modes_kept
from slimc.random_state import OwnRandomState, kept_random_state, random_state
from slimc.recover import Task
from slimc.report import TrainingPoint
from slimc.report.format import metric
from slimc.samples import Samples, batch_of
from slimc.scores import Loss

from . import workers
from .folder import RunFolder
from .interrupts import Wish
from .journal import Journal
from .loop import Hooks, Metric, evaluate
from .network import Alive, Network
from .options import Options
from .phase import Phase, Trainer
from .recipe import default_rate, has_layer_norms
from .schedule import Schedule
from .selection import Selection
from .stream import SAMPLES_SEED, Stream, training_samples

_SAVED_EVERY = 60.0
_ROUNDING = 1e-9
_MEASURED_EVERY = 0.5
_SETTLED = 100
"""Steps after which a batch norm's running statistics have forgotten what was before a cut (0.9 to the 100th)."""


class Run:
    """A schedule at work; iterate over it, then take `result`.

    analysis: the model as given. data: training batches, readable again and again; None only where the caller trains
    every phase. val: batches that nothing is chosen on but what `Recipe.keep` and `patience` say. finish: makes the
    result of a run that has ended. mend: the recovery steps after every cut.
    """

    def __init__(
        self,
        schedule: Schedule,
        analysis: Analysis,
        options: Options,
        *,
        data: Iterable[Any] | None,
        val: Iterable[Any] | None,
        loss: Loss | None,
        metric: Metric | None,
        stages: Stages,
        finish: Callable[[Run], Any],
        folder: RunFolder | None = None,
        resume: bool = False,
    ) -> None:
        self.schedule, self.analysis, self.options = schedule, analysis, options
        self.mend = options.mend if schedule.mends else ()
        self.network = Network(analysis, as_graph=options.as_graph)
        self.selection = Selection(self.network, options.limits, options.round_to, options.may_relax, options.ignored)
        self.history: list[TrainingPoint] = []
        self.spent = 0.0
        self.loss, self.metric, self.stages, self.folder = loss, metric, stages, folder
        self._finish, self._data, self._resume = finish, data, resume
        example = analysis.captured.example
        device = next((tensor.device for tensor in example.tensors()), None)
        self.stream = None if data is None else Stream(data, example, options.seed, device)
        if isinstance(val, Iterator):
            raise UsageError("the validation data can be read only once; give a DataLoader or a list of batches")
        self._val, self._device = val, device
        self._journal = Journal(self._wake)
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._middle: Mapping[str, Any] | None = None
        self._measured_at, self._steps = 0.0, 0
        self._settled = False
        self._began = self._saved_at = time.monotonic()
        self._samples: Samples | None = None
        self.unscored: dict[str, str] = {}  # groups by name, and the scorer that says nothing of them
        self._result: Any = None
        self._phases: Iterator[Phase] | None = None
        self._own_random_state = OwnRandomState(options.seed, SAMPLES_SEED)
        self.wish = Wish()

    # -- for callers ----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Phase]:
        """The phases; each is trained when the next one is asked for, unless it was before.

        There is one pass: a loop that was left is gone on with by the next one, or by `result`.
        """
        return self

    def __next__(self) -> Phase:
        if self._phases is None:
            self._phases = self._pass()
        with self._own_random_state:
            return next(self._phases)

    def _pass(self) -> Iterator[Phase]:
        with self._alone():
            checkpoint = workers.from_first(lambda: self.folder.start(self._resume) if self.folder else None)
            if checkpoint is not None:
                self.history = [TrainingPoint(**point) for point in checkpoint["history"]]
                self._journal.recall(checkpoint)
            for phase in self.schedule.plan(self, **self.options.settings):
                if self._journal.is_telling:
                    self._journal.told("phase", partial(self._heed, phase))
                    continue
                self.stages.detail(f"{phase.name}: {phase.epochs:.3g} epochs at {100 * self.share:.1f}% of the FLOPs")
                yield phase
                phase.train()
                self._close(phase)
            self.merge()
            self._settle()
            self._check_reached()
            self._look_again()
            self._result = self._finish(self)

    @property
    def result(self) -> Any:
        """The compressed model; runs every phase that is left."""
        for _ in self:
            pass
        if self._result is None:
            raise UsageError("this run ended in an error; begin it again, or go on from its folder with resume=True")
        return self._result

    # -- for schedules --------------------------------------------------------------------------------

    @property
    def share(self) -> float:
        """The share of the MACs that is left."""
        whole = self.analysis.full.macs
        return self.network.costs.macs / whole if whole else 1.0

    @property
    def reached(self) -> bool:
        """Whether every budget holds."""
        return self.selection.meets(self.network.alive)

    @property
    def left(self) -> float:
        """Epochs of the budget that are not spent."""
        left = self.options.epochs - self.spent
        return left if left > _ROUNDING else 0.0

    def extend(self, epochs: float) -> None:
        """Train longer than was asked."""
        self.options = replace(self.options, epochs=max(epochs, self.options.epochs))

    def phase(
        self,
        name: str,
        epochs: float,
        *,
        rate: float = 1.0,
        hooks: Hooks | None = None,
        trains: Callable[[str], bool] = lambda name: True,
        tally: dict[str, Tensor] | None = None,
        continues: bool = False,
        **changes: Any,
    ) -> Phase:
        """A phase to yield.

        rate: as a share of the recipe's peak. tally: sums that the hooks keep. continues: the optimiser remembers what
        it did in the phase before. changes: other fields of the recipe. Averages, early stops and the best weights
        belong to "finetune" alone.
        """
        recipe = self.options.recipe
        if name != "finetune":
            recipe = replace(recipe, average=0.0, patience=0, keep="last")
        recipe = replace(recipe, **changes)
        if recipe.optimiser == "auto":  # by the graph: a model from a file has no norm modules
            recipe = replace(recipe, optimiser="adamw" if has_layer_norms(self.analysis.captured.module) else "sgd")
        peak = recipe.rate or default_rate(recipe, self.analysis.model)
        recipe = replace(recipe, rate=peak * rate)
        return Phase(self, name, min(epochs, self.left), recipe, hooks or Hooks(), trains, tally or {}, continues)

    def event(self, kind: str, compute: Callable[[], Any]) -> Any:
        """Do something that changes the run, or depends on weights, once; what came of it is kept for a restart.

        Gives tensors and plain data only.
        """
        if self._journal.is_telling:
            return self._journal.told(kind)
        value = compute()
        self._journal.write(kind, value)
        return value

    def gate(self, *, identity: bool = False) -> None:
        """Put gates on; identity: these start as 1 behind the norms."""
        self.event("gate", partial(self.network.gate, identity=identity))

    def merge(self) -> None:
        """Multiply gates in and take them off."""
        self.event("merge", self.network.merge)

    def keep(self, name: str) -> None:
        """Remember all tensors as they are now; they are cut along with the network."""
        self.event("keep", lambda: self._kept.update({name: {k: t.clone() for k, t in self.network.tensors().items()}}))

    def rewind(self, name: str) -> None:
        """Put back what `keep` remembered, at the channels that are left."""
        self.event("rewind", lambda: self.network.put(self._kept[name]))

    def cut(self, choose: Callable[[], Alive]) -> None:
        """Remove every channel that is not chosen, and fit what is left if the method allows and the user wants it."""
        if self._journal.is_telling:
            self._journal.told("cut", lambda alive: setattr(self.network, "alive", alive.numpy()))
            return
        alive = torch.from_numpy(choose() & self.network.alive)
        workers.same([alive])
        with self.stages.stage("cut"), self.wish.listening():
            self._apply(alive.numpy(), self.mend)
        self._journal.write("cut", alive)
        self.log({"event": "cut", "flops": self.share, "widths": self.network.widths.tolist()})

    def _apply(self, alive: Alive, steps: Sequence[str]) -> None:
        older = self.network.cut_so_far

        def mend(task: Task) -> None:
            for name in steps:
                recover.find(name).run(replace(task, seed=self.options.seed))

        self.network.cut(alive, mend if steps else None, self.samples if steps else None)
        for name, tensors in self._kept.items():
            self._kept[name] = self.network.sliced(tensors, older)
        workers.same(self.network.tensors().values())
        self._steps = 0

    def score(self, scorer: str | scores.Method, normalise: str = "auto") -> scores.Scores:
        """A scorer's numbers for the network as it is now, [variables], normalised between groups as it likes.

        NaN for groups that it says nothing of, which stay whole.
        """
        method = scores.find(scorer) if isinstance(scorer, str) else scorer
        types, grouping = self.network.typed()
        needed = None if method.needs == "weights" else self.samples
        subject = scores.Subject(types, grouping, "l2", self.options.seed, needed, self.loss, self.stages.tick)
        with modes_kept(self.network.graph, training=False):
            plain = method.score(subject)
        found = scores.normalise(plain, method.normalisation if normalise == "auto" else normalise)
        total, unscored = np.full(self.analysis.types.solution.variables, np.nan), scores.unscored(plain)
        for group, own in zip(grouping.groups, found, strict=True):
            if group.number in unscored:
                self.unscored[group.name] = method.name
            else:
                total[group.variables] = own
        return total

    def check_reachable(self) -> None:
        """UnreachableTarget where --scorer says too little for the budget; before anything is trained."""
        if not self._journal.is_telling and self.options.limits:
            self.chosen()

    def chosen(self, progress: float = 1.0) -> Alive:
        """The channels that stay by --scorer, so that budgets hold to the degree of `progress` (`Selection.choose`)."""
        method = scores.find(self.options.scorer)
        return self.selection.choose(self.score(method), progress, per_cost=method.normalisation == "cost")

    @property
    def samples(self) -> Samples:
        """Some of the training data, in memory: for scores and for mending. The same whenever the run is begun."""
        if self._samples is None:
            if self._data is None:
                raise UsageError("this method needs data= for its scores and for mending after cuts")
            self._samples = training_samples(self._data, self.analysis, self.options.seed)
        return self._samples

    # -- for phases -----------------------------------------------------------------------------------

    def train(self, phase: Phase) -> float | None:
        """Train a phase with the built-in loop; gives the mean loss of its last epoch."""
        trainer = Trainer(self, phase)
        if self._middle is not None:
            trainer.load(self._middle)
            self._middle = None
        with self.stages.stage("train"), self.wish.listening(), self._own_random_state, closing(trainer):
            loss = trainer.run()
        self._steps += trainer.steps
        return loss

    def trained_elsewhere(self, phase: Phase) -> None:
        """Count the steps of a loop of the user's own."""
        if self.stream is not None:
            self._steps += round(phase.epochs * len(self.stream))

    def measure(self, phase: Phase) -> float | None:
        """Validation accuracy at the end of a phase; short phases go unmeasured until half an epoch has passed."""
        self.spent += phase.epochs
        soon = phase.name != "finetune" and self.spent - self._measured_at < _MEASURED_EVERY
        if self._val is None or soon or self.network.generator is not None:  # which stands for many networks
            return None
        self._measured_at = self.spent
        return self.accuracy_of(self.network.module)

    @property
    def metric_name(self) -> str:
        """What is shown as accuracy: "top1", or "metric" for the user's own."""
        return "top1" if self.metric is None else "metric"

    def shown(self, accuracy: float) -> str:
        """An accuracy, or the user's metric, in words."""
        return f"{'accuracy' if self.metric is None else 'metric'} {metric(accuracy, self.metric_name)}"

    def accuracy_of(self, module: nn.Module) -> float | None:
        """Validation accuracy of any module; None without validation data."""
        return None if self._val is None else self.accuracy_on(module, self._val)

    def accuracy_on(self, module: nn.Module, batches: Iterable[Any]) -> float:
        """Accuracy on other batches, of which each process looks at its part."""
        with kept_random_state():  # a DataLoader draws from the global state even where it does not shuffle
            mine = itertools.islice(iter(batches), workers.rank(), None, workers.count())
            own = (batch_of(item, self.analysis.captured.example).to(self._device) for item in mine)
            return evaluate(module, own, self.metric, self.options.recipe)

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        # A run that goes on is not as far as its journal says until the journal is told to its end.
        waited = time.monotonic() - self._saved_at
        return self.folder is not None and not self._journal.is_telling and waited > _SAVED_EVERY

    def save(self, middle: Mapping[str, Any] | None) -> None:
        """Write a checkpoint; middle: where a phase is, None between phases."""
        self._saved_at = time.monotonic()
        if self.folder is None or workers.rank() != 0:
            return
        stream = [0, 0] if self.stream is None else [self.stream.epoch, self.stream.index]
        self.folder.save(
            {
                "journal": self._journal.events, "history": [asdict(point) for point in self.history],
                "network": self.network.state(), "kept": self._kept, "stream": stream, "random": random_state(),
                "spent": self.spent, "measured_at": self._measured_at, "steps": self._steps, "middle": middle,
            }
        )  # fmt: skip

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to the run folder's log."""
        if self.folder is not None and workers.rank() == 0:
            self.folder.log({"seconds": round(time.monotonic() - self._began, 2), **line})

    # -- between phases -------------------------------------------------------------------------------

    def _close(self, phase: Phase) -> None:
        found = phase.metrics
        self._add(TrainingPoint(phase.name, self.spent, self.share, found["loss"], found["accuracy"]))
        tally = {name: value.clone() for name, value in phase.tally.items()}
        self._journal.write("phase", {"spent": self.spent, "measured_at": self._measured_at, "tally": tally})
        if self.folder is not None and (phase.name == "finetune" or phase.epochs >= 1 or self.is_due()):
            self.save(None)

    def _add(self, point: TrainingPoint) -> None:
        self.history.append(point)
        self.log({"event": "phase", **asdict(point)})
        if point.accuracy is not None and workers.rank() == 0:
            loss = "" if point.loss is None else f", loss {point.loss:.3f}"
            self.stages.phase(
                f"  {point.phase}: {point.epochs:.3g} of {self.options.epochs:g} epochs, "
                f"{100 * point.flops:.1f}% of the FLOPs, {self.shown(point.accuracy)}{loss}"
            )

    def _heed(self, phase: Phase, value: Mapping[str, Any]) -> None:
        """What a phase left behind that is not trained again."""
        self.spent, self._measured_at = value["spent"], value["measured_at"]
        for name, own in value["tally"].items():
            phase.tally[name].copy_(own)

    def _wake(self, state: Mapping[str, Any]) -> None:
        """Everything is as the checkpoint left it."""
        self.network.load(state["network"])
        self._kept = dict(state["kept"])
        self.spent, self._measured_at, self._steps = state["spent"], state["measured_at"], state["steps"]
        self._middle = state["middle"]
        if self.stream is not None:
            epoch, index = state["stream"]
            self.stream.seek(epoch, index, state["random"])
        self.stages.detail(f"going on after {self.spent:.3g} of {self.options.epochs:g} epochs")

    def _settle(self) -> None:
        """Measure batch-norm statistics anew where too few steps were trained since the last cut to forget the old.

        Not where nothing is mended: the method is then as it was published.
        """
        if self.options.mend and self._data is not None and self._steps < _SETTLED:
            self.event("settle", lambda: self.network.refit(recover.find("bn").run, self.samples))
            self._settled = True

    def _look_again(self) -> None:
        """A last point, where what came after the last phase has changed the network."""
        if self._settled and self._val is not None and self.history:
            last = replace(self.history[-1], phase="settle", loss=None, accuracy=self.accuracy_of(self.network.module))
            self._add(last)

    def _check_reached(self) -> None:
        if not self.reached:
            raise UsageError(
                f"{self.schedule.name} ended at {100 * self.share:.2f}% of the FLOPs without meeting the budget; "
                "please report this with the model"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self.folder is None or workers.rank() != 0:
            yield
            return
        with self.folder.locked():
            yield
