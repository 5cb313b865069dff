"""Steps of distillation: the weights of layers move by orthogonal matrices (Muon), whatever else is trained by Adam.

An orthogonal step moves every direction of a matrix as far, also those that gradients hardly show. A slim ResNet-20
came about as near to the original in 25 epochs as in 100 of Adam's (at 70% of the FLOPs, one seed).

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); convolutions are taken as
matrices of outputs by inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimc.graph.infer import attribute, hint
from slimc.readers import readers, unhalved
from slimc.recover import Task

_RATE, _MATRIX_RATE = 1e-3, 2e-3
_PLACES = 20
"""Five steps of Newton and Schulz take 10 m multiplications for each weight, m the smaller side, and training takes 3
for each place of the output. With so many places for each m, a sixth of the layer's training goes into them."""


class Optimiser:
    """Moves parameters along their gradients, matrices by Muon and the others by Adam.

    matrices: among the parameters; each is moved as [first axis, all others]. Parameters of half precision are moved
    in float32 and rounded after each step.
    """

    def __init__(self, parameters: Sequence[Tensor], matrices: Sequence[Tensor]) -> None:
        chosen = {id(matrix) for matrix in matrices}
        self._moved: list[tuple[Tensor, Tensor]] = []
        for parameter in parameters:
            parameter.grad = None
            # Shares memory with the parameter, unless that is of half precision.
            own = unhalved(parameter.detach())
            # Muon takes two axes only.
            own = own.view(len(own), -1) if id(parameter) in chosen else own.view_as(own)
            self._moved.append((parameter, own.requires_grad_(True)))
        flat = [own for parameter, own in self._moved if id(parameter) in chosen]
        others = [own for parameter, own in self._moved if id(parameter) not in chosen]
        muon = [torch.optim.Muon(flat, lr=_MATRIX_RATE, weight_decay=0.0)] if flat else []
        self._optimisers = [*muon, *([torch.optim.Adam(others, lr=_RATE)] if others else [])]
        self._rates = [group["lr"] for group in self._groups()]

    def step(self, share: float) -> None:
        """Move once by a share of the full rates."""
        for parameter, own in self._moved:
            own.grad = None if parameter.grad is None else unhalved(parameter.grad).reshape(own.shape)
        for group, rate in zip(self._groups(), self._rates, strict=True):
            group["lr"] = rate * share
        for optimiser in self._optimisers:
            optimiser.step()
        for parameter, own in self._moved:
            parameter.grad = None
            if own.dtype != parameter.dtype:
                with torch.no_grad():
                    parameter.copy_(own.view_as(parameter))

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimiser in self._optimisers for group in optimiser.param_groups]


def matrices(task: Task, samples: int) -> list[Tensor]:
    """Weights of the slim graph that orthogonal steps are right and cheap for, where so many samples are a batch.

    Left out are those of grouped convolutions, which are many matrices, and those with few places for their size: the
    last layers of a network for small pictures, say.
    """
    originals = {new: old for old, new in task.twins.items()}
    found = []
    for node, reader in readers(task.slim).items():
        weight: Tensor = attribute(task.slim, reader.weight)
        if node not in originals or reader.groups > 1 or not weight.is_contiguous():
            continue
        each = reader.places([hint(size) for size in originals[node].meta["val"].shape]) / task.types.captured.batch
        if _PLACES * min(len(weight), weight.numel() // len(weight)) <= each * samples:
            found.append(weight)
    return found
