"""Discrimination-aware channel pruning: greedily pick the input channels with the largest gradient.

Source: Zhuang et al., "Discrimination-aware Channel Pruning for Deep Neural Networks" (NeurIPS 2018). A layer starts
with no input channel; the one with the largest gradient of reconstruction error plus cross entropy comes in with its
trained weights, and so on. As a scorer it keeps to one backward pass: the network's own head stands for the paper's
auxiliary heads, the cross entropy is taken linear around the trained network, picked weights are not optimised between
picks, and groups of more than 64 channels pick several at a time. The gradient of the reconstruction error is exact and
follows the picks. The schedule `dcp` trains the heads and takes the gradient of their losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimc.gradients import parameter_gradients
from slimc.graph.groups import Group
from slimc.graph.terms import Terms
from slimc.readings import Reading, Sampling, running_worst
from slimc.scores import Scores, Subject, scorer

_ROUNDS = 64
"""Picks until all channels are in: wide groups pick several at a time, where the paper picks one."""
_OUTPUTS = 512
"""Outputs of a layer that are looked at; more are thinned evenly."""


@scorer(
    "dcp",
    "output error left when a channel is picked, by gradient of error and loss",
    "Zhuang et al., NeurIPS 2018",
    "labels",
)
def dcp(subject: Subject) -> list[Scores]:
    """What is left of the readers' squared error when a channel's turn comes, largest from there on; 1 for the first.

    Gradient norms are summed over outputs (of each kernel's Frobenius norm) and over readers. Groups that no plain
    convolution or linear layer reads have no score.
    """
    sampling = Sampling(subject, "dcp")
    gradients: dict[str, Tensor] = {}
    batches = 0
    for found in parameter_gradients(subject, names=sampling.parameters, places=sampling.places):
        for name, gradient in found.items():
            gradients[name] = gradient if name not in gradients else gradients[name].add_(gradient)
        batches += 1
    return picked(subject, sampling.readings(), {name: gradient / batches for name, gradient in gradients.items()})


def picked(subject: Subject, layers: list[Reading], gradients: dict[str, Tensor]) -> list[Scores]:
    """Scores of every group from the gradients of the readers' weights; NaN without a reader."""
    scores = []
    for group in subject.grouping.groups:
        parts = [part for layer in layers if (part := _part(layer, group, gradients)) is not None]
        scores.append(pick(parts, group.width) if parts else np.full(group.width, np.nan))
    return scores


@dataclass
class Part:
    """One reader while channels are picked.

    rows: [rows, channels, kernel]; weight: [outputs, channels, kernel]; members: [channels] places in the group.
    residual: [rows, outputs] what the picked channels leave of the group's contribution.
    gradient: [channels, kernel, outputs] of the loss plus half the mean squared residual, kept up to date.
    """

    rows: Tensor
    weight: Tensor
    members: Terms
    residual: Tensor
    gradient: Tensor

    def norms(self) -> Tensor:
        """[channels] the gradient's norm: Frobenius over a kernel, summed over outputs."""
        # Torch's own vector norm takes ten times as long across an inner axis.
        return self.gradient.square().sum(1).sqrt_().sum(1)

    def take(self, channels: Terms) -> None:
        """Bring channels in with their trained weights."""
        index = torch.from_numpy(channels)
        rows, weight = self.rows[:, index].flatten(1), self.weight[:, index].flatten(1)
        self.residual -= rows @ weight.T
        cross = self.rows.flatten(1).T @ rows
        self.gradient.view(-1, self.gradient.shape[2]).addmm_(cross, weight.T, alpha=1 / self.residual.numel())


def _part(layer: Reading, group: Group, gradients: dict[str, Tensor]) -> Part | None:
    members = layer.members(group)
    chosen = np.flatnonzero(members >= 0)
    if not chosen.size:
        return None
    outputs = np.unique(np.linspace(0, len(layer.weight) - 1, min(len(layer.weight), _OUTPUTS)).astype(np.int64))
    # Rows are the large part: no copy where the group is all that the layer reads.
    rows = layer.rows if chosen.size == len(members) else layer.rows[:, chosen]
    weight = layer.weight[outputs][:, chosen]
    own = gradients.get(layer.parameter)
    gradient = (
        torch.zeros_like(weight) if own is None else own[layer.outputs].flatten(2) if own.dim() > 2 else own[..., None]
    )
    if own is not None:
        gradient = gradient[outputs][:, chosen]
    residual = rows.flatten(1) @ weight.flatten(1).T
    pull = (rows.flatten(1).T @ residual).reshape(len(chosen), -1, len(outputs))
    gradient = (gradient.permute(1, 2, 0) - pull / residual.numel()).contiguous()
    return Part(rows, weight, members[chosen], residual, gradient)


def pick(parts: list[Part], width: int) -> Scores:
    """Pick all channels, the largest gradient first; each scores the error left before it, largest from there on."""
    targets = [max(float(part.residual.square().sum()), 1e-300) for part in parts]
    left = np.ones(width, np.bool_)
    order: list[int] = []
    errors: list[float] = []
    at_once = -(-width // _ROUNDS)
    while left.any():
        rest = [float(p.residual.square().sum()) / target for p, target in zip(parts, targets, strict=True)]
        norms = np.zeros(width)
        for part in parts:
            np.add.at(norms, part.members, part.norms().double().cpu().numpy())
        best = np.argsort(-np.where(left, norms, -np.inf), kind="stable")[: min(at_once, int(left.sum()))]
        left[best] = False
        order.extend(best.tolist())
        errors.extend([sum(rest) / len(rest)] * len(best))
        for part in parts:
            part.take(np.flatnonzero(np.isin(part.members, best)))
    score = np.zeros(width)
    score[order[::-1]] = running_worst(errors[::-1])
    return score
