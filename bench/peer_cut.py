"""Torch-Pruning's global pruner run down to a share of the MACs, and its choice of channels as a plan of slimc's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimc.plan import Plan

PIECES = 400
"""Steps from everything to nothing: Torch-Pruning has no target of its own, so it is stopped at the right one."""


def macs(module: nn.Module, example: Tensor) -> float:
    """Multiply-accumulates of one sample by Torch-Pruning's counter."""
    import torch_pruning

    training = module.training
    module.eval()
    found = float(torch_pruning.utils.count_ops_and_params(module, example[:1])[0])
    module.train(training)
    return found


def pruner_of(model: nn.Module, example: Tensor, importance: Any = None, kind: str = "magnitude", **more: Any) -> Any:
    """A global pruner that keeps the outputs of the last layer; `kind` may be "group-sparsity"."""
    import torch_pruning

    make = {
        "magnitude": torch_pruning.pruner.MagnitudePruner,
        "group-sparsity": torch_pruning.pruner.GroupNormPruner,
    }[kind]
    options = {
        "importance": importance or torch_pruning.importance.GroupMagnitudeImportance(p=2), "global_pruning": True,
        "pruning_ratio": 1.0, "iterative_steps": PIECES,
        "ignored_layers": [model[-1]],  # type: ignore[index]
    } | more  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(model, example, **options)


def shrink(pruner: Any, model: nn.Module, example: Tensor, limit: float) -> None:
    """Step until at most so many MACs are left."""
    while macs(model, example) > limit:
        pruner.step()


def chosen(
    model: nn.Module, example: Tensor, budget: float, method: str, batches: Iterable[tuple[Tensor, Tensor]]
) -> Plan:
    """What Torch-Pruning keeps at a share of the MACs by "magnitude" or "taylor" (gradients of labelled batches)."""
    import torch_pruning

    ours = copy.deepcopy(model)
    importances = torch_pruning.importance
    pruner = pruner_of(ours, example, importances.GroupTaylorImportance() if method == "taylor" else None)
    if method == "taylor":
        for images, labels in batches:
            functional.cross_entropy(ours(images), labels).backward()  # type: ignore[no-untyped-call]
    shrink(pruner, ours, example, budget * macs(ours, example))
    return _replayed(model, example, pruner.pruning_history())


def _replayed(model: nn.Module, example: Tensor, history: Any) -> Plan:
    """The same steps on a copy whose every number says where it stood: what is left tells what was kept."""
    traced = copy.deepcopy(model).double()
    pruner = pruner_of(traced, example.double())
    shapes = {name: list(t.shape) for name, t in traced.state_dict().items() if t.dim()}
    with torch.no_grad():
        for tensor in traced.state_dict().values():
            if tensor.dim():
                inputs = tensor.shape[1] if tensor.dim() > 1 else 1
                place = torch.arange(len(tensor) * inputs, dtype=tensor.dtype).reshape(len(tensor), inputs)
                tensor.copy_(place.reshape(*tensor.shape[:2], *[1] * (tensor.dim() - 2)).expand_as(tensor))
    pruner.load_pruning_history(history)
    kept: dict[str, dict[int, list[int]]] = {}
    for name, tensor in traced.state_dict().items():
        if not tensor.dim() or list(tensor.shape) == shapes[name]:
            continue
        places = tensor.reshape(*tensor.shape[:2], -1)[..., 0].long() if tensor.dim() > 1 else tensor.long()[:, None]
        inputs = shapes[name][1] if tensor.dim() > 1 else 1
        axes = {0: (places[:, 0] // inputs).tolist(), 1: (places[0] % inputs).tolist()}
        kept[name] = {axis: own for axis, own in axes.items() if len(own) < (shapes[name] + [1])[axis]}
    return Plan(kept, {name: shapes[name] for name in kept})
