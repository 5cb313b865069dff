"""An ONNX file written tensor by tensor: serialising a model at once holds its weights three times.

A protobuf message is a sequence of fields, each a tag, a length and so many bytes, and a repeated field may come in
any number of places. So the model without its large weights is serialised as usual, and the weights are appended to
the graph straight from where they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnxscript import ir

_LARGE = 1 << 16
"""Bytes of a tensor from which it is worth being written on its own."""
_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_LENGTH_DELIMITED = 2


def save(model: ir.Model, path: Path) -> None:
    """Write one file with all weights inside; what `onnx.load` reads is what `ir.save` would have written."""
    large = [value for value in model.graph.initializers.values() if _is_large(value.const_value)]
    tensors: list[Any] = [value.const_value for value in large]
    try:
        for value in large:
            value.const_value = None  # serialised without its numbers
        whole = ir.to_proto(model)
    finally:
        for value, tensor in zip(large, tensors, strict=True):
            value.const_value = tensor
    graph = whole.graph.SerializeToString()
    whole.ClearField("graph")
    heads = [_head(str(value.name), tensor) for value, tensor in zip(large, tensors, strict=True)]
    sizes = [len(head) + tensor.nbytes for head, tensor in zip(heads, tensors, strict=True)]
    starts = [_start(_INITIALIZER, size) for size in sizes]
    with path.open("wb") as file:
        file.write(whole.SerializeToString())
        file.write(_start(_GRAPH, len(graph) + sum(sizes) + sum(map(len, starts))))
        file.write(graph)
        for start, head, tensor in zip(starts, heads, tensors, strict=True):
            file.write(start + head)
            tensor.tofile(file)


def _is_large(tensor: Any) -> bool:
    return tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _LARGE


def _head(name: str, tensor: Any) -> bytes:
    """A tensor up to where its numbers follow."""
    proto = onnx.TensorProto(name=name, dims=tensor.shape.numpy(), data_type=int(tensor.dtype))
    return b"".join((proto.SerializeToString(), _start(_RAW_DATA, tensor.nbytes)))


def _start(field: int, size: int) -> bytes:
    """Tag and length of a field that is `size` bytes long."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(size)


def _varint(number: int) -> bytes:
    """Seven bits to a byte, the lowest first; the top bit says that more follow."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
