"""ONNX files: read without leaving their folder, checked, and made into a module.

Nothing in such a file is code. What is checked: that weights stored beside it are where the file says and inside its
folder, that the graph is valid, that every operator is one whose meaning is known here, and (``onnx_check``) that what
was read computes the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import nn

from slimc.errors import LoadError, first_line
from slimc.loading import onnx_compute, onnx_movement, onnx_resize  # noqa: F401  (they fill the table of operators)
from slimc.loading.onnx_check import Input, check
from slimc.loading.onnx_module import OPERATORS, Call, OnnxModule, Step, with_own_vectors
from slimc.loading.onnx_numbers import numbers

_OLDEST, _NEWEST = 7, 25
_SEVERAL = ("Split", "TopK")  # operators all of whose results are made
_QUANTISED = ("Quantize", "Dequantize", "QLinear", "ConvInteger", "MatMulInteger")


@dataclass(frozen=True)
class OnnxFile:
    """A module read from an ONNX file.

    input_shape: of one sample, where the file takes one tensor of numbers with known sizes; else None.
    batch: the batch size that the file fixes, or the only one that works; else None.
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
    constants = numbers(model, path)
    steps = []
    for number, node in enumerate(model.graph.node):
        if node.op_type != "Constant":
            name = node.name or f"node {number}"
            call = Call(node.op_type, name, constants.attributes(node), opset, len(node.output))
            steps.append(Step(call, tuple(node.input), tuple(node.output), constants.literals(node)))
    outputs = [value.name for value in model.graph.output]
    _check_results(steps, outputs)
    steps, arrays = with_own_vectors(steps, constants.arrays, outputs)
    stored = {entry.name for entry in model.graph.initializer}
    inputs = [Input.of(value) for value in model.graph.input if value.name not in stored]
    module = OnnxModule(steps, [entry.name for entry in inputs], outputs, arrays).eval()
    checked = check(module, path, inputs, constants.single, constants.is_half)
    shape = _sample(inputs, constants.single)
    notes = (*constants.notes, *checked.notes)
    if shape is None:
        notes = (f"the file's inputs, in the order of --input: {', '.join(map(str, inputs))}", *notes)
    return OnnxFile(module, shape, checked.batch, notes)


def _sample(inputs: Sequence[Input], single: frozenset[int]) -> tuple[int, ...] | None:
    """The shape of a sample, where there is one input, of float32, and its sizes are known."""
    if len(inputs) != 1 or len(inputs[0].axes) < 2 or inputs[0].kind not in (onnx.TensorProto.FLOAT, *single):
        return None
    sizes = tuple(axis for axis in inputs[0].axes[1:] if isinstance(axis, int))
    return sizes if len(sizes) == len(inputs[0].axes) - 1 else None


# -- reading --------------------------------------------------------------------------------------------


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own classes, the system others
        raise LoadError(f"{path}: not a readable ONNX file ({first_line(error)}). Copy or export it again.") from error
    if not model.graph.node:
        raise LoadError(f"{path}: no ONNX graph in it. It is damaged or of another format; export it again.")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(str(path))
    except Exception as error:
        raise LoadError(f"{path}: not valid ONNX: {first_line(error).rstrip('.')}. Export it again.") from error
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
    if not place.is_file():
        raise LoadError(f"{path}: {tensor.name} is stored in {location}, which is not there. Copy it beside the file.")
    if place.resolve() != place:
        raise LoadError(
            f"{path}: {tensor.name} is stored in {location}, which is a link. Copy the file that it leads to in its "
            "place."
        )
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


def _check_results(steps: Sequence[Step], outputs: Sequence[str]) -> None:
    """Refuse further results of operators of which only the first is made: masks, indices, statistics."""
    read = ({name for step in steps for name in step.read} | set(outputs)) - {""}
    for step in steps:
        used = [name for name in step.outputs[1:] if name in read]
        if used and step.call.operator not in _SEVERAL:
            raise step.call.refuse(f"its result {used[0]} is used, and only its first can be computed")
