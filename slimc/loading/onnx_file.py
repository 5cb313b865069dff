"""ONNX files: read without leaving their folder, checked, and made into a module.

Nothing in such a file is code. What is checked: that weights stored beside it are where the file says and inside its
folder, that the graph is valid, and that every operator is one whose meaning is known here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from slimc.errors import LoadError
from slimc.loading import onnx_compute, onnx_movement  # noqa: F401  (they fill the table of operators)
from slimc.loading.onnx_module import OPERATORS, Call, OnnxModule, Step, attributes

_OLDEST, _NEWEST = 7, 25
_TOLERANCE = 1e-3
_QUANTISED = ("Quantize", "Dequantize", "QLinear", "ConvInteger", "MatMulInteger")


@dataclass(frozen=True)
class OnnxFile:
    """A module read from an ONNX file.

    input_shape: of one sample, where the file takes one tensor of numbers with known sizes; else None.
    batch: the batch size that the file fixes, else None.
    """

    module: nn.Module
    input_shape: tuple[int, ...] | None
    batch: int | None
    notes: tuple[str, ...]


def load_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file with the weights beside it. Raises LoadError naming what is missing, wrong or not known."""
    model = _read(path)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if not _OLDEST <= opset <= _NEWEST:
        raise LoadError(
            f"{path}: written in opset {opset}; {_OLDEST} to {_NEWEST} can be read. Export it again with "
            "torch.onnx.export(..., opset_version=18), or give the PyTorch model."
        )
    _check_operators(model, path)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    steps = []
    for number, node in enumerate(model.graph.node):
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant(node, path)
            continue
        call = Call(node.op_type, node.name or f"node {number}", attributes(node), opset, len(node.output))
        steps.append(Step(call, tuple(node.input), tuple(node.output)))
    inputs = [value for value in model.graph.input if value.name not in constants]
    outputs = [value.name for value in model.graph.output]
    module = OnnxModule(steps, [value.name for value in inputs], outputs, constants).eval()
    batch, shape = _interface(inputs)
    if shape is None:
        return OnnxFile(module, shape, batch, (_inputs_note(inputs),))
    generator = torch.Generator().manual_seed(0)
    difference(module, path, (torch.randn(batch or 2, *shape, generator=generator),))
    return OnnxFile(module, shape, batch, ())


# -- reading --------------------------------------------------------------------------------------------


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own classes, the system others
        raise LoadError(f"{path}: not a readable ONNX file ({_first_line(error)}). Copy or export it again.") from error
    if not model.graph.node:
        raise LoadError(f"{path}: no ONNX graph in it. It is damaged or of another format; export it again.")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(str(path))
    except Exception as error:
        raise LoadError(f"{path}: not valid ONNX: {_first_line(error)}. Export it again.") from error
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Weights beside the file: a plain file in its folder that is long enough."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    place = Path(os.path.normpath(folder / location))
    if not location or Path(location).is_absolute() or not place.is_relative_to(folder) or place == folder:
        raise LoadError(f"{path}: {tensor.name} is stored in {location!r}, outside of the file's folder. Not loaded.")
    if not place.is_file() or place.resolve() != place:
        raise LoadError(f"{path}: {tensor.name} is stored in {location}, which is not there. Copy it beside the file.")
    try:
        start, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError:
        start = length = -1
    if start < 0 or length < 0 or start + length > place.stat().st_size:
        raise LoadError(f"{path}: {location} is too short to hold {tensor.name}. Copy both files again.")


def _check_operators(model: onnx.ModelProto, path: Path) -> None:
    unknown: list[str] = []
    for node in model.graph.node:
        known = node.op_type in OPERATORS or node.op_type == "Constant"
        if not known or node.domain not in ("", "ai.onnx"):
            unknown.append(f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
    if not unknown:
        return
    names = ", ".join(sorted(set(unknown)))
    if any(part in names for part in _QUANTISED):
        raise LoadError(f"{path}: a quantised model ({names}). Prune the float model and quantise the result.")
    raise LoadError(
        f"{path}: operators that cannot be read from ONNX: {names}. Give the PyTorch model that it was exported from "
        "(.pt, .pt2, or weights with --arch)."
    )


def _constant(node: onnx.NodeProto, path: Path) -> np.ndarray[Any, Any]:
    found = attributes(node)
    for name, kind in (("value_float", np.float32), ("value_floats", np.float32),
                       ("value_int", np.int64), ("value_ints", np.int64)):  # fmt: skip
        if name in found:
            return np.array(found[name], kind)
    if not isinstance(found.get("value"), np.ndarray):
        raise LoadError(f"{path}: the constant {node.output[0]} holds {', '.join(found) or 'nothing'}, not numbers.")
    array: np.ndarray[Any, Any] = found["value"]
    return array


# -- inputs ---------------------------------------------------------------------------------------------


def _interface(inputs: list[onnx.ValueInfoProto]) -> tuple[int | None, tuple[int, ...] | None]:
    """The batch size that is fixed, and the shape of a sample, where there is one input of floats."""
    if not inputs:
        return None, None
    kind = inputs[0].type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    batch = sizes[0] if sizes else None
    sample = tuple(size for size in sizes[1:] if size)
    is_plain = len(inputs) == 1 and kind.elem_type == onnx.TensorProto.FLOAT and len(sizes) > 1
    return batch, sample if is_plain and len(sample) == len(sizes) - 1 else None


def _inputs_note(inputs: list[onnx.ValueInfoProto]) -> str:
    described = []
    for value in inputs:
        kind = value.type.tensor_type
        sizes = "x".join(str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim)
        described.append(f"{value.name} {sizes} {onnx.TensorProto.DataType.Name(kind.elem_type).lower()}")
    return f"the file's inputs, in the order of --input: {', '.join(described)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def difference(module: nn.Module, path: Path, inputs: tuple[torch.Tensor, ...]) -> float | None:
    """Largest relative difference between the module and ONNX Runtime on the file; None where no runtime is installed.

    Raises LoadError where it is too large: the file then means something else than was read.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {value.name: given.numpy() for value, given in zip(session.get_inputs(), inputs, strict=True)}
    worst = 0.0
    for got, wanted in zip(_run(module, inputs, path), session.run(None, feed), strict=True):
        ours, theirs = got.numpy().astype(np.float64), wanted.astype(np.float64)
        if ours.shape != theirs.shape:
            raise LoadError(
                f"{path}: read with the shape {ours.shape} where the file has {theirs.shape}. Please report it."
            )
        if theirs.size:
            worst = max(worst, float(np.abs(ours - theirs).max()) / (float(np.abs(theirs).max()) or 1.0))
    if not worst <= _TOLERANCE:
        raise LoadError(f"{path}: what was read differs from the file by {worst:.2g}. Please report it with the file.")
    return worst


def _run(module: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> list[torch.Tensor]:
    try:
        with torch.no_grad():
            found = module(*inputs)
    except LoadError:
        raise
    except Exception as error:  # a use of an operator that nobody has thought of
        raise LoadError(
            f"{path}: cannot be run as a PyTorch module: {_first_line(error)}. Please report it."
        ) from error
    return list(found) if isinstance(found, tuple) else [found]
