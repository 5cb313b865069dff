"""The eager result: the user's own class with sliced tensors and corrected size attributes.

Which attributes are sizes is not looked up by class. An integer attribute of a module is taken for a size where
the graph shows that size shrinking in that module's own tensors, values or literals, and all of that evidence
agrees; input and output evidence settle attributes that say which they are (`in_channels`, `out_features`). In classes
of the user's own an attribute keeps its value where the module computes the same with it. The module is accepted only
if it then computes what the rewritten graph computes, also where parameters near zero (scales of layers that were not
trained yet) are not.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from .errors import PlanError, first_line
from .graph.capture import tensors_only
from .graph.example import Example
from .graph.infer import Types, attribute, module_path
from .graph.resize import Cut, Resizing
from .graph.rule import arguments, operator_name
from .graph.stateless import buffers_kept, modes_kept
from .random_state import kept_random_state, seed_all
from .rewrite import Rewritten
from .verify import distance

Attributes = dict[str, dict[str, Any]]
"""New values of integer (or tuple of integer) attributes, by module path and attribute name."""

_TOLERANCE = 1e-4
_TRIES, _TRAINING = 4, 1
_MOST_TRIED = 16
_HIDING = 1e-2
_LARGEST = 2**31


@dataclass(frozen=True)
class Eager:
    """The user's class, smaller, with the attributes that were changed; or the reason why there is none."""

    module: nn.Module | None
    attributes: Attributes
    reason: str | None


def build(
    model: nn.Module, types: Types, cut: Cut, rewritten: Rewritten, example: Example, *, is_apart: bool = False
) -> Eager:
    """Make the user's class smaller; it shares its tensors with the rewritten graph.

    is_apart: the parameters are its own, over the same memory until it is moved elsewhere: `to` changes parameters in
        place, and would move half of the graph along.
    """
    tensors = {name: attribute(rewritten.module, name) for name in _names(types)}
    if is_apart:
        own = {
            id(t): nn.Parameter(t.detach(), t.requires_grad) for t in tensors.values() if isinstance(t, nn.Parameter)
        }
        tensors = {name: own.get(id(tensor), tensor) for name, tensor in tensors.items()}
    small = with_tensors(model, tensors)
    found, wanted = _attributes(model, types, cut, rewritten), _expected(rewritten, example)

    def give(chosen: Attributes) -> None:
        for path, own in found.items():
            for name in own:
                setattr(small.get_submodule(path), name, vars(model.get_submodule(path))[name])
        set_attributes(small, chosen)

    give(attributes := found)
    reason = _difference(small, wanted, example)
    for key in _own_attributes(model, found)[:_MOST_TRIED]:  # what is no size keeps its value
        give(fewer := _without(attributes, model, key))
        if _difference(small, wanted, example) is None:
            attributes, reason = fewer, None
    give(attributes)
    if reason is None:
        with _hidden_shown(small):  # the graph shares its memory
            wanted = _expected(rewritten, example)
            if all(bool(value.isfinite().all()) for value in wanted):
                reason = _difference(small, wanted, example)
    return Eager(None, {}, reason + _scaled_by_size(types, rewritten)) if reason else Eager(small, attributes, None)


def _scaled_by_size(types: Types, rewritten: Rewritten) -> str:
    """What to do about an attention that a class scales by its head size, where that was cut; "" if there is none."""
    for node in types.captured.module.graph.nodes:
        if operator_name(node) != "scaled_dot_product_attention" or arguments(node)["scale"] is not None:
            continue
        if arguments(rewritten.twins[node])["scale"] is not None:
            path = module_path(node)
            where, way = (f" in {path}", f", as does --ignore {path}") if path else ("", "")
            return f". Its attention{where} scales by the head size, which was cut: a scale= in it keeps the class{way}"
    return ""


def _own_attributes(model: nn.Module, attributes: Attributes) -> list[tuple[type[nn.Module], str]]:
    """Classes of the user's own with the names of attributes that are taken for sizes."""
    found = {(type(model.get_submodule(path)), name): None for path, own in attributes.items() for name in own}
    return [key for key in found if not key[0].__module__.startswith("torch.nn")]


def _without(attributes: Attributes, model: nn.Module, key: tuple[type[nn.Module], str]) -> Attributes:
    kept = {
        path: {name: value for name, value in own.items() if (type(model.get_submodule(path)), name) != key}
        for path, own in attributes.items()
    }
    return {path: own for path, own in kept.items() if own}


