"""ONNX operators that move, choose and make: views, slices, look-ups, sizes and constants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from slimc.loading.onnx_module import Call, Value, operator, tensor

_END = 2**31 - 1  # files write "to the end" as any number from here up

# -- sizes ----------------------------------------------------------------------------------------------


@operator("Shape")
def shape(call: Call, x: Tensor) -> Value:
    """The sizes of the axes from `start` to `end`."""
    return list(x.shape)[call.get("start", 0) : call.get("end", None)]


@operator("Size")
def size(_call: Call, x: Tensor) -> Value:
    """How many elements there are."""
    return x.numel()


@operator("Cast")
def cast(call: Call, x: Value) -> Value:
    """Another type; sizes stay sizes as long as they are whole numbers."""
    kind = _kind(call.get("to"))
    if not isinstance(x, Tensor) and kind in (torch.int64, torch.int32):
        return x
    return tensor(x).to(kind)


@operator("CastLike")
def cast_like(_call: Call, x: Value, other: Value) -> Value:
    """The type of another value."""
    return tensor(x).to(tensor(other).dtype) if isinstance(other, Tensor) else x


def _kind(number: int) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(number))).dtype


@operator("ConstantOfShape")
def constant_of_shape(call: Call, sizes: Value) -> Value:
    """One number everywhere."""
    value = call.get("value", np.zeros(1, np.float32))
    number = value.reshape(-1)[0].item()
    wanted = list(_sizes(call, sizes))
    if value.dtype == np.int64 and len(wanted) == 1 and isinstance(wanted[0], int) and wanted[0] <= 8:
        return [number] * wanted[0]
    return torch.full(wanted, number, dtype=torch.from_numpy(value).dtype)


@operator("Range")
def arange(_call: Call, start: Value, limit: Value, delta: Value) -> Value:
    """Numbers from start up to limit."""
    start, limit, delta = (v.item() if isinstance(v, Tensor) else v for v in (start, limit, delta))
    return torch.arange(start, limit, delta)


def _sizes(call: Call, value: Value) -> Sequence[Any]:
    """A shape that is known before the data is."""
    if isinstance(value, (list, tuple)):
        return value
    raise call.refuse("sizes or indices that depend on the data cannot be captured")


def _list(value: Value) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# -- views ----------------------------------------------------------------------------------------------


@operator("Reshape")
def reshape(call: Call, x: Value, sizes: Value) -> Value:
    """0 keeps the size that is there (unless `allowzero`), -1 is what is left."""
    sizes = list(_sizes(call, sizes))
    if not isinstance(x, Tensor):
        return (_list(x)[0] if not sizes else _list(x)) if len(sizes) < 2 else tensor(x).reshape(sizes)
    if not call.get("allowzero", 0):
        sizes = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    """Two axes: those before `axis`, and the rest."""
    axis = call.get("axis", 1)
    axis = axis % x.dim() if axis < 0 else axis
    if axis == x.dim():
        return x.reshape(-1, 1)
    x = x.flatten(axis)
    return x.reshape(1, -1) if axis == 0 else x.flatten(0, axis - 1) if axis > 1 else x


@operator("Squeeze")
def squeeze(call: Call, x: Value, axes: Value = None) -> Value:
    """Drop axes of one index."""
    axes = call.get("axes", axes)
    if isinstance(x, list):
        return x[0]
    return x.squeeze() if axes is None else x.squeeze(tuple(_list(axes)))


@operator("Unsqueeze")
def unsqueeze(call: Call, x: Value, axes: Value = None) -> Value:
    """New axes of one index."""
    axes = _list(call.get("axes", axes))
    if not isinstance(x, Tensor):
        if not isinstance(x, list) and len(axes) == 1:
            return [x]
        x = tensor(x)
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    """Axes in another order; reversed where none is given."""
    return x.permute(call.get("perm") or list(reversed(range(x.dim()))))


@operator("Expand")
def expand(call: Call, x: Value, sizes: Value) -> Tensor:
    """Broadcast against a shape, in both directions."""
    source, sizes = tensor(x), list(_sizes(call, sizes))
    own = [1] * (len(sizes) - source.dim()) + list(source.shape)
    sizes = [1] * (len(own) - len(sizes)) + sizes
    return source.expand([o if isinstance(n, int) and n == 1 else n for o, n in zip(own, sizes, strict=True)])


@operator("Tile")
def tile(call: Call, x: Value, repeats: Value) -> Tensor:
    """Whole copies along each axis."""
    return tensor(x).repeat(list(_sizes(call, repeats)))


@operator("Concat")
def concat(call: Call, *parts: Value) -> Value:
    """One after the other along an axis."""
    if not any(isinstance(part, Tensor) for part in parts):
        return [n for part in parts for n in _list(part)]
    return torch.cat([tensor(part) for part in parts], call.get("axis"))


@operator("Split")
def split(call: Call, x: Value, sizes: Value = None) -> tuple[Value, ...]:
    """Pieces of given sizes, else as many equal ones as there are results."""
    source, axis, sizes = tensor(x), call.get("axis", 0), call.get("split", sizes)
    if sizes is None:
        return torch.split(source, -(-source.shape[axis] // call.results), axis)
    return torch.split(source, list(_sizes(call, sizes)), axis)


@operator("Slice")
def slice_(
    call: Call, x: Value, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None
) -> Value:
    """A part along some axes; bounds are attributes in old files and inputs in newer ones."""
    starts, ends = (_list(_sizes(call, call.get(n, v))) for n, v in (("starts", starts), ("ends", ends)))
    axes = _list(call.get("axes", axes) or list(range(len(starts))))
    steps = _list(steps) if steps is not None else [1] * len(starts)
    if isinstance(x, list):
        return x[starts[0] : None if _is_end(ends[0]) else ends[0] : steps[0]]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == -1 and (start == -1 or _is_end(start)) and isinstance(end, int) and end < -(2**30):
            x = x.flip(axis)
            continue
        if step < 1:
            raise call.refuse("a slice that runs backwards cannot be expressed")
        bounds = slice(None if start == 0 else start, None if _is_end(end) else end, step)
        x = x[(slice(None),) * (axis % x.dim()) + (bounds,)]
    return x


def _is_end(bound: Any) -> bool:
    return isinstance(bound, int) and bound >= _END


@operator("Pad")
def pad(call: Call, x: Tensor, pads: Value = None, value: Value = None, axes: Value = None) -> Tensor:
    """A border on each side of each axis."""
    pads = list(_sizes(call, call.get("pads", pads)))
    chosen = [axis % x.dim() for axis in _list(axes)] if axes is not None else list(range(x.dim()))
    before, after = [0] * x.dim(), [0] * x.dim()
    for place, axis in enumerate(chosen):
        before[axis], after[axis] = pads[place], pads[place + len(chosen)]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        call.get("mode", "constant")
    ]
    widths = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    if mode == "constant":
        number = call.get("value", 0.0 if value is None else value)
        return F.pad(x, widths, value=float(number))
    while len(widths) > 2 and widths[-2:] == [0, 0]:
        widths = widths[:-2]
    return F.pad(x, widths, mode)


@operator("DepthToSpace", "SpaceToDepth")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    """Channels to blocks of space and back."""
    block = call.get("blocksize")
    if call.operator == "SpaceToDepth":
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // block, block, w // block, block)
        return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block * block, h // block, w // block)
    if call.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    blocks = x.reshape(n, block, block, c // block**2, h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)


@operator("Resize", "Upsample")
def resize(call: Call, x: Tensor, *given: Value) -> Tensor:
    """Interpolation, in the ways that torch has."""
    roi, scales, sizes = (None, *given, None)[:3] if call.operator == "Upsample" else (*given, None, None, None)[:3]
    del roi
    mode, way = call.get("mode", "nearest"), call.get("coordinate_transformation_mode", "half_pixel")
    if call.operator == "Upsample" or call.opset < 11:
        way = "asymmetric"
    scales = call.get("scales", scales)
    rank = x.dim() - 2
    if isinstance(scales, Tensor):
        scales = scales.tolist()
    factors = [float(s) for s in scales[2:]] if scales else None
    target = None if factors else list(_sizes(call, sizes))[2:]
    if call.get("antialias", 0) or call.get("axes") or call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refuse("this kind of resizing cannot be expressed")
    options: dict[str, Any] = {"size": target, "scale_factor": factors}
    if mode == "nearest":
        if way != "asymmetric" or call.get("nearest_mode", "round_prefer_floor") != "floor":
            whole = factors is not None and all(f == int(f) for f in factors)
            if not whole and not (target and _divides(x, target)):
                raise call.refuse(f"nearest neighbours by {way} cannot be expressed")
        return F.interpolate(x, mode="nearest", **options)
    kinds = {"linear": ("linear", "bilinear", "trilinear")[rank - 1], "cubic": "bicubic"}
    if way not in ("half_pixel", "pytorch_half_pixel", "align_corners") or (
        mode == "cubic" and call.get("cubic_coeff_a", -0.75) != -0.75
    ):
        raise call.refuse(f"{mode} interpolation by {way} cannot be expressed")
    return F.interpolate(x, mode=kinds[mode], align_corners=way == "align_corners", **options)


def _divides(x: Tensor, target: Sequence[Any]) -> bool:
    return all(
        isinstance(t, int) and isinstance(s, int) and t % s == 0 for t, s in zip(target, x.shape[2:], strict=True)
    )


# -- look-ups -------------------------------------------------------------------------------------------


@operator("Gather")
def gather(call: Call, x: Value, indices: Value) -> Value:
    """Indices along one axis; one literal index is a select, a table of words an embedding."""
    axis = call.get("axis", 0)
    if not isinstance(x, Tensor):
        if isinstance(x, list) and not isinstance(indices, Tensor):
            return [x[i] for i in indices] if isinstance(indices, list) else x[indices]
        x = tensor(x)
    if not isinstance(indices, Tensor):
        if not isinstance(indices, list):
            return x.select(axis, indices)
        step = {b - a for a, b in pairwise(indices)}
        if step <= {1} and indices and indices[0] >= 0:
            return x.narrow(axis, indices[0], len(indices))
        return x.index_select(axis, tensor(indices, x))
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(indices.to(torch.int64), x)
    axis %= x.dim()
    return x[(slice(None),) * axis + (indices.to(torch.int64),)]


@operator("GatherElements")
def gather_elements(call: Call, x: Tensor, indices: Value) -> Tensor:
    """One element for each index, along an axis."""
    chosen = tensor(indices).to(torch.int64)
    axis = call.get("axis", 0)
    return x.gather(axis, torch.where(chosen < 0, chosen + x.shape[axis], chosen))


@operator("GatherND")
def gather_nd(call: Call, x: Tensor, indices: Value) -> Tensor:
    """The last axis of the indices counts coordinates."""
    if call.get("batch_dims", 0):
        raise call.refuse("batch_dims cannot be expressed")
    return x[tuple(tensor(indices).to(torch.int64).unbind(-1))]


@operator("ScatterND")
def scatter_nd(call: Call, x: Tensor, indices: Value, updates: Value) -> Tensor:
    """Write at coordinates."""
    if call.get("reduction", "none") not in ("none", "add"):
        raise call.refuse(f"the reduction {call.get('reduction')} cannot be expressed")
    places = tuple(tensor(indices).to(torch.int64).unbind(-1))
    return torch.index_put(x, places, tensor(updates).to(x), accumulate=call.get("reduction", "none") == "add")


@operator("ScatterElements")
def scatter_elements(call: Call, x: Tensor, indices: Value, updates: Tensor) -> Tensor:
    """Write one element for each index, along an axis."""
    if call.get("reduction", "none") != "none":
        raise call.refuse(f"the reduction {call.get('reduction')} cannot be expressed")
    axis = call.get("axis", 0)
    places = tensor(indices).to(torch.int64)
    return x.scatter(axis, torch.where(places < 0, places + x.shape[axis], places), updates)


@operator("Where")
def where(_call: Call, condition: Value, a: Value, b: Value) -> Value:
    """One or the other, element by element."""
    if isinstance(a, list) and isinstance(b, list) and isinstance(condition, Tensor) and len(a) == len(b):
        return [x if one else y for one, x, y in zip(condition.tolist(), a, b, strict=True)]
    left, right = tensor(a), tensor(b)
    return torch.where(tensor(condition), left, right)


@operator("TopK")
def top_k(call: Call, x: Tensor, count: Value) -> tuple[Value, ...]:
    """The largest or smallest along an axis, with where they stood."""
    largest, ordered = bool(call.get("largest", 1)), bool(call.get("sorted", 1))
    values, places = torch.topk(x, _list(_sizes(call, _list(count)))[0], call.get("axis", -1), largest, ordered)
    return values, places


@operator("ArgMax", "ArgMin")
def arg_max(call: Call, x: Tensor) -> Tensor:
    """Where the largest or smallest stands."""
    function = torch.argmax if call.operator == "ArgMax" else torch.argmin
    if call.get("select_last_index", 0):
        raise call.refuse("the last of equal values cannot be asked for")
    return function(x, call.get("axis", 0), bool(call.get("keepdims", 1)))


@operator("CumSum")
def cumulative(call: Call, x: Value, axis: Value) -> Tensor:
    """Running sums along an axis."""
    if call.get("exclusive", 0) or call.get("reverse", 0):
        raise call.refuse("exclusive or reversed sums cannot be expressed")
    return tensor(x).cumsum(_list(axis.tolist() if isinstance(axis, Tensor) else axis)[0])


@operator("Trilu")
def triangle(call: Call, x: Tensor, diagonal: Value = 0) -> Tensor:
    """The upper or lower triangle."""
    return x.triu(diagonal or 0) if call.get("upper", 1) else x.tril(diagonal or 0)
