"""Analysis: everything known of a model before anything is chosen."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import fnmatch
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .detector import is_detector
from .errors import CaptureError, UsageError, first_line
from .graph.capture import Captured, capture
from .graph.cost import Costs, Model
from .graph.example import Example
from .graph.groups import Group, Grouping, group
from .graph.infer import Types, hint, infer, named_tensors
from .graph.terms import Cause
from .inputs import names_of

if TYPE_CHECKING:
    import networkx

_MACS_PER_NUMBER = 260
_LONG_STAGE = 1.0
_HUGE_MACS = 4e10
"""Of a whole batch: minutes where a run in float64 is one of many, on a small machine."""

Progress = Callable[[str, str], None]
"""Called with ("stage", name) when a stage starts and ("target", sentence) for what each target means,
("detail", text) and ("tick", "3/10") for what it does and how far it is, ("live", "0.25 text") for what training
reports as it goes, with the share of it that is done, ("phase", text) for what a phase of it came to."""


class Stages:
    """Times the stages of a run and tells whoever listens."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; a stage entered again adds up."""
        if self._progress:
            self._progress("stage", name)
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            if took > _LONG_STAGE:
                _give_back()
        if self._progress:
            self._progress("done", name)

    def detail(self, text: str) -> None:
        """Say what a stage is doing."""
        if self._progress:
            self._progress("detail", text)

    def tick(self, done: int, of: int) -> None:
        """Say how far a stage is."""
        if self._progress:
            self._progress("tick", f"{done}/{of}")

    def phase(self, text: str) -> None:
        """Say what a phase of training came to."""
        if self._progress:
            self._progress("phase", text)

    def live(self, text: str, share: float) -> None:
        """Say how things are going, and what share of the work is done; the next such text takes its place."""
        if self._progress:
            self._progress("live", f"{share:.4f} {text}")

    def target(self, text: str) -> None:
        """Say what a target means for this model."""
        if self._progress:
            self._progress("target", text)


