from __future__ import annotations

import logging
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from slimc.errors import OutputError, UsageError
from slimc.exporters.formats import onnx as onnx_format


class Net(nn.Module):
    """Two convolutions with batch normalisation whose statistics are far from the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = randomised(nn.BatchNorm2d(8))
        self.conv2 = nn.Conv2d(8, 4, 1)
        self.bn2 = randomised(nn.BatchNorm2d(4))

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(image)).relu())).mean((2, 3))
        return out


def randomised(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return norm


def program(model: nn.Module, *inputs: Tensor, dynamic: object = None) -> ExportedProgram:
    return torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic, strict=False)


def batch_program() -> tuple[nn.Module, ExportedProgram]:
    model = Net()
    return model, program(model, torch.randn(2, 3, 8, 8), dynamic=({0: Dim("batch")},))


def test_a_net_becomes_one_file_that_computes_the_same_at_any_batch_size(tmp_path: Path) -> None:
    model, exported = batch_program()
    written = onnx_format.export(exported, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (written.dynamic_batch, written.batched, written.external_data) == (True, (True,), False)
    assert (written.input_names, written.output_names) == (("image",), ("output",))
    assert written.bytes == written.path.stat().st_size
    for batch in (1, 5):
        image = torch.randn(batch, 3, 8, 8)
        expected = model(image)
        assert expected.std() > 0.01
        torch.testing.assert_close(onnx_format.run(written.path, (image,)), [expected.detach()])


def test_no_batch_normalisation_follows_a_convolution(tmp_path: Path) -> None:
    written = onnx_format.export(batch_program()[1], tmp_path / "m.onnx")
    graph = onnx.load(written.path).graph
    assert "BatchNormalization" not in [node.op_type for node in graph.node]
    assert len(graph.node) == written.nodes
    assert written.unfolded == ()


def test_the_free_axes_have_readable_names(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return left + right, torch.cat([left, left])

    shapes = {0: Dim("n"), 1: Dim("length", min=2)}
    exported = program(Sum(), torch.randn(2, 6), torch.randn(2, 6), dynamic=(shapes, shapes))
    graph = onnx.load(onnx_format.export(exported, tmp_path / "m.onnx").path).graph
    names = [
        [dimension.dim_param for dimension in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    ]
    assert names[:3] == [["batch", "left_axis1"]] * 3
    assert names[3] == ["2*batch", "left_axis1"]


def test_a_fixed_batch_is_said_to_be_fixed(tmp_path: Path) -> None:
    written = onnx_format.export(program(Net(), torch.randn(2, 3, 8, 8)), tmp_path / "m.onnx")
    assert (written.dynamic_batch, written.batched) == (False, (False,))


def test_the_file_carries_no_path_of_this_machine(tmp_path: Path) -> None:
    exported = batch_program()[1]
    assert any(__file__ in str(node.meta.get("stack_trace")) for node in exported.graph.nodes)
    content = onnx_format.export(exported, tmp_path / "m.onnx").path.read_bytes()
    for trace in (Path(__file__).parent.as_posix(), Path(torch.__file__).parent.as_posix(), ".py"):
        assert trace.encode() not in content


def test_exporting_is_silent(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x.relu(), None  # torch's exporter logs a warning about the None

    exported = program(Optional(), torch.randn(2, 3))
    capfd.readouterr()
    caplog.clear()
    recwarn.clear()
    level = logging.getLogger("torch.onnx").level
    onnx_format.export(exported, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert len(recwarn) == 0
    assert logging.getLogger("torch.onnx").level == level


def test_outputs_are_named_by_the_keys_the_model_returns(tmp_path: Path) -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"logits": x.relu(), "hidden": [x.exp(), None, x]}

    x = torch.randn(2, 3)
    written = onnx_format.export(program(Heads(), x), tmp_path / "m.onnx")
    assert written.input_names == ("x",)
    assert written.output_names == ("logits", "hidden_0", "hidden_2")
    torch.testing.assert_close(onnx_format.run(written.path, (x,)), [x.relu(), x.exp(), x])


def test_large_weights_go_to_a_second_file(tmp_path: Path) -> None:
    model, exported = batch_program()
    written = onnx_format.export(exported, tmp_path / "m.onnx", external_data_bytes=100)
    assert written.external_data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert written.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(onnx_format.run(written.path, (image,)), [model(image).detach()])


def test_the_program_is_left_as_it_was(tmp_path: Path) -> None:
    model, exported = batch_program()
    before = str(exported)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    onnx_format.export(exported, tmp_path / "m.onnx")
    assert str(exported) == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_what_onnx_cannot_say_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.special.bessel_j0(x)
            return out

    with pytest.raises(OutputError, match="bessel_j0"):
        onnx_format.export(program(Odd(), torch.randn(2, 3)), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_running_without_onnxruntime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match="pip install onnxruntime"):
        onnx_format.run(tmp_path / "m.onnx", ())


def test_a_wrong_number_of_inputs_is_refused(tmp_path: Path) -> None:
    written = onnx_format.export(batch_program()[1], tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"takes 1 inputs \(image\), not 2"):
        onnx_format.run(written.path, (torch.randn(1, 3, 8, 8),) * 2)


class Clips(nn.Module):
    """One value clipped to several limits that are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = nn.ParameterList(torch.tensor(float(limit)) for limit in (-1, 1, -0.5, 0.25))

    def forward(self, x: Tensor) -> Tensor:
        low, high, lower, higher = self.limits
        return torch.cat([torch.clamp(x, low, high), torch.clamp(x, lower, higher), torch.clamp(x, low, higher)], 1)


