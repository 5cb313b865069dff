"""A saved compression put back into the user's own class."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from . import eager
from .errors import OutputError, PlanError, UsageError
from .plan import Plan


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """The user's own class with the sizes and weights of a saved compression; `model` is left as it is.

    Raises PlanError where the class cannot take the sizes (then model.pt2 holds the network), OutputError where
    the folder is none of ours.
    """
    from .exporters.formats import safetensors

    if not isinstance(model, nn.Module):
        raise UsageError(f"wanted an nn.Module to take the sizes and weights, got {type(model).__name__}")
    folder = Path(folder)
    if not (folder / "plan.json").is_file():
        raise OutputError(f"{folder} holds no plan.json; give a folder that slimc has written")
    plan = Plan.load(folder / "plan.json")
    if plan.attributes is None:
        raise PlanError(
            f"{type(model).__name__} cannot take the sizes of this plan ({plan.attributes_note}). "
            f"Load the network with torch.export.load({str(folder / 'model.pt2')!r}) instead."
        )
    weights = safetensors.load(folder / "model.safetensors")
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    # Buffers that are saved nowhere are made by the class, and cut here.
    sliced = plan.apply({**buffers, **state})
    if foreign := sorted(weights.keys() - state.keys()):
        raise PlanError(
            f"{folder / 'model.safetensors'} holds {foreign[0]}, which {type(model).__name__} does not have: the model "
            "given is of another architecture than the one that was compressed"
        )
    for tensor_name in state:
        tensor = sliced[tensor_name]
        found = weights.get(tensor_name)
        if found is None or found.shape != tensor.shape or found.is_floating_point() != tensor.is_floating_point():
            kind = "numbers" if tensor.is_floating_point() else "whole numbers"
            raise PlanError(
                f"{folder / 'model.safetensors'} does not hold {kind} for {tensor_name} of shape {tuple(tensor.shape)}"
            )
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **buffers,
    }
    places = {t.device for t in named.values() if t.device.type != "meta"}
    place = places.pop() if len(places) == 1 else torch.device("cpu")
    kinds = {t.dtype for t in weights.values() if t.is_floating_point()}
    tensors: dict[str, torch.Tensor] = {}
    for n, t in named.items():
        if n in weights:
            own = weights[n].to(place)
            tensors[n] = nn.Parameter(own, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else own
        elif n in buffers and n not in state:
            if sliced[n].device.type == "meta":
                raise PlanError(f"{n} is saved nowhere and has no values (it is on the meta device): give a real model")
            # Of the precision that the others have.
            precision = next(iter(kinds)) if sliced[n].is_floating_point() and len(kinds) == 1 else sliced[n].dtype
            tensors[n] = sliced[n].to(place, precision)
    small = eager.with_tensors(model, tensors)
    eager.set_attributes(small, plan.attributes)
    return small
