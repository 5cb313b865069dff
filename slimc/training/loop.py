"""The loop: one phase of training, step by step, that can be stopped after any step, saved, and gone on with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

from slimc.errors import UsageError, first_line
from slimc.graph.example import Example
from slimc.graph.stateless import modes_kept
from slimc.losses import GIVE_METRIC, check_labels, first_output, scalar
from slimc.onednn import Guard
from slimc.random_state import kept_random_state
from slimc.samples import Batch, batch_of, check_finite
from slimc.scores import Loss

from . import workers
from .aside import aside
from .features import Features
from .layout import layout
from .precision import autocast, widened
from .recipe import Recipe, build, factor
from .stream import Stream

Metric = Callable[[Any, Any], float]
"""Takes outputs and targets of one batch, gives the mean over its samples; larger is better."""
Hook = Callable[[], None]


@dataclass(frozen=True)
class Hooks:
    """What a method does besides descending the loss.

    extra: what is added to the loss, from the targets of the batch that has just gone through the network.
    before_step: with the gradients of a step there (of all processes), before the optimiser uses them.
    after_epoch: when a whole pass over the data has been trained on.
    """

    extra: Callable[[Any], Tensor] | None = None
    before_step: Hook | None = None
    after_epoch: Hook | None = None


class Loop:
    """Trains a module for a number of steps.

    teacher: gives the original network's outputs for a batch, where the recipe distils; features: what is drawn to its
    values inside. module is trained in place, and is in training mode afterwards.
    """

    def __init__(
        self,
        module: nn.Module,
        stream: Stream,
        steps: int,
        recipe: Recipe,
        *,
        loss: Loss | None = None,
        hooks: Hooks | None = None,
        trains: Callable[[str], bool] = lambda name: True,
        teacher: nn.Module | None = None,
        features: Features | None = None,
        memory: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.module, self.stream, self.steps, self.recipe = module, stream, steps, recipe
        self._loss = None if loss is None else scalar(loss)
        self._hooks = hooks or Hooks()
        self._teacher = teacher if recipe.distil or features is not None else None
        self._features = features
        # Users freeze single norms by putting just those in eval mode.
        self._still = [part for part in module.modules() if module.training and not part.training]
        self._named = [(name, p) for name, p in module.named_parameters() if p.is_floating_point()]
        self._wanted = [p.requires_grad for _, p in self._named]
        for name, parameter in self._named:
            parameter.requires_grad_(parameter.requires_grad and trains(name))
        if not any(p.requires_grad for _, p in self._named):
            raise UsageError("no parameter of the model trains: all have requires_grad switched off")
        self.optimiser = build(recipe, module, self._named)
        self._recall(memory or {})
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, factor(recipe, max(1, steps)))
        self.average: AveragedModel | None = None
        if recipe.average:
            self.average = AveragedModel(module, multi_avg_fn=_averaging(recipe.average), use_buffers=True)
        self.done = 0
        self.total, self.seen = 0.0, 0.0
        self._taken: set[int] = set()  # sizes of batches that the model ran on
        self._worker = _distributed(module)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    @property
    def loss(self) -> float | None:
        """The mean loss since it was last asked to forget."""
        return self.total / self.seen if self.seen else None

    def forget(self) -> None:
        """Start the mean loss again."""
        self.total, self.seen = 0.0, 0.0

    def step(self) -> None:
        """One step; raises UsageError where the loss is not finite."""
        batch = self.stream.next()
        if self.stream.began_anew and self.done and self._hooks.after_epoch:
            self._hooks.after_epoch()
        self.module.train()
        for part in self._still:
            part.eval()
        self.optimiser.zero_grad(set_to_none=True)
        value = self._value(batch)
        if not bool(torch.isfinite(value)):
            check_finite(batch, self._place)
            raise UsageError(
                f"the loss is {float(value.detach())} at step {self.done + 1} of {self.steps}: lower the learning rate "
                "(--rate), or look at the data"
            )
        weight = workers.weight(batch)
        (value * weight).backward()  # type: ignore[no-untyped-call]
        if self._hooks.before_step:
            self._hooks.before_step()
        self.optimiser.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        self.total, self.seen, self.done = self.total + float(value.detach()) * weight, self.seen + 1, self.done + 1
        if self.stream.ended and self._hooks.after_epoch:
            self._hooks.after_epoch()

    @property
    def _place(self) -> str:
        return f"batch {self.stream.index} of the training data"

    def _value(self, batch: Batch) -> Tensor:
        example = layout(batch, self.module)
        with autocast(self.recipe, self.module):
            try:
                with Guard():
                    outputs = example.example.run(self._worker)
            except Exception as error:  # of the user's model
                if not self._taken or batch.count in self._taken:
                    raise
                sizes = ", ".join(map(str, sorted(self._taken)))
                raise UsageError(
                    f"the model does not take {self._place}, {batch.count} samples ({first_line(error)}), but took "
                    f"batches of {sizes}. Give batches of these sizes only (drop_last=True of a DataLoader)"
                ) from error
            wanted = None
            if self._teacher is not None:
                with torch.no_grad():
                    wanted = batch.example.run(self._teacher)
        self._taken.add(batch.count)
        value = self._of_outputs(widened(outputs), wanted, batch)
        return value if self._hooks.extra is None else value + self._hooks.extra(batch.targets)

    def _of_outputs(self, outputs: Any, wanted: Any, batch: Batch) -> Tensor:
        if self._teacher is None:
            return self._of_labels(outputs, batch)
        share = self.recipe.distil
        parts = []
        if share:
            parts.append(share * self._drawn(first_output(outputs), first_output(widened(wanted)), batch.targets))
        if share < 1:
            parts.append((1 - share) * self._of_labels(outputs, batch))
        if self._features is not None:
            parts.append(self.recipe.features * self._features.loss())
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def _of_labels(self, outputs: Any, batch: Batch) -> Tensor:
        if self._loss is not None:
            return self._loss(outputs, batch.targets)
        scores = first_output(outputs)
        check_labels(batch.targets, batch.count, tuple(scores.shape), self._place)
        assert isinstance(batch.targets, Tensor)
        return functional.cross_entropy(scores, batch.targets.long(), label_smoothing=self.recipe.smoothing)

    def _drawn(self, own: Tensor, wanted: Tensor, targets: Any) -> Tensor:
        """How far class scores are from the original's, per sample and place, both softened; the mean square of the
        distance where the targets of a loss of the user's are no classes."""
        if self._loss is not None and not (isinstance(targets, Tensor) and _are_whole(targets)):
            return functional.mse_loss(own, wanted)
        if own.dim() < 2 or own.shape[1] < 2 or (own.dim() == 3 and self._loss is not None):
            raise UsageError(
                f"the model's first output has shape {list(own.shape)}: which of its axes holds the classes is not "
                "known, so it cannot be distilled this way. Leave --distil out, or distil in your loss="
            )
        heat = self.recipe.temperature
        mine, theirs = (
            functional.log_softmax(t.movedim(1, -1).flatten(0, -2) / heat, dim=1) for t in (own, wanted)
        )  # fmt: skip
        # Hinton et al. (2015), section 2: gradients of the softened outputs are 1/T^2 as large.
        return functional.kl_div(mine, theirs, reduction="batchmean", log_target=True) * heat * heat

    def finish(self) -> None:
        """Take the averaged weights and statistics, if there are any, and `close`."""
        if self.average is not None and self.done:
            self.module.load_state_dict(self.average.module.state_dict())
        self.close()

    def close(self) -> None:
        """Put back what trains, and take hooks off; also where training has failed."""
        if self._features is not None:
            self._features.close()
        for (_, parameter), wanted in zip(self._named, self._wanted, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None

    # -- the optimiser's memory -----------------------------------------------------------------------

    def memory(self) -> dict[str, dict[str, Tensor]]:
        """What the optimiser remembers, by parameter name."""
        names = {id(parameter): name for name, parameter in self._named}
        return {
            names[id(parameter)]: {key: value for key, value in own.items() if isinstance(value, Tensor)}
            for parameter, own in self.optimiser.state.items()
        }

    def _recall(self, memory: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, parameter in self._named:
            own = memory.get(name)
            if own and parameter.requires_grad and all(v.shape in (parameter.shape, ()) for v in own.values()):
                self.optimiser.state[parameter] = dict(own)

    def state(self) -> dict[str, Any]:
        """Everything that a fresh loop over the same module needs to go on as this one."""
        return {
            "done": self.done,
            "total": self.total,
            "seen": self.seen,
            "optimiser": self.optimiser.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.done, self.total, self.seen = state["done"], state["total"], state["seen"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])


def _are_whole(targets: Tensor) -> bool:
    return not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """The exponential average of real numbers; indices and counters are those of the last step."""
    of_floats = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(averages: Any, current: Any, seen: Any) -> None:
        if averages[0].is_floating_point():
            of_floats(averages, current, seen)
        else:
            for own, new in zip(averages, current, strict=True):
                own.copy_(new)

    return update


def _distributed(module: nn.Module) -> nn.Module:
    if workers.count() == 1:
        return module
    first = next(module.parameters())
    devices = [first.device.index] if first.is_cuda else None
    return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=True)


@torch.no_grad()
def evaluate(
    module: nn.Module, batches: Iterable[Batch], metric: Metric | None = None, recipe: Recipe | None = None
) -> float:
    """The mean of a metric over samples, in eval mode; every module's mode is put back. Top-1 accuracy if not given."""
    ask = metric or top1
    total = count = 0.0
    with modes_kept(module, training=False):
        for batch in batches:
            own = layout(batch, module)
            with autocast(recipe or Recipe(precision="float32"), module):
                outputs = own.example.run(module)
            total, count = total + _number(ask(widened(outputs), batch.targets)) * batch.count, count + batch.count
    total, count = workers.total([total, count])
    if not count:
        raise UsageError("the validation data is empty; give at least one batch of (inputs, targets)")
    return total / count


def check_own(own: Callable[[Any, Any], Any], kind: str, module: nn.Module, batch: Batch, source: str) -> None:
    """Call a loss or metric of the user's on a first batch; UsageError where it fails, or gives no number.

    kind: "loss", which sees what the model gives in training (at inference, where it is trained as a graph), or
    "metric".
    """
    example = batch.to(next((p.device for p in module.parameters()), None))
    ask = scalar(copy.deepcopy(own) if isinstance(own, nn.Module) else own) if kind == "loss" else own
    wrong: Exception | None = None
    for training in (True, False) if kind == "loss" else (False,):
        with aside(module, training):
            try:
                outputs = example.example.run(module)
            except Exception:  # as of a batch norm with one sample: training, if it comes to that, says what is wrong
                return
            try:
                with torch.set_grad_enabled(kind == "loss"):  # some losses take gradients by what they are given
                    value = ask(_derivable(widened(outputs)), example.targets)
            except Exception as error:
                wrong = wrong or error
                continue
        if kind == "metric":
            _number(value)
        return
    assert wrong is not None
    if isinstance(wrong, UsageError):
        raise wrong
    said = f"{type(wrong).__name__}: {first_line(wrong)}"
    raise UsageError(f"{kind}= fails with {said} on batch 1 of {source}") from wrong


def _derivable(outputs: Any) -> Any:
    def given(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.is_floating_point())

    return pytree.tree_map_only(Tensor, given, outputs)


def _number(value: Any) -> float:
    """What a metric gives, as a number; UsageError where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"metric= returned a {type(value).__name__}; wanted a number") from None


def top1(outputs: Any, targets: Any) -> float:
    """The share of samples whose largest output is that of their class."""
    scores = first_output(outputs)
    check_labels(targets, len(scores), tuple(scores.shape), "a batch of the validation or test data", GIVE_METRIC)
    return float((scores.argmax(1) == targets).float().mean())


@dataclass(frozen=True)
class Epoch:
    """What one epoch did; `loss` is the mean over its batches, `accuracy` a share where it was measured."""

    number: int
    of: int
    loss: float
    accuracy: float | None


def fit(
    module: nn.Module,
    data: Iterable[Any],
    like: Any,
    *,
    epochs: int,
    recipe: Recipe,
    val: Iterable[Any] | None = None,
    seed: int = 0,
    progress: Callable[[Epoch], None] | None = None,
) -> tuple[Epoch, ...]:
    """Train a module in place on `data`, batches of (inputs, targets); random state and mode are as before afterwards.

    like: example inputs. val: is only measured, never used to choose anything.
    """
    if epochs < 1:
        raise UsageError(f"epochs is {epochs}; at least 1 is needed")
    example, history = Example.of(like), []
    with kept_random_state(), modes_kept(module):
        stream = Stream(data, example, seed)
        loop = Loop(module, stream, epochs * len(stream), recipe)
        for number in range(1, epochs + 1):
            loop.forget()
            for _ in range(len(stream)):
                loop.step()
            accuracy = None if val is None else evaluate(module, (batch_of(item, example) for item in val))
            history.append(Epoch(number, epochs, loop.loss or 0.0, accuracy))
            if progress is not None:
                progress(history[-1])
        loop.finish()
    return tuple(history)
