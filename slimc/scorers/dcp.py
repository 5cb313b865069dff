"""Discrimination-aware channel pruning: greedily pick the input channels with the largest gradient.

Source: Zhuang et al., "Discrimination-aware Channel Pruning for Deep Neural Networks" (NeurIPS 2018). A layer starts
with no input channel; the one with the largest ||dL/dW_k||, L the reconstruction error plus the cross entropy, comes in
with its trained weights, and so on. As a scorer it keeps to one backward pass: the network's own head stands for the
paper's auxiliary heads, the cross entropy is taken linear around the trained network, picked weights are not optimised
between picks, and groups of more than 64 channels pick several at a time. The gradient of the reconstruction error is
exact and follows the picks. The schedule `dcp` trains the heads and takes the gradient of their losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimc.gradients import parameter_gradients
from slimc.graph.groups import Group
from slimc.graph.terms import Terms
from slimc.passes import batches_of
from slimc.readers import unhalved
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
    samples = batches_of(subject)
    steps = parameter_gradients(subject, names=sampling.parameters, places=sampling.places)
    for batch, found in zip(samples.batches, steps, strict=True):
        for name, gradient in found.items():
            gradient.mul_(batch.count / samples.count)  # means over samples, whatever the batches
            gradients[name] = gradient if name not in gradients else gradients[name].add_(gradient)
    return picked(subject, sampling.readings(), gradients)


def picked(subject: Subject, layers: list[Reading], gradients: dict[str, Tensor]) -> list[Scores]:
    """Scores of every group from the gradients of the readers' weights; NaN without a reader."""
    scores = []
    for group in subject.grouping.groups:
        parts = [part for layer in layers if (part := _part(layer, group, gradients)) is not None]
        scores.append(pick(parts, group.width) if parts else np.full(group.width, np.nan))
    return scores


@dataclass
class Part:
    """One reader while channels are picked; inputs are its channels times the kernel's positions, in this order.

    gram: [inputs, inputs] inner products of the inputs over the sampled rows. members: [channels] places in the group.
    left: [inputs, outputs] the weights of channels that are not picked, zero for others.
    pull: [inputs, outputs] gram times left: what the inputs have in common with the error left.
    loss: [inputs, outputs] the gradient of the loss. rows: how many were sampled.
    layer: the whole layer's number, the same for all groups of a convolution.
    """

    gram: Tensor
    members: Terms
    left: Tensor
    pull: Tensor
    loss: Tensor
    rows: int
    layer: int

    @classmethod
    def of(cls, rows: Tensor, weight: Tensor, members: Terms, loss: Tensor | None = None, layer: int = 0) -> Part:
        """From rows [rows, channels, kernel]; weight and its gradient of the loss are [outputs, channels, kernel]."""
        inputs, left = rows.flatten(1), weight.flatten(1).T.contiguous()
        gram = inputs.T @ inputs
        slope = torch.zeros_like(left) if loss is None else loss.flatten(1).T.contiguous()
        return cls(gram, members, left, gram @ left, slope, len(rows), layer)

    def error(self) -> float:
        """The squared error over all rows and outputs that the picked channels leave."""
        return max(0.0, float((self.left * self.pull).sum()))

    def norms(self) -> Tensor:
        """[channels] the norm of the gradient of the loss plus half the mean squared error.

        Frobenius over a kernel, summed over outputs.
        """
        gradient = torch.add(self.loss, self.pull, alpha=-1 / (self.rows * self.left.shape[1]))
        # Torch's own vector norm takes ten times as long across an inner axis.
        return gradient.square_().view(len(self.members), -1, gradient.shape[1]).sum(1).sqrt_().sum(1)

    def take(self, channels: Terms) -> None:
        """Bring channels in with their trained weights."""
        each = len(self.left) // len(self.members)
        index = torch.from_numpy((channels[:, None] * each + np.arange(each)).reshape(-1)).to(self.left.device)
        self.pull.addmm_(self.gram[index].T, self.left[index], alpha=-1)
        self.left[index] = 0


def _part(layer: Reading, group: Group, gradients: dict[str, Tensor]) -> Part | None:
    members = layer.members(group)
    chosen = np.flatnonzero(members >= 0)
    if not chosen.size:
        return None
    outputs = np.unique(np.linspace(0, len(layer.weight) - 1, min(len(layer.weight), _OUTPUTS)).astype(np.int64))
    # Rows are the large part: no copy where the group is all that the layer reads.
    rows = layer.rows if chosen.size == len(members) else layer.rows[:, chosen]
    loss = None
    if (own := gradients.get(layer.parameter)) is not None:
        own = own[layer.outputs].flatten(2) if own.dim() > 2 else own[layer.outputs, :, None]
        loss = unhalved(own[outputs][:, chosen])
    return Part.of(rows, layer.weight[outputs][:, chosen], members[chosen], loss, layer.layer)


def pick(parts: list[Part], width: int) -> Scores:
    """Pick all channels, the largest gradient first; each scores the error left before it, largest from there on."""
    targets = _errors(parts)
    left = np.ones(width, np.bool_)
    order: list[int] = []
    errors: list[float] = []
    at_once = -(-width // _ROUNDS)
    while left.any():
        rest = [error / max(targets[layer], 1e-300) for layer, error in _errors(parts).items()]
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


def _errors(parts: list[Part]) -> dict[int, float]:
    """The squared error that is left, by layer."""
    found: dict[int, float] = {}
    for part in parts:
        found[part.layer] = found.get(part.layer, 0.0) + part.error()
    return found
