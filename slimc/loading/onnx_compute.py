"""ONNX operators that compute: layers, activations, norms, pooling, reductions and arithmetic."""

from __future__ import annotations

import operator as python
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slimc.loading.onnx_module import Call, Value, objects, operator, sizes, tensor

# -- layers ---------------------------------------------------------------------------------------------


@operator("Conv")
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution; padding that differs from side to side is made apart."""
    rank = weight.dim() - 2
    stride, dilation = _many(call, "strides", rank), _many(call, "dilations", rank)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    before, after = _padding(call, x, reach, stride)
    if before != after:
        x, before = F.pad(x, _pairs(before, after)), [0] * rank
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    result: Tensor = function(x, weight, bias, stride, before, dilation, call.get("group", 1))
    return result


@operator("ConvTranspose")
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Transposed convolution with the same padding on both sides."""
    rank = weight.dim() - 2
    if call.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or call.get("output_shape"):
        raise call.refuse("padding found from the output's size cannot be expressed")
    pads = call.get("pads", [0] * 2 * rank)
    if pads[:rank] != pads[rank:]:
        raise call.refuse("padding that differs from side to side cannot be expressed")
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    result: Tensor = function(
        x, weight, bias, _many(call, "strides", rank), pads[:rank], call.get("output_padding", [0] * rank),
        call.get("group", 1), _many(call, "dilations", rank),
    )  # fmt: skip
    return result


@operator("Gemm")
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha A B + beta C, each of A and B transposed where it says so; a linear layer where it is one."""
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    a, weight = a.t() if call.get("transA", 0) else a, b if call.get("transB", 0) else b.t()
    if alpha == 1 and (c is None or (beta == 1 and c.shape == weight.shape[:1])):
        return F.linear(a, weight, c)
    product = a @ weight.t()
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


@operator("MatMul")
def matmul(_call: Call, a: Value, b: Value) -> Tensor:
    """Matrix product as numpy has it."""
    return torch.matmul(tensor(a), tensor(b))


@operator("Einsum")
def einsum(call: Call, *operands: Tensor) -> Tensor:
    """Sums over named axes."""
    return torch.einsum(call.get("equation"), *operands)


# -- norms ----------------------------------------------------------------------------------------------


@operator("BatchNormalization")
def batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """With the statistics of the file; further results are of training and are left out."""
    if call.get("training_mode", 0) or (call.opset < 14 and call.results > 1):
        raise call.refuse("it is in training mode; export the model after model.eval()")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, call.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Each channel of each sample by its own statistics."""
    if x.shape[2:].numel() == 1:  # torch's function takes it for a mistake
        return torch.group_norm(x, x.shape[1], scale, bias, call.get("epsilon", 1e-5))
    return F.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Statistics over all axes from `axis` on."""
    shape = list(x.shape[call.get("axis", -1) % x.dim() :])
    if list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        return F.layer_norm(x, shape, scale, bias, call.get("epsilon", 1e-5))
    normed = F.layer_norm(x, shape, None, None, call.get("epsilon", 1e-5)) * scale
    return normed if bias is None else normed + bias


@operator("RMSNormalization")
def rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    """Divided by the root of the mean square over all axes from `axis` on."""
    return F.rms_norm(x, list(x.shape[call.get("axis", -1) % x.dim() :]), scale, call.get("epsilon", 1e-5))


@operator("GroupNormalization")
def group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Statistics over groups of channels; before opset 21 scale and bias were one number a group."""
    if scale.shape[0] != x.shape[1]:
        each = x.shape[1] // scale.shape[0]
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, call.get("num_groups"), scale, bias, call.get("epsilon", 1e-5))


@operator("LpNormalization")
def lp_norm(call: Call, x: Tensor) -> Tensor:
    """Divided by the length along an axis."""
    length: Tensor = torch.linalg.vector_norm(x, call.get("p", 2), call.get("axis", -1), keepdim=True)
    return x / length


@operator("LRN")
def lrn(call: Call, x: Tensor) -> Tensor:
    """Local response normalisation over neighbouring channels."""
    return F.local_response_norm(
        x, call.get("size"), call.get("alpha", 1e-4), call.get("beta", 0.75), call.get("bias", 1.0)
    )


# -- pooling --------------------------------------------------------------------------------------------


@operator("MaxPool")
def max_pool(call: Call, x: Tensor) -> Tensor:
    """The largest value in each window."""
    kernel = call.get("kernel_shape")
    stride, dilation = _many(call, "strides", len(kernel)), _many(call, "dilations", len(kernel))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    before, after = _padding(call, x, reach, stride)
    if before != after or any(2 * b > k for b, k in zip(before, kernel, strict=True)):
        x, before = F.pad(x, _pairs(before, after), value=float("-inf")), [0] * len(kernel)
    function: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    result: Tensor = function(x, kernel, stride, before, dilation, bool(call.get("ceil_mode", 0)))
    return result