@contextlib.contextmanager
def _hidden_shown(small: nn.Module) -> Iterator[None]:
    """Parameters near zero take values near one for a while: scales of layers may hide what is behind them."""
    hidden = [p for p in small.parameters() if p.is_floating_point() and p.numel() and p.abs().max() < _HIDING]
    saved = [parameter.detach().clone() for parameter in hidden]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in hidden:
                parameter.copy_(0.5 + 0.25 * torch.randn(parameter.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(hidden, saved, strict=True):
                parameter.copy_(value)


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module that holds other tensors under the same names; the original is not touched."""
    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        memo[id(attribute(model, name))] = tensor
    # The memory of `deepcopy` hands out the new tensor wherever the old one occurs, ties included.
    return copy.deepcopy(model, memo)


def set_attributes(module: nn.Module, attributes: Attributes) -> None:
    """Write changed sizes into a module; PlanError where one is no size, or takes the place of none."""
    modules = dict(module.named_modules(remove_duplicate=False))  # a layer may have two names
    for path, values in attributes.items():
        own = vars(modules[path]) if path in modules else {}
        for name, value in values.items():
            new = tuple(value) if isinstance(value, list) else value
            if not (_is_size(new) and _is_size(own.get(name)) and _is_like(new, own[name])):
                raise PlanError(
                    f"attributes of the plan: {path or type(module).__name__} has no size {name!r} that {value!r} "
                    "could take the place of"
                )
            setattr(modules[path], name, new)


def _is_size(value: Any) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def _is_like(new: Any, old: Any) -> bool:
    """Whether a size (or a number that goes with one, as a shift), or each of several, may replace another."""
    if isinstance(new, tuple) and isinstance(old, tuple):
        return len(new) == len(old) and all(map(_is_like, new, old))
    return isinstance(new, type(old)) and (new == 0 or (new > 0) == (old > 0)) and abs(new) < _LARGEST


def _names(types: Types) -> list[str]:
    own = (name for name in types.tensors if name not in types.captured.constants)
    return [alias for name in own for alias in types.aliases.get(name, (name,))]


def _expected(rewritten: Rewritten, example: Example) -> list[Tensor]:
    """What the graph computes."""
    with torch.no_grad(), modes_kept(rewritten.module, training=False):
        return _outputs(rewritten.module, example)


def _difference(small: nn.Module, wanted: list[Tensor], example: Example) -> str | None:
    """Why a module does not compute what the graph does; None where it does."""
    try:
        with torch.no_grad(), tensors_only(small), modes_kept(small, training=False):
            got = _outputs(small, example)
    except Exception as error:
        return f"{type(small).__name__} does not run with the new sizes: {first_line(error)}"
    if [value.shape for value in got] != [value.shape for value in wanted]:
        return f"{type(small).__name__} returns other shapes than the rewritten graph"
    worst = distance(got, wanted)
    if not worst <= _TOLERANCE:
        return f"{type(small).__name__} with the new sizes differs from the rewritten graph by {worst:.2g}"
    return None


def training_fault(small: nn.Module, model: nn.Module, types: Types) -> str | None:
    """Why a smaller module does not run in training mode although the model does, as where an auxiliary head keeps its
    size; None where it does run, or neither does."""
    example, used = types.captured.example, set(_names(types))
    has_more = any(name not in used for name, _ in model.named_parameters())
    for seed in range(_TRIES if has_more else 1):  # what training runs may be drawn
        try:
            _trained_once(small, example, seed)
        except Exception as error:
            with contextlib.suppress(Exception):
                _trained_once(model, example, seed)
                return first_line(error)
    return None


def outputs_differ(model: nn.Module, example: Example) -> bool:
    """Whether a model that runs in training mode returns other kinds of outputs there than at inference."""
    with torch.no_grad(), modes_kept(model, training=False), buffers_kept(model):
        plain = pytree.tree_structure(example.map(torch.clone).run(model))
    return bool(plain != pytree.tree_structure(_trained_once(model, example, 0)))


def _trained_once(model: nn.Module, example: Example, seed: int) -> Any:
    """Outputs in training mode, of a copy: attributes may be moved too, which nobody can put back."""
    ours = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    with torch.no_grad(), kept_random_state():
        seed_all(seed, _TRAINING)
        return example.map(torch.clone).run(ours.train())


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Both models share tensors, so each leaves its buffers as they were."""
    with buffers_kept(model):
        leaves = pytree.tree_leaves(example.map(torch.clone).run(model))
        return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]


# -- attributes ---------------------------------------------------------------------------------------


@dataclass
class _Evidence:
    """Old sizes seen at a module, each with the new sizes it became."""

    anywhere: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    inputs: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    outputs: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    literals: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    arguments: dict[tuple[str, int], set[int]] = field(default_factory=lambda: defaultdict(set))

    def new_value(self, name: str, value: int) -> int | None:
        """What an attribute becomes; None where the evidence says nothing or does not agree."""
        # An operator's argument of that very name settles it: 32 groups of 32 channels stay 32 groups.
        if len(found := self.arguments.get((name, value), set())) == 1:
            return next(iter(found))
        tables = [self.literals, self.anywhere]
        if name.startswith("in_") or "_in_" in name or name.startswith("input"):
            tables = [self.inputs]
        elif name.startswith("out_") or "_out_" in name or name.startswith("output"):
            tables = [self.outputs]
        for table in tables:
            if len(found := table.get(value, set())) == 1:
                return next(iter(found))
        return None


def _attributes(model: nn.Module, types: Types, cut: Cut, rewritten: Rewritten) -> Attributes:
    changed: Attributes = {}
    for path, evidence in _collect(model, types, cut, rewritten).items():
        try:
            owner = model.get_submodule(path)
        except AttributeError:
            continue
        for name, value in vars(owner).items():
            new = _new(evidence, name, value)
            if new is not None and new != value:
                changed.setdefault(path, {})[name] = new
    return changed


def _new(evidence: _Evidence, name: str, value: Any) -> Any:
    if name.startswith("_") or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return evidence.new_value(name, value)
    if isinstance(value, tuple) and value and name.endswith("shape") and all(isinstance(v, int) for v in value):
        found = [evidence.new_value(name, v) for v in value]
        return tuple(v if f is None else f for v, f in zip(value, found, strict=True))
    return None


def _collect(model: nn.Module, types: Types, cut: Cut, rewritten: Rewritten) -> dict[str, _Evidence]:
    found: dict[str, _Evidence] = defaultdict(_Evidence)
    work = Resizing(types, cut.alive)
    for name in _names(types):
        owner = name.rpartition(".")[0]
        small, full = attribute(rewritten.module, name).shape, attribute(model, name).shape
        for old, new in zip(full, small, strict=True):
            found[owner].anywhere[old].add(new)
    for old_node, new_node in rewritten.twins.items():
        if old_node.op != "call_function":
            continue
        evidence = found[module_path(old_node).split("@")[0]]
        for old, new in _sizes(work, types, old_node):
            evidence.outputs[old].add(new)
            evidence.anywhere[old].add(new)
        for source in old_node.all_input_nodes[:1]:
            for old, new in _sizes(work, types, source):
                evidence.inputs[old].add(new)
                evidence.anywhere[old].add(new)
        for old, new in _literals(old_node, new_node):
            evidence.literals[old].add(new)
        before, after = arguments(old_node), arguments(new_node)
        for name, given in before.items():
            value, left = _single(given), _single(after.get(name))
            if value is not None and left is not None:
                evidence.arguments[name, value].add(left)
    return found


def _single(value: Any) -> int | None:
    """A number, also where an operator takes it once for each axis."""
    if isinstance(value, (tuple, list)) and value and all(part == value[0] for part in value):
        value = value[0]
    return value if isinstance(value, int) else None


def _sizes(work: Resizing, types: Types, node: Node) -> Iterator[tuple[int, int]]:
    axes = types.values.get(node)
    if isinstance(axes, tuple) and all(hasattr(axis, "shape") for axis in axes):
        # Batch, time and space sizes are no evidence: 7 may be a window and a head count at once.
        channels = [axis for axis in axes if (types.solution.factors(axis) >= 0).any()]
        for axis, size in zip(channels, work.shape(tuple(channels)), strict=True):
            yield len(axis), size


def _literals(old: Node, new: Node) -> Iterator[tuple[int, int]]:
    if old.target != new.target:
        return
    before = pytree.tree_leaves((old.args, old.kwargs))
    after = pytree.tree_leaves((new.args, new.kwargs))
    for a, b in zip(before, after, strict=False):
        if isinstance(a, int) and isinstance(b, int) and not isinstance(a, bool) and a != b:
            yield a, b
