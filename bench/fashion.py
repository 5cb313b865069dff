"""The networks of the accuracy and training benchmarks and how they are trained on Fashion-MNIST.

    python -m bench.fashion resnet20 vgg11_bn --seeds 0 1 2

Training stops after a fixed number of epochs and the last one counts; the 10,000 validation pictures (the last of the
60,000) choose nothing. Checkpoints go to bench/checkpoints/, rounded to half precision, and are not trained again;
those of the ResNets are in the repository, so that every machine measures the same networks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimc.datasets import fashion_mnist
from slimc.demo import ResidualBlock
from slimc.onednn import Guard
from slimc.training.precision import computes_in_bfloat16

CHECKPOINTS = Path(__file__).parent / "checkpoints"
EPOCHS = {"resnet20": 10, "resnet56": 10, "vgg11_bn": 5, "vgg16_bn": 3, "vit": 8}
VALIDATION = 10_000
BATCH = 128


def resnet(blocks_each: int) -> nn.Module:
    """ResNet of He et al. 2016, section 4.2, for one input channel, with convolutions in the changing shortcuts.

    blocks_each: 3 for ResNet-20, 9 for ResNet-56.
    """
    blocks: list[nn.Module] = []
    width = 16
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        for index in range(blocks_each):
            blocks.append(ResidualBlock(width, outputs, stride if index == 0 else 1))
            width = outputs
    stem = (nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet20() -> nn.Module:
    """ResNet-20."""
    return resnet(3)


def resnet56() -> nn.Module:
    """ResNet-56."""
    return resnet(9)


def vgg(*column: int | None) -> nn.Module:
    """VGG with batch norm (Simonyan and Zisserman 2015) without its last pool and hidden linears; None: a pool."""
    layers: list[nn.Module] = []
    inputs = 1
    for width in column:
        if width is None:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def vgg11_bn() -> nn.Module:
    """Column A."""
    return vgg(64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512)


def vgg16_bn() -> nn.Module:
    """Column D."""
    return vgg(64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512)


def vit() -> nn.Module:
    """A small vision transformer of timm: 7x7 tokens of 4x4 pixels, 6 blocks of width 96 with 4 heads."""
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=96, depth=6, num_heads=4, mlp_ratio=3
    )
    return model


NETWORKS = {"resnet20": resnet20, "resnet56": resnet56, "vgg11_bn": vgg11_bn, "vgg16_bn": vgg16_bn, "vit": vit}


class Fashion:
    """Fashion-MNIST in memory: 50,000 pictures to train on, 10,000 to validate on."""

    def __init__(self) -> None:
        images, labels = fashion_mnist()
        self.images, self.labels = images[:-VALIDATION], labels[:-VALIDATION]
        self.validation = (images[-VALIDATION:], labels[-VALIDATION:])

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, each picture mirrored half the time and moved by up to 2 pixels."""
        order = torch.randperm(len(self.images), generator=generator)
        for index in torch.split(order, BATCH):
            if len(index) == BATCH:
                yield _augmented(self.images[index], generator), self.labels[index]

    def steps(self) -> int:
        """Batches in an epoch."""
        return len(self.images) // BATCH


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, side, _ = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, (2, 2, 2, 2), value=float(images.min()))
    rows, columns = (torch.randint(0, 5, (count, 1), generator=generator) + torch.arange(side) for _ in range(2))
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def fit(model: nn.Module, data: Fashion, *, epochs: int, rate: float, seed: int, warmup: float = 0.2) -> None:
    """Train in place: Nesterov SGD (AdamW for transformers), linear warm-up and decay, bfloat16 where it is quick."""
    generator = torch.Generator().manual_seed(seed)
    transformer = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    decay = 0.05 if transformer else 5e-4
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimiser: torch.optim.Optimizer
    if transformer:
        optimiser = torch.optim.AdamW(settings, lr=rate)
    else:
        optimiser = torch.optim.SGD(settings, lr=rate, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=rate, total_steps=epochs * data.steps(), pct_start=warmup, anneal_strategy="linear"
    )
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(epochs):
        started, total = time.perf_counter(), 0.0
        for images, labels in data.batches(generator):
            with Guard(), torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16("cpu")):
                logits = model(images.to(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        spent = time.perf_counter() - started
        print(f"  epoch {epoch + 1} of {epochs}: loss {total / data.steps():.3f}, {spent:.0f} s", flush=True)
    model.eval().to(memory_format=torch.contiguous_format)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Fashion) -> float:
    """Percent right on the validation pictures, in float32 and eval mode."""
    images, labels = data.validation
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(torch.split(images, 500), torch.split(labels, 500), strict=True)
    )
    return 100 * right / len(labels)


def trained(name: str, seed: int, data: Fashion) -> nn.Module:
    """The network of that name and seed in eval mode, trained now if no checkpoint is there."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    path = CHECKPOINTS / f"{name}-{seed}.pt"
    if not path.exists():
        print(f"{name} seed {seed}: training {EPOCHS[name]} epochs", flush=True)
        fit(model, data, epochs=EPOCHS[name], rate=2e-3 if name == "vit" else 0.2, seed=seed)
        CHECKPOINTS.mkdir(exist_ok=True)
        state = model.state_dict()
        rounded = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        torch.save(rounded, path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def main() -> None:
    """Train every network asked for and print its accuracy."""
    parser = argparse.ArgumentParser(description="train the networks of the accuracy benchmark")
    parser.add_argument("networks", nargs="*", default=["resnet20", "vgg11_bn"], choices=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Fashion()
    for name in options.networks:
        for seed in options.seeds:
            print(f"{name} seed {seed}: {accuracy(trained(name, seed, data), data):.2f} %", flush=True)


if __name__ == "__main__":
    main()
