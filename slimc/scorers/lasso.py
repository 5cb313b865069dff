"""LASSO selection: the channels that survive the strongest pressure when the next layer's outputs are rebuilt.

Source: He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017), equation 2:
minimise 1/(2N) ||Y - sum of beta_i X_i W_i'||² + lambda ||beta||_1, with beta_i = 0 for channels that go. The target is
what the group contributes, so biases stay out of it.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from slimc.readings import readings
from slimc.scores import Scores, Subject, scorer

_STEPS = 48
_SWEEPS = 100
_RANGE = 1e-4
_ROUNDING = 1e-9


@scorer(
    "lasso", "the LASSO penalty at which a channel leaves the next layers' regression", "He et al., ICCV 2017", "inputs"
)
def lasso(subject: Subject) -> list[Scores]:
    """N lambda at which beta_i becomes zero, each reader's error divided by its squared target.

    One beta for all readers of a channel. Channels that are alike leave early, but for one of them. Groups that no
    plain convolution or linear layer reads have no score.
    """
    layers = readings(subject, "lasso")
    scores = []
    for group in subject.grouping.groups:
        whole: dict[int, Tensor] = {}  # by layer: of all groups of a convolution
        for layer in layers:
            if (gram := layer.gram(group)) is not None:
                whole[layer.layer] = whole[layer.layer] + gram if layer.layer in whole else gram
        grams = [gram / target for gram in whole.values() if (target := float(gram.sum())) > 0]
        scores.append(leaving(torch.stack(grams).sum(0).cpu().numpy()) if grams else np.full(group.width, np.nan))
    return scores


def leaving(gram: Scores) -> Scores:
    """N lambda at which each coefficient leaves the path for good, where the target is the sum of all columns.

    gram: [channels, channels] inner products of contributions. Between two points of a grid the path is continued in a
    straight line, which it is, so orthogonal columns give exactly their squared lengths.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lasso_path

    strongest = float(np.abs(gram.sum(1)).max())
    if strongest <= 0:
        return np.zeros(len(gram))
    values, vectors = np.linalg.eigh(gram)  # of more channels than rows some are zero, or just below by rounding
    columns = (vectors * np.sqrt(values.clip(0))).T  # any columns with these inner products
    target = columns.sum(1)
    penalties = strongest * np.geomspace(1.0, _RANGE, _STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last steps of nearly equal columns decide nothing
        _, path, _ = lasso_path(
            columns,
            target,
            alphas=penalties / len(columns),
            precompute=gram,
            Xy=gram.sum(1),
            max_iter=_SWEEPS,
            tol=1e-5,
        )
    beta = np.abs(np.asarray(path, np.float64))  # [channels, penalties], strongest first
    is_in = beta > _ROUNDING * beta.max()
    first = np.where(is_in.any(1), is_in.argmax(1), _STEPS)
    score = np.zeros(len(gram))
    for channel, entered in enumerate(first.tolist()):
        if entered == _STEPS:  # never in: below all others, by length
            score[channel] = penalties[-1] * gram[channel, channel] / max(float(np.trace(gram)), 1e-300)
            continue
        upper = penalties[max(0, entered - 1)]
        score[channel] = penalties[entered]
        if entered + 1 < _STEPS and beta[channel, entered + 1] > beta[channel, entered]:
            slope = (penalties[entered] - penalties[entered + 1]) / (
                beta[channel, entered + 1] - beta[channel, entered]
            )
            score[channel] = min(upper, penalties[entered] + beta[channel, entered] * slope)
    return score
