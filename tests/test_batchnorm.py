from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from slimc.exporters.formats import onnx as onnx_format


def norm(channels: int, seed: int) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.BatchNorm2d(channels)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
        tensor.normal_(generator=generator)
    layer.running_var.uniform_(0.5, 2.0, generator=generator)
    return layer


class Shared(nn.Module):
    """One convolution called with two normalisations: the exporter alone leaves both."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=bias)
        self.bn1, self.bn2 = norm(3, 1), norm(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv(self.bn1(self.conv(x)).relu()))
        return out


class Pyramid(nn.Module):
    """One head on two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), norm(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.conv(x)), self.bn(self.conv(x[:, :, ::2, ::2]))


class Reader(nn.Module):
    """The convolution's own output is needed too, so nothing can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), norm(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.bn(y).relu() + y
        return out


class PreActivation(nn.Module):
    """The stream is read as it is and normalised: the normalisation can only go into the convolution after it."""

    def __init__(self, kernel: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3), norm(8, 1)
        self.conv = nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        out: Tensor = self.conv(self.bn(y)) + y
        return out


def export(model: nn.Module, path: Path) -> tuple[onnx_format.OnnxModel, Counter[str]]:
    program = torch.export.export(model.eval(), (torch.randn(2, 3, 8, 8),), strict=False)
    written = onnx_format.export(program, path)
    return written, Counter(node.op_type for node in onnx.load(path).graph.node)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result = model(x)
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_with_two_normalisations_folds_into_two(tmp_path: Path, bias: bool) -> None:
    model = Shared(bias)
    written, operators = export(model, tmp_path / "m.onnx")
    assert operators == {"Conv": 2, "Relu": 1}
    assert written.unfolded == ()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(onnx_format.run(written.path, (x,)), outputs(model, x))


def test_a_head_on_two_resolutions_keeps_one_weight(tmp_path: Path) -> None:
    model = Pyramid()
    written, operators = export(model, tmp_path / "m.onnx")
    assert operators["Conv"] == 2
    assert operators["BatchNormalization"] == 0
    initializers = onnx.load(written.path).graph.initializer
    assert sum(1 for tensor in initializers if len(tensor.dims) == 4) == 1
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(onnx_format.run(written.path, (x,)), outputs(model, x))


def test_a_normalisation_that_cannot_be_folded_is_named_with_the_reason(tmp_path: Path) -> None:
    model = Reader()
    written, operators = export(model, tmp_path / "m.onnx")
    assert operators["BatchNormalization"] == 1
    assert written.unfolded == ("bn.weight: the output of its convolution has 1 other reader",)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(onnx_format.run(written.path, (x,)), outputs(model, x))


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (1, False), (4, True), (8, False)])
def test_a_normalisation_of_a_shared_stream_folds_into_the_convolution_after_it(
    tmp_path: Path, groups: int, bias: bool
) -> None:
    model = PreActivation(1, groups, bias)
    written, operators = export(model, tmp_path / "m.onnx")
    assert operators["BatchNormalization"] == 0
    assert written.unfolded == ()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(onnx_format.run(written.path, (x,)), outputs(model, x))


def test_a_normalisation_before_a_padding_convolution_stays_since_zeros_are_not_normalised(tmp_path: Path) -> None:
    model = PreActivation(3, 1, True)
    written, operators = export(model, tmp_path / "m.onnx")
    assert operators["BatchNormalization"] == 1
    assert written.unfolded == ("bn.weight: the output of its convolution has 1 other reader",)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(onnx_format.run(written.path, (x,)), outputs(model, x))
