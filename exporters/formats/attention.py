"""Attention with more or fewer axes than ONNX's exporter of torch takes: brought to [batch, heads, length, size]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_AXES = 4


def with_four_axes(program: ExportedProgram) -> ExportedProgram:
    """A program of the same meaning in which every attention has four axes; the same one where all have them."""
    nodes = [node for node in program.graph.nodes if node.target is _ATTENTION]
    if all(len(node.meta["val"].shape) == _AXES for node in nodes):
        return program
    changed: ExportedProgram = program.run_decompositions({_ATTENTION: _attend})
    return changed


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *more: Any, **options: Any) -> Any:
    if query.dim() == _AXES:
        return NotImplemented  # stays as it is
    batch = (query[..., 0, 0] + key[..., 0, 0] + value[..., 0, 0]).shape  # as they broadcast
    if mask is not None and mask.dim() > 2:
        mask = _folded(mask.expand(*batch, *mask.shape[-2:]))
    folded = [_folded(each.expand(*batch, *each.shape[-2:])) for each in (query, key, value)]
    result = _ATTENTION(*folded, mask, *more, **options)
    return result.reshape(*batch, query.shape[-2], value.shape[-1])


def _folded(value: Tensor) -> Tensor:
    """All leading axes in one, and one head."""
    return value.reshape(-1, 1, *value.shape[-2:])
