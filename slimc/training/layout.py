"""The memory layout in which convolutions are trained: channels last, in which they are fast."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from slimc.samples import Batch


def arrange(module: nn.Module) -> None:
    """Put a module's convolution weights into the layout that it is to be trained in."""
    if _has_maps(module):
        module.to(memory_format=torch.channels_last)


def layout(batch: Batch, module: nn.Module) -> Batch:
    """Pictures in the layout in which a module is trained."""
    if not _has_maps(module):
        return batch
    change = batch.example.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    return replace(batch, example=change)


def _has_maps(module: nn.Module) -> bool:
    return any(parameter.dim() == 4 for parameter in module.parameters())
