"""Recovery: what can be done to the kept weights after the cut, by the names that users type.

A step is one file in `recovery/`. It changes the tensors of the slim graph in place (the user's module shares them)
and says in one line what it did. Samples are set aside to judge by: a step that brings the slim model's outputs no
nearer to the original's on these is undone. So is one after which classes are told less like the original tells them,
by more than chance among these samples: outputs can come nearer on the whole where the largest ones, which choose the
class, go astray. Where the user names no steps, their order is chosen on these samples too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional
from torch.utils import _pytree as pytree

from .errors import UsageError
from .graph.example import Example
from .graph.infer import Types
from .graph.resize import Cut
from .graph.stateless import Stateless
from .registry import Registry
from .samples import Samples

_JUDGED, _ENOUGH = 0.2, 64
"""Steps are judged by this share of the samples, by no more than so many; the others are fitted on."""


@dataclass(frozen=True)
class Task:
    """A cut model, the original that it should be like, and samples to fit on.

    original: the whole graph, in eval mode; never changed. slim: the cut graph, whose tensors steps write to.
    twins: the slim node of each original node. types, cut: which indices of every original value are left.
    work: what one sample of the original takes (`Analysis.work`).
    """

    original: GraphModule
    slim: GraphModule
    twins: dict[Node, Node]
    types: Types
    cut: Cut
    samples: Samples
    seed: int = 0
    work: float = 0.0
    tick: Callable[[int, int], None] = lambda done, of: None


Run = Callable[[Task], str]
"""Fits the slim graph's weights and says in one line what it did."""


@dataclass(frozen=True)
class Step:
    """One way of fitting the kept weights again, with one line about it and its source."""

    name: str
    summary: str
    source: str
    run: Run


FINETUNE = "finetune"
"""No step of its own: what a schedule does with labels for the epochs that are left after its last cut."""

REGISTRY = Registry[Step]("recovery step", "slimc.recovery", ("auto", "none", FINETUNE))
steps, find = REGISTRY.all, REGISTRY.find


def step(name: str, summary: str, source: str) -> Callable[[Run], Run]:
    """Register a recovery step under the name that users type."""

    def register(function: Run) -> Run:
        REGISTRY.add(Step(name, summary, source, function))
        return function

    return register


_LAST = "distill"
AUTO = ("reconstruct", "bn", _LAST)
"""What `--recover auto` tries, in the order that helps most; each is kept only where it helps."""


