"""Scalars: one factor for each channel that a convolution reads, for each input of a linear layer, by least squares.

The cheap form of reconstruction: as many numbers as channels are fitted, so that very few samples are enough.

Source: Luo, Wu and Lin, "ThiNet" (ICCV 2017), equation 7: least-squares scalars of the kept channels, multiplied into
the next layer's weights. Ours: layer after layer, the penalty, the offset, and no change where it does not help.
"""

from __future__ import annotations

from slimc.recover import Task, step
from slimc.recovery.reconstruct import WIDEST, Layer, refit
from slimc.regression import RIDGES, Fit, Moments, mean_only, none, scaled


@step("scale", "fit one factor for each channel that a layer reads, from unlabelled samples", "Luo et al., ICCV 2017")
def scale(task: Task) -> str:
    """Fit factors and offsets of every layer that nothing else shares."""
    tally = refit(task, _scalars, WIDEST)
    return f"one factor per channel: {tally} on {tally.samples} samples ({task.samples.source})"


def _scalars(fitted: Moments, judged: Moments, layer: Layer) -> Fit:
    """The best of several penalties, of the offset alone and of no change, by the rows that are set aside."""

    def fit(moments: Moments, strength: float) -> Fit:
        return scaled(moments, layer.matrix, layer.each, layer.importance, strength, layer.offset)

    fits = [none(fitted), *([mean_only(fitted)] if layer.offset else []), *(fit(fitted, s) for s in RIDGES)]
    errors = [float((judged.error(found) * layer.importance).sum()) for found in fits]
    best = fits[min(range(len(fits)), key=errors.__getitem__)]
    everything = fitted.merge(judged)
    if best.ridge is not None:
        return fit(everything, best.ridge)
    return mean_only(everything) if bool(best.offset.any()) else none(everything)
