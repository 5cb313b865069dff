"""Readers: the operators whose weights can be fitted again, each seen as rows times a matrix.

A convolution, a linear layer or a product with a parameter computes, at each place of its output, a fixed linear map
of some numbers of its input. `Reader` cuts these rows out of real values, so that a regression need not know what
operator it fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from .graph.infer import attribute
from .graph.rule import arguments, operator_name

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True)
class Reader:
    """One use of a weight in a graph.

    source: the node that gives its input. weight, bias: tensor names; bias is None where there is none.
    groups: the map is block diagonal with so many blocks: inputs and outputs are [groups, ...].
    """

    node: Node
    source: Node
    weight: str
    bias: str | None
    groups: int

    @property
    def kind(self) -> str:
        """The operator's name."""
        return operator_name(self.node)

    def pads(self, size: Sequence[int]) -> bool:
        """Whether places at the borders see fewer inputs than those in the middle. size: of the kernel."""
        if self.kind in _TRANSPOSED:
            return max(size) > 1
        call = arguments(self.node)
        return self.kind in _CONVOLUTIONS and any(_padding(call["padding"], size, _each(call["dilation"], len(size))))

    def matrix(self, module: GraphModule) -> Tensor:
        """The weight as [groups, outputs, inputs], inputs in the order of `rows`."""
        weight: Tensor = attribute(module, self.weight).detach()
        if self.kind in _CONVOLUTIONS:
            return weight.reshape(self.groups, len(weight) // self.groups, -1)
        if self.kind in _TRANSPOSED:
            split = weight.reshape(self.groups, len(weight) // self.groups, *weight.shape[1:])
            return split.flip(list(range(3, split.dim()))).transpose(1, 2).flatten(2)
        return weight[None] if self.kind == "linear" else weight.T[None]

    def write(self, module: GraphModule, matrix: Tensor) -> None:
        """Set the weight from [groups, outputs, inputs]."""
        weight: Tensor = attribute(module, self.weight)
        if self.kind in _CONVOLUTIONS:
            value = matrix.reshape(weight.shape)
        elif self.kind in _TRANSPOSED:
            inputs = len(weight) // self.groups
            split = matrix.reshape(self.groups, weight.shape[1], inputs, *weight.shape[2:]).transpose(1, 2)
            value = split.flip(list(range(3, split.dim()))).reshape(weight.shape)
        else:
            value = matrix[0] if self.kind == "linear" else matrix[0].T
        with torch.no_grad():
            weight.copy_(value)

    def places(self, sizes: Sequence[int]) -> int:
        """How many rows an output of these sizes has."""
        return math.prod(sizes) // sizes[1 if self.kind in (*_CONVOLUTIONS, *_TRANSPOSED) else -1]

    def results(self, output: Tensor, places: Tensor) -> Tensor:
        """What the output holds at some places: [places, outputs]."""
        if self.kind in (*_CONVOLUTIONS, *_TRANSPOSED):
            flat = output.flatten(2)
            return flat[places // flat.shape[2], :, places % flat.shape[2]]
        return output.flatten(0, -2)[places]

    def rows(self, value: Tensor, weight: Tensor, spatial: Sequence[int], places: Tensor) -> Tensor:
        """The inputs that each place of the output is computed from: [groups, places, inputs].

        spatial: the output's sizes behind its channel axis (unused where the operator has none).
        """
        if self.kind not in (*_CONVOLUTIONS, *_TRANSPOSED):
            return value.flatten(0, -2)[places][None]
        call = arguments(self.node)
        size = weight.shape[2:]
        dims = len(size)
        stride, dilation = (_each(call[name], dims) for name in ("stride", "dilation"))
        if self.kind in _TRANSPOSED:
            padding = _each(call["padding"], dims)
            reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
            before = [own - p for own, p in zip(reach, padding, strict=True)]
            value = _stuffed(value, stride, before, [o + own for o, own in zip(spatial, reach, strict=True)])
            stride = [1] * dims
        else:
            value = functional.pad(value, _padding(call["padding"], size, dilation))
        steps = value.stride()[2:]
        windows = value.as_strided(
            (*value.shape[:2], *spatial, *size),
            (
                *value.stride()[:2],
                *(s * n for s, n in zip(steps, stride, strict=True)),
                *(s * n for s, n in zip(steps, dilation, strict=True)),
            ),
        )
        sample, rest = places // math.prod(spatial), places % math.prod(spatial)
        where: tuple[Any, ...] = (sample, slice(None), *torch.unravel_index(rest, tuple(spatial)))
        found = windows[where]
        return found.reshape(len(places), self.groups, -1).transpose(0, 1)


def unhalved(value: Tensor) -> Tensor:
    """Numbers of half precision as float32: it has too few digits for sums of products over thousands of rows."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def readers(module: GraphModule) -> dict[Node, Reader]:
    """Every operator whose weight is a parameter that nothing else uses.

    Shared and derived weights are left out: fitting one use would change the others.
    """
    by_name: dict[int, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found = attribute(module, str(node.target))
            by_name[id(found)] = by_name.get(id(found), 0) + len(node.users)
    read = (_reader(module, node) for node in module.graph.nodes if node.op == "call_function")
    return {r.node: r for r in read if r is not None and by_name[id(attribute(module, r.weight))] == 1}


def _reader(module: GraphModule, node: Node) -> Reader | None:
    name = operator_name(node)
    if name not in (*_CONVOLUTIONS, *_TRANSPOSED, "linear", "addmm", "matmul", "mm"):
        return None
    call = arguments(node)
    source, weight, bias = {
        "addmm": ("mat1", "mat2", "self"), "matmul": ("self", "other", ""), "mm": ("self", "mat2", "")
    }.get(name, ("input", "weight", "bias"))  # fmt: skip
    if name == "addmm" and (call["beta"] != 1 or call["alpha"] != 1):
        return None
    if not _is_parameter(module, call[weight]) or not isinstance(call[source], Node):
        return None
    tensor = attribute(module, str(call[weight].target))
    if name in ("matmul", "mm") and tensor.dim() != 2:
        return None
    offset = call.get(bias)
    if offset is not None and not _is_parameter(module, offset):
        return None
    convolves = name in (*_CONVOLUTIONS, *_TRANSPOSED)
    value = call[source].meta.get("val")
    if convolves and (not isinstance(value, Tensor) or value.dim() != tensor.dim()):
        return None  # an input without a batch axis
    if name == "addmm" and offset is not None and attribute(module, str(offset.target)).dim() != 1:
        return None
    groups = int(call["groups"]) if convolves else 1
    return Reader(node, call[source], str(call[weight].target), offset and str(offset.target), groups)


def _is_parameter(module: GraphModule, node: Any) -> bool:
    if not isinstance(node, Node) or node.op != "get_attr":
        return False
    return isinstance(attribute(module, str(node.target)), torch.nn.Parameter)


def _each(value: Any, dims: int) -> list[int]:
    """One number for each axis, from a number or a list of one or all."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _padding(value: Any, size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """What `pad` wants: last axis first, before and after."""
    if value == "valid":
        value = 0
    if value == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in whole]
    else:
        pairs = [(p, p) for p in _each(value, len(size))]
    return [number for pair in reversed(pairs) for number in pair]


def _stuffed(value: Tensor, stride: Sequence[int], before: Sequence[int], whole: Sequence[int]) -> Tensor:
    """Zeros between the elements, and at the edges: a transposed convolution is a convolution of that.

    before: zeros at the beginning of each axis; less than none cuts. whole: the sizes that come out.
    """
    sizes = [(n - 1) * s + 1 for n, s in zip(value.shape[2:], stride, strict=True)]
    wide = value.new_zeros((*value.shape[:2], *sizes))
    where: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    wide[where] = value
    edges = [(b, w - b - s) for b, w, s in zip(before, whole, sizes, strict=True)]
    return functional.pad(wide, [number for edge in reversed(edges) for number in edge])
