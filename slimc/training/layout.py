"""The memory layout in which convolutions are trained: channels last, in which they are fast.

A model that flattens maps with `view` runs in the other layout only. Whether one does is tried once for its code.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimc.graph.example import Example
from slimc.graph.stateless import buffers_kept, modes_kept
from slimc.samples import Batch

_FITS: dict[frozenset[object], bool] = {}
"""Whether models that are made of some forward functions run in channels last."""


def arrange(module: nn.Module) -> None:
    """Put a module's convolution weights into the layout that it is to be trained in."""
    if _has_maps(module) and _FITS.get(_code(module), True):
        _turn(module, torch.channels_last)


def layout(batch: Batch, module: nn.Module) -> Batch:
    """Pictures in the layout in which a module is trained; a module that does not run in it is put back."""
    if not _has_maps(module):
        return batch
    example = batch.example.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    key = _code(module)
    if key not in _FITS:
        # A graph asks for shapes, not for layouts (`capture`).
        _FITS[key] = isinstance(module, GraphModule) or _runs(module, example)
    if not _FITS[key]:
        _turn(module, torch.contiguous_format)
        return batch
    return replace(batch, example=example)


def _has_maps(module: nn.Module) -> bool:
    return any(parameter.dim() == 4 for parameter in module.parameters())


def _turn(module: nn.Module, layout: torch.memory_format) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=layout)


def _code(module: nn.Module) -> frozenset[object]:
    return frozenset(getattr(type(part).forward, "__code__", None) for part in module.modules())


@torch.no_grad()
def _runs(module: nn.Module, example: Example) -> bool:
    """Whether one run in eval mode, which leaves no trace, ends without an error."""
    try:
        with torch.random.fork_rng(devices=[]), buffers_kept(module), modes_kept(module, training=False):
            example.map(Tensor.clone).run(module)
    except RuntimeError:
        return False
    return True
