"""Optimal Brain Damage: what a diagonal, quadratic picture of the loss says that removing a channel's weights costs.

Source: LeCun et al., "Optimal Brain Damage" (NeurIPS 1989), saliency H_jj w_j² / 2, with the empirical Fisher matrix,
the mean of squared gradients of single samples, for the Hessian's diagonal.
"""

from __future__ import annotations

import torch

from slimc.gradients import parameter_gradients
from slimc.readers import unhalved
from slimc.scores import Scores, Subject, scorer


@scorer(
    "obd",
    "half the sum of Fisher × weight² over everything that goes with a channel",
    "LeCun et al., NeurIPS 1989",
    "labels",
)
def obd(subject: Subject) -> list[Scores]:
    """The sum over a channel's weights of w_j² E[(g_j)²] / 2, gradients g of single samples (additive lift).

    Samples run one by one: squares of batch gradients would be too small by up to the batch size.
    """
    squares: dict[str, torch.Tensor] = {}
    samples = 0
    for gradients in parameter_gradients(subject, one_by_one=True):
        for name, half in gradients.items():
            gradient = unhalved(half)
            squares[name] = squares[name].addcmul_(gradient, gradient) if name in squares else gradient.square()
        samples += 1
    saliency = {name: own.mul_(subject.tensor(name).square()).mul_(0.5 / samples) for name, own in squares.items()}
    return subject.sum_over_weights(saliency)
