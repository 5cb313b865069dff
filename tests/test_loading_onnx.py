"""ONNX files as models: every operator against ONNX Runtime, whole networks, and files that are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import both, captured_open, graph_of, node, numbers, whole
from torch import Tensor, nn

import slimc
from slimc.errors import LoadError
from slimc.loading import load
from slimc.loading.onnx_module import OPERATORS

pytest.importorskip("onnxruntime")

X = numbers(2, 8, 6, 6)
ONE: dict[str, tuple[tuple[Any, ...], dict[str, Any], int]] = {
    "Conv": ((numbers(4, 2, 3, 3), numbers(4)), {"pads": [1, 0, 2, 1], "group": 4, "strides": [2, 1]}, 18),
    "Conv same": ((numbers(4, 8, 3, 3),), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 18),
    "ConvTranspose": ((numbers(8, 3, 3, 3),), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, 18),
    "MatMul": ((numbers(6, 5),), {}, 18),
    "BatchNormalization": ((numbers(8), numbers(8), numbers(8), np.abs(numbers(8))), {}, 15),
    "InstanceNormalization": ((numbers(8), numbers(8)), {}, 18),
    "LayerNormalization": ((numbers(6), numbers(6)), {"axis": -1}, 18),
    "GroupNormalization": ((numbers(8), numbers(8)), {"num_groups": 4}, 21),
    "LpNormalization": ((), {"axis": 1}, 18),
    "LRN": ((), {"size": 3}, 18),
    "MaxPool": ((), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1, "strides": [2, 2]}, 18),
    "MaxPool uneven": ((), {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1], "strides": [2, 2]}, 18),
    "AveragePool": ((), {"kernel_shape": [2, 2], "pads": [0, 1, 1, 0], "count_include_pad": 1}, 18),
    "GlobalAveragePool": ((), {}, 18),
    "GlobalMaxPool": ((), {}, 18),
    **{name: ((), {}, 20) for name in ("Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Abs", "Sign", "Floor", "Ceil", "Sin",
                                       "Cos", "Softsign", "Softplus", "Mish", "HardSwish", "Selu", "HardSigmoid", "Neg",
                                       "Gelu", "Identity", "Reciprocal", "Round", "Shape", "Size", "Flatten")},
    "LeakyRelu": ((), {"alpha": 0.3}, 18),
    "Elu": ((), {"alpha": 0.3}, 18),
    "Celu": ((), {"alpha": 0.3}, 18),
    "ThresholdedRelu": ((), {"alpha": 0.3}, 18),
    "Gelu tanh": ((), {"approximate": "tanh"}, 20),
    "PRelu": ((numbers(8, 1, 1),), {}, 18),
    "PRelu last": ((numbers(6),), {}, 18),
    "Clip": ((np.float32(-0.5), np.float32(0.5)), {}, 18),
    "Clip old": ((), {"min": -0.5, "max": 0.5}, 9),
    "Softmax": ((), {"axis": 1}, 18),
    "Softmax old": ((), {"axis": 1}, 11),
    "LogSoftmax": ((), {}, 18),
    "Add": ((numbers(8, 1, 1),), {}, 18),
    "Sub": ((numbers(6),), {}, 18),
    "Mul": ((np.float32(3),), {}, 18),
    "Div": ((np.abs(numbers(6)) + 1,), {}, 18),
    "Pow": ((np.float32(2),), {}, 18),
    "Max": ((numbers(6), numbers(8, 1, 1)), {}, 18),
    "Min": ((numbers(6),), {}, 18),
    "Sum": ((numbers(6), numbers(6, 1)), {}, 18),
    "Mean": ((numbers(6), numbers(6)), {}, 18),
    "Greater": ((numbers(6),), {}, 18),
    "Mod": ((np.abs(numbers(6)) + 1,), {"fmod": 1}, 18),
    **{f"{name} old": ((), {"axes": [1, -1], "keepdims": 0}, 13) for name in (
        "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")},
    "ReduceMean": ((whole(2, 3),), {"keepdims": 1}, 18),
    "ReduceSum": ((whole(1),), {}, 18),
    "ReduceMean all": ((), {"keepdims": 0}, 18),
    "ReduceProd": ((whole(1),), {}, 18),
    "Reshape": ((whole(0, 2, 4, -1),), {}, 18),
    "Reshape exactly": ((whole(2, -1, 6),), {"allowzero": 1}, 18),
    "Flatten 2": ((), {"axis": 2}, 18),
    "Flatten 0": ((), {"axis": 0}, 18),
    "Unsqueeze": ((whole(1, -1),), {}, 18),
    "Transpose": ((), {"perm": [0, 2, 3, 1]}, 18),
    "Transpose all": ((), {}, 18),
    "Expand": ((whole(3, 1, 1, 6, 1),), {}, 18),
    "Tile": ((whole(1, 2, 1, 3),), {}, 18),
    "Concat": ((numbers(2, 3, 6, 6),), {"axis": 1}, 18),
    "Slice": ((whole(1, -3), whole(2**62, -1), whole(1, 3), whole(2, 1)), {}, 18),
    "Slice old": ((), {"starts": [1], "ends": [5], "axes": [1]}, 9),
    "Slice backwards": ((whole(-1), whole(-(2**62)), whole(2), whole(-1)), {}, 18),
    "Pad": ((whole(0, 1, 2, 0, 0, 0, 1, 3), np.float32(0.5)), {}, 18),
    "Pad edge": ((whole(0, 0, 1, 2, 0, 0, 2, 1),), {"mode": "edge"}, 18),
    "Pad edge of the last axis": ((whole(0, 0, 0, 1, 0, 0, 0, 2),), {"mode": "edge"}, 18),
    "Pad reflect": ((whole(0, 0, 1, 2, 0, 0, 2, 1),), {"mode": "reflect"}, 18),
    "DepthToSpace": ((), {"blocksize": 2}, 18),
    "DepthToSpace CRD": ((), {"blocksize": 2, "mode": "CRD"}, 18),
    "SpaceToDepth": ((), {"blocksize": 2}, 18),
    "Resize": ((np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)),
               {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, 18),
    "Resize linear": ((np.zeros(0, np.float32), np.zeros(0, np.float32), whole(2, 8, 9, 12)), {"mode": "linear"}, 18),
    "Resize cubic": ((np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)), {"mode": "cubic"}, 18),
    "Resize corners": ((np.zeros(0, np.float32), np.zeros(0, np.float32), whole(2, 8, 9, 12)),
                       {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, 18),
    "Upsample": ((np.array([1, 1, 2, 2], np.float32),), {"mode": "nearest"}, 9),
    "Gather": ((whole(3, 1),), {"axis": 1}, 18),
    "Gather one": ((np.int64(-2),), {"axis": 1}, 18),
    "Gather from the end": ((whole(-1, -3),), {"axis": 1}, 18),
    "Gather run": ((whole(2, 3, 4),), {"axis": 1}, 18),
    "Gather grid": ((np.array([[0, 5], [2, 1]]),), {"axis": 2}, 18),
    "GatherElements": ((np.zeros((2, 8, 6, 6), np.int64) - 1,), {"axis": 1}, 18),
    "GatherND": ((np.array([[0, 7], [1, 2]]),), {}, 18),
    "ScatterND": ((np.array([[0, 7], [1, 2]]), numbers(2, 6, 6)), {}, 18),
    "ScatterElements": ((np.zeros((2, 8, 6, 6), np.int64), numbers(2, 8, 6, 6)), {"axis": 1}, 18),
    "CumSum": ((np.int64(1),), {}, 18),
    "ArgMax": ((), {"axis": 1, "keepdims": 0}, 18),
    "Trilu": ((), {"upper": 0}, 18),
    "Einsum": ((numbers(6, 5),), {"equation": "bchw,wk->bchk"}, 18),
    "Cast": ((), {"to": TensorProto.INT64}, 18),
    "CastLike": ((np.float64(0),), {}, 18),
    "Dropout": ((), {}, 13),
}  # fmt: skip


@pytest.mark.parametrize("title", ONE)
def test_an_operator_means_what_onnx_runtime_computes(title: str, tmp_path: Path) -> None:
    constants, attributes, opset = ONE[title]
    named = {f"c{i}": np.asarray(value) for i, value in enumerate(constants)}
    node = helper.make_node(title.split()[0], ["x", *named], ["y"], **attributes)
    path = tmp_path / "net.onnx"
    onnx.save(graph_of([node], X.shape, named, opset=opset), path)
    got, wanted = both(path, X)
    assert tuple(got.shape) == wanted.shape
    np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-5, atol=2e-5)
    assert wanted.size == 1 or np.unique(wanted).size > 1 or title == "Shape"


def test_gemm_with_factors_and_pieces(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], alpha=0.5, beta=2.0, transB=1),
        helper.make_node("Split", ["h"], ["p", "q"], axis=1, num_outputs=2),
        helper.make_node("TopK", ["q", "k"], ["v", "i"], axis=1),
        helper.make_node("Concat", ["p", "v"], ["y"], axis=1),
    ]
    path = tmp_path / "net.onnx"
    onnx.save(graph_of(nodes, [2, 8], {"w": numbers(6, 8), "b": numbers(1, 6), "k": whole(2)}), path)
    got, wanted = both(path, numbers(2, 8))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_map_of_one_element_is_normalised(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(graph_of([node("InstanceNormalization", "x s b", "y")], [1, 4, 1, 1], {"s": numbers(4), "b": numbers(4)}),
              path)  # fmt: skip
    got, wanted = both(path, numbers(1, 4, 1, 1))
    # What rounding leaves of a number less its mean is divided by the root of 1e-5.
    np.testing.assert_allclose(got.numpy(), wanted, atol=4 * np.finfo(np.float32).eps / 1e-5**0.5)


def test_how_many_of_the_largest_is_an_attribute_in_old_files(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(graph_of([node("TopK", "x", "y i", k=2, axis=1)], [2, 5], {}, opset=9), path)
    got, wanted = both(path, numbers(2, 5))
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_rows_of_a_table_are_counted_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    nodes = [node("Gather", "table places", "rows"), node("Add", "x rows", "y")]
    constants = {"table": numbers(5, 4), "places": np.array([[0, -1, 2], [-5, 4, -2]])}
    onnx.save(graph_of(nodes, ["batch", 2, 3, 4], constants), path)
    loaded = captured_open(path, 2, 3, 4)
    assert list(dict(loaded.model.named_parameters())) == ["constants.table"]


def test_shapes_that_the_file_computes_keep_the_batch_open(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], kernel_shape=[3, 3]),
        helper.make_node("Shape", ["h"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["h", "target"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v"], ["y"], transB=1),
    ]
    constants = {
        "w": numbers(6, 3, 3, 3),
        "v": numbers(4, 96),
        "zero": np.int64(0),
        "axes": whole(0),
        "rest": whole(-1),
    }
    path = tmp_path / "net.onnx"
    onnx.save(graph_of(nodes, ["batch", 3, 6, 6], {k: np.asarray(v) for k, v in constants.items()}), path)
    loaded = load(str(path))
    assert loaded.input_shape == (3, 6, 6)
    assert loaded.batch is None
    slim = slimc.compress(loaded.model, torch.randn(2, 3, 6, 6), flops=0.5, round_to=1)
    assert slim.analysis.captured.batch_note is None
    assert [group.width for group in slim.analysis.groups] == [6]
    assert slim.report.macs.after < slim.report.macs.before


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.bn(self.a(x))))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def exported(folder: Path, **options: Any) -> Path:
    """A file that slimc itself has written."""
    slim = slimc.compress(Network().eval(), torch.randn(2, 3, 8, 8), params=0.9, round_to=1)
    slim.export_onnx(folder / "model.onnx")
    return folder / "model.onnx"


def test_our_own_file_is_read_compressed_and_written_again(tmp_path: Path) -> None:
    loaded = load(str(exported(tmp_path)))
    assert {"a.weight", "fc.weight"} <= dict(loaded.model.named_parameters()).keys()
    slim = slimc.compress(loaded.model, torch.randn(2, 3, 8, 8), flops=0.6, round_to=1)
    assert slim.export_onnx(tmp_path / "smaller.onnx").max_relative_error < 1e-5
    assert slim.report.verification is not None
    assert (slim.report.verification.moved or 0) > 1e-3


def test_nobody_misses_the_class_of_a_file(tmp_path: Path) -> None:
    depthwise = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(2, 3, 8, 8)
    slimc.compress(depthwise.eval(), x, flops=0.9, round_to=1, recover="none").save(tmp_path / "slim")
    for name in ("model.onnx", "model.pt2"):
        slim = slimc.compress(load(str(tmp_path / "slim" / name)).model, x, flops=0.6, round_to=1, recover="none")
        assert slim.module is slim.graph  # the number of groups is written in the file
        assert slim.report.warnings == ()


def test_a_fixed_batch_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    nodes = [helper.make_node("Reshape", ["x", "s"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    onnx.save(graph_of(nodes, [1, 3, 4], {"s": whole(1, 12)}), path)
    assert load(str(path)).batch == 1


# -- refused ---------------------------------------------------------------------------------------------


def with_external_data(folder: Path, location: str = "net.data") -> Path:
    path = folder / "net.onnx"
    model = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [2, 64], {"w": numbers(64, 64)})
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    if location != "net.data":
        model = onnx.load(path, load_external_data=False)
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
        path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    got, wanted = both(with_external_data(tmp_path), numbers(2, 64))
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "a/../../secret.bin", ".", ""])
def test_weights_outside_of_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64 * 64 * 4))
    with pytest.raises(LoadError, match="outside of the file's folder"):
        load(str(with_external_data(inside, location)))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = with_external_data(inside)
    (inside / "net.data").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", inside / "net.data")
    with pytest.raises(LoadError, match=r"net\.data, which is a link\. Copy the file"):
        load(str(path))


def test_missing_and_short_weights_are_named(tmp_path: Path) -> None:
    path = with_external_data(tmp_path)
    (tmp_path / "net.data").write_bytes(b"short")
    with pytest.raises(LoadError, match=r"net\.data is too short to hold w"):
        load(str(path))
    (tmp_path / "net.data").unlink()
    with pytest.raises(LoadError, match=r"w is stored in net\.data, which is not there"):
        load(str(path))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:100] + bytes(50) + content[150:], b"\x08\x08garbage"):
        path.write_bytes(damaged)
        with pytest.raises(LoadError, match=r"(E|e)xport (it )?again|opset"):
            load(str(path))


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    nodes = [helper.make_node("NonZero", ["x"], ["h"]), helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT)]
    onnx.save(graph_of(nodes, [2, 8], {}), path)
    with pytest.raises(LoadError, match="cannot be read from ONNX: NonZero"):
        load(str(path))


def test_what_an_operator_cannot_express_is_said(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    node = helper.make_node("CumSum", ["x", "axis"], ["y"], name="sums", reverse=1)
    onnx.save(graph_of([node], [2, 8], {"axis": np.asarray(np.int64(1))}), path)
    with pytest.raises(LoadError, match=r"CumSum \(sums\): exclusive or reversed"):
        load(str(path))


def test_a_quantised_model_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    zero = np.asarray(np.uint8(0))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    onnx.save(graph_of(nodes, [2, 8], {"s": np.asarray(np.float32(0.1)), "z": zero}), path)
    with pytest.raises(LoadError, match="quantised"):
        load(str(path))


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(graph_of([helper.make_node("Relu", ["x"], ["y"])], [2, 8], {}, opset=6), path)
    with pytest.raises(LoadError, match="opset 6"):
        load(str(path))


def test_most_operators_are_compared() -> None:
    compared = {title.split()[0] for title in ONE}
    assert len(compared & OPERATORS.keys()) > 80


def test_an_output_that_is_a_constant_is_read(tmp_path: Path) -> None:
    anchors = numbers(3, 4)
    model = graph_of([node("Relu", "x", "y")], ["batch", 4], {})
    model.graph.initializer.append(onnx.numpy_helper.from_array(anchors, "anchors"))
    model.graph.output.append(helper.make_tensor_value_info("anchors", onnx.TensorProto.FLOAT, [3, 4]))
    onnx.save(model, tmp_path / "net.onnx")
    module = load(str(tmp_path / "net.onnx")).model
    np.testing.assert_array_equal(module(torch.zeros(2, 4))[1].detach().numpy(), anchors)


def test_whole_numbers_are_divided_towards_zero(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s one", "w"), node("Neg", "w", "n"), node("Div", "n two", "q"),
        node("Slice", "x zero q axis", "y"),
    ]  # fmt: skip
    constants = {"one": whole(1), "two": whole(2), "zero": whole(0), "axis": whole(1)}
    path = tmp_path / "net.onnx"
    onnx.save(graph_of(nodes, ["batch", 7], constants), path)
    got, wanted = both(path, numbers(2, 7))
    assert got.shape == wanted.shape == (2, 4)


def test_names_of_inputs_and_outputs_stay_those_of_the_file(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "image w", "h"), node("Relu", "h", "r"), node("MatMul", "r v", "relu"),
        node("ArgMax", "relu", "class", axis=1, keepdims=0),
    ]  # fmt: skip
    model = graph_of([node("Identity", "x", "relu")], ["batch", 8], {"w": numbers(8, 16), "v": numbers(16, 4)}, "relu")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.input[0].name = "image"
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("relu", onnx.TensorProto.FLOAT, ["batch", 4]))
    model.graph.output.append(helper.make_tensor_value_info("class", onnx.TensorProto.INT64, ["batch"]))
    onnx.save(model, tmp_path / "net.onnx")
    slim = slimc.compress(load(str(tmp_path / "net.onnx")).model, torch.randn(4, 8), flops=0.5, round_to=1)
    slim.export_onnx(tmp_path / "slim.onnx")
    graph = onnx.load(tmp_path / "slim.onnx").graph
    assert [value.name for value in graph.input] == ["image"]
    assert [value.name for value in graph.output] == ["relu", "class"]
