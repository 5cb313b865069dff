"""Pieces of a size known only at run time, as a chunk along the open batch axis has: slices instead of a sequence.

torch's exporter writes a sequence whose pieces are read one by one, and onnxscript's optimizer (0.7.2) fails on it:
it takes the size to be a constant, or to have an axis, and asks a missing value for its rank.
"""

from __future__ import annotations

import numpy as np
from onnxscript import ir


def slice_pieces(graph: ir.Graph) -> None:
    """Read pieces of one computed size by slices, in place; the last is shorter, as a slice ends with its input."""
    for split in list(graph):
        if split.op_type != "SplitToSequence" or split.domain or not _has_computed_size(split):
            continue
        for piece in split.outputs[0].consumers():
            position = _position(piece)
            if position is not None:
                _slice(graph, split, piece, position)
        if not split.outputs[0].consumers():
            graph.remove(split, safe=True)


def _has_computed_size(split: ir.Node) -> bool:
    if len(split.inputs) < 2 or split.inputs[1] is None:
        return False
    size, keepdims = split.inputs[1], split.attributes.get("keepdims")
    is_scalar = size.shape is not None and len(size.shape) == 0
    return is_scalar and _constant(size) is None and (keepdims is None or keepdims.as_int() == 1)


def _position(piece: ir.Node) -> int | None:
    """Which piece a reader of the sequence takes, counted from the first; None where that is not known."""
    constant = _constant(piece.inputs[1]) if piece.op_type == "SequenceAt" else None
    return int(constant.item()) if constant is not None and constant.item() >= 0 else None


def _slice(graph: ir.Graph, split: ir.Node, piece: ir.Node, position: int) -> None:
    """Put one slice, from position * size to (position + 1) * size, in the place of a piece."""
    data, size = split.inputs
    axis = split.attributes.get("axis")
    numbers = [_number(n) for n in (position, position + 1, axis.as_int() if axis is not None else 0)]
    start, end = (ir.node("Mul", [number.outputs[0], size]) for number in numbers[:2])
    taken = ir.node("Slice", [data, start.outputs[0], end.outputs[0], numbers[2].outputs[0]])
    output = piece.outputs[0]
    taken.outputs[0].shape, taken.outputs[0].type, name = output.shape, output.type, output.name
    graph.insert_before(piece, [*numbers, start, end, taken])
    ir.convenience.replace_all_uses_with(output, taken.outputs[0], replace_graph_outputs=True)
    graph.remove(piece, safe=True)
    taken.outputs[0].name = name


def _number(number: int) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.array([number], np.int64))})


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None else None
