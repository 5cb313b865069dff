"""Detectors of torchvision: the part of them that can be compiled, with the rest kept around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .errors import UsageError

_PACKAGE = "torchvision.models.detection."


def is_detector(model: nn.Module) -> bool:
    """Whether a model is one of torchvision's detectors, whose post-processing depends on what they see."""
    return type(model).__module__.startswith(_PACKAGE) and hasattr(model, "backbone") and hasattr(model, "transform")


class DenseDetector(nn.Module):
    """Backbone and heads of a torchvision detector, from normalised images to raw outputs.

    Anchors, thresholds and non-maximum suppression depend on the data and are left outside; so is the second stage of
    an R-CNN, which reads the backbone's features: these are outputs here, so that they keep their channels. The
    detector itself is kept as `detector`, also in what `slimc.compress` gives: that one detects as before, smaller.

    detector: FasterRCNN, MaskRCNN, KeypointRCNN, RetinaNet, FCOS or SSD; raises UsageError for anything else.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        if not is_detector(detector):
            raise UsageError(f"{type(detector).__name__} is no detector of torchvision")
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        """[N, 3, H, W] to the outputs of the heads, and the features that a second stage reads."""
        features = self.detector.backbone(images)
        levels = [features] if isinstance(features, Tensor) else list(features.values())
        if not hasattr(self.detector, "rpn"):
            return self.detector.head(levels)
        return self.detector.rpn.head(levels), levels


def image_size(detector: Any) -> tuple[int, int, int] | None:
    """Shape of one image where a detector takes one size only (SSD); None where any goes."""
    fixed = getattr(detector.transform, "fixed_size", None)
    return None if fixed is None else (3, fixed[1], fixed[0])
