"""Shapes that an ONNX file computes and numbers that PyTorch wants plain: known when the module is captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx_graphs import captured_open, graph_of, node, numbers, whole
from torch import Tensor, nn

import slimc
from slimc.loading import load

pytest.importorskip("onnxruntime")

INT32 = np.int32
ZERO, ONE = (helper.make_tensor("value", TensorProto.INT64, [1], [number]) for number in (0, 1))
COMPUTED: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "by way of int32": (
        [
            node("Shape", "x", "s"),
            node("Cast", "s", "s32", to=TensorProto.INT32),
            node("Slice", "s32 begin end begin", "n"),
            node("Concat", "n rest", "c", axis=0),
            node("Cast", "c", "target", to=TensorProto.INT64),
            node("Reshape", "x target", "y"),
        ],
        {"begin": np.array([0], INT32), "end": np.array([1], INT32), "rest": np.array([-1], INT32)},
    ),
    "slice with int32": (
        [node("Slice", "x start end axis", "y")],
        {"start": np.array([1], INT32), "end": np.array([3], INT32), "axis": np.array([2], INT32)},
    ),
    "in pieces": (
        [
            node("Shape", "x", "s"),
            node("Split", "s", "n c d", axis=0, num_outputs=3),
            node("Concat", "n rest", "target", axis=0),
            node("Reshape", "x target", "y"),
        ],
        {"rest": whole(-1)},
    ),
    "in uneven pieces": (
        [
            node("Shape", "x", "s"),
            node("Split", "s lengths", "nc d", axis=0),
            node("ReduceProd", "nc", "rows", keepdims=1),
            node("Concat", "rows d", "target", axis=0),
            node("Reshape", "x target", "y"),
        ],
        {"lengths": whole(2, 1)},
    ),
    "product that keeps its axis": (
        [
            node("Shape", "x", "s"),
            node("Slice", "s one three", "cd"),
            node("ReduceProd", "cd", "p", keepdims=1),
            node("Concat", "rest p", "target", axis=0),
            node("Reshape", "x target", "y"),
        ],
        {"one": whole(1), "three": whole(3), "rest": whole(-1)},
    ),
    "the shape of a shape": (
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "n"),
            node("Unsqueeze", "n axis", "n1"),
            node("Concat", "n1 open", "sizes", axis=0),
            node("Shape", "sizes", "rank"),
            node("ConstantOfShape", "rank", "ones", value=ONE),
            node("Mul", "ones minus", "marks"),
            node("Equal", "sizes marks", "is_open"),
            node("Where", "is_open ones sizes", "target"),
            node("Expand", "token target", "tokens"),
            node("Concat", "tokens x", "y", axis=1),
        ],
        {"zero": np.int64(0), "axis": whole(0), "open": whole(-1, -1), "minus": np.int64(-1),
         "token": numbers(1, 1, 4)},
    ),
    "padding in a table": (
        [
            node("ConstantOfShape", "two", "none", value=ZERO),
            node("Concat", "widths none", "all", axis=0),
            node("Reshape", "all table", "pairs"),
            node("Slice", "pairs last first axis last", "turned"),
            node("Transpose", "turned", "t", perm=[1, 0]),
            node("Reshape", "t last", "flat"),
            node("Cast", "flat", "pads", to=TensorProto.INT64),
            node("Pad", "x pads", "y"),
        ],
        {"two": whole(2), "widths": whole(1, 2, 0, 1), "table": whole(-1, 2), "last": whole(-1),
         "first": whole(-(2**63) + 1), "axis": whole(0)},
    ),
    "a constant to pad with": ([node("Pad", "x pads number", "y")],
                               {"pads": whole(0, 0, 1, 0, 0, 2), "number": np.float32(0.5)}),
    "a range of floats": ([node("Range", "a b step", "r"), node("Add", "x r", "y")],
                          {"a": np.float32(0), "b": np.float32(4), "step": np.float32(1)}),
    "limits": ([node("Clip", "x low high", "y")], {"low": np.float32(-0.5), "high": np.float32(0.5)}),
    "a limit that never binds": ([node("Clip", "x low high", "y")], {"low": np.float32(0), "high": np.float32("inf")}),
    "an upper limit alone": ([node("Clip", "x - high", "y")], {"high": np.float32(0.5)}),
}  # fmt: skip


@pytest.mark.parametrize("title", COMPUTED)
def test_what_is_known_before_the_data_is_captured(title: str, tmp_path: Path) -> None:
    nodes, constants = COMPUTED[title]
    onnx.save(graph_of(nodes, ["batch", 3, 4], constants), tmp_path / "net.onnx")
    loaded = captured_open(tmp_path / "net.onnx", 3, 4)
    assert loaded.batch is None
    assert loaded.notes == ()


def test_a_number_may_be_a_literal_here_and_a_tensor_there(tmp_path: Path) -> None:
    nodes = [node("Pad", "x pads number", "h"), node("Add", "h number", "h2"), node("Mul", "h2 scales", "h3"),
             node("Resize", "h3 - scales", "y", mode="nearest")]  # fmt: skip
    constants = {
        "pads": whole(0, 0, 0, 0, 0, 0, 0, 1),
        "number": np.float32(0.5),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    onnx.save(graph_of(nodes, ["batch", 3, 4, 3], constants), tmp_path / "net.onnx")
    captured_open(tmp_path / "net.onnx", 3, 4, 3)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.pad(self.a(x), (0, 1, 0, 1)), scale_factor=2)
        result: Tensor = self.b(x)
        return result


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        result: Tensor = self.b(torch.relu(self.a(x)))
        return result


@pytest.mark.parametrize(("model", "shape", "opset"), [
    (Padded(), (3, 8, 8), 10), (Padded(), (3, 8, 8), 13), (Padded(), (3, 8, 8), 18), (Tokens(), (3, 8), 14),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_files_of_the_older_exporter_are_compressed(
    model: nn.Module, shape: tuple[int, ...], opset: int, tmp_path: Path
) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(2, *shape)
    torch.onnx.export(
        model.eval(), (x,), str(path), dynamo=False, opset_version=opset, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
    )  # fmt: skip
    loaded = captured_open(path, *shape)
    assert sum(p.numel() for p in loaded.model.parameters()) == sum(p.numel() for p in model.parameters())
    slim = slimc.compress(loaded.model, x, flops=0.6, round_to=1, recover="none")
    assert slim.analysis.captured.batch_note is None
    assert slim.report.macs.after < slim.report.macs.before


def test_a_padding_that_the_newer_exporter_writes_is_captured(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(2, 3, 8, 8)
    slimc.compress(Padded().eval(), x, flops=0.9, round_to=1, recover="none").export_onnx(path)
    assert "Pad" in {entry.op_type for entry in onnx.load(path).graph.node}
    slim = slimc.compress(load(str(path)).model, x, flops=0.6, round_to=1, recover="none")
    assert slim.report.macs.after < slim.report.macs.before