@operator("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    """The mean of each window, borders counted or not as the file says."""
    kernel = call.get("kernel_shape")
    stride = _many(call, "strides", len(kernel))
    before, after = _padding(call, x, kernel, stride)
    counted = bool(call.get("count_include_pad", 0))
    if any(d != 1 for d in call.get("dilations", ())):
        raise call.refuse("dilated windows cannot be expressed")
    if before != after or any(2 * b > k for b, k in zip(before, kernel, strict=True)):
        if not counted:
            raise call.refuse("padding that differs from side to side and is not counted cannot be expressed")
        x, before = F.pad(x, _pairs(before, after)), [0] * len(kernel)
    function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    result: Tensor = function(x, kernel, stride, before, bool(call.get("ceil_mode", 0)), counted)
    return result


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(call: Call, x: Tensor) -> Tensor:
    """One number for each channel."""
    axes = list(range(2, x.dim()))
    return x.mean(axes, keepdim=True) if call.operator == "GlobalAveragePool" else x.amax(axes, keepdim=True)


def _many(call: Call, name: str, rank: int) -> list[int]:
    return list(call.get(name) or [1] * rank)


def _padding(call: Call, x: Tensor, reach: Sequence[int], stride: Sequence[int]) -> tuple[list[int], list[int]]:
    """Padding before and after each space axis."""
    rank = len(reach)
    kind = call.get("auto_pad", "NOTSET")
    if kind in ("NOTSET", ""):
        pads = list(call.get("pads") or [0] * 2 * rank)
        return pads[:rank], pads[rank:]
    if kind == "VALID":
        return [0] * rank, [0] * rank
    total = [max((-(-size // s) - 1) * s + r - size, 0) for size, s, r in zip(x.shape[2:], stride, reach, strict=True)]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if kind == "SAME_UPPER" else (large, small)


def _pairs(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Padding in torch's order: the last axis first, before and after."""
    return [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]


# -- activations ----------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[[Call, Tensor], Tensor]] = {
    "Relu": lambda _, x: torch.relu(x),
    "Sigmoid": lambda _, x: torch.sigmoid(x),
    "Tanh": lambda _, x: torch.tanh(x),
    "Erf": lambda _, x: torch.erf(x),
    "Exp": lambda _, x: torch.exp(x),
    "Log": lambda _, x: torch.log(x),
    "Sqrt": lambda _, x: torch.sqrt(x),
    "Abs": lambda _, x: torch.abs(x),
    "Sign": lambda _, x: torch.sign(x),
    "Reciprocal": lambda _, x: torch.reciprocal(x),
    "Floor": lambda _, x: torch.floor(x),
    "Ceil": lambda _, x: torch.ceil(x),
    "Round": lambda _, x: torch.round(x),
    "Sin": lambda _, x: torch.sin(x),
    "Cos": lambda _, x: torch.cos(x),
    "Tan": lambda _, x: torch.tan(x),
    "IsNaN": lambda _, x: torch.isnan(x),
    "Not": lambda _, x: torch.logical_not(x),
    "Softsign": lambda _, x: F.softsign(x),
    "Softplus": lambda _, x: F.softplus(x),
    "Mish": lambda _, x: F.mish(x),
    "HardSwish": lambda _, x: F.hardswish(x),
    "Swish": lambda c, x: x * torch.sigmoid(x * c.get("alpha", 1.0)) if c.get("alpha", 1.0) != 1 else F.silu(x),
    "Gelu": lambda c, x: F.gelu(x, approximate=c.get("approximate", "none")),
    "LeakyRelu": lambda c, x: F.leaky_relu(x, c.get("alpha", 0.01)),
    "Elu": lambda c, x: F.elu(x, c.get("alpha", 1.0)),
    "Celu": lambda c, x: F.celu(x, c.get("alpha", 1.0)),
    "Selu": lambda c, x: (
        c.get("gamma", 1.0507009873554805)
        * torch.where(x > 0, x, c.get("alpha", 1.6732632423543772) * (torch.exp(x) - 1))
    ),
    "HardSigmoid": lambda c, x: torch.clamp(x * c.get("alpha", 0.2) + c.get("beta", 0.5), 0, 1),
    "ThresholdedRelu": lambda c, x: torch.where(x > c.get("alpha", 1.0), x, torch.zeros_like(x)),
}


@operator(*_ACTIVATIONS)
def activation(call: Call, x: Value) -> Tensor:
    """A function of each element."""
    return _ACTIVATIONS[call.operator](call, tensor(x))


@operator("PRelu")
def prelu(_call: Call, x: Tensor, slope: Tensor) -> Tensor:
    """Slopes broadcast from the right; one slope a channel is torch's own."""
    if slope.dim() == x.dim() - 1 and slope.numel() == slope.shape[0] == x.shape[1]:
        return F.prelu(x, slope.flatten())
    return torch.where(x > 0, x, x * slope)


@operator("Clip")
def clip(call: Call, x: Tensor, low: Value = None, high: Value = None) -> Tensor:
    """Limits are attributes in old files and inputs in newer ones."""
    low, high = call.get("min", low), call.get("max", high)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return torch.clamp(x, low, high) if low is not None or high is not None else x
    x = x if low is None else torch.maximum(x, tensor(low).to(x))
    return x if high is None else torch.minimum(x, tensor(high).to(x))


