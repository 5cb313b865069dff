"""The memory layout in which convolutions are trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from slimc.samples import Batch

_BLOCK = 16
"""Channels that the widest kernels of a processor take at once (AVX-512; 8 with AVX2)."""


def memory_format(module: nn.Module) -> torch.memory_format:
    """Channels last, in which convolutions are fast, unless this would run into a fault of oneDNN's.

    On a processor, the weights' gradients of a 1x1 convolution with a stride, channels last, and fewer inputs than a
    kernel takes at once are written past the end of a buffer: wrong gradients or a crash (oneDNN issue 6035; seen with
    torch 2.14.1 and AVX2 below 8 inputs, not in groups or transposed). Slim networks have such layers: shortcuts of
    residual networks, for one.
    """
    return torch.contiguous_format if any(map(_overruns, module.modules())) else torch.channels_last


def arrange(module: nn.Module) -> None:
    """Put a module's convolution weights into the layout that it is to be trained in."""
    if _has_maps(module):
        module.to(memory_format=memory_format(module))


def layout(batch: Batch, module: nn.Module) -> Batch:
    """Pictures in the layout in which a module is trained."""
    if not _has_maps(module):
        return batch
    wanted = memory_format(module)
    change = batch.example.map(lambda t: t.contiguous(memory_format=wanted) if t.dim() == 4 else t)
    return replace(batch, example=change)


def _has_maps(module: nn.Module) -> bool:
    return any(parameter.dim() == 4 for parameter in module.parameters())


def _overruns(module: nn.Module) -> bool:
    """Whether a module's own weights include such a convolution's; where user code holds them, they are suspected."""
    if isinstance(module, nn.ConvTranspose2d) or (
        isinstance(module, nn.Conv2d) and (max(module.stride) == 1 or module.groups > 1)
    ):
        return False
    return any(
        p.dim() == 4 and p.shape[1] < _BLOCK and p.shape[2:].numel() == 1 and not p.is_cuda
        for p in module.parameters(recurse=False)
    )
