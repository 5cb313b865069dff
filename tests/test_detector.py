"""Detectors of torchvision: their dense part is compressed, the rest of them goes on working around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

import slimc
from slimc.errors import CaptureError, UsageError
from slimc.loading import load

PICTURES = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))]


def detector(name: str) -> Any:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 4, 1))
    backbone.out_channels = 24  # type: ignore[assignment]
    sizes = {"min_size": 96, "max_size": 128}
    anchors = detection.anchor_utils.AnchorGenerator(((32, 64),), ((1.0,),))
    if name == "FasterRCNN":
        return detection.FasterRCNN(backbone, 3, rpn_anchor_generator=anchors, **sizes).eval()
    return detection.RetinaNet(backbone, 3, anchor_generator=anchors, **sizes).eval()


def levels(model: Any, pictures: list[Tensor]) -> Tensor:
    found: Tensor = model.backbone(model.transform(pictures)[0].tensors)
    return found


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet"])
def test_the_smaller_detector_detects_with_its_own_post_processing(name: str) -> None:
    model = detector(name)
    slim = slimc.compress(slimc.DenseDetector(model), torch.randn(2, 3, 64, 96), flops=0.5, round_to=1, recover="none")
    small: Any = slim.module.detector
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.backbone.parameters()) < sum(p.numel() for p in model.backbone.parameters())
    with torch.no_grad():
        (found,) = small(PICTURES)
        assert {"boxes", "labels", "scores"} <= found.keys()
        # What the second stage reads keeps its channels; a one-stage detector's features are its own affair.
        same = levels(small, PICTURES).shape == levels(model, PICTURES).shape
    assert same == (name == "FasterRCNN")


def test_a_saved_detector_is_loaded_into_a_fresh_one(tmp_path: Path) -> None:
    slim = slimc.compress(
        slimc.DenseDetector(detector("FasterRCNN")), torch.randn(2, 3, 64, 96), flops=0.5, recover="none"
    )
    slim.save(tmp_path / "slim")
    other: Any = slimc.load(tmp_path / "slim", slimc.DenseDetector(detector("FasterRCNN")))
    wanted: Any = slim.module
    with torch.no_grad():
        (found,), (boxes,) = other.detector.eval()(PICTURES), wanted.detector.eval()(PICTURES)
    assert len(found["boxes"])
    assert all(torch.equal(value, boxes[name]) for name, value in found.items())


def test_a_detector_as_it_is_is_refused_with_what_to_do() -> None:
    with pytest.raises(CaptureError, match=r"RetinaNet .*slimc\.DenseDetector"):
        slimc.compress(detector("RetinaNet"), torch.randn(2, 3, 64, 96), flops=0.5)
    with pytest.raises(UsageError, match="Linear is no detector"):
        slimc.DenseDetector(nn.Linear(1, 1))


def test_files_and_names_give_the_dense_part(tmp_path: Path) -> None:
    named = load("torchvision:ssdlite320_mobilenet_v3_large")
    assert isinstance(named.model, slimc.DenseDetector)
    assert named.input_shape == (3, 320, 320)
    assert any("post-processing" in note for note in named.notes)
    model = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).eval()
    torch.save(model, tmp_path / "model.pt")
    filed = load(str(tmp_path / "model.pt"))
    assert isinstance(filed.model, slimc.DenseDetector)
    assert filed.input_shape is None
