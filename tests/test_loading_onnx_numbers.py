"""The numbers of ONNX files: half and double precision, masks, odd types and names."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import captured_open, graph_of, node, numbers, wanted
from torch import nn

import slimc
from slimc.errors import LoadError
from slimc.loading import load

pytest.importorskip("onnxruntime")

HALF, FLOAT, DOUBLE = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE


def half_network(kind: int, batch: Any = "batch") -> onnx.ModelProto:
    """Two layers between casts, as converters with keep_io_types write them."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [
        node("Cast", "x", "h", to=kind),
        node("MatMul", "h w", "a"),
        node("Shape", "a", "s"),
        node("ConstantOfShape", "s", "zeros", value=helper.make_tensor("value", kind, [1], [0])),
        node("Max", "a zeros", "r"),
        node("MatMul", "r w2", "b"),
        node("Cast", "b", "y", to=FLOAT),
    ]
    constants = {"w": numbers(16, 8).astype(dtype), "w2": numbers(8, 4).astype(dtype)}
    return graph_of(nodes, [batch, 16], constants)


@pytest.mark.parametrize(("kind", "word"), [(HALF, "half"), (DOUBLE, "double")])
def test_a_file_of_another_precision_runs_in_float32(kind: int, word: str, tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", numbers(3, 16)
    onnx.save(half_network(kind), path)
    loaded = load(str(path))
    assert loaded.notes == (f"converted 2 {word}-precision tensors to float32",)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    with torch.no_grad():
        got = loaded.model(torch.from_numpy(x))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), wanted(path, x), rtol=0, atol=0.05 if kind == HALF else 1e-5)
    assert np.abs(wanted(path, x)).max() > 1


def test_an_input_of_half_precision_becomes_one_of_float32(tmp_path: Path) -> None:
    weights = numbers(16, 8).astype(np.float16)
    onnx.save(graph_of([node("MatMul", "x w", "y")], ["batch", 16], {"w": weights}, kind=HALF), tmp_path / "net.onnx")
    loaded = load(str(tmp_path / "net.onnx"))
    assert loaded.input_shape == (16,)
    assert loaded.notes == ("converted 1 half-precision tensors to float32",)
    assert loaded.model(torch.zeros(2, 16)).dtype == torch.float32


def test_double_beside_single_precision_stays(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Cast", "h", "d", to=DOUBLE), node("Mul", "d v", "y")]
    onnx.save(
        graph_of(nodes, ["batch", 4], {"w": numbers(4, 3), "v": numbers(3).astype(np.float64)}), tmp_path / "net.onnx"
    )
    loaded = load(str(tmp_path / "net.onnx"))
    assert loaded.notes == ()
    assert loaded.model(torch.zeros(2, 4)).dtype == torch.float64


def test_weights_in_bfloat16_are_converted(tmp_path: Path) -> None:
    weights = helper.make_tensor("w", TensorProto.BFLOAT16, [4], [1, 2, 3, 4])
    onnx.save(graph_of([node("Cast", "w", "v", to=FLOAT), node("Mul", "x v", "y")], [2, 4], {"w": weights}),
              tmp_path / "net.onnx")  # fmt: skip
    loaded = load(str(tmp_path / "net.onnx"))
    assert loaded.notes == ("converted 1 half-precision tensors to float32",)
    assert loaded.model(torch.ones(2, 4))[0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.INT4])
def test_types_that_torch_lacks_are_named(kind: int, tmp_path: Path) -> None:
    weights = helper.make_tensor("scale", kind, [4], [1, 2, 3, 4])
    onnx.save(graph_of([node("Cast", "scale", "v", to=FLOAT), node("Mul", "x v", "y")], [2, 4], {"scale": weights},
                       opset=21), tmp_path / "net.onnx")  # fmt: skip
    with pytest.raises(LoadError, match=f"constant scale is of type {TensorProto.DataType.Name(kind)}"):
        load(str(tmp_path / "net.onnx"))


def test_constants_that_nobody_reads_do_no_harm(tmp_path: Path) -> None:
    unused = {
        "text": TensorProto(name="text", data_type=TensorProto.STRING, dims=[1], string_data=[b"hello"]),
        "tiny": helper.make_tensor("tiny", TensorProto.FLOAT8E4M3FN, [1], [1.0]),
        "nan": np.array([np.nan, 1], np.float32),
    }
    onnx.save(graph_of([node("Add", "x b", "y")], [2, 4], {"b": numbers(4), **unused}), tmp_path / "net.onnx")
    assert list(dict(load(str(tmp_path / "net.onnx")).model.named_parameters())) == ["constants.b"]


