"""An ONNX graph as an nn.Module: its nodes one after another, each by a PyTorch function of the same meaning.

Numbers that describe shapes (what Shape gives, small integer constants and arithmetic on them) are Python integers and
lists of them, not tensors. So a reshape has its sizes as literals when torch.export traces the module, and an open
batch size stays open. The same holds for what PyTorch's functions take as plain numbers, such as factors of a resize.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from slimc.errors import LoadError

Value = Any  # a tensor, a number or list (of lists) of numbers known before the data is, None for an input left out
Operator = Callable[..., Any]
Array = np.ndarray[Any, Any]

OPERATORS: dict[str, Operator] = {}
"""Functions by ONNX operator: (call, *inputs) to a value, or a tuple of values where the operator has several."""

LITERALS = {"Resize": (1, 2), "Upsample": (1,), "Pad": (2,), "Range": (0, 1, 2), "Clip": (1, 2)}
"""Inputs, by place, that PyTorch's functions take as plain numbers."""

_SHAPE_LENGTH = 64  # a list of integers no longer than this may be a shape
# An infinite number in a weight of these is damage; in what other operators read it is a mask.
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "InstanceNormalization",
             "LayerNormalization", "GroupNormalization", "RMSNormalization")  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One node: its operator, name, attributes, the opset that says what they mean, and how many results are named."""

    operator: str
    name: str
    attributes: dict[str, Any]
    opset: int
    results: int

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or what the standard says when it is left out."""
        return self.attributes.get(name, default)

    def refuse(self, reason: str) -> LoadError:
        """What cannot be expressed, for the caller to raise."""
        return LoadError(
            f"the ONNX operator {self.operator} ({self.name}): {reason}. Give the PyTorch model that the file was "
            "exported from (.pt, .pt2, or weights with --arch)."
        )


@dataclass(frozen=True)
class Step:
    """A call with the names of the values that it reads ("" for one left out) and makes.

    literals: plain numbers by their place among the inputs, which stand for the names there.
    """

    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    literals: Mapping[int, Value]

    @property
    def read(self) -> tuple[str, ...]:
        """Names of the values that it needs."""
        return tuple(name for place, name in enumerate(self.inputs) if place not in self.literals)


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Register the function of one or more ONNX operators."""

    def register(function: Operator) -> Operator:
        for name in names:
            assert name not in OPERATORS, name
            OPERATORS[name] = function
        return function

    return register


class OnnxModule(nn.Module):
    """A network read from an ONNX file; parameters and buffers have the names that the file gives them."""

    holds_a_graph = True

    def __init__(
        self, steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str], constants: Mapping[str, Array]
    ) -> None:
        super().__init__()
        self._steps, self._inputs, self._outputs = tuple(steps), tuple(inputs), tuple(outputs)
        self._shapes: dict[str, Value] = {}
        self._places: dict[str, str] = {}
        statistics = {name for step in steps if step.call.operator == "BatchNormalization" for name in step.inputs[3:5]}
        weights = {name for step in steps if step.call.operator in _WEIGHTED for name in step.inputs}
        read = {name for step in steps for name in step.read} | set(outputs)
        for name, array in constants.items():
            if name not in read:
                continue
            if is_shape(array):
                self._shapes[name] = array.tolist()
            else:
                is_mask = name not in weights and array.dtype.kind == "f" and not np.isfinite(array).all()
                self._places[name] = _hold(self, name, array, name not in statistics and not is_mask)

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the graph calls its inputs, in the order in which `forward` takes them."""
        return self._inputs

    @property
    def output_names(self) -> tuple[str, ...]:
        """What the graph calls its outputs, in the order in which `forward` gives them."""
        return self._outputs

    def forward(self, *inputs: Tensor) -> Any:
        """The file's inputs in their order to its outputs: a tensor, or a tuple where there are several."""
        if len(inputs) != len(self._inputs):
            wanted = ", ".join(self._inputs)
            raise TypeError(f"the ONNX model takes {len(self._inputs)} inputs ({wanted}), not {len(inputs)}")
        values: dict[str, Value] = {"": None, **self._shapes, **dict(zip(self._inputs, inputs, strict=True))}
        for name, place in self._places.items():
            values[name] = _at(self, place)
        for step in self._steps:
            given = (step.literals[i] if i in step.literals else values[n] for i, n in enumerate(step.inputs))
            made = OPERATORS[step.call.operator](step.call, *given)
            results = made if isinstance(made, tuple) else (made,)
            values.update((name, result) for name, result in zip(step.outputs, results, strict=False) if name)
        found = tuple(tensor(values[name]) for name in self._outputs)
        return found[0] if len(found) == 1 else found