@operator("Softmax", "LogSoftmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    """Along one axis; before opset 13 along everything from `axis` on."""
    function = torch.softmax if call.operator == "Softmax" else torch.log_softmax
    axis = call.get("axis", -1 if call.opset >= 13 else 1) % x.dim()
    if call.opset >= 13 or axis == x.dim() - 1:
        return function(x, axis)
    return function(x.flatten(axis), axis).reshape(x.shape)


@operator("Dropout", "Identity")
def same(_call: Call, x: Value, *_options: Value) -> Value:
    """Nothing happens at inference."""
    return x


# -- arithmetic -----------------------------------------------------------------------------------------

_BINARY: dict[str, Any] = {
    "Add": python.add, "Sub": python.sub, "Mul": python.mul, "Div": torch.div, "Pow": torch.pow,
    "Equal": python.eq, "Greater": python.gt, "Less": python.lt, "GreaterOrEqual": python.ge, "LessOrEqual": python.le,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip


def _quotient(a: Any, b: Any) -> Any:
    """ONNX divides whole numbers towards zero; sizes that are open are positive."""
    if isinstance(a, int) and isinstance(b, int) and b:
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b


_OF_SHAPES = {
    "Add": python.add, "Sub": python.sub, "Mul": python.mul, "Div": _quotient, "Mod": python.mod,
    "Max": torch.sym_max, "Min": torch.sym_min,
    "Equal": lambda a, b: bool(a == b), "Greater": lambda a, b: bool(a > b), "Less": lambda a, b: bool(a < b),
}  # fmt: skip


@operator(*_BINARY)
def binary(call: Call, a: Value, b: Value) -> Value:
    """Element by element with broadcasting; of sizes, in whole numbers."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        if call.operator in _OF_SHAPES:
            return _shapes(_OF_SHAPES[call.operator], a, b)
        a, b = tensor(a), tensor(b)
    if call.operator == "Div" and not _is_float(a) and not _is_float(b):
        return torch.div(tensor(a), tensor(b), rounding_mode="trunc")
    # A plain number stays one, so that it takes the type of what it meets.
    a, b = (v if isinstance(v, (Tensor, int, torch.SymInt)) else tensor(v) for v in (a, b))
    if call.operator in ("And", "Or", "Xor", "Pow", "Div") and not isinstance(a, Tensor):
        a = tensor(a).to(b)
    result: Value = _BINARY[call.operator](a, b)
    return result


@operator("Mod")
def mod(call: Call, a: Value, b: Value) -> Value:
    """The remainder; with the sign of the divisor, or as C has it where `fmod` says so."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return _shapes(python.mod, a, b)
    return torch.fmod(tensor(a), tensor(b)) if call.get("fmod", 0) else torch.remainder(tensor(a), tensor(b))


@operator("Max", "Min", "Sum", "Mean")
def variadic(call: Call, first: Value, *others: Value) -> Value:
    """Any number of operands, element by element."""
    if call.operator in _OF_SHAPES and not any(isinstance(value, Tensor) for value in (first, *others)):
        for other in others:
            first = _shapes(_OF_SHAPES[call.operator], first, other)
        return first
    function: Any = {"Max": torch.maximum, "Min": torch.minimum}.get(call.operator, torch.add)
    result = tensor(first)
    for other in others:
        result = function(result, tensor(other).to(result.dtype))
    return result / (1 + len(others)) if call.operator == "Mean" else result


@operator("Neg")
def negative(_call: Call, x: Value) -> Value:
    """The opposite sign."""
    return sizes(-objects(x)) if isinstance(x, list) else -x


def _shapes(function: Callable[[Any, Any], Any], a: Value, b: Value) -> Value:
    """A function of sizes, lists or single ones, broadcast."""
    return sizes(np.frompyfunc(function, 2, 1)(objects(a), objects(b)))


def _is_float(value: Value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# -- reductions -----------------------------------------------------------------------------------------

_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keep),
}


@operator(*_REDUCTIONS, "ReduceProd")
def reduction(call: Call, x: Value, axes: Value = None) -> Value:
    """Axes are an attribute in old files and an input in newer ones; none means all, or nothing if it says so."""
    keep, axes = bool(call.get("keepdims", 1)), call.get("axes", axes)
    if call.operator == "ReduceProd":
        return _product(call, x, axes, keep)
    x = tensor(x)
    if not axes and call.get("noop_with_empty_axes", 0):
        return x
    return _REDUCTIONS[call.operator](x, list(axes) if axes else list(range(x.dim())), keep)


def _product(call: Call, x: Value, axes: Value, keep: bool) -> Value:
    """Mostly the number of elements of a shape."""
    if isinstance(x, list):
        return sizes(objects(x).prod(tuple(axes) if axes else None, keepdims=keep))
    x = tensor(x)
    if not axes or len(axes) != 1:
        raise call.refuse("a product over several axes cannot be expressed")
    return x.prod(axes[0], keep)
