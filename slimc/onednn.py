"""A way round a fault of oneDNN's, with which torch computes convolutions on processors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BLOCK = 16
"""Channels that the widest kernels of a processor take at once (AVX-512; 8 with AVX2)."""
_CONVOLUTIONS = {"conv2d", "convolution"}
_NAMES = ("input", "weight", "bias", "stride")
"""Their first arguments, in order."""


class Guard(TorchFunctionMode):
    """Within it, a forward pass is one whose backward pass computes the weights' gradients of convolutions rightly.

    On a processor, those of a convolution with a kernel of one pixel, a stride, channels last, and fewer inputs than a
    kernel takes at once, are written past the end of a buffer: wrong gradients, a crash, or no end (oneDNN issue 6035;
    seen with torch 2.14.1 and AVX2 below 8 inputs, in two dimensions, not in groups or transposed). Slim networks have
    such layers: shortcuts of residual networks, for one. So these see their input in torch's usual layout.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch's."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        if name not in _CONVOLUTIONS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        given = dict(zip(_NAMES, args, strict=False)) | kwargs
        if not _is_at_risk(given):
            return func(*args, **kwargs)
        x = given["input"]
        # Copies: where an axis has one place, a tensor is in both layouts, and torch may take it for the other.
        usual = {n: given[n].clone(memory_format=torch.contiguous_format) for n in ("input", "weight")}
        by_place = [usual.get(n, value) for n, value in zip(_NAMES, args, strict=False)]
        result = func(*by_place, *args[len(by_place) :], **(kwargs | {n: usual[n] for n in usual.keys() & kwargs}))
        is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return result.contiguous(memory_format=torch.channels_last) if is_last else result


def _is_at_risk(given: dict[str, Any]) -> bool:
    """Arguments of a convolution, or of anything else, by name."""
    x, weight, stride = given.get("input"), given.get("weight"), given.get("stride", 1)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return False
    strides = [stride] if isinstance(stride, int) else list(stride)
    return (
        x.device.type == "cpu"
        and x.dim() == weight.dim() == 4
        and weight.shape[2:].numel() == 1
        and weight.shape[1] < _BLOCK
        and max(strides) > 1
    )
