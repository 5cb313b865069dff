"""What was read from an ONNX file is compared with ONNX Runtime, or it is said why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import graph_of, node, numbers, whole
from torch import Tensor

from slimc.errors import LoadError
from slimc.loading import (
    load,
    onnx_file,  # noqa: F401  (it fills the table of operators)
)
from slimc.loading.onnx_module import OPERATORS, Call, OnnxModule, Step

pytest.importorskip("onnxruntime")

NOT_COMPARED = "not compared with ONNX Runtime"


def saved(folder: Path, model: onnx.ModelProto) -> str:
    onnx.save(model, folder / "net.onnx")
    return str(folder / "net.onnx")


@pytest.fixture
def wrong_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relu is misread, by little."""

    def relu(_call: Call, x: Tensor) -> Tensor:
        return torch.relu(x) * 1.01

    monkeypatch.setitem(OPERATORS, "Relu", relu)


@pytest.mark.usefixtures("wrong_relu")
@pytest.mark.parametrize(("nodes", "shape"), [
    ([node("Relu", "x", "y")], ["batch", 4]),
    ([node("Relu", "x", "y")], ["batch", 4, "height", "width"]),
    ([node("Relu", "x", "y")], ["batch", "time", 4]),
    ([node("Sqrt", "x", "h"), node("Relu", "h", "y")], [2, 4]),  # half of it is NaN
    ([node("Log", "x", "h"), node("Softmax", "h", "s"), node("Relu", "s", "y")], [2, 64]),  # all of it, unless positive
])  # fmt: skip
def test_a_misread_operator_is_found(nodes: list[onnx.NodeProto], shape: list[Any], tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"differs from the file by 0\.0"):
        load(saved(tmp_path, graph_of(nodes, shape, {})))


@pytest.mark.usefixtures("wrong_relu")
def test_an_input_without_axes_is_compared(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="differs from the file"):
        load(saved(tmp_path, graph_of([node("Exp", "x", "h"), node("Relu", "h", "y")], [], {})))


@pytest.mark.usefixtures("wrong_relu")
def test_several_inputs_of_numbers_and_words_are_compared(tmp_path: Path) -> None:
    nodes = [node("Gather", "table words", "h"), node("Add", "h x", "s"), node("Relu", "s", "y")]
    model = graph_of(nodes, ["batch", 3, 4], {"table": numbers(10, 4)})
    model.graph.input.append(helper.make_tensor_value_info("words", TensorProto.INT64, ["batch", 3]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 4]))
    with pytest.raises(LoadError, match="differs from the file"):
        load(saved(tmp_path, model))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_infinity_in_the_place_of_a_number_is_found(
    number: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPERATORS, "Relu", lambda _call, x: torch.where(x > 0, x, number))
    with pytest.raises(LoadError, match="NaN or infinity"):
        load(saved(tmp_path, graph_of([node("Relu", "x", "y")], [2, 64], {})))


def test_a_result_without_a_finite_number_is_said(tmp_path: Path) -> None:
    nodes = [node("Mul", "x zero", "h"), node("Log", "h", "y")]
    loaded = load(saved(tmp_path, graph_of(nodes, [2, 4], {"zero": np.float32(0)})))
    assert loaded.notes == (f"{NOT_COMPARED}: it gives nothing finite for random inputs",)


def test_a_file_that_onnx_runtime_does_not_take_is_read_with_a_note(tmp_path: Path) -> None:
    model = graph_of([node("LRN", "x", "y", size=4)], [2, 8, 3, 3], {})
    assert load(saved(tmp_path, model)).notes[0].startswith(f"{NOT_COMPARED}: ")
    model = graph_of([node("Relu", "x", "y")], [2, 8], {})
    model.ir_version = onnx.IR_VERSION
    notes = load(saved(tmp_path, model)).notes
    assert all("IR version" in note and "/onnxruntime_src" not in note for note in notes)


