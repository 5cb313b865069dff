"""Which torchvision architectures a file of weights fits, found by comparing names and shapes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimc.loading.builders import construct_torchvision, seeded

# A hint is worth a few seconds; with one model built for each family, about two are needed.
_SECONDS = 10.0
_ALLOCATIONS = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, torch.full)


class _ShapesOnly(TorchFunctionMode):
    """Make weights on the meta device, but leave the little arithmetic of constructors real (regnet needs it)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ALLOCATIONS:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


def matching_architectures(state: Mapping[str, Tensor]) -> list[tuple[str, bool]]:
    """torchvision models whose names and shapes are those of the file; the flag is False where only the head differs.

    Empty when torchvision is not installed, or when nothing matches within ten seconds.
    """
    try:
        from torchvision import models
    except ImportError:
        return []
    shapes = _shapes(state)
    exact: list[tuple[str, bool]] = []
    nearly: list[tuple[str, bool]] = []
    other_families: set[str] = set()
    end = time.monotonic() + _SECONDS
    for name in _names(models):
        family = _family(models, name)
        if family in other_families or time.monotonic() > end:
            continue
        own = _model_shapes(name)
        if own is None:
            continue
        if not {next(iter(own)), next(reversed(own))} <= shapes.keys():
            other_families.add(family)
        if own.keys() != shapes.keys():
            continue
        changed = [key for key in own if own[key] != shapes[key]]
        if not changed:
            exact.append((name, True))
        elif len(changed) <= 2 and all(own[key][1:] == shapes[key][1:] for key in changed):
            nearly.append((name, False))
    return exact or nearly


def _names(models: Any) -> list[str]:
    families = (models, models.segmentation, models.video)
    return [name for family in families for name in models.list_models(module=family)]


def _family(models: Any, name: str) -> str:
    """Models that begin and end with tensors of the same name: those of one file, but for segmentation backbones."""
    module: str = models.get_model_builder(name).__module__
    return name if ".segmentation" in module else module


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    # files of old versions lack the counters of batch normalization
    return {n: tuple(v.shape) for n, v in state.items() if isinstance(v, Tensor) and not n.endswith("batches_tracked")}


def _model_shapes(name: str) -> dict[str, tuple[int, ...]] | None:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    try:
        with seeded(), _ShapesOnly():
            model: nn.Module = construct_torchvision(name, **options)
    except Exception:  # a model that cannot be built this way is no candidate; this is a hint, not a result
        return None
    return _shapes(model.state_dict())


def suggestion(matches: list[tuple[str, bool]], tensors: int) -> str:
    """The sentence about matching architectures that ends an error message."""
    names = " or ".join(f"--arch torchvision:{name}" for name, _ in matches[:3])
    exact = "all match" if matches[0][1] else "match but for the size of the head"
    return f"Add {names} (its {tensors} tensors {exact})."