def with_own_vectors(
    steps: Sequence[Step], constants: Mapping[str, Array], outputs: Sequence[str]
) -> tuple[list[Step], dict[str, Array]]:
    """Steps and constants in which layers with weights of their own have vectors of their own.

    Exporters and simplifiers store equal tensors once, so that the biases of layers that never met are one tensor (all
    of them, where they are zero), which ties the layers' channels together. Steps of the same weight keep one vector.
    """
    held, arrays, kept = dict(constants), dict(constants), []
    owned: dict[tuple[str, Any], str] = {}  # new names by the stored vector and the weight that it goes with
    aliases: dict[str, str] = {}
    taken = set(outputs)
    for number, step in enumerate(steps):
        source = aliases.get(step.inputs[0], step.inputs[0]) if step.call.operator == "Identity" else ""
        if source in held and _is_vector(held[source]) and step.outputs[0] not in outputs:
            aliases[step.outputs[0]] = source
            continue
        weight = tuple(name for name in step.read if name in held and held[name].ndim > 1) or number
        inputs = list(step.inputs)
        for place, name in enumerate(inputs):
            vector = aliases.get(name, name)
            if place not in step.literals and vector in held and _is_vector(held[vector]):
                free = name if name not in taken else f"{name}_{step.outputs[0]}"
                own = owned.setdefault((vector, weight), free)
                taken.add(own)
                arrays[own], inputs[place] = held[vector], own
        kept.append(replace(step, inputs=tuple(inputs)))
    return kept, arrays


def _is_vector(array: Array) -> bool:
    return array.ndim == 1 and array.size > 1 and array.dtype.kind == "f"


def is_shape(array: Array) -> bool:
    """Whether a constant may describe a shape: one integer, or a short list of them."""
    return array.dtype in (np.int64, np.int32) and array.ndim < 2 and array.size <= _SHAPE_LENGTH


def tensor(value: Value, like: Tensor | None = None) -> Tensor:
    """A value as a tensor, for operators that do not compute with shapes."""
    if isinstance(value, Tensor):
        return value
    first = next(iter(objects(value).flat), 0)
    kind = torch.bool if isinstance(first, bool) else None if isinstance(first, float) else torch.int64
    return torch.tensor(value, dtype=kind, device=None if like is None else like.device)


def torch_type(number: int) -> torch.dtype:
    """The type of PyTorch for one of ONNX."""
    return torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(number))).dtype


def objects(value: Value) -> Array:
    """Sizes as an array of Python's numbers, among which may be an open batch; rearranged, see ``sizes``."""
    return np.array(value, dtype=object)


def sizes(array: Any) -> Value:
    """An array of Python's numbers, or a single one, as the list (of lists) or number that other operators read."""
    return array.tolist() if isinstance(array, np.ndarray) else array


def _hold(root: nn.Module, name: str, array: Array, is_trained: bool) -> str:
    """Register a constant under its own name, dots as modules; returns where."""
    # torch's exporter names what it makes val_1, unsqueeze ..., and meets these names in a file that it has written.
    name = name if "." in name else f"constants.{name}"
    parts = [re.sub(r"\W", "_", part) or "_" for part in name.split(".")]
    parts = [f"{part}_" if keyword.iskeyword(part) else part for part in parts]  # torch writes them into code
    owner = root
    for part in parts[:-1]:
        if part not in owner._modules and not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        child = owner._modules.get(part)
        if child is None:  # the name of a tensor, or of something that modules have
            owner, parts = root, ["_".join(parts)]
            break
        owner = child
    last = parts[-1]
    while hasattr(owner, last):
        last += "_"
    value = torch.from_numpy(np.array(array))  # a copy, since protobuf's memory cannot be written to
    if is_trained and value.is_floating_point() and value.numel() > 1:
        owner.register_parameter(last, nn.Parameter(value))
    else:
        owner.register_buffer(last, value)
    return ".".join([*parts[:-1], last])


def _at(module: nn.Module, place: str) -> Tensor:
    *path, last = place.split(".")
    for part in path:
        module = getattr(module, part)
    found: Tensor = getattr(module, last)
    return found


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values; text decoded, tensors as arrays."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, onnx.TensorProto):
            value = onnx.numpy_helper.to_array(value)
        found[attribute.name] = value
    return found
