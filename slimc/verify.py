"""Translation validation: removal must equal masking.

The reference is the original graph, interpreted with every removed index set to zero in every value; where a
normalisation takes statistics over indices that were removed, it takes them over the kept ones. The rewritten
graph must give the same outputs. Both run in float64, where a wrong index differs by orders of magnitude more
than rounding does. Weights are widened one by one, when they are first used, so that a proof needs little more
memory than the largest of them and the values alive.

A proof must be able to fail: the cut has to move the outputs by far more than the error. Where it does not
(weights of zero, layer scales near zero), the check runs once more with all parameters redrawn; it concerns
indices, which do not depend on the weights' values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from .errors import VerificationError, first_line
from .graph.example import Example
from .graph.infer import Types, attribute, module_path
from .graph.resize import Cut
from .graph.rule import arguments, operator_name
from .rewrite import Rewritten

_PRECISION, _TOLERANCE = torch.float64, 1e-10
_SEED = 0
_TELLING = 1e3
"""The cut must move the outputs by this many times the error for the proof to mean something."""
_SMALLEST_MOVE = 1e-9
_PLAIN_MOVE = 1e-3
"""A move as large as this shows in float32 too, in which convolutions are several times as fast."""
_VIDEO = 5
"""Axes of a batch of videos."""
_NEAR_ZERO = 1e-2
_LATER = object()
"""Stands for a tensor of the model that no node has used yet."""

Read = Callable[[str], Any]


@dataclass(frozen=True)
class Proof:
    """What was compared.

    max_relative_error: largest difference over largest output, over all outputs and inputs.
    moved: how far the cut moved the outputs, in the same measure; None if nothing was cut.
    redrawn: whether parameters had to be redrawn for the proof to be telling.
    """

    max_relative_error: float
    moved: float | None
    dtype: str
    inputs: int
    redrawn: bool


def verify(types: Types, cut: Cut, rewritten: Rewritten, inputs: Sequence[Example]) -> Proof:
    """Compare the rewritten graph with the masked original on each of the inputs.

    Raises VerificationError naming the first node that differs.
    """
    check = _Check(types, cut, rewritten)
    errors = [error for example in inputs[1:] if (error := check.error_if_fair(example)) is not None]
    last, moved = check.error_and_move(inputs[0], check.trained)
    error, redrawn = max([last, *errors]), False
    if moved is not None and moved < max(_TELLING * error, _SMALLEST_MOVE):
        last, moved = check.error_and_move(inputs[0], _redrawn(types.captured.module, _SEED))
        error, redrawn = max(error, last), True
    return Proof(error, moved, str(_PRECISION).removeprefix("torch."), 1 + len(errors), redrawn)


def random_inputs(example: Example, count: int, seed: int) -> list[Example]:
    """The example and others of its shape: floats drawn from its own values, integers shuffled."""
    generator = torch.Generator().manual_seed(seed)
    return [example, *(example.map(lambda t: _like(t, generator)) for _ in range(1, count))]


def mixed_input(example: Example, batch: int, seed: int) -> Example:
    """The example's first sample, and others drawn like it in the places of the rest."""
    drawn = random_inputs(example, 2, seed)[1].tensors()
    places = iter(drawn)

    def mix(tensor: Tensor) -> Tensor:
        other = next(places)
        return torch.cat([tensor[:1], other[1:]]) if tensor.dim() > 0 and tensor.shape[0] == batch else tensor

    return example.map(mix)


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_floating_point():
        values = tensor.detach().flatten()
        if not bool(values.isfinite().all()):  # a mask
            return tensor
        if values.numel() < 2 or bool((values == values[0]).all()):
            return (torch.randn(tensor.shape, generator=generator) + values.float().mean().cpu()).to(tensor)
        # Its own, so that they are in the model's domain: logarithms, say, take positive numbers.
        places = torch.randint(0, values.numel(), tensor.shape, generator=generator)
        return values[places.to(values.device)]
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.reshape(-1)[order].reshape(tensor.shape)


