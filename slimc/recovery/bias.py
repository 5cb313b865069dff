"""Biases alone: what removed channels contributed on average goes into the biases of their readers.

From the first layer to the last, each layer's mean error against the original, at the kept channels, is added to its
bias, or to that of the batch norm behind it. The cheapest form of recovery: no weight changes. The mean is that of what
the layer computes, borders of padded maps included, where fewer inputs count. No one number is right both there and in
the middle, so such layers are counted in what the step says.
"""

from __future__ import annotations

from slimc.recover import Task, step
from slimc.recovery.reconstruct import Layer, refit
from slimc.regression import Fit, Moments, mean_only, none


@step("bias", "fold the mean of what was removed into biases, from unlabelled samples", "He et al., ICCV 2017")
def bias(task: Task) -> str:
    """Fit every layer's bias; layers without one, and without a batch norm behind, stay as they are."""
    padded = 0

    def mean(fitted: Moments, judged: Moments, layer: Layer) -> Fit:
        """The mean residual, where it leaves less error on the rows that are set aside."""
        nonlocal padded
        if not layer.offset:
            return none(fitted)
        shifted = float((judged.error(mean_only(fitted)) * layer.importance).sum())
        as_it_was = float((judged.error(none(judged)) * layer.importance).sum())
        if shifted >= as_it_was:
            return none(fitted)
        padded += layer.pads
        return mean_only(fitted.merge(judged))

    tally = refit(task, mean)
    borders = f" ({padded} of them pad: right on average, not at the borders)" if padded else ""
    return f"biases only: {tally}{borders} on {tally.samples} samples ({task.samples.source})"
