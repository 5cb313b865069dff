"""Models from files and names, read so that a file cannot run code of its own.

``load`` is the whole of it: tell what the source is, read it, take the model out, and check what came out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimc.detector import DenseDetector, image_size, is_detector
from slimc.errors import LoadError, UsageError
from slimc.loading.archive import open_archive
from slimc.loading.audit import check_structure, check_values
from slimc.loading.builders import build, is_architecture, torchvision_input
from slimc.loading.checkpoint import model_part
from slimc.loading.files import Kind, kind_of
from slimc.loading.pickled import checked_copy, read_trusted
from slimc.loading.pt2 import is_program, load_program
from slimc.loading.statedict import cleaned, fit, read_safetensors

__all__ = ["Loaded", "load", "load_state_dict_file"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Loaded:
    """A model with where it came from.

    input_shape: of one sample, without the batch; None where it is not known.
    batch: the batch size that the file fixes; None where any may be tried.
    """

    model: nn.Module
    name: str
    origin: str
    input_shape: tuple[int, ...] | None
    weights: str
    notes: tuple[str, ...]
    batch: int | None = None


def load(source: str, *, arch: str | None = None, allow: Sequence[str] = (), unsafe_pickle: bool = False) -> Loaded:
    """Load a model from a file or a name.

    ``arch`` is the architecture for files that hold weights only; ``allow`` names packages whose classes a file may
    use, which imports them; ``unsafe_pickle`` unpickles without protection, so that the file can run any code.
    """
    _check_allowed(allow)
    if is_architecture(source) and not Path(source).exists():
        loaded = _from_name(source, arch)
    else:
        loaded = _from_file(Path(source), arch, tuple(allow), unsafe_pickle)
    model, notes = _unwrapped(loaded.model)
    check_values(model, source)
    notes = (*loaded.notes, *notes, *_to_single_precision(model))
    if is_detector(model):
        return _dense(dataclasses.replace(loaded, model=model, notes=notes))
    return dataclasses.replace(loaded, model=model, notes=notes)


def load_state_dict_file(path: str | Path) -> dict[str, Tensor]:
    """Read weights from a .pt, .pth or .safetensors file, with the prefixes of wrappers stripped.

    A whole model in the file gives its state dict; half precision becomes float32.
    """
    path = Path(path)
    if kind_of(path) is Kind.SAFETENSORS:
        return cleaned(read_safetensors(path), str(path))[0]
    loaded, _ = _pickled_part(path, (), unsafe_pickle=False)
    if isinstance(loaded, Loaded):
        return cleaned(loaded.model.state_dict(), str(path))[0]
    return cleaned(loaded, str(path))[0]


def _check_allowed(allow: Sequence[str]) -> None:
    if isinstance(allow, str):
        raise UsageError(f"allow={allow!r}: give a list of package names, such as [{allow!r}].")
    for package in allow:
        if not all(part.isidentifier() for part in package.split(".")):
            raise UsageError(f"--allow {package}: not the name of a Python package.")
        if package.partition(".")[0] in sys.stdlib_module_names:
            raise UsageError(
                f"--allow {package}: part of Python itself; no model is made of it. Name your own package."
            )


def _from_name(source: str, arch: str | None) -> Loaded:
    if arch is not None:
        raise UsageError(f"--arch {arch} goes with a file of weights; {source} already names an architecture.")
    built = build(source)
    return Loaded(built.model, built.name, f"built from {built.origin}", built.input_shape, built.weights, built.notes)


def _from_file(path: Path, arch: str | None, allow: tuple[str, ...], unsafe_pickle: bool) -> Loaded:
    kind = kind_of(path)
    if kind is Kind.ONNX:
        return _from_onnx(path, arch)
    if kind is Kind.SAFETENSORS:
        return _with_architecture(read_safetensors(path), arch, path, ())
    loaded, notes = _pickled_part(path, allow, unsafe_pickle)
    if not isinstance(loaded, Loaded):
        return _with_architecture(loaded, arch, path, notes)
    if arch is not None:
        notes = (*notes, f"--arch {arch} was not needed: the file holds the whole model")
    return dataclasses.replace(loaded, notes=(*loaded.notes, *notes))


def _from_onnx(path: Path, arch: str | None) -> Loaded:
    from slimc.loading.onnx_file import load_onnx  # the package onnx takes a while to import

    file = load_onnx(path)
    notes = file.notes if arch is None else (*file.notes, f"--arch {arch} was not needed: the file holds the graph")
    return Loaded(file.module, path.stem, f"{path}, an ONNX graph", file.input_shape, "file", notes, file.batch)


def _pickled_part(
    path: Path, allow: tuple[str, ...], unsafe_pickle: bool
) -> tuple[Loaded | Mapping[str, Any], tuple[str, ...]]:
    """The model, or the state dict, in a file of torch.save or torch.export."""
    label = str(path)
    if kind_of(path) is Kind.LEGACY:
        value = _legacy(path, unsafe_pickle)
    else:
        archive = open_archive(path, label)
        with archive.zip:
            if is_program(archive.zip.namelist()):
                program = load_program(archive)
                how = "a torch.export program"
                return Loaded(
                    program.module, path.stem, f"{path}, {how}", program.input_shape, "file", program.notes,
                    program.batch,
                ), ()  # fmt: skip
            value = read_trusted(path) if unsafe_pickle else checked_copy(archive, allow)[0]
    part, notes = model_part(value, label)
    if unsafe_pickle:
        notes = (*notes, "unpickled without protection (--unsafe-pickle): code in the file was free to run")
    if not isinstance(part, nn.Module):
        return part, notes
    if not unsafe_pickle:
        check_structure(part, label)
    inner = _unwrapped(part)[0]
    shape = torchvision_input(inner) if type(inner).__module__.startswith("torchvision.models.") else None
    return Loaded(part, path.stem, f"{path}, a pickled {type(part).__name__}", shape, "file", ()), notes


def _legacy(path: Path, unsafe_pickle: bool) -> Any:
    if unsafe_pickle:
        return read_trusted(path)
    raise LoadError(
        f"{path}: saved in the format of torch before 1.6, a bare pickle that cannot be checked before it runs. If it "
        f'holds weights only, save it again: torch.save(torch.load("{path.name}", weights_only=True), "new.pt"). '
        "If it holds a whole model and you trust its source, use --unsafe-pickle."
    )


def _with_architecture(state: Mapping[str, Any], arch: str | None, path: Path, notes: tuple[str, ...]) -> Loaded:
    tensors, changes = cleaned(state, str(path))
    if arch is None:
        from slimc.loading.suggest import matching_architectures, suggestion

        matches = matching_architectures(tensors)
        advice = suggestion(matches, len(tensors)) if matches else (
            "Say which architecture they belong to: --arch torchvision:resnet18, timm:NAME or package.module:factory."
        )  # fmt: skip
        raise LoadError(f"{path}: this file holds weights only. {advice}")
    built = fit(tensors, arch, str(path))
    origin = f"{path}, weights for {built.origin}"
    return Loaded(built.model, path.stem, origin, built.input_shape, "file", (*notes, *changes, *built.notes))


def _unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    notes: list[str] = []
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        notes.append(f"took the model out of its {type(model).__name__} wrapper")
        model = model.module
    return model, tuple(notes)


def _dense(loaded: Loaded) -> Loaded:
    """Backbone and heads of a detector; the rest of it cannot be compiled, and stays as it is."""
    name = type(loaded.model).__name__
    note = f"{name}: backbone and heads are compressed (slimc.DenseDetector), post-processing is left outside"
    shape = loaded.input_shape or image_size(loaded.model)
    return dataclasses.replace(
        loaded, model=DenseDetector(loaded.model), input_shape=shape, notes=(*loaded.notes, note)
    )


def _to_single_precision(model: nn.Module) -> tuple[str, ...]:
    """Convert weights to float32 and say how many: of half precision, which CPUs compute slowly and inexactly, and
    those of a model that is in double precision throughout, in which ONNX Runtime knows few operators."""
    if isinstance(model, torch.fx.GraphModule):  # its operators were recorded for another precision
        return ()
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    weights = {t.dtype for t in model.parameters() if t.is_floating_point()}
    found = []
    for kinds, name in ((_HALF, "half"), ((torch.float64,) if weights == {torch.float64} else (), "double")):
        own = [t for t in tensors if t.dtype in kinds]
        for tensor in own:
            tensor.data = tensor.data.float()
        if own:
            found.append(f"converted {len(own)} {name}-precision tensors to float32")
    return tuple(found)