def test_weights_beside_the_file_that_are_fewer_than_claimed_are_named(tmp_path: Path) -> None:
    weights = TensorProto(name="w", data_type=FLOAT, dims=[64, 64], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value="net.data")
    (tmp_path / "net.data").write_bytes(bytes(100))
    onnx.save(graph_of([node("MatMul", "x w", "y")], [2, 64], {"w": weights}), tmp_path / "net.onnx")
    with pytest.raises(LoadError, match=r"net\.onnx: w is damaged"):
        load(str(tmp_path / "net.onnx"))


# -- masks -----------------------------------------------------------------------------------------------


def test_a_mask_of_minus_infinity_is_no_weight(tmp_path: Path) -> None:
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    nodes = [node("MatMul", "x w", "h"), node("Add", "h mask", "m"), node("Softmax", "m", "y", axis=-1)]
    onnx.save(graph_of(nodes, ["batch", 4, 6], {"mask": mask, "w": numbers(6, 4)}), tmp_path / "net.onnx")
    loaded = captured_open(tmp_path / "net.onnx", 4, 6)
    assert list(dict(loaded.model.named_parameters())) == ["constants.w"]
    assert list(dict(loaded.model.named_buffers())) == ["constants.mask"]


@pytest.mark.parametrize("number", [-np.inf, np.inf])
def test_a_single_infinite_number_is_no_damage(number: float, tmp_path: Path) -> None:
    nodes = [node("Greater", "x zero", "c"), node("Where", "c x number", "h"), node("Softmax", "h", "y")]
    constants = {"zero": np.float32(-5), "number": np.float32(number)}
    onnx.save(graph_of(nodes, [2, 64], constants), tmp_path / "net.onnx")
    assert load(str(tmp_path / "net.onnx")).notes == ()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_still_refused(number: float, tmp_path: Path) -> None:
    weights = numbers(4, 3)
    weights[1, 2] = number
    onnx.save(graph_of([node("MatMul", "x w", "y")], [2, 4], {"w": weights}), tmp_path / "net.onnx")
    with pytest.raises(LoadError, match=r"constants\.w has .*training diverged"):
        load(str(tmp_path / "net.onnx"))


# -- names -----------------------------------------------------------------------------------------------


def test_names_that_are_words_of_python_are_captured(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x global.weight", "h"), node("Add", "h lambda", "y")]
    constants = {"global.weight": numbers(4, 3), "lambda": numbers(3)}
    onnx.save(graph_of(nodes, ["batch", 4], constants), tmp_path / "net.onnx")
    loaded = captured_open(tmp_path / "net.onnx", 4)
    assert list(dict(loaded.model.named_parameters())) == ["global_.weight", "constants.lambda_"]


def chain(*widths: int) -> nn.Sequential:
    """Layers of the given widths whose biases are zero, as they are before training."""
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    for layer in layers:
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1]).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_simplified", [False, True])
def test_equal_vectors_that_are_stored_once_tie_no_layers(is_simplified: bool, tmp_path: Path) -> None:
    model, x, path = chain(4, 8, 8, 8, 8), torch.randn(2, 4), tmp_path / "net.onnx"
    torch.onnx.export(model, (x,), str(path), dynamo=False, input_names=["x"], output_names=["y"])
    stored = onnx.load(path)
    assert sum(list(entry.dims) == [8] for entry in stored.graph.initializer) == 1
    if is_simplified:  # as simplifiers leave it: no aliases between the vector and its readers
        aliases = {entry.output[0]: entry.input[0] for entry in stored.graph.node if entry.op_type == "Identity"}
        rest = [entry for entry in stored.graph.node if entry.op_type != "Identity"]
        for entry in rest:
            entry.input[:] = [aliases.get(name, name) for name in entry.input]
        del stored.graph.node[:]
        stored.graph.node.extend(rest)
        onnx.save(stored, path)
    loaded = load(str(path))
    assert sum(p.numel() for p in loaded.model.parameters()) == sum(p.numel() for p in model.parameters())
    np.testing.assert_allclose(loaded.model(x).detach().numpy(), wanted(path, x.numpy()), rtol=1e-5, atol=1e-6)
    slim = slimc.compress(loaded.model, x, flops=0.5, round_to=1, recover="none")
    assert [group.width for group in slim.analysis.groups] == [8, 8, 8]


def test_steps_of_one_weight_keep_one_vector_and_an_output_stays(tmp_path: Path) -> None:
    bias = numbers(8)
    nodes = [
        node("Gemm", "x w b", "h"), node("Relu", "h", "r"), node("Gemm", "r w b", "s"),
        node("Identity", "b", "c"), node("Gemm", "s v c", "t"), node("Add", "t b", "y"),
    ]  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(graph_of(nodes, ["batch", 8], {"w": numbers(8, 8), "v": numbers(8, 8), "b": bias}), path)
    loaded = captured_open(path, 8)
    vectors = [p for p in loaded.model.parameters() if p.ndim == 1]
    assert len(vectors) == 3  # of the two steps of w, of that of v, of the sum
    assert all(np.array_equal(vector.detach().numpy(), bias) for vector in vectors)
