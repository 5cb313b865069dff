from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from slimc.exporters import fast_path, machine
from slimc.exporters.fast_path import FastPath
from slimc.exporters.formats import onnx as onnx_format

needs_avx = pytest.mark.skipif(machine.describe().simd == "other", reason="the fast path needs AVX2")


def inspected(channels: int, path: Path) -> FastPath:
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, groups=channels),
        nn.Conv2d(channels, 16, 1),
    ).eval()
    program = torch.export.export(net, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: Dim("batch")},), strict=False)
    return fast_path.inspect(onnx_format.export(program, path).path, onnxruntime)


@needs_avx
@pytest.mark.parametrize("channels", [16, 20])
def test_channels_in_multiples_of_four_stay_on_the_fast_path(tmp_path: Path, channels: int) -> None:
    assert inspected(channels, tmp_path / "m.onnx") == FastPath(3, ())


@needs_avx
@pytest.mark.parametrize("channels", [17, 18])
def test_other_widths_fall_off_and_are_named(tmp_path: Path, channels: int) -> None:
    assert inspected(channels, tmp_path / "m.onnx") == FastPath(3, ("2.weight", "3.weight"))


def test_lost_are_those_slow_only_after_the_cut() -> None:
    before, after = FastPath(4, ("stem",)), FastPath(4, ("stem", "conv2", "conv3"))
    assert fast_path.lost(before, after) == ("conv2", "conv3")
    assert fast_path.lost(after, before) == ()
    assert fast_path.lost(before, None) == ()


def test_nothing_is_lost_on_a_machine_without_a_fast_path() -> None:
    assert fast_path.lost(FastPath(2, ("old1", "old2")), FastPath(2, ("new1", "new2"))) == ()
