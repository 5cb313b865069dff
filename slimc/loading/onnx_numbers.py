"""The numbers of an ONNX file: those that are read, as arrays that PyTorch takes, half precision as float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from slimc.errors import LoadError
from slimc.loading.onnx_module import LITERALS, Array, Value, attributes

_HALF = frozenset({int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)})
_DOUBLE = frozenset({int(TensorProto.DOUBLE)})
_FLOATS = _HALF | _DOUBLE | {int(TensorProto.FLOAT)}


@dataclass(frozen=True)
class Numbers:
    """The constants of a graph by name.

    single: types of the file that are float32 in the module. is_half: whether the file computes in half precision.
    """

    arrays: dict[str, Array]
    single: frozenset[int]
    is_half: bool
    notes: tuple[str, ...]

    def attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        """A node's attributes, with float32 in place of what is float32 in the module."""
        found = attributes(node)
        if node.op_type == "Cast" and found["to"] in self.single:
            found["to"] = int(TensorProto.FLOAT)
        if isinstance(value := found.get("value"), np.ndarray) and _type(value) in self.single:
            found["value"] = value.astype(np.float32)
        return found

    def literals(self, node: onnx.NodeProto) -> dict[int, Value]:
        """Constants by place among the inputs, where PyTorch's function takes plain numbers."""
        found: dict[int, Value] = {}
        for place in LITERALS.get(node.op_type, ()):
            array = self.arrays.get(node.input[place]) if place < len(node.input) else None
            if array is not None:
                found[place] = array.item() if array.size == 1 else array.tolist()
        indices = self.arrays.get(node.input[1]) if node.op_type == "Gather" else None
        if indices is not None and (indices < 0).any():  # from the end, which torch's embeddings do not know
            found[1] = indices.tolist()
        return found


def numbers(model: onnx.ModelProto, path: Path) -> Numbers:
    """Read the constants that some node reads. Raises LoadError naming one that PyTorch has no type for."""
    outputs = {value.name for value in model.graph.output}
    read = {name for node in model.graph.node for name in node.input} | outputs
    arrays = {tensor.name: _array(tensor, path) for tensor in model.graph.initializer if tensor.name in read}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in read:
            arrays[node.output[0]] = _constant(node, path)
    held = _as_tensors(model) | outputs
    types = {name: _type(array) for name, array in arrays.items()}
    weights = {types[name] for name, array in arrays.items() if name in held and array.size > 1} & _FLOATS
    single = _HALF | _DOUBLE if weights == _DOUBLE else _HALF
    notes = []
    for chosen, word in ((_HALF, "half"), (_DOUBLE & single, "double")):
        if count := sum(types[name] in chosen for name in arrays.keys() & held):
            notes.append(f"converted {count} {word}-precision tensors to float32")
    arrays = {name: array.astype(np.float32) if types[name] in single else array for name, array in arrays.items()}
    for name, array in arrays.items():
        _check_type(name, array, types[name], path)
    casts = {a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    inputs = {value.type.tensor_type.elem_type for value in model.graph.input}
    return Numbers(arrays, single, bool(_HALF & (casts | inputs | set(types.values()))), tuple(notes))


def _as_tensors(model: onnx.ModelProto) -> set[str]:
    return {
        name
        for node in model.graph.node
        for place, name in enumerate(node.input)
        if place not in LITERALS.get(node.op_type, ())
    }


def _array(tensor: onnx.TensorProto, path: Path) -> Array:
    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:  # of every kind, by type and place of the numbers
        raise LoadError(
            f"{path}: {tensor.name or 'a constant'} is damaged ({error}). Copy or export it again."
        ) from error


def _constant(node: onnx.NodeProto, path: Path) -> Array:
    for attribute in node.attribute:
        if attribute.name == "value":
            return _array(attribute.t, path)
    found = attributes(node)
    for name, kind in (("value_float", np.float32), ("value_floats", np.float32),
                       ("value_int", np.int64), ("value_ints", np.int64)):  # fmt: skip
        if name in found:
            return np.array(found[name], kind)
    raise LoadError(f"{path}: the constant {node.output[0]} holds {', '.join(found) or 'nothing'}, not numbers.")


def _type(array: Array) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _check_type(name: str, array: Array, kind: int, path: Path) -> None:
    try:
        torch.from_numpy(np.zeros(0, array.dtype))
    except TypeError as error:
        raise LoadError(
            f"{path}: the constant {name} is of type {TensorProto.DataType.Name(kind)}, which cannot be read. "
            "Export the model in float32."
        ) from error
