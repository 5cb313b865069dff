"""The laws that every rule, every zoo model and every random network must meet.

`check_laws` takes a model through analysis and one random cut and asserts, in this order, all that can be said of
the result without knowing the model. Nothing here is an expected number: the oracle is always a second way to
find the same thing (masking, counting, capturing again, building a module from its own repr).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from slimc import eager
from slimc.analysis import Analysis, analyse
from slimc.graph.capture import capture
from slimc.graph.example import Example
from slimc.graph.groups import Grouping, group
from slimc.graph.infer import infer
from slimc.graph.resize import Cut
from slimc.graph.rule import operator_name
from slimc.rewrite import Rewritten, rewrite, shapes_agree
from slimc.verify import Proof, random_inputs, verify

UNCOUNTED = {"lstm", "gru", "lstm_cell", "gru_cell", "mv", "dot", "einsum", "bilinear"}
"""Operators that torch's FLOP counter does not see, or einsum over one index: tests/test_cost.py has formulas."""

TELLING = 1e3
REBUILT = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.PReLU, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.LSTM, nn.GRU, nn.RNN,
)  # fmt: skip

Place = tuple[str, int]
Signature = tuple[int, bool, frozenset[Place]]
"""A group without its name: width, whether it is exact, and the (tensor, axis) places that it shrinks."""


@dataclass(frozen=True)
class Checked:
    """A model that met the laws, for assertions of its own."""

    analysis: Analysis
    cut: Cut
    rewritten: Rewritten
    proof: Proof
    own: eager.Eager


def check_laws(
    model: nn.Module,
    inputs: Any,
    *,
    seed: int = 0,
    fraction: float | None = None,
    eager_result: bool | None = None,
    inferred_again: bool = True,
) -> Checked:
    """Assert every law for one random cut.

    fraction: the share of each group to remove; None draws one per group.
    eager_result: whether the user's own class must come back smaller (None: it may or may not).
    inferred_again: False where the cut itself leaves an operator in the graph that freezes what it reads.
    """
    before = _fingerprint(model)
    analysis = analyse(model, inputs)
    assert _fingerprint(model) == before, "the caller's model was changed"
    with torch.random.fork_rng():
        check_empty_plan(analysis)
    cut = random_cut(analysis, np.random.default_rng(seed), fraction)
    rewritten = rewrite(analysis.types, cut)
    assert shapes_agree(analysis.types, cut, rewritten) is None
    _same_output_shapes(analysis, rewritten)
    proof = verify(analysis.types, cut, rewritten, random_inputs(analysis.captured.example, 2, seed))
    if not cut.alive.all():
        assert proof.moved is not None
        telling = proof.moved > max(TELLING * proof.max_relative_error, 1e-9)
        assert telling or _constant(analysis), "the proof is vacuous"
    own = eager.build(analysis.model, analysis.types, cut, rewritten, analysis.captured.example)
    if eager_result is not None:
        assert (own.module is not None) == eager_result, own.reason
    with torch.random.fork_rng():
        check_costs(analysis, cut, rewritten, own)
        if own.module is not None:
            check_attributes(own.module)
        if inferred_again:
            check_inferred_again(analysis, cut, rewritten)
    assert _fingerprint(model) == before, "the caller's model was changed"
    return Checked(analysis, cut, rewritten, proof, own)


# -- cuts ---------------------------------------------------------------------------------------------


def random_cut(analysis: Analysis, rng: np.random.Generator, fraction: float | None = None) -> Cut:
    """Remove a random share of every group's channels, down to its floor; at least one channel in all."""
    alive = np.ones(analysis.types.solution.variables, np.bool_)
    room = [g for g in analysis.groups if g.width > g.floor]
    for g in room:
        share = rng.random() if fraction is None else fraction
        remove = min(round(share * g.width), g.width - g.floor)
        alive[rng.choice(g.variables, remove, replace=False)] = False
    if room and alive.all():
        alive[rng.choice(room[int(rng.integers(len(room)))].variables)] = False
    return Cut(analysis.types, alive)


def widths(grouping: Grouping, cut: Cut) -> npt.NDArray[np.int64]:
    """How many channels of each group a cut keeps."""
    return np.array([int(cut.alive[g.variables].sum()) for g in grouping.groups], np.int64)


def signatures(grouping: Grouping) -> list[Signature]:
    """Every group of a model in a form that can be compared."""
    return sorted(
        ((g.width, g.exact, frozenset((m.tensor, m.axis) for m in g.members)) for g in grouping.groups),
        key=lambda s: (s[0], sorted(s[2])),
    )


# -- laws ---------------------------------------------------------------------------------------------