def asked(wanted: str | Sequence[str], *, trains: bool = False) -> tuple[str, ...]:
    """The recovery steps that are asked for; ("auto",) stands for itself. trains: whether a schedule fine-tunes."""
    if not isinstance(wanted, (str, Sequence)):
        raise UsageError(f"recover is {wanted!r}; wanted auto, none or a list of steps")
    names = [n.strip() for n in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
    if names in (["none"], []):
        return ()
    if names == ["auto"]:
        return ("auto",)
    if alone := [name for name in names if name in ("auto", "none")]:
        raise UsageError(f"--recover {','.join(names)}: {alone[0]} stands alone; give it, or a list of steps")
    if FINETUNE in names and not trains:
        raise UsageError(
            f"--recover {','.join(names)}: finetune trains with labels; give slimc compress --epochs, how often it may "
            "see the data"
        )
    steps = tuple(name for name in names if name != FINETUNE)
    for name in steps:
        find(name)
    return steps


def possible(wanted: Sequence[str], samples: Samples | None) -> tuple[str, ...]:
    """The steps that run with these samples, or without any."""
    if tuple(wanted) == ("auto",):
        return AUTO if samples else ()
    if wanted and samples is None:
        raise UsageError(f"--recover {','.join(wanted)} needs --data to fit on: these inputs cannot be made up")
    return tuple(wanted)


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    before, after: distance of the outputs from the original's on the samples set aside (see `Judge`); kept: whether
    the weights are the fitted ones, or those before since these were nearer.
    """

    detail: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class Verdict:
    """How far a slim graph's outputs are from the original's.

    distance: the squared difference over the originals' own spread around their mean, averaged over the outputs: 0 is
        equal, 1 no better than a constant; of one sample, which has no spread, over its own square. divergences: where
        the first output is [N, classes], the Kullback-Leibler divergence of its softmax from the original's, in nats,
        of each sample; else None. agreement: the share of samples with the same largest class; else None. The distance
        is infinity where something is not finite.
    """

    distance: float
    divergences: Tensor | None
    agreement: float | None

    def no_worse(self, other: Verdict) -> bool:
        """Whether the outputs on the whole are no further off than by another verdict, and the classes not clearly.

        Clearly: the mean rise of the divergence is more than its standard error. Of six samples one can be the mean.
        """
        if self.distance > other.distance:
            return False
        if self.divergences is None or other.divergences is None or len(self.divergences) < 2:
            return True
        rise = self.divergences - other.divergences
        return not float(rise.mean()) > float(rise.std()) / math.sqrt(len(rise))


def set_aside(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to fit on, and those to judge by; raises UsageError where there are too few of them."""
    return samples.split(min(_JUDGED, _ENOUGH / max(1, samples.count)))


class Judge:
    """How far a slim graph's outputs are from the original's, on samples that nothing is fitted on."""

    def __init__(self, original: GraphModule, samples: Samples) -> None:
        self._samples = samples
        self._wanted = [outputs(original, example) for example in samples.examples()]
        floats = [i for i, value in enumerate(self._wanted[0]) if value.is_floating_point()]
        columns = [_columns([batch[i] for batch in self._wanted]) for i in floats]
        self._floats = floats
        self._spread = [float((c - c.mean(0)).square().sum()) or float(c.square().sum()) for c in columns]
        first = self._wanted[0][floats[0]] if floats else None
        self._classes = first is not None and first.dim() == 2 and first.shape[1] > 1

    def verdict(self, slim: GraphModule) -> Verdict:
        """Run the slim graph on all samples."""
        sums = [0.0] * len(self._floats)
        divergences: list[Tensor] = []
        same = 0
        for example, wanted in zip(self._samples.examples(), self._wanted, strict=True):
            found = outputs(slim, example)
            for place, i in enumerate(self._floats):
                sums[place] += float((found[i].double() - wanted[i].double()).square().sum())
            if self._classes:
                own, goal = (values[self._floats[0]].double() for values in (found, wanted))
                each = functional.kl_div(own.log_softmax(1), goal.log_softmax(1), reduction="none", log_target=True)
                divergences.append(each.sum(1))
                same += int((own.argmax(1) == goal.argmax(1)).sum())
        shares = [s / spread for s, spread in zip(sums, self._spread, strict=True) if spread > 0]
        distance = _finite(sum(shares) / len(shares) if shares else 0.0)
        if not self._classes:
            return Verdict(distance, None, None)
        of_samples = torch.cat(divergences)
        return Verdict(distance, of_samples, same / len(of_samples))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


@torch.no_grad()
def outputs(module: GraphModule, example: Example) -> list[Tensor]:
    """The tensors that a graph returns."""
    found = Stateless(module).run(*example.copies(), enable_io_processing=False)
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def run(
    task: Task, steps: Sequence[str], judge: Judge, tell: Callable[[str], None], in_order: bool
) -> Iterator[tuple[str, Outcome]]:
    """Run the steps and give what each did; the slim graph is left with what those that are kept did.

    in_order: one after the other. Else, as long as one helps, the one that brings the outputs nearest is next, so that
    what does not help at first can do so later; distillation, which starts best from what the others leave, comes last.
    tell: called with a step's name before it is run.
    """
    waiting = [] if in_order else [name for name in steps if name != _LAST]
    while waiting:
        tried: dict[str, Outcome] = {}
        best, best_tensors = "", {}
        for name in waiting:
            tried[name], fitted = _try(task, name, judge, tell)
            helps = tried[name].kept and tried[name].after < tried[name].before
            if helps and (not best or tried[name].after < tried[best].after):
                best, best_tensors = name, fitted
        if not best:
            yield from tried.items()
            break
        task.slim.load_state_dict(best_tensors)
        waiting.remove(best)
        yield best, tried[best]
    for name in steps if in_order else [name for name in steps if name == _LAST]:
        outcome, fitted = _try(task, name, judge, tell)
        if outcome.kept:
            task.slim.load_state_dict(fitted)
        yield name, outcome


def _try(task: Task, name: str, judge: Judge, tell: Callable[[str], None]) -> tuple[Outcome, dict[str, Tensor]]:
    """What a step does, and the tensors that it leaves; they are put back.

    It is not to be kept if the outputs are then further from the original's, or the classes are.
    """
    tell(name)
    found = find(name)
    before = judge.verdict(task.slim)
    with restored_on_error(task.slim) as saved:
        detail = found.run(task)
        after = judge.verdict(task.slim)
        fitted = {key: tensor.clone() for key, tensor in task.slim.state_dict().items()}
        task.slim.load_state_dict(saved)
    return Outcome(detail, before.distance, after.distance, after.no_worse(before)), fitted


@contextmanager
def restored_on_error(module: GraphModule) -> Iterator[dict[str, Tensor]]:
    """Gives a copy of all tensors, and puts it back where an error or an interrupt ends the block."""
    saved = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    try:
        yield saved
    except BaseException:
        module.load_state_dict(saved)
        raise


def _columns(batches: Sequence[Tensor]) -> Tensor:
    """[samples, numbers]; [all numbers, 1] where these are not as many for each sample, as of a matrix of samples."""
    flat = [value.reshape(len(value) if value.dim() else 1, -1) for value in batches]
    alike = len({value.shape[1] for value in flat}) == 1
    return torch.cat(flat if alike else [value.reshape(-1, 1) for value in flat])
