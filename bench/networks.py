"""The networks of the speed, scale, memory and acceptance benchmarks, with weights under which every check can fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ACCEPTANCE = (
    "resnet50", "resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0",
    "regnet_y_400mf", "shufflenet_v2_x1_0", "googlenet", "inception_v3", "squeezenet1_0", "vgg11_bn", "mnasnet0_5",
    "vit_b_16", "swin_t", "convnext_tiny", "maxvit_t", "deeplabv3_resnet50",
)  # fmt: skip
SPEED = ("resnet50", "densenet121", "vit_b_16", "efficientnet_b0")

_CALIBRATION_BATCH = 4


def torchvision_model(name: str, seed: int = 0) -> nn.Module:
    """A torchvision model in eval mode with random weights, the same ones each time; nothing is downloaded."""
    from torchvision import models

    torch.manual_seed(seed)
    known = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in known else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # the default warns that it will change
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model.eval()


def image(name: str, batch: int = 1, seed: int = 1) -> Tensor:
    """[batch, 3, H, W] random input of the size that the model is made for."""
    side = 299 if name == "inception_v3" else 224
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def awaken(model: nn.Module, inputs: Tensor) -> None:
    """Give constant parameters random values, and batch norms the statistics of random images, in place.

    Fresh models have heads of zeros (ViT), layer scales of 1e-6 (ConvNeXt) and batch norms that do nothing. On
    these a wrong index would not show in any output, and a comparison of two outputs would compare zeros.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        redraw_constants(model, generator)
        images = torch.randn(_CALIBRATION_BATCH, *inputs.shape[1:], generator=generator)
        calibrate(model, lambda: model(images))


def redraw_constants(model: nn.Module, generator: torch.Generator) -> None:
    """Random values for parameters that are all alike, or next to zero, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() < 2 or not parameter.is_floating_point():
                continue
            low, high = float(parameter.min()), float(parameter.max())
            if low == high or max(-low, high) < 1e-3:
                parameter.copy_(_redrawn(parameter, low, generator))


def _redrawn(parameter: Tensor, value: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if value == 1:
        return 1 + noise.mul(0.2)
    if parameter.dim() > 1 and parameter[0].numel() > 1:
        return noise.mul(parameter[0].numel() ** -0.5)
    return 0.5 + noise.mul(0.1) if 0 < abs(value) < 1e-3 else noise.mul(0.1)


def calibrate(model: nn.Module, run: Callable[[], object]) -> None:
    """Let batch norms take the statistics of one run, so that signals keep their scale as in a trained network."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        with torch.no_grad():
            run()
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


class ConcatChain(nn.Module):
    """`depth` 3x3 convolutions, each reading the concatenation of all that came before: a dense block."""

    def __init__(self, depth: int, growth: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(growth * (i + 1), growth, 3, padding=1) for i in range(depth))
        self.head = nn.Conv2d(growth * (depth + 1), 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 10, H, W]."""
        found = [torch.relu(self.stem(x))]
        for conv in self.convs:
            found.append(torch.relu(conv(torch.cat(found, 1))))
        output: Tensor = self.head(torch.cat(found, 1))
        return output
