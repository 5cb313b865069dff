"""The ONNX operators Resize and Upsample, in the ways that torch has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from slimc.loading.onnx_module import Array, Call, Value, operator

_KINDS = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}


@operator("Resize", "Upsample")
def resize(call: Call, x: Tensor, *given: Value) -> Tensor:
    """Interpolation; factors are an attribute in old files, then the first of the inputs, later the second."""
    is_old = call.operator == "Upsample" or call.opset < 11
    scales, sizes = (*given, None)[:2] if is_old else (*given, None, None, None)[1:3]
    scales = call.get("scales", scales)
    if isinstance(scales, Tensor):
        scales = scales.tolist()
    mode = call.get("mode", "nearest")
    way = "asymmetric" if is_old else call.get("coordinate_transformation_mode", "half_pixel")
    if call.get("antialias", 0) or call.get("axes") or call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refuse("this kind of resizing cannot be expressed")
    factors = [float(s) for s in _of_space(call, x, scales, [1, 1])] if scales else None
    target = None if factors else _of_space(call, x, sizes, x.shape[:2])
    options: dict[str, Any] = {"size": target, "scale_factor": factors}
    if mode == "nearest":
        _check_nearest(call, x, way, factors, target)
        return F.interpolate(x, mode="nearest", **options)
    kind = _KINDS.get((mode, x.dim() - 2))
    if way not in ("half_pixel", "pytorch_half_pixel", "align_corners") or kind is None:
        raise call.refuse(f"{mode} interpolation of {x.dim() - 2} axes by {way} cannot be expressed")
    if call.get("exclude_outside", 0) or (mode == "cubic" and call.get("cubic_coeff_a", -0.75) != -0.75):
        raise call.refuse(f"{mode} interpolation with weights other than torch's cannot be expressed")
    return F.interpolate(x, mode=kind, align_corners=way == "align_corners", **options)


def _of_space(call: Call, x: Tensor, numbers: Value, unchanged: Sequence[Any]) -> list[Any]:
    """What is said of the axes after the first two, which must stay as they are."""
    if not isinstance(numbers, list):
        raise call.refuse("sizes that depend on the data cannot be captured")
    if len(numbers) != x.dim() or any(bool(n != own) for n, own in zip(numbers, unchanged, strict=False)):
        raise call.refuse(f"{numbers} resizes the first or second axis, which cannot be expressed")
    return numbers[2:]


def _check_nearest(
    call: Call, x: Tensor, way: str, factors: Sequence[float] | None, target: Sequence[int] | None
) -> None:
    """Refuse what reads other elements than torch does, which rounds down; in float32, as both compute."""
    rounding = call.get("nearest_mode", "round_prefer_floor")
    for axis, size in enumerate(x.shape[2:]):
        length = int(size * factors[axis]) if factors else target[axis] if target else size
        factor = np.float32(factors[axis] if factors else length / size)
        if call.opset < 11:  # said nowhere; what ONNX Runtime does
            rounding = "floor" if factor >= 1 else "ceil"
        places = np.arange(length, dtype=np.float32)
        step = np.float32(1 / factors[axis]) if factors else np.float32(size) / np.float32(length)
        wanted = np.minimum(np.floor(places * step), size - 1)
        read = _source(places, size, factor, way)
        if read is None or not np.array_equal(np.clip(_rounded(read, rounding), 0, size - 1), wanted):
            raise call.refuse(
                f"nearest neighbours by {way} and {rounding}, {size} to {length}, differ from torch's and cannot be "
                "expressed"
            )


def _source(places: Array, size: int, factor: np.float32, way: str) -> Array | None:
    """Where the output's elements lie on the input's axis."""
    half = np.float32(0.5)
    if way == "asymmetric":
        return places / factor
    if way == "half_pixel" or (way == "pytorch_half_pixel" and len(places) > 1):
        return (places + half) / factor - half
    if way in ("align_corners", "pytorch_half_pixel"):
        return places * np.float32(size - 1) / np.float32(max(len(places) - 1, 1))
    return None


def _rounded(places: Array, rounding: str) -> Array:
    if rounding == "round_prefer_floor":
        return np.ceil(places - np.float32(0.5))
    if rounding == "round_prefer_ceil":
        return np.floor(places + np.float32(0.5))
    return np.ceil(places) if rounding == "ceil" else np.floor(places)