def test_sizes_that_do_not_suit_the_network_are_said(tmp_path: Path) -> None:
    nodes = [node("Flatten", "x", "h"), node("MatMul", "h w", "y")]
    loaded = load(saved(tmp_path, graph_of(nodes, ["batch", 2, "height", "width"], {"w": numbers(200, 3)})))
    assert loaded.batch is None
    assert loaded.notes[0].startswith("the file's inputs")
    assert loaded.notes[1].startswith(f"{NOT_COMPARED}: ")
    assert loaded.model(torch.zeros(2, 2, 10, 10)).shape == (2, 3)


def test_inputs_that_cannot_be_made_up_are_said(tmp_path: Path) -> None:
    model = graph_of([node("Relu", "x", "y")], [2, 4], {})
    model.graph.input.append(helper.make_tensor_value_info("label", TensorProto.UINT16, [2]))
    assert load(saved(tmp_path, model)).notes[1] == f"{NOT_COMPARED}: no values are made up for label 2 uint16"


def test_a_network_for_one_sample_is_read_with_a_batch_of_one(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x shape", "h"), node("MatMul", "h w", "y")]
    model = graph_of(nodes, ["batch", 2, 4], {"shape": whole(1, 8), "w": numbers(8, 3)})
    loaded = load(saved(tmp_path, model))
    assert loaded.batch == 1
    assert loaded.notes == ("the network works on one sample at a time only, though the file leaves the batch open",)


@pytest.mark.parametrize("size", [-1, 0])
def test_a_size_that_is_none_leaves_the_batch_open(size: int, tmp_path: Path) -> None:
    loaded = load(saved(tmp_path, graph_of([node("Relu", "x", "y")], [size, 4], {})))
    assert (loaded.batch, loaded.input_shape) == (None, (4,))


MASKS = [
    ([node("Dropout", "x", "h m"), node("Relu", "h", "y")], {}, 12),
    ([node("MaxPool", "x", "y i", kernel_shape=[2, 2])], {}, 12),
    ([node("LayerNormalization", "x w", "y m d")], {"w": numbers(4)}, 17),
]


@pytest.mark.parametrize(("nodes", "constants", "opset"), MASKS)
def test_further_results_that_nobody_reads_are_left_out(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], opset: int, tmp_path: Path
) -> None:
    assert load(saved(tmp_path, graph_of(nodes, [2, 3, 4, 4], constants, opset=opset))).notes == ()


@pytest.mark.parametrize(("nodes", "constants", "opset"), MASKS)
def test_further_results_that_are_used_are_refused(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], opset: int, tmp_path: Path
) -> None:
    model = graph_of(nodes, [2, 3, 4, 4], constants, opset=opset)
    name = nodes[0].output[1]
    inferred = onnx.shape_inference.infer_shapes(model)
    model.graph.output.append(next(value for value in inferred.graph.value_info if value.name == name))
    with pytest.raises(LoadError, match=f"its result {name} is used, and only its first"):
        load(saved(tmp_path, model))


def test_statistics_made_in_training_are_refused(tmp_path: Path) -> None:
    constants = {name: np.abs(numbers(3)) for name in "sbmv"}
    model = graph_of([node("BatchNormalization", "x s b m v", "y m2 v2 sm sv")], [2, 3, 4, 4], constants, opset=9)
    with pytest.raises(LoadError, match="training mode"):
        load(saved(tmp_path, model))


def test_a_result_without_a_name_is_no_input_that_is_left_out(tmp_path: Path) -> None:
    nodes = [node("Dropout", "x", "h m"), node("Clip", "h - high", "y")]
    nodes[0].output[1] = ""
    assert load(saved(tmp_path, graph_of(nodes, [2, 4], {"high": np.float32(0)}, opset=12))).notes == ()
    steps = [
        Step(Call("Split", "pieces", {"axis": 1}, 18, 2), ("x",), ("h", ""), {}),
        Step(Call("Clip", "limit", {}, 18, 1), ("h", "", "high"), ("y",), {}),
    ]
    module = OnnxModule(steps, ["x"], ["y"], {"high": np.asarray(np.float32(0))})
    assert module(torch.tensor([[-1.0, 1.0, 5.0, 5.0]])).tolist() == [[-1.0, 0.0]]
