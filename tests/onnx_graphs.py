"""Small ONNX graphs for the tests of reading them, and what ONNX Runtime computes on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from slimc.graph.capture import capture
from slimc.loading import Loaded, load

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)


def numbers(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def whole(*values: int) -> Array:
    return np.array(values, np.int64)


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[Any],
    constants: Mapping[str, Any],
    output: str = "y",
    opset: int = 18,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model of some nodes that read "x" of a shape and make "y"."""
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_empty_tensor_value_info(output)],
        [
            value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
            for name, value in constants.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    inferred = onnx.shape_inference.infer_shapes(model)
    kinds = {value.name: value.type for value in inferred.graph.value_info} | {output: inferred.graph.output[0].type}
    found = kinds[output] if kinds[output].WhichOneof("value") else helper.make_tensor_type_proto(kind, shape)
    model.graph.output[0].CopyFrom(helper.make_value_info(output, found))
    return model


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node by its inputs and outputs, their names after one another; - for one left out."""
    return helper.make_node(kind, [name.strip("-") for name in inputs.split()], outputs.split(), **attributes)


def wanted(path: Path, x: Array) -> Array:
    """What ONNX Runtime gives."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"x": x})[0]
    return found


def both(path: Path, x: Array) -> tuple[Any, Array]:
    """What the loaded module gives, and what ONNX Runtime gives."""
    with torch.no_grad():
        return load(str(path)).model(torch.from_numpy(x)), wanted(path, x)


def captured_open(path: Path, *shape: int) -> Loaded:
    """Load and capture a file with an open batch, and compare the capture with the file for another batch."""
    loaded = load(str(path))
    found = capture(loaded.model, torch.randn(2, *shape))
    assert found.batch_note is None
    x = numbers(3, *shape)
    with torch.no_grad():
        np.testing.assert_allclose(found.module(torch.from_numpy(x)).numpy(), wanted(path, x), rtol=1e-5, atol=1e-5)
    return loaded
