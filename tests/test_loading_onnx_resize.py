"""Resize and Upsample of ONNX: what torch's interpolation does, and everything else by name."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_graphs import both, captured_open, graph_of, node, numbers, whole

from slimc.errors import LoadError
from slimc.loading import load

pytest.importorskip("onnxruntime")

WAYS = ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners")
ROUNDINGS = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
SIZES = ((4, 8), (4, 12), (5, 20), (6, 9), (8, 4), (7, 3), (3, 1))


def test_nearest_neighbours_are_those_of_the_file_or_refused(tmp_path: Path) -> None:
    """All ways in one: of each graph ONNX Runtime says what is right."""
    path, read, refused = tmp_path / "net.onnx", [], []
    for way, rounding, (size, length), is_scale in itertools.product(WAYS, ROUNDINGS, SIZES, (True, False)):
        resize = node(
            "Resize", "x - factors" if is_scale else "x - - sizes", "y",
            mode="nearest", coordinate_transformation_mode=way, nearest_mode=rounding,
        )  # fmt: skip
        constants = (
            {"factors": np.array([1, 1, length / size, 1], np.float32)}
            if is_scale
            else {"sizes": whole(1, 2, length, 3)}
        )
        onnx.save(graph_of([resize], [1, 2, size, 3], constants), path)
        try:
            got, wanted = both(path, numbers(1, 2, size, 3))
        except LoadError as error:
            refused.append((f"nearest neighbours by {way} and {rounding}, {size} to {length}", str(error)))
            continue
        np.testing.assert_array_equal(got.numpy(), wanted)
        read.append((way, rounding, size, length))
    assert all(words in message for words, message in refused)
    assert {("asymmetric", "floor", *sizes) for sizes in SIZES} <= set(read)
    assert ("half_pixel", "round_prefer_floor", 4, 12) in read
    assert ("asymmetric", "round_prefer_floor", 4, 12) not in read


@pytest.mark.parametrize(("kind", "opset"), [("Resize", 10), ("Upsample", 9)])
def test_factors_of_old_files_are_the_second_input(kind: str, opset: int, tmp_path: Path) -> None:
    resize = node(kind, "x factors", "y", mode="nearest")
    constants = {"factors": np.array([1, 1, 2, 3], np.float32)}
    onnx.save(graph_of([resize], ["batch", 2, 4, 4], constants, opset=opset), tmp_path / "net.onnx")
    loaded = captured_open(tmp_path / "net.onnx", 2, 4, 4)
    assert list(loaded.model.parameters()) == []


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_factors_and_sizes_are_captured(mode: str, tmp_path: Path) -> None:
    way = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} if mode == "nearest" else {}
    resize = node("Resize", "x - factors", "y", mode=mode, **way)
    constants = {"factors": np.array([1, 1, 2, 1.5], np.float32)}
    onnx.save(graph_of([resize], ["batch", 2, 4, 4], constants), tmp_path / "net.onnx")
    loaded = captured_open(tmp_path / "net.onnx", 2, 4, 4)
    assert list(loaded.model.parameters()) == []


@pytest.mark.parametrize(("attributes", "factors", "words"), [
    ({"mode": "nearest"}, [1, 2, 2, 2], "first or second axis"),
    ({"mode": "linear"}, [2, 1, 2, 2], "first or second axis"),
    ({"mode": "cubic", "exclude_outside": 1}, [1, 1, 2, 2], "weights other than torch's"),
    ({"mode": "cubic", "cubic_coeff_a": -0.5}, [1, 1, 2, 2], "weights other than torch's"),
    ({"mode": "linear", "coordinate_transformation_mode": "asymmetric"}, [1, 1, 2, 2], "linear interpolation .*asymm"),
    ({"mode": "linear", "antialias": 1}, [1, 1, 0.5, 0.5], "this kind of resizing"),
])  # fmt: skip
def test_what_torch_has_no_way_for_is_refused(
    attributes: dict[str, Any], factors: list[float], words: str, tmp_path: Path
) -> None:
    resize = node("Resize", "x - factors", "y", **attributes)
    onnx.save(graph_of([resize], [1, 2, 4, 4], {"factors": np.array(factors, np.float32)}), tmp_path / "net.onnx")
    with pytest.raises(LoadError, match=words):
        load(str(tmp_path / "net.onnx"))
