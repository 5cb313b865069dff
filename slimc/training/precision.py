"""In which precision training computes: bfloat16 where that is fast and the model runs in it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slimc.errors import UsageError, first_line
from slimc.graph.example import Example

from .aside import aside
from .recipe import Recipe


@functools.cache
def computes_in_bfloat16(kind: str) -> bool:
    """Whether a device multiplies bfloat16 numbers faster than float32."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    flags = torch.backends.cpu.get_cpu_capability()
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None), getattr(torch.cpu, "_is_amx_tile_supported", None)
    return flags.startswith("AVX512") and any(bool(ask()) for ask in known if ask is not None)


@contextlib.contextmanager
def autocast(recipe: Recipe, module: nn.Module) -> Iterator[None]:
    """bfloat16 where the recipe and the device have it, and the model is in float32."""
    kind = _casting(recipe, module)
    with contextlib.nullcontext() if kind is None else torch.autocast(kind, torch.bfloat16):
        yield


def _casting(recipe: Recipe, module: nn.Module) -> str | None:
    """The kind of device to compute on in bfloat16; None for the model's own precision."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    kind = "cpu" if first is None else first.device.type
    wanted = recipe.precision == "bfloat16" or (recipe.precision == "auto" and computes_in_bfloat16(kind))
    return kind if wanted and (first is None or first.dtype == torch.float32) else None


def settled(recipe: Recipe, module: nn.Module, example: Example) -> Recipe:
    """A recipe in float32 where it leaves the precision open and the model, though it runs, does not in bfloat16.

    UsageError where bfloat16 is asked for.
    """
    if _casting(recipe, module) is None:
        return recipe
    with aside(module):
        try:
            with autocast(recipe, module):
                example.run(module)
        except Exception as error:  # an operator without a kernel, or one whose operands must be of one type
            if recipe.precision == "bfloat16":
                raise UsageError(
                    f"the model does not run in bfloat16 ({first_line(error)}): leave precision= out, or give float32"
                ) from error
            return replace(recipe, precision="float32")
    return recipe


def widened(outputs: Any) -> Any:
    """Outputs of an autocast model in float32 and maps in torch's usual layout, for losses and metrics."""

    def usual(tensor: Tensor) -> Tensor:
        wide = tensor.float() if tensor.is_floating_point() else tensor
        return wide.contiguous() if wide.dim() == 4 else wide

    return pytree.tree_map_only(Tensor, usual, outputs)
