from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxscript import ir

from slimc.exporters.formats.streamed import save


def _model(*weights: np.ndarray) -> ir.Model:
    """Adds each weight to the input in turn."""
    x = value = ir.val("x", ir.DataType.FLOAT, [128, 256])
    nodes, initializers = [], []
    for number, weight in enumerate(weights):
        tensor = ir.tensor(weight, name=f"w{number}")
        initializers.append(ir.val(f"w{number}", const_value=tensor))
        nodes.append(ir.node("Add", [value, initializers[-1]]))
        value = nodes[-1].outputs[0]
        value.name = f"y{number}"
    graph = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="sums")
    return ir.Model(graph, ir_version=10, producer_name="test")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_the_file_is_what_a_whole_serialisation_reads_as(tmp_path: Path, dtype: type) -> None:
    large: np.ndarray = np.arange(128 * 256, dtype=dtype).reshape(128, 256)
    model = _model(large, np.ones(256, dtype), -large)
    save(model, tmp_path / "streamed.onnx")
    ir.save(model, tmp_path / "whole.onnx")
    ours, theirs = (onnx.load(tmp_path / name) for name in ("streamed.onnx", "whole.onnx"))
    assert [t.name for t in ours.graph.initializer] == ["w1", "w0", "w2"]  # large ones come last
    for proto in (ours, theirs):
        kept = sorted(proto.graph.initializer, key=lambda tensor: tensor.name)
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
    assert ours == theirs
    assert (onnx.numpy_helper.to_array(ours.graph.initializer[0]) == large).all()


def test_weights_of_torch_are_written_from_where_they_are_and_stay_there(tmp_path: Path) -> None:
    weight = torch.nn.Linear(256, 300)
    program = torch.onnx.export(weight.eval(), (torch.randn(2, 256),), dynamo=True, verbose=False)
    assert program is not None
    before = {name: value.const_value for name, value in program.model.graph.initializers.items()}
    save(program.model, tmp_path / "model.onnx")
    assert all(value.const_value is before[name] for name, value in program.model.graph.initializers.items())
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    (found,) = [t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if len(t.dims) == 2]
    assert (onnx.numpy_helper.to_array(found) == weight.weight.detach().numpy()).all()