class Windows(nn.Module):
    """Attention within windows: one axis more than [batch, heads, length, size]."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = x.chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=0.7)


@pytest.mark.parametrize(
    ("model", "shape"), [(Clips(), (2, 8)), (Windows(), (2, 3, 4, 5, 12)), (Windows(), (2, 5, 12))], ids=str
)
def test_what_torchs_exporter_gets_wrong_is_put_right(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        exported = program(model, x, dynamic=({0: Dim("batch")},))
    onnx_format.export(exported, tmp_path / "m.onnx")
    other = torch.randn(3, *shape[1:])
    with torch.no_grad():
        expected = model(other)
    (got,) = onnx_format.run(tmp_path / "m.onnx", (other,))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 0.1


class Frames(nn.Module):
    """Two inputs that are one batch for a convolution, then two again, and correlated."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        left, right = torch.chunk(self.features(torch.cat([first, second])).flatten(2), 2)
        return torch.matmul(left.transpose(1, 2), right)


class Halves(nn.Module):
    """The later half of a batch before the earlier one, which may be longer."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return torch.cat([second * 2, first])


@pytest.mark.parametrize(("model", "inputs"), [(Frames(), 2), (Halves(), 1)], ids=str)
def test_a_chunk_along_the_open_batch_holds_at_every_batch_size(model: nn.Module, inputs: int, tmp_path: Path) -> None:
    shapes = ({0: Dim.AUTO},) * inputs  # torch cannot prove that one named batch always gives two pieces
    exported = program(model, *(torch.randn(4, 3, 5, 5) for _ in range(inputs)), dynamic=shapes)
    written = onnx_format.export(exported, tmp_path / "m.onnx")
    assert written.batched == (True,) * inputs
    assert not [node.op_type for node in onnx.load(written.path).graph.node if "Sequence" in node.op_type]
    for batch in (2, 4, 5, 7):
        case = tuple(torch.randn(batch, 3, 5, 5) for _ in range(inputs))
        with torch.no_grad():
            expected = model(*case)
        torch.testing.assert_close(onnx_format.run(written.path, case), [expected], rtol=1e-5, atol=1e-6)
        assert expected.std() > 0.1