def check_empty_plan(analysis: Analysis) -> None:
    """Removing nothing changes no bit of the output."""
    nothing = Cut(analysis.types, np.ones(analysis.types.solution.variables, np.bool_))
    rewritten = rewrite(analysis.types, nothing)
    example = analysis.captured.example
    with torch.no_grad():
        wanted = tensors(example.map(torch.clone).run(analysis.captured.module))
        got = tensors(example.map(torch.clone).run(rewritten.module))
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), "the empty plan is not bit-exact"


def check_costs(analysis: Analysis, cut: Cut, rewritten: Rewritten, own: eager.Eager) -> None:
    """Predicted multiply-accumulates, parameters and bytes are those counted on the new model."""
    predicted = analysis.cost(widths(analysis.grouping, cut))
    slim = own.module or rewritten.module
    read = {id(t) for t in (*analysis.captured.module.parameters(), *analysis.captured.module.buffers())}
    used = {id(_get(analysis.captured.module, name)) for name in analysis.types.tensors}
    unread = 0 if own.module is not None else sum(
        p.numel() for p in analysis.captured.module.parameters() if id(p) in read - used
    )  # fmt: skip
    assert predicted.params == sum(p.numel() for p in slim.parameters()) + unread
    names = {operator_name(node) for node in rewritten.module.graph.nodes if node.op == "call_function"}
    if not names & UNCOUNTED:
        counted = counted_macs(rewritten.module, analysis.captured.example)
        assert round(predicted.macs * analysis.captured.batch) == counted


def counted_macs(module: Any, example: Example) -> int:
    """Multiply-accumulates of the whole example batch as torch's FLOP counter sees them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        example.map(torch.clone).run(module)
    return int(counter.get_total_flops()) // 2


def _constant(analysis: Analysis) -> bool:
    """Whether the outputs are the same whatever goes in: a mean over what instance norm has centred, for instance."""
    with torch.no_grad():
        first, second = (
            [leaf.double() for leaf in pytree.tree_leaves(analysis.captured.module(*e.args, **e.kwargs))]
            for e in random_inputs(analysis.captured.example, 2, seed=1)
        )
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(first, second, strict=True))


def check_attributes(module: nn.Module) -> None:
    """Every standard module's repr rebuilds the shapes of its own tensors."""
    for path, child in module.named_modules():
        if type(child) not in REBUILT:
            continue
        rebuilt = eval(repr(child), vars(nn))  # the repr of torch's own classes
        shapes = {name: tuple(t.shape) for name, t in child.named_parameters(recurse=False)}
        wanted = {name: tuple(t.shape) for name, t in rebuilt.named_parameters(recurse=False)}
        assert shapes.items() <= wanted.items(), f"{path}: {child} holds {shapes}"


def check_inferred_again(analysis: Analysis, cut: Cut, rewritten: Rewritten) -> None:
    """The rewritten model, analysed as a model of its own, has the planned widths."""
    again = group(infer(capture(copy.deepcopy(rewritten.module), analysis.captured.example)))
    planned = [
        (int(cut.alive[g.variables].sum()), g.exact, frozenset((m.tensor, m.axis) for m in g.members))
        for g in analysis.groups
    ]
    # A single channel cannot shrink and is no group; what it multiplied alone joins its neighbours.
    first = {alias: name for name, aliases in analysis.types.aliases.items() for alias in aliases}
    found = [(w, e, frozenset((first.get(n, n), axis) for n, axis in places)) for w, e, places in signatures(again)]
    places = {place: signature for signature in found for place in signature[2]}
    for width, exact, members in planned:
        if width > 1 and not any(_shared(analysis, members, other) for _, _, other in planned if other != members):
            assert (width, exact, members) in found, f"planned {width} of {sorted(members)}, found {places.keys()}"


def _shared(analysis: Analysis, members: frozenset[Place], other: frozenset[Place]) -> bool:
    """Whether two groups meet in one axis, where a cut may change which channels stand in for each other."""
    return bool(members & other)


def _same_output_shapes(analysis: Analysis, rewritten: Rewritten) -> None:
    example = analysis.captured.example
    with torch.no_grad():
        wanted = tensors(example.map(torch.clone).run(analysis.captured.module))
        got = tensors(example.map(torch.clone).run(rewritten.module))
    assert [t.shape for t in got] == [t.shape for t in wanted]


def _fingerprint(model: nn.Module) -> list[Any]:
    """All of a model's state that a compiler could touch by mistake."""
    state = [(name, t.dtype, t.shape, t.detach().cpu().numpy().tobytes()) for name, t in model.state_dict().items()]
    modes = [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    plain = [
        (name, key, value)
        for name, m in model.named_modules()
        for key, value in vars(m).items()
        if isinstance(value, (int, float, str, tuple))
    ]
    grads = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return [state, modes, plain, grads, torch.get_rng_state().numpy().tobytes()]


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _get(module: nn.Module, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)