@dataclass(frozen=True)
class Analysis:
    """A captured model with its channel types, groups and costs.

    model: our copy of the caller's model, in eval mode; the graph shares its tensors.
    modes: whether each module of the caller's model was in training mode.
    """

    model: nn.Module
    modes: dict[str, bool]
    captured: Captured
    types: Types
    grouping: Grouping
    cost: Model

    def __repr__(self) -> str:
        return (
            f"<Analysis of {type(self.model).__name__}: {len(self.groups)} groups, {self.macs:,} MACs, "
            f"{self.params:,} parameters>"
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """The channels that go together, in network order."""
        return self.grouping.groups

    @property
    def full(self) -> Costs:
        """What the whole model costs, per sample."""
        return self.cost(self.grouping.widths)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return round(self.full.macs)

    @property
    def work(self) -> float:
        """How long one sample takes, in multiply-accumulates: those of the model, and what its values are worth.

        Writing one number takes a processor as long as about 260 of them: fitted to forward and backward passes of
        eleven torchvision networks (bench/work.py), of which the lightest in arithmetic are the slowest for it.
        """
        values = (n.meta.get("val") for n in self.captured.module.graph.nodes if n.op == "call_function")
        written: int = sum(
            math.prod(map(hint, v.shape)) for v in values if isinstance(v, Tensor) and v.is_floating_point()
        )
        return self.full.macs + _MACS_PER_NUMBER * written / self.captured.batch

    @property
    def is_huge(self) -> bool:
        """Whether running the example takes so long that checks look at fewer inputs."""
        return self.full.macs * self.captured.batch >= _HUGE_MACS

    @property
    def params(self) -> int:
        """Number of parameters."""
        return self.full.params

    @property
    def frozen(self) -> tuple[Cause, ...]:
        """What keeps channels from being removed, besides the model's inputs and outputs: operators with reasons.

        What operators are made to do, as a window over channels, is left out unless no channel of the model can go.
        """
        found = dict.fromkeys(self.types.unknown)
        kinds = ("limit", "unknown") if self.groups else ("limit", "unknown", "structure")
        for axes in self.types.tensors.values():
            for axis in axes:
                rows = self.types.solution.factors(axis)
                for term in axis[(rows < 0).all(axis=1) & (axis > 0)][:1].tolist():
                    cause = self.types.store.cause(term)
                    if cause.kind in kinds:
                        found[cause] = None
        return tuple(found)

    def to_networkx(self) -> networkx.Graph:
        """Groups and tensors as a bipartite graph: an edge where a group shrinks an axis of a tensor."""
        from .graph.view import to_networkx

        return to_networkx(self.types, self.grouping)

    def dump(self) -> str:
        """The channel types of every value as text."""
        from .graph.dump import dump

        return dump(self.types, self.grouping)

    def matching(self, patterns: Sequence[str]) -> list[int]:
        """Numbers of the groups that touch a module or parameter matching one of the patterns (as file names do)."""
        if isinstance(patterns, str):
            raise UsageError(f"ignore={patterns!r}: give a list of patterns, such as [{patterns!r}]")
        found, aliases = [], self.types.aliases
        others = [name for name, _ in self.model.named_modules(remove_duplicate=False)]  # those of no use at inference
        others += [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        for pattern in patterns:
            hit = [
                group.number for group in self.groups
                if any(_matches(name, pattern) for m in group.members for name in aliases.get(m.tensor, (m.tensor,)))
            ]  # fmt: skip
            if not hit and not any(_matches(name, pattern) for name in (*self.types.tensors, *others)):
                known = next(iter(self.types.tensors), "")
                raise UsageError(f"--ignore {pattern}: no module or parameter matches. Names look like {known}.")
            found.extend(hit)
        return sorted(set(found))


def analyse(
    model: nn.Module, example_inputs: Any, stages: Stages | None = None, device: str | torch.device | None = None
) -> Analysis:
    """Capture a copy of a model and infer its channels; the model itself is left as it is."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"wanted an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(f"{type(model).__name__} is compiled by torch.jit; give the nn.Module that it was made of")
    lazy = next((name for name, tensor in named_tensors(model) if is_lazy(tensor)), None)
    if lazy is not None:
        raise UsageError(f"{lazy} has no shape yet: run the model once, so that its lazy modules get theirs")
    if is_detector(model):
        raise CaptureError(
            f"{type(model).__name__} decides by what it sees how many boxes it keeps, which cannot be captured. Give "
            "slimc.DenseDetector(model), its backbone and heads; the result holds the smaller detector as `.detector`"
        )
    stages = stages or Stages(None)
    example = Example.of(example_inputs).map(Tensor.detach)
    if any(tensor.dim() and not len(tensor) for tensor in example.tensors()):
        raise UsageError("an example input holds no sample; give at least one, better two")
    with torch.random.fork_rng():
        with stages.stage("capture"):
            modes = {name: module.training for name, module in model.named_modules()}
            ours = _copy(model)
            if device is not None:
                ours, example = _on(device, ours, example)
            captured = capture(ours, replace(example, names=tuple(names_of(ours) or ())))
        with stages.stage("infer"):
            types = infer(captured)
            grouping = group(types)
            cost = Model(types, grouping)
    return Analysis(ours, modes, captured, types, grouping, cost)


def _on(device: str | torch.device, model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    try:
        return model.to(device), example.map(lambda tensor: tensor.to(device))
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise UsageError(f"device {device!s} cannot be used: {first_line(error)}") from error


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what tensors of many sizes leave behind, gigabytes of it."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}), and slimc never works on the caller's model itself. "
            "Remove what cannot be copied (open files, non-leaf tensors kept as attributes) first; weights of "
            "torch.nn.utils.prune and weight_norm become plain ones by prune.remove and remove_weight_norm."
        ) from error


def _matches(tensor: str, pattern: str) -> bool:
    parts = tensor.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))