class _Check:
    def __init__(self, types: Types, cut: Cut, rewritten: Rewritten) -> None:
        self.types, self.cut, self.rewritten = types, cut, rewritten

    def trained(self, name: str) -> Any:
        """A tensor of the original as it is."""
        return attribute(self.types.captured.module, name)

    def error(self, example: Example, read: Read) -> float:
        """How far the rewritten graph is from the masked original on one input; raises where that is too far."""
        return self._compared(example, read)[0]

    def error_if_fair(self, example: Example) -> float | None:
        """As `error`; None for drawn inputs on which the original itself fails, or gives no finite numbers."""
        try:
            return self.error(example, self.trained)
        except VerificationError:
            leaves = example.leaves()
            try:
                with torch.no_grad():
                    found = Plain(self.types.captured.module, self.trained, _PRECISION).results(leaves)
            except (RuntimeError, IndexError):
                return None
            if all(bool(value.isfinite().all()) for value in found):
                raise
            return None

    def error_and_move(self, example: Example, read: Read) -> tuple[float, float | None]:
        """The error, and how far the cut moves the outputs on this input; None where nothing was cut."""
        error, slim = self._compared(example, read)
        if self.cut.alive.all():
            return error, None
        leaves = example.leaves()
        moved = 0.0
        for dtype in (torch.float32, _PRECISION):
            with torch.no_grad():
                moved = distance(slim, Plain(self.types.captured.module, read, dtype).results(leaves))
            if moved >= _PLAIN_MOVE:
                break
        return error, moved

    def _compared(self, example: Example, read: Read) -> tuple[float, list[Tensor]]:
        leaves = example.leaves()
        with torch.no_grad():
            try:
                slim = self._slim(leaves, read)
            except (RuntimeError, IndexError, TypeError, ValueError) as cause:
                raise VerificationError(
                    f"the rewritten model does not run: {first_line(cause)}. Nothing was written. "
                    "This is a fault of slimc: please report it with the model."
                ) from cause
            wanted = Masked(self.types, self.cut, self.rewritten, read).results(leaves)
            error = distance(slim, wanted)
            if not error <= _TOLERANCE:
                raise VerificationError(self._first_difference(leaves, read, error))
        return error, slim

    def _slim(self, leaves: list[Any], read: Read) -> list[Tensor]:
        return Plain(self.rewritten.module, self._sliced(read), _PRECISION).results(leaves)

    def _sliced(self, read: Read) -> Read:
        """Tensors of the rewritten graph: its own, or those of `read` with the same cut."""
        if read == self.trained:
            return lambda name: attribute(self.rewritten.module, name)

        def sliced(name: str) -> Any:
            axes = self.types.tensors.get(self.types.first(name))
            if axes is None:
                return attribute(self.rewritten.module, name)
            return self.cut.select(read(name), axes)

        return sliced

    def _first_difference(self, leaves: list[Any], read: Read, error: float) -> str:
        """Run both graphs once more, keep every value, and name the first node that differs."""
        if drawing := _random_operator(self.types.captured.module):
            return (
                f"the model draws random numbers at inference ({drawing}), so that its outputs are never the same "
                "twice and no cut can be proven. Nothing was written. Draw them in training mode only, or make "
                "them an input."
            )
        masked = Masked(self.types, self.cut, self.rewritten, read)
        plain = Plain(self.rewritten.module, self._sliced(read), _PRECISION)
        masked.results(leaves, keep=True)
        plain.results(leaves, keep=True)
        for old, new in self.rewritten.twins.items():
            axes, value = self.types.values.get(old), masked.env.get(old)
            if not isinstance(value, Tensor) or new not in plain.env or axes is None:
                continue
            wanted, got = self.cut.select(value, axes), plain.env[new]
            if wanted.shape != got.shape or not distance([got], [wanted]) <= _TOLERANCE:
                stack = old.meta.get("nn_module_stack")
                module = list(stack.values())[-1][0] if stack else ""
                return (
                    f"the rewritten model differs from the masked original by {error:.2g} of the output; "
                    f"the first node that differs is {old.name} ({old.target}{f' in {module}' if module else ''}). "
                    "Nothing was written. This is a fault of slimc: please report it with the model."
                )
        return f"the rewritten model differs from the masked original by {error:.2g} of the output, at no single node"


def _random_operator(module: GraphModule) -> str:
    """An operator of the graph that draws random numbers; empty if there is none."""
    for node in module.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            call = arguments(node)
            share = call.get("dropout_p", call.get("p"))
            is_idle = share == 0 or call.get("train") is False or call.get("training") is False
            if not is_idle:
                path = module_path(node)
                return f"{operator_name(node)}{f' in {path}' if path else ''}"
    return ""


