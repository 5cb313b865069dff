"""The memory layout in which convolutions are trained: channels last, in which they are fast.

A model that flattens maps with `view` runs in the other layout only. Whether one does is tried once.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimc.graph.example import Example
from slimc.samples import Batch

from .aside import aside

_FITS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model runs in channels last, where that has been tried."""
_VIEW = "view size is not compatible"


def arrange(module: nn.Module) -> None:
    """Put a module's convolution weights into the layout that it is to be trained in."""
    if _has_maps(module) and _FITS.get(module, True):
        _turn(module, torch.channels_last)


def layout(batch: Batch, module: nn.Module) -> Batch:
    """Pictures in the layout in which a module is trained; a module that does not run in it is put back."""
    if not _has_maps(module):
        return batch
    example = batch.example.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
    if module not in _FITS:
        # A graph asks for shapes, not for layouts (`capture`).
        _FITS[module] = isinstance(module, GraphModule) or _runs(module, example)
    if not _FITS[module]:
        _turn(module, torch.contiguous_format)
        return batch
    return replace(batch, example=example)


def _has_maps(module: nn.Module) -> bool:
    return any(parameter.dim() == 4 for parameter in module.parameters())


def _turn(module: nn.Module, layout: torch.memory_format) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=layout)


def _runs(module: nn.Module, example: Example) -> bool:
    """Whether one run in eval mode ends without an error, and one in training mode without one of the layout.

    They leave no trace. In training mode other things may be wrong, such as a batch norm with one sample.
    """
    for training in (False, True):
        try:
            with aside(module, training):
                example.map(Tensor.clone).run(module)
        except RuntimeError as error:
            if not training or _VIEW in str(error):
                return False
        except Exception:
            if not training:
                raise
    return True
