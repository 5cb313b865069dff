"""An ONNX graph as an nn.Module: its nodes one after another, each by a PyTorch function of the same meaning.

Numbers that describe shapes (what Shape gives, small integer constants and arithmetic on them) are Python integers and
lists of them, not tensors. So a reshape has its sizes as literals when torch.export traces the module, and an open
batch size stays open.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from slimc.errors import LoadError

Value = Any  # a tensor, an integer or list of integers that describes a shape, None for an input left out
Operator = Callable[..., Any]
Array = np.ndarray[Any, Any]

OPERATORS: dict[str, Operator] = {}
"""Functions by ONNX operator: (call, *inputs) to a value, or a tuple of values where the operator has several."""

_SHAPE_LENGTH = 64  # a list of integers no longer than this may be a shape


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
        return LoadError(f"the ONNX operator {self.operator} ({self.name}): {reason}")


@dataclass(frozen=True)
class Step:
    """A call with the names of the values that it reads ("" for one left out) and makes."""

    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


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
        for name, array in constants.items():
            if is_shape(array):
                self._shapes[name] = array.tolist()
            else:
                self._places[name] = _hold(self, name, array, name not in statistics)

    def forward(self, *inputs: Tensor) -> Any:
        """The file's inputs in their order to its outputs: a tensor, or a tuple where there are several."""
        if len(inputs) != len(self._inputs):
            wanted = ", ".join(self._inputs)
            raise TypeError(f"the ONNX model takes {len(self._inputs)} inputs ({wanted}), not {len(inputs)}")
        values: dict[str, Value] = {"": None, **self._shapes, **dict(zip(self._inputs, inputs, strict=True))}
        for name, place in self._places.items():
            values[name] = _at(self, place)
        for step in self._steps:
            made = OPERATORS[step.call.operator](step.call, *(values[name] for name in step.inputs))
            results = made if isinstance(made, tuple) else (made,)
            values.update(zip(step.outputs, results, strict=False))
        found = tuple(tensor(values[name]) for name in self._outputs)
        return found[0] if len(found) == 1 else found


def is_shape(array: Array) -> bool:
    """Whether a constant may describe a shape: one integer, or a short list of them."""
    return array.dtype == np.int64 and (array.ndim == 0 or (array.ndim == 1 and len(array) <= _SHAPE_LENGTH))


def tensor(value: Value, like: Tensor | None = None) -> Tensor:
    """A value as a tensor, for operators that do not compute with shapes."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64, device=None if like is None else like.device)


def _hold(root: nn.Module, name: str, array: Array, is_trained: bool) -> str:
    """Register a constant under its own name, dots as modules; returns where."""
    # torch's exporter names what it makes val_1, unsqueeze ..., and meets these names in a file that it has written.
    name = name if "." in name else f"constants.{name}"
    parts = [re.sub(r"\W", "_", part) or "_" for part in name.split(".")]
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
