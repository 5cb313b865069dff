"""Models built in place from a name: torchvision:NAME, timm:NAME, hf:PATH, package.module:factory."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import random
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimc.errors import LoadError, UsageError
from slimc.loading.pickled import weights_only_forced
from slimc.loading.policy import project_on_path

RANDOM = "random initialisation"
_RANDOM_NOTE = (
    "weights are random: pretrained ones are not on this machine and slimc downloads nothing. "
    "Sizes and speed are real, accuracy is not"
)
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", re.ASCII)
_LIBRARIES = ("torchvision", "timm", "hf")


@dataclass(frozen=True)
class Built:
    """A model made from a name; ``input_shape`` is per sample."""

    model: nn.Module
    name: str
    origin: str
    input_shape: tuple[int, ...] | None
    weights: str
    notes: tuple[str, ...]


def is_architecture(text: str) -> bool:
    """Whether a text has the form of a name to build rather than of a file."""
    library, separator, rest = text.partition(":")
    return bool(separator and rest and library in _LIBRARIES) or _FACTORY.fullmatch(text) is not None


def build(spec: str, *, pretrained: bool = True) -> Built:
    """Build a model from its name, the same one each time; ``pretrained`` takes cached weights where there are any."""
    library, _, name = spec.partition(":")
    if not is_architecture(spec):
        raise UsageError(
            f"{spec!r} is no architecture. Write torchvision:resnet50, timm:NAME, hf:PATH or package.module:factory."
        )
    with seeded():
        if library == "torchvision":
            return _torchvision(name, pretrained)
        if library == "timm":
            return _timm(name, pretrained)
        if library == "hf":
            return _transformers(Path(name), pretrained)
        return _factory(library, name)


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Fix the random numbers of torch (CPU), Python and NumPy, and give the caller's state back afterwards."""
    torch_state = torch.default_generator.get_state()
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def construct_torchvision(name: str, **options: Any) -> nn.Module:
    """Build a torchvision model with random weights; ``options`` such as num_classes go to its builder."""
    models = _library("torchvision.models", "torchvision")
    _check_torchvision_name(models, name)
    if "weights_backbone" in _parameters(models, name):
        options["weights_backbone"] = None  # its default downloads a backbone
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)  # the default warns that it will change
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _parameters(models: Any, name: str) -> Sequence[str]:
    return tuple(inspect.signature(models.get_model_builder(name)).parameters)


def _check_torchvision_name(models: Any, name: str) -> None:
    known = models.list_models()
    if name.startswith("quantized_"):
        raise UsageError(
            f"torchvision:{name} is a quantized model. Prune the float model torchvision:"
            f"{name.removeprefix('quantized_')} and quantize the result."
        )
    if name not in known:
        shown = [text for text in known if not text.startswith("quantized_")]
        raise UsageError(f"torchvision has no model {name!r}. {_suggestion('torchvision', name, shown)}")


def _torchvision(name: str, pretrained: bool) -> Built:
    models = _library("torchvision.models", "torchvision")
    _check_torchvision_name(models, name)
    weights = _cached_weights(models, name) if pretrained else None
    if weights is None:
        model = construct_torchvision(name)
    else:
        with weights_only_forced():
            model = models.get_model(name, weights=weights)
    return Built(
        model,
        name,
        f"torchvision:{name}",
        torchvision_input(model),
        RANDOM if weights is None else str(weights),
        (_RANDOM_NOTE,) if weights is None and pretrained else (),
    )


def _cached_weights(models: Any, name: str) -> Any:
    """Weights whose file torch.hub has downloaded before, the default ones first."""
    choices = models.get_model_weights(name)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    ordered = [choices.DEFAULT, *choices] if len(choices) else []
    return next((weights for weights in ordered if (folder / Path(weights.url).name).is_file()), None)


def torchvision_input(model: nn.Module) -> tuple[int, ...] | None:
    """Shape of one sample that a torchvision model was made for; None where it takes something else than an image."""
    family = type(model).__module__
    if ".detection" in family or ".optical_flow" in family:
        return None
    kind = family.rpartition(".")[2]
    if ".video" in family:
        side = 112 if kind == "resnet" else 224
        return (3, 16, side, side)
    if kind == "inception":
        return (3, 299, 299)
    side = getattr(model, "image_size", 224)  # vision transformers fix it
    return (3, side, side) if isinstance(side, int) else (3, 224, 224)


