"""What to take from a file that holds more than a model: the parts of a training checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from slimc.errors import LoadError
from slimc.loading.statedict import is_state_dict

# Where training scripts put the weights, the likeliest first; averaged weights last, as they may lag behind.
_PARTS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "student",
    "teacher",
    "ema",
    "params_ema",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
)


def model_part(value: object, label: str) -> tuple[nn.Module | Mapping[str, Any], tuple[str, ...]]:
    """The module or the state dict in what a file holds, with a note on where it was."""
    if isinstance(value, nn.Module):
        return value, ()
    if is_state_dict(value):
        assert isinstance(value, Mapping)
        return value, ()
    if isinstance(value, Mapping):
        usable = [key for key in _PARTS if _is_usable(value.get(key))]
        if usable:
            part = value[usable[0]]
            others = f"; it also holds weights under {', '.join(map(repr, usable[1:]))}" if usable[1:] else ""
            kind = "the whole module" if isinstance(part, nn.Module) else "the weights"
            return part, (f"a training checkpoint: took {kind} under {usable[0]!r}{others}",)
        keys = ", ".join(repr(key) for key in list(value)[:6])
        raise LoadError(
            f"{label}: a dictionary with the keys {keys or '(none)'}, none of which holds a model or its weights. "
            "Save the model itself, torch.save(model, ...), or its state_dict()."
        )
    raise LoadError(
        f"{label}: holds a {type(value).__name__}, not a model. Save the model itself, torch.save(model, ...), "
        "or its state_dict()."
    )


def _is_usable(value: object) -> bool:
    return isinstance(value, nn.Module) or is_state_dict(value)
