from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from slimc.exporters.formats import pt2


def example() -> tuple[nn.Module, ExportedProgram, torch.Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    return model, torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},), strict=False), x


def test_a_program_comes_back_and_computes_the_same_at_another_batch_size(tmp_path: Path) -> None:
    model, program, _ = example()
    written = pt2.export(program, tmp_path / "m.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected, got = model(x), torch.export.load(written.path).module()(x)
    assert expected.std() > 0.01
    assert torch.equal(got, expected)


def test_the_file_carries_neither_paths_nor_the_users_data(tmp_path: Path) -> None:
    _, program, x = example()
    before = [node.meta.get("stack_trace") for node in program.graph.nodes]
    assert any(str(Path(torch.__file__).parent) in str(trace) for trace in before)
    written = pt2.export(program, tmp_path / "m.pt2")
    with zipfile.ZipFile(written.path) as file:
        content = b"".join(file.read(name) for name in file.namelist())
    assert str(Path(torch.__file__).parent).encode() not in content
    assert x.numpy().tobytes() not in content
    assert [node.meta.get("stack_trace") for node in program.graph.nodes] == before
    assert program.example_inputs is not None
    assert torch.equal(program.example_inputs[0][0], x)
