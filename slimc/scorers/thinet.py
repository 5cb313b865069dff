"""ThiNet: the channels whose contributions to the next layer cancel or vanish go first.

Source: Luo et al., "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression" (ICCV 2017), equation
6 and algorithm 1: remove, one by one, the channel that keeps sum_i (sum over removed j of x_ij)² smallest, x_ij what
channel j contributes to the sampled output i. The paper draws one output channel at each sampled position; here all
outputs of a position count, which is its expected value.
"""

from __future__ import annotations

import numpy as np
import torch

from slimc.graph.terms import Terms
from slimc.readings import readings, running_worst
from slimc.scores import Scores, Subject, scorer


@scorer(
    "thinet", "error of the next layers' outputs when a channel and all before it go", "Luo et al., ICCV 2017", "inputs"
)
def thinet(subject: Subject) -> list[Scores]:
    """The largest squared error up to a channel's turn in greedy removal, as a share of what the group contributes.

    The samples of all readers count together. Groups that no plain convolution or linear layer reads have no score.
    """
    layers = readings(subject, "thinet")
    scores = []
    for group in subject.grouping.groups:
        grams = [gram for layer in layers if (gram := layer.gram(group)) is not None]
        if not grams:
            scores.append(np.full(group.width, np.nan))
            continue
        products = torch.stack(grams).sum(0).cpu().numpy()
        order, errors = greedy(products)
        whole = max(float(products.sum()), float(np.trace(products)) * 1e-12, 1e-300)
        own = np.zeros(group.width)
        own[order] = running_worst([error / whole for error in errors])
        scores.append(own)
    return scores


def greedy(gram: Scores) -> tuple[Terms, list[float]]:
    """The order of removal and the squared norm of the sum of what is gone after each step; ties go to the first.

    gram: [channels, channels] inner products of contributions.
    """
    left = np.ones(len(gram), np.bool_)
    gone, error = np.zeros(len(gram)), 0.0  # inner products with the sum of what is gone
    order, errors = [], []
    for _ in range(len(gram)):
        costs = np.where(left, error + 2 * gone + np.diag(gram), np.inf)
        best = int(costs.argmin())
        left[best] = False
        error = max(0.0, float(costs[best]))
        gone += gram[best]
        order.append(best)
        errors.append(error)
    return np.array(order), errors
