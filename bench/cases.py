"""The models of the sweeps: every torchvision model, one per timm module file, Hugging Face families, smp.

Each case is a name that `build` turns into (model, example inputs). Weights are random: pretrained ones cannot be
had offline, and structure does not depend on them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import slimc
from bench import networks
from slimc.graph.example import Example

BATCH = 2
_ORDINARY_SIDE, _HUGE_SIDE, _SMALL_SIDE = 400, 800, 256

SMALL = (
    "atto", "femto", "pico", "nano", "xxtiny", "xxs", "xtiny", "tiny", "_t", "_xs", "mini", "small", "_s", "_b0", "_0",
    "18", "base",
)  # fmt: skip


@contextlib.contextmanager
def quick_initialisation() -> Iterator[None]:
    """Leave truncated normals and the like out: they take longer than everything else together."""
    names = ("trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_", "orthogonal_")
    kept = {name: getattr(nn.init, name) for name in names}

    def normal(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
            return tensor.normal_(0, max(fan_in, 1) ** -0.5)

    try:
        for name in names:
            setattr(nn.init, name, normal)
        yield
    finally:
        for name, function in kept.items():
            setattr(nn.init, name, function)


def cases(sources: list[str]) -> list[str]:
    """Names of all cases of some sources: torchvision, timm, hf, smp, yolo."""
    found: list[str] = []
    for source in sources:
        found.extend(f"{source}:{name}" for name in SOURCES[source]())
    return found


def build(case: str) -> tuple[nn.Module, Any]:
    """(model in eval mode, example inputs) of one case; the same each time."""
    source, _, name = case.partition(":")
    torch.manual_seed(0)
    with quick_initialisation():
        model, inputs = _BUILDERS[source](name)
    model.eval()
    _wake(model, inputs)
    return model, inputs


def _wake(model: nn.Module, inputs: Any) -> None:
    """Weights under which every check can fail: no constants, and batch norms that know their inputs' statistics.

    Without the statistics a deep network's signal grows until float32 itself is off by half (ghostnetv3).
    """
    networks.redraw_constants(model, torch.Generator().manual_seed(1))
    with contextlib.suppress(ValueError):  # a norm over one value has no statistics; it keeps those it has
        networks.calibrate(model, lambda: Example.of(inputs).run(model))


# -- torchvision --------------------------------------------------------------------------------------


def _torchvision_names() -> list[str]:
    import torchvision

    return [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    module = torchvision.models.get_model_builder(name).__module__
    if "segmentation" in module or "detection" in module:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = torchvision.models.get_model(name, **options)
    if "detection" in module:
        return slimc.DenseDetector(model), torch.randn(BATCH, 3, 320, 320)
    if "optical_flow" in module:
        return model, (torch.randn(BATCH, 3, 128, 128), torch.randn(BATCH, 3, 128, 128))
    if "video" in module:
        side = 224 if "mvit" in name or "swin" in name or "s3d" in name else 112
        return model, torch.randn(BATCH, 3, 16, side, side)
    side = {"inception_v3": 299}.get(name, 256 if "swin_v2" in name else 224)
    return model, torch.randn(BATCH, 3, side, side)


# -- timm ---------------------------------------------------------------------------------------------


def _timm_names() -> list[str]:
    import timm

    chosen = []
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            chosen.append(min(names, key=_size_hint))
    return sorted(set(chosen))


def size_hint(case: str) -> int:
    """What a case costs, roughly: parameters where its library says so, or the pixels of large pictures."""
    source, _, name = case.partition(":")
    if source == "timm":
        *_, high, wide = _timm_size(name)
        return int(high * wide) * 100 if high > _ORDINARY_SIDE else 0
    if source != "torchvision":
        return 0
    import torchvision

    weights = torchvision.models.get_model_weights(name)
    return max((int(one.meta["num_params"]) for one in weights), default=0)


def _size_hint(name: str) -> tuple[int, int, int, str]:
    rank = next((i for i, part in enumerate(SMALL) if part in name), len(SMALL))
    huge = any(part in name for part in ("large", "huge", "giant", "so400m", "_xl"))
    depth = re.search(r"[a-z]_?(\d+)", name)
    return (int(huge), rank, int(depth[1]) if depth else 0, name)


def _timm_size(name: str) -> tuple[int, ...]:
    import timm

    config = timm.get_pretrained_cfg(name)
    assert config is not None
    return tuple(config.input_size)


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    *_, side = _timm_size(name)
    # Pictures of 1024 x 1024 (SAM) take minutes for each run of the plain model, and show nothing more.
    smaller = side > _HUGE_SIDE
    try:
        settings: dict[str, Any] = {"img_size": _SMALL_SIDE} if smaller else {}
        model: Any = timm.create_model(name, pretrained=False, **settings)
    except TypeError:  # it takes pictures of any size
        model = timm.create_model(name, pretrained=False)
    size = model.default_cfg.get("input_size", (3, 224, 224))
    if smaller:
        size = (3, _SMALL_SIDE, _SMALL_SIDE)
    elif model.default_cfg.get("fixed_input_size") is False and size[-1] > 256:
        size = (3, 224, 224)
    return model, torch.randn(BATCH, *size)


# -- Hugging Face -------------------------------------------------------------------------------------

_HF = (
    "albert bart beit bert bloom camembert clip cohere convnext convnextv2 deberta-v2 deit detr dinov2 distilbert "
    "efficientnet electra falcon focalnet gemma gemma2 gpt2 gpt_neo gpt_neox gptj granite hubert levit llama m2m_100 "
    "mamba mamba2 marian mbart mistral mixtral mobilenet_v1 mobilenet_v2 mobilevit mpnet olmo opt pegasus phi phi3 "
    "poolformer qwen2 qwen3 regnet resnet roberta segformer siglip stablelm starcoder2 swin swinv2 t5 vit wav2vec2 "
    "whisper xlm-roberta"
)


def _hf_names() -> list[str]:
    return _HF.split()


def _hf(name: str) -> tuple[nn.Module, Any]:
    from bench import hf

    return hf.build(name)


# -- segmentation_models_pytorch and an Ultralytics-style detector ------------------------------------


def _smp_names() -> list[str]:
    return [
        "Unet/resnet18", "UnetPlusPlus/resnet18", "FPN/resnet18", "PSPNet/resnet18", "DeepLabV3/resnet18",
        "DeepLabV3Plus/resnet18", "PAN/resnet18", "Linknet/resnet18", "MAnet/resnet18", "Unet/efficientnet-b0",
        "DeepLabV3Plus/mobilenet_v2", "Segformer/mit_b0", "UPerNet/resnet18",
    ]  # fmt: skip


def _smp(name: str) -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

    decoder, _, encoder = name.partition("/")
    kind: Callable[..., nn.Module] = getattr(smp, decoder)
    return kind(encoder_name=encoder, encoder_weights=None, classes=3), torch.randn(BATCH, 3, 128, 128)


def _yolo(_name: str) -> tuple[nn.Module, Any]:
    from bench.yolo import Detector

    return Detector(), torch.randn(BATCH, 3, 160, 160)


SOURCES: dict[str, Callable[[], list[str]]] = {
    "torchvision": _torchvision_names, "timm": _timm_names, "hf": _hf_names, "smp": _smp_names, "yolo": lambda: ["v8n"],
}  # fmt: skip
_BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    "torchvision": _torchvision, "timm": _timm, "hf": _hf, "smp": _smp, "yolo": _yolo,
}  # fmt: skip
