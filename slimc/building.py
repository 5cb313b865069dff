"""What one cut and training share: what is asked for, checked, and a cut that is chosen, made into a proven result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from . import budget, eager, planner
from .analysis import Analysis, Stages
from .budget import Target
from .describe import report_of, warnings_of
from .errors import InternalError, UsageError
from .exporters import machine
from .graph.cost import Costs
from .graph.example import Example
from .graph.resize import Cut
from .graph.stateless import modes_kept
from .plan import make
from .report import Method, TargetResult
from .result import Compressed
from .rewrite import rewrite, shapes_agree
from .trainable import trainable
from .verify import mixed_input, random_inputs, verify

_LARGEST_SEED = 2**62  # torch takes 64 bits with a sign, and seeds are added to
_INPUTS = 3
_INPUTS_OF_LARGE = 2
_LARGE_MACS = 5e9
"""Float64 runs at tens of billions of operations a second on a small machine; the proof should take seconds."""


def targets_of(**given: str | float | None) -> list[Target]:
    """The targets that are given; UsageError if there is none."""
    targets = [budget.parse(metric, value) for metric, value in given.items() if value is not None]
    if not targets:
        raise UsageError(f"no target: give at least one of {', '.join(given)}")
    return targets


def limits_of(targets: Sequence[Target], analysis: Analysis, stages: Stages) -> dict[str, float]:
    """What each target's metric may come to for this model, where it can be computed; told to whoever listens."""
    limits = {}
    for target in targets:
        if target.metric == "latency":
            continue  # it is measured
        whole = getattr(analysis.full, planner.METRIC[target.metric])
        if not whole:
            raise UsageError(f"--{target.metric} {target.text}: the model has no {budget.METRICS[target.metric]}")
        limits[target.metric] = target.limit(whole)
        stages.target(budget.describe(target, whole))
    return limits


def alignment_of(round_to: int | str) -> int:
    """The number that widths become multiples of; "auto" asks the machine."""
    if round_to == "auto":
        return machine.preferred_alignment()
    try:
        number = int(round_to)
    except ValueError:
        number = 0
    if number < 1:
        raise UsageError(f"--round-to {round_to}: wanted a whole number from 1 up, or auto")
    return number


def check_seed(seed: int) -> None:
    """UsageError where a seed is none that random generators take."""
    if not isinstance(seed, int) or not 0 <= seed <= _LARGEST_SEED:
        raise UsageError(f"--seed {seed}: wanted a whole number from 0 to {_LARGEST_SEED}")


def build(
    analysis: Analysis,
    cut: Cut,
    facts: Mapping[str, Any],
    targets: Mapping[str, TargetResult],
    method: Method,
    stages: Stages,
    warnings: list[str],
    name: str | None,
) -> Compressed:
    """Rewrite, prove, and describe."""
    types, captured = analysis.types, analysis.captured
    with stages.stage("rewrite"), torch.random.fork_rng():
        rewritten = rewrite(types, cut)
        if wrong := shapes_agree(types, cut, rewritten):
            raise InternalError(f"the rewritten graph has a wrong shape at {wrong}; please report this with the model")
        own = eager.build(analysis.model, types, cut, rewritten, captured.example, is_apart=True)
        if own.module is not None:
            module: nn.Module = _with_modes(own.module, analysis.modes)
        else:
            module = trainable(rewritten.module).train(analysis.modes[""])
    with stages.stage("verify"), modes_kept(rewritten.module, training=False):
        proof = verify(types, cut, rewritten, _proof_inputs(analysis))
    plan = make(types, analysis.grouping, cut, **facts)
    plan = replace(plan, attributes=own.attributes if own.module else None, attributes_note=own.reason)
    before, after = analysis.full, costs_of(analysis, cut)
    warnings = [*warnings, *warnings_of(analysis, own)]
    report = report_of(analysis, cut, targets, method, proof, stages, (before, after), warnings, name)
    return Compressed(module, rewritten, cut, analysis, plan, report, stages)


def _proof_inputs(analysis: Analysis) -> list[Example]:
    """The example and others like it, fewer for larger models; of the largest, a batch in which samples differ."""
    captured = analysis.captured
    if analysis.is_huge and captured.batch > 1:
        return [mixed_input(captured.example, captured.batch, seed=0)]
    is_large = analysis.full.macs * captured.batch >= _LARGE_MACS
    return random_inputs(captured.example, _INPUTS_OF_LARGE if is_large else _INPUTS, seed=0)


def costs_of(analysis: Analysis, cut: Cut) -> Costs:
    """What a cut leaves of every cost."""
    return analysis.cost(np.array([int(cut.alive[g.variables].sum()) for g in analysis.groups], np.int64))


def _with_modes(module: nn.Module, modes: Mapping[str, bool]) -> nn.Module:
    for path, child in module.named_modules():
        child.training = modes.get(path, child.training)
    return module