class Plain(Interpreter):
    """A graph run in another precision, with its tensors read through a function."""

    def __init__(self, module: GraphModule, read: Read, dtype: torch.dtype) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.read, self.dtype = read, dtype

    def results(self, leaves: list[Any], keep: bool = False) -> list[Tensor]:
        """The output tensors for flat inputs; `keep` leaves all values in `env`."""
        self.garbage_collect_values = not keep
        found = self.run(*[self._cast(leaf) for leaf in leaves], enable_io_processing=False)
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            # A copy, since in-place operators and masks would write into the caller's tensor.
            return value.detach().to(self.dtype, copy=True) if value.is_floating_point() else value.detach().clone()
        return value

    def run_node(self, n: Node) -> Any:
        """Run a node, after those of the model's tensors that it is the first to use."""
        if n.op == "get_attr":
            return _LATER
        for source in n.all_input_nodes:
            if self.env[source] is _LATER:
                self.env[source] = self.value(source)
        return self.value(n)

    def value(self, n: Node) -> Any:
        """What a node gives, with everything that it uses at hand."""
        # What is made of nothing (zeros, arange) has torch's default type unless the model names one.
        return pytree.tree_map_only(Tensor, self._widened, super().run_node(n))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor in the run's precision."""
        return self._cast(self.read(str(target)))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operator, with literal types of the model's precision widened."""
        if "_assert_tensor_metadata" in str(target):
            return None
        args, kwargs = pytree.tree_map_only(torch.dtype, self._widen, (tuple(args), dict(kwargs)))
        if "cdist" in str(target):  # by matrix products it rounds to many times its own precision near zero
            p = args[2] if len(args) > 2 else kwargs.get("p", 2.0)
            return torch.cdist(args[0], args[1], p=p, compute_mode="donot_use_mm_for_euclid_dist")
        if "conv3d" in str(target) and args[0].dim() == _VIDEO:
            # In float64 torch unrolls the patches of all videos at once, many times what the network itself holds.
            videos = torch.split(args[0], 1)
            return torch.cat([super(Plain, self).call_function(target, (video, *args[1:]), kwargs) for video in videos])
        return super().call_function(target, args, kwargs)

    def _widened(self, value: Tensor) -> Tensor:
        return value.to(self._widen(value.dtype))

    def _widen(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if dtype.is_floating_point else dtype


class Masked(Plain):
    """The original graph with every removed index set to zero in every value."""

    def __init__(self, types: Types, cut: Cut, rewritten: Rewritten, read: Read) -> None:
        super().__init__(types.captured.module, read, _PRECISION)
        self.types, self.cut, self.rewritten = types, cut, rewritten
        self._statistics = {node for node, axis in types.renormalising if not cut.whole(axis)}

    def value(self, n: Node) -> Any:
        """Run a node as usual, or over kept indices, then zero what was removed."""
        value = self._over_kept(n) if n in self._statistics else super().value(n)
        axes = self.types.values.get(n)
        if isinstance(value, Tensor) and axes is not None:
            return self._zero(value, axes)
        if isinstance(value, (tuple, list)) and axes is not None:
            return [self._zero(v, a) if isinstance(v, Tensor) else v for v, a in zip(value, axes, strict=True)]
        return value

    def _zero(self, value: Tensor, axes: Any) -> Tensor:
        for position, axis in enumerate(axes):
            if self.cut.whole(axis):
                continue
            removed = torch.from_numpy(np.flatnonzero(~self.cut.kept(axis))).to(value.device)
            if 0 in value.stride():
                value = value.clone()
            # Filled, not multiplied: a removed 0 / 0 must not survive. In place, so that views see it too.
            value.index_fill_(position, removed, 0)
        return value

    def _over_kept(self, node: Node) -> Any:
        """Gather the kept indices, run the operator with its new literals, and put the result back."""
        new = self.rewritten.twins[node]
        back = {self.rewritten.twins[source]: source for source in node.all_input_nodes}

        def kept(source: Node) -> Any:
            value = self.env[back[source]]
            return self.cut.select(value, self.types.values[back[source]]) if isinstance(value, Tensor) else value

        args, kwargs = torch.fx.node.map_arg((new.args, new.kwargs), kept)
        small = self.call_function(new.target, args, kwargs)
        axes = self.types.values[node]
        if isinstance(small, Tensor):
            return _scatter(small, axes, self.cut)
        return [_scatter(item, own, self.cut) for item, own in zip(small, axes, strict=True)]


def _scatter(small: Tensor, axes: Any, cut: Cut) -> Tensor:
    for position, axis in enumerate(axes):
        if not cut.whole(axis):
            shape = list(small.shape)
            shape[position] = len(axis)
            small = small.new_zeros(shape).index_copy_(position, cut.indices(axis).to(small.device), small)
    return small


def distance(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference over the largest reference value, over all outputs; NaN where one side is NaN."""
    worst = 0.0
    for value, reference in zip(values, wanted, strict=True):
        if value.shape != reference.shape:
            return float("inf")
        if not reference.numel():
            continue
        if not (reference.is_floating_point() or reference.is_complex()):
            worst = max(worst, float((value != reference).double().mean()))
            continue
        scale = float(reference.abs().max())
        difference = float((value - reference).abs().max())
        relative = difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))
        worst = relative if np.isnan(relative) else max(worst, relative)
    return worst


def _redrawn(module: GraphModule, seed: int) -> Read:
    """Other values for every parameter: of its own where these differ, since they are in the model's domain.

    Those that are near zero all over, or all equal, are drawn from a normal distribution, of the same sign.
    """
    drawn: dict[int, Tensor] = {}

    def read(name: str) -> Any:
        tensor = attribute(module, name)
        if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            return tensor
        if id(tensor) not in drawn:
            generator = torch.Generator().manual_seed(seed + len(drawn))
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
            other = noise * (fan_in**-0.5) if tensor.dim() > 1 else 0.5 + 0.25 * noise
            values = tensor.detach().flatten()
            if values.numel() and float(values.abs().max()) > _NEAR_ZERO:
                alike = bool((values == values[0]).all())
                places = torch.randint(values.numel(), tensor.shape, generator=generator)
                other = other.abs() * values[0].sign() if alike else values[places.to(values.device)].double()
            drawn[id(tensor)] = other
        return drawn[id(tensor)]

    return read
