"""ONNX operators that move, choose and make: views, slices, look-ups, sizes and constants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slimc.loading.onnx_module import Call, Value, is_shape, objects, operator, sizes, tensor, torch_type

_END = 2**31 - 1  # files write "to the end" as any number from here up

# -- sizes ----------------------------------------------------------------------------------------------


@operator("Shape")
def shape(call: Call, x: Value) -> Value:
    """The sizes of the axes from `start` to `end`."""
    own = x.shape if isinstance(x, Tensor) else objects(x).shape
    return list(own)[call.get("start", 0) : call.get("end", None)]


@operator("Size")
def size(_call: Call, x: Value) -> Value:
    """How many elements there are."""
    return x.numel() if isinstance(x, Tensor) else objects(x).size


@operator("Cast")
def cast(call: Call, x: Value) -> Value:
    """Another type; sizes stay sizes as long as they are whole numbers."""
    kind = torch_type(call.get("to"))
    if not isinstance(x, Tensor) and kind in (torch.int64, torch.int32):
        return sizes(np.frompyfunc(lambda n: int(n) if isinstance(n, (bool, float)) else n, 1, 1)(objects(x)))
    return tensor(x).to(kind)


@operator("CastLike")
def cast_like(_call: Call, x: Value, other: Value) -> Value:
    """The type of another value."""
    return tensor(x).to(tensor(other).dtype) if isinstance(other, Tensor) else x


@operator("ConstantOfShape")
def constant_of_shape(call: Call, shape: Value) -> Value:
    """One number everywhere."""
    value = call.get("value", np.zeros(1, np.float32))
    number = value.reshape(-1)[0].item()
    wanted = list(_known(call, shape))
    if is_shape(value) and len(wanted) == 1 and isinstance(wanted[0], int) and wanted[0] <= 8:
        return [number] * wanted[0]
    return torch.full(wanted, number, dtype=torch.from_numpy(value).dtype)


@operator("Range")
def arange(_call: Call, start: Value, limit: Value, delta: Value) -> Value:
    """Numbers from start up to limit."""
    start, limit, delta = (v.item() if isinstance(v, Tensor) else v for v in (start, limit, delta))
    return torch.arange(start, limit, delta)


def _known(call: Call, value: Value) -> Sequence[Any]:
    """A shape that is known before the data is."""
    if isinstance(value, (list, tuple)):
        return value
    raise call.refuse("sizes or indices that depend on the data cannot be captured")


def _list(value: Value) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# -- views ----------------------------------------------------------------------------------------------


@operator("Reshape")
def reshape(call: Call, x: Value, wanted: Value) -> Value:
    """0 keeps the size that is there (unless `allowzero`), -1 is what is left."""
    source, wanted = x if isinstance(x, Tensor) else objects(x), list(_known(call, wanted))
    if not call.get("allowzero", 0):
        wanted = [source.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(wanted)]
    return sizes(source.reshape(wanted))


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
    source = x if isinstance(x, Tensor) else objects(x)
    return sizes(source.squeeze() if axes is None else source.squeeze(tuple(_list(axes))))


@operator("Unsqueeze")
def unsqueeze(call: Call, x: Value, axes: Value = None) -> Value:
    """New axes of one index."""
    axes = _list(call.get("axes", axes))
    if not isinstance(x, Tensor):
        return sizes(np.expand_dims(objects(x), tuple(axes)))
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(call: Call, x: Value) -> Value:
    """Axes in another order; reversed where none is given."""
    if not isinstance(x, Tensor):
        return sizes(objects(x).transpose(call.get("perm")))
    return x.permute(call.get("perm") or list(reversed(range(x.dim()))))


@operator("Expand")
def expand(call: Call, x: Value, wanted: Value) -> Tensor:
    """Broadcast against a shape, in both directions."""
    source, wanted = tensor(x), list(_known(call, wanted))
    own = [1] * (len(wanted) - source.dim()) + list(source.shape)
    wanted = [1] * (len(own) - len(wanted)) + wanted
    return source.expand([o if isinstance(n, int) and n == 1 else n for o, n in zip(own, wanted, strict=True)])


@operator("Tile")
def tile(call: Call, x: Value, repeats: Value) -> Tensor:
    """Whole copies along each axis."""
    return tensor(x).repeat(list(_known(call, repeats)))


@operator("Concat")
def concat(call: Call, *parts: Value) -> Value:
    """One after the other along an axis."""
    if not any(isinstance(part, Tensor) for part in parts):
        return sizes(np.concatenate([objects(part) for part in parts], call.get("axis")))
    return torch.cat([tensor(part) for part in parts], call.get("axis"))


@operator("Split")
def split(call: Call, x: Value, lengths: Value = None) -> tuple[Value, ...]:
    """Pieces of given lengths, else as many equal ones as there are results."""
    axis, lengths = call.get("axis", 0), call.get("split", lengths)
    source = x if isinstance(x, Tensor) else objects(x)
    lengths = -(-source.shape[axis] // call.results) if lengths is None else list(_known(call, lengths))
    if isinstance(source, Tensor):
        return torch.split(source, lengths, axis)
    ends = np.cumsum(lengths)[:-1] if isinstance(lengths, list) else range(lengths, source.shape[axis], lengths)
    return tuple(sizes(piece) for piece in np.split(source, list(ends), axis))


@operator("Slice")
def slice_(
    call: Call, x: Value, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None
) -> Value:
    """A part along some axes; bounds are attributes in old files and inputs in newer ones."""
    starts, ends = (_list(_known(call, call.get(n, v))) for n, v in (("starts", starts), ("ends", ends)))
    axes = _list(call.get("axes", axes) or list(range(len(starts))))
    steps = _list(steps) if steps is not None else [1] * len(starts)
    if isinstance(x, list):
        bounds = {a: slice(start, end, step) for start, end, a, step in zip(starts, ends, axes, steps, strict=True)}
        rank = objects(x).ndim
        return sizes(objects(x)[tuple(bounds.get(a, bounds.get(a - rank, slice(None))) for a in range(rank))])
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == -1 and (start == -1 or _is_end(start)) and isinstance(end, int) and end < -(2**30):
            x = x.flip(axis)
            continue
        if step < 1:
            raise call.refuse("a slice that runs backwards cannot be expressed")
        part = slice(None if start == 0 else start, None if _is_end(end) else end, step)
        x = x[(slice(None),) * (axis % x.dim()) + (part,)]
    return x


def _is_end(bound: Any) -> bool:
    return isinstance(bound, int) and bound >= _END


@operator("Pad")
def pad(call: Call, x: Tensor, pads: Value = None, value: Value = None, axes: Value = None) -> Tensor:
    """A border on each side of each axis."""
    pads = list(_known(call, call.get("pads", pads)))
    chosen = [axis % x.dim() for axis in _list(axes)] if axes is not None else list(range(x.dim()))
    before, after = [0] * x.dim(), [0] * x.dim()
    for place, axis in enumerate(chosen):
        before[axis], after[axis] = pads[place], pads[place + len(chosen)]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        call.get("mode", "constant")
    ]
    widths = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    if mode == "constant":
        number = call.get("value", 0.0 if value is None else _list(value)[0])
        return F.pad(x, widths, value=float(number))
    # torch takes the last axes in these modes, all but one or two of them.
    while len(widths) > max(2, 2 * (x.dim() - 2)) and widths[-2:] == [0, 0]:
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


# -- look-ups -------------------------------------------------------------------------------------------


@operator("Gather")
def gather(call: Call, x: Value, indices: Value) -> Value:
    """Indices along one axis; one literal index is a select, a table of words an embedding."""
    axis = call.get("axis", 0)
    if not isinstance(x, Tensor):
        if not isinstance(indices, Tensor):
            return sizes(objects(x).take(indices, axis))
        x = tensor(x)
    if not isinstance(indices, (Tensor, list)):
        return x.select(axis, indices)
    if isinstance(indices, list):
        size = x.shape[axis]
        known = np.frompyfunc(lambda i: i + size if i < 0 else i, 1, 1)(objects(indices))
        if known.ndim == 1 and known.size and all(b - a == 1 for a, b in pairwise(known)):
            return x.narrow(axis, known[0], known.size)
        indices = tensor(sizes(known), x)
        if known.ndim == 1:
            return x.index_select(axis, indices)
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
    if not any(isinstance(value, Tensor) for value in (condition, a, b)):
        return sizes(np.frompyfunc(lambda one, x, y: x if one else y, 3, 1)(*map(objects, (condition, a, b))))
    left, right = tensor(a), tensor(b)
    return torch.where(tensor(condition), left, right)


@operator("TopK")
def top_k(call: Call, x: Tensor, count: Value = None) -> tuple[Value, ...]:
    """The largest or smallest along an axis, with where they stood; how many is an attribute in old files."""
    count = call.get("k", count)
    largest, ordered = bool(call.get("largest", 1)), bool(call.get("sorted", 1))
    values, places = torch.topk(x, _list(_known(call, _list(count)))[0], call.get("axis", -1), largest, ordered)
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