def _timm(name: str, pretrained: bool) -> Built:
    timm = _library("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"timm has no model {name!r}. {_suggestion('timm', name, timm.list_models())}")
    cached = _cached_timm_file(timm, name) if pretrained else None
    if cached is None:
        model = _called(f"timm:{name}", timm.create_model, name, pretrained=False)
    else:
        overlay = {"file": cached}
        with weights_only_forced():
            model = _called(f"timm:{name}", timm.create_model, name, pretrained=True, pretrained_cfg_overlay=overlay)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = config.get("input_size")
    return Built(
        model,
        name,
        f"timm:{name}",
        tuple(shape) if shape else None,
        RANDOM if cached is None else cached,
        (_RANDOM_NOTE,) if cached is None and pretrained else (),
    )


def _cached_timm_file(timm: Any, name: str) -> str | None:
    """The safetensors file of timm's pretrained weights, if the Hugging Face cache has it."""
    config = timm.get_pretrained_cfg(name)
    hub = getattr(config, "hf_hub_id", None)
    if not hub:
        return None
    found = importlib.import_module("huggingface_hub").try_to_load_from_cache(hub, "model.safetensors")
    return found if isinstance(found, str) else None


def _transformers(path: Path, pretrained: bool) -> Built:
    """A local folder (or config.json) of transformers; its own code files are never run."""
    transformers = _library("transformers", "transformers")
    if not path.exists():
        raise UsageError(f"hf:{path}: no such folder. Give a local folder with config.json; slimc downloads nothing.")
    config = _called(f"hf:{path}", transformers.AutoConfig.from_pretrained, path, local_files_only=True)
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        raise LoadError(f"hf:{path}: config.json names {names[0]}, which the installed transformers does not have.")
    stored = pretrained and path.is_dir() and any(path.glob("*.safetensors"))
    if stored:
        model = _called(f"hf:{path}", kind.from_pretrained, path, local_files_only=True, use_safetensors=True)
    else:
        make = kind.from_config if kind is transformers.AutoModel else kind
        model = _called(f"hf:{path}", make, config)
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    folder = path if path.is_dir() else path.parent
    return Built(
        model,
        folder.resolve().name,
        f"hf:{path}",
        (channels, side, side) if isinstance(side, int) else None,
        "file" if stored else RANDOM,
        () if stored else ("weights are random: the folder holds no safetensors file",),
    )


def _factory(module_name: str, attribute: str) -> Built:
    spec = f"{module_name}:{attribute}"
    with project_on_path():
        value: Any = _library(module_name, module_name.partition(".")[0])
        for part in attribute.split("."):
            if not hasattr(value, part):
                raise UsageError(f"{spec}: {module_name} has no {attribute!r}. {_close(part, dir(value))}".rstrip())
            value = getattr(value, part)
        if not callable(value):
            raise UsageError(f"{spec} is a {type(value).__name__}, not a function that returns a model.")
        model = _called(spec, value)
    if not isinstance(model, nn.Module):
        raise LoadError(f"{spec} returned a {type(model).__name__}. It has to return a torch.nn.Module.")
    return Built(model, attribute.rpartition(".")[2], spec, None, "as the factory makes them", ())


def _called(spec: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """Call code that is not ours and say where in it things went wrong."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" at {os.path.relpath(frames[-1].filename)}:{frames[-1].lineno}" if len(frames) > 1 else ""
        raise LoadError(f"{spec}: building the model fails{place} with {type(error).__name__}: {error}") from error


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = f"Install it: pip install {package}." if package in (*_LIBRARIES, "transformers") else (
            "Run from the folder that holds it, or install the package."
        )  # fmt: skip
        raise LoadError(f"cannot import {module}: Python finds no module {error.name!r}. {hint}") from error
    except Exception as error:  # user modules can fail in any way
        raise LoadError(f"importing {module} fails with {type(error).__name__}: {error}") from error


def _suggestion(library: str, name: str, known: Sequence[str]) -> str:
    return _close(name, known) or f"{library}.list_models() lists the {len(known)} names."


def _close(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"Did you mean {', '.join(found)}?" if found else ""
