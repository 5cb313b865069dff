"""Files that hold weights only: read, named as the architecture names them, compared, then filled in."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimc.detector import is_detector
from slimc.errors import LoadError
from slimc.loading.audit import check_kind
from slimc.loading.builders import Built, build, construct_torchvision

StateDict = dict[str, Tensor]

_WRAPPERS = ("module.", "_orig_mod.")
_HALF = (torch.float16, torch.bfloat16)
_MAX_TENSORS = 100_000
_SHOWN = 5
_PLAIN = (int, float, str, bytes, type(None))


@dataclass(frozen=True)
class Difference:
    """A tensor that the file and the architecture do not agree on; None where one of them lacks it."""

    name: str
    file: tuple[int, ...] | None
    model: tuple[int, ...] | None


def read_safetensors(path: Path) -> StateDict:
    """Read a .safetensors file: its header is JSON and its tensors are bytes, so nothing can run."""
    from slimc.exporters.formats import safetensors

    _check_header(path)
    return safetensors.load(path)  # tied weights under each of their names


def _check_header(path: Path) -> None:
    """Refuse headers that cost time before they are found to be wrong."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(path.stat().st_size, 100_000_000):
            raise LoadError(f"{path}: the header claims {length} bytes; the file is truncated or no safetensors file.")
        header = stream.read(length)
    if header.count(b'"data_offsets"') > _MAX_TENSORS:
        raise LoadError(f"{path}: the header names over {_MAX_TENSORS} tensors, more than a model has. Not loaded.")
    try:
        json.load(io.BytesIO(header))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: the header is damaged ({error}). Copy or download the file again.") from error


def is_state_dict(value: object) -> bool:
    """Whether a value maps names to tensors, perhaps with plain values and what modules save beside."""
    if not isinstance(value, Mapping) or not value:
        return False
    tensors, plain = (sum(isinstance(part, kind) for part in value.values()) for kind in (Tensor, _PLAIN))
    return tensors > plain and all(
        isinstance(name, str) and (isinstance(part, (Tensor, *_PLAIN)) or name.endswith("_extra_state"))
        for name, part in value.items()
    )


def cleaned(state: Mapping[str, Any], label: str) -> tuple[StateDict, tuple[str, ...]]:
    """Strip the prefixes of wrappers, convert half precision to float32, and check each tensor's kind."""
    tensors = {name: part for name, part in state.items() if isinstance(part, Tensor)}
    notes = [f"left out {name!r}, which is no tensor" for name, part in state.items() if isinstance(part, _PLAIN)]
    for name, tensor in tensors.items():
        check_kind(name, tensor, label)
    if all(name.startswith("module.") or name == "n_averaged" for name in tensors):
        tensors.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPERS:
            if tensors and all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
                notes.append(f"stripped the prefix {prefix!r} from every name in the file")
                stripped = True
    halves = sum(tensor.dtype in _HALF for tensor in tensors.values())
    if halves:
        notes.append(f"converted {halves} half-precision tensors to float32")
        tensors = {name: t.float() if t.dtype in _HALF else t for name, t in tensors.items()}
    return tensors, tuple(notes)


def fit(state: StateDict, arch: str, label: str) -> Built:
    """Build the architecture and fill it with the weights of a file; shapes are compared before anything is copied."""
    built = build(arch, pretrained=False)
    notes: tuple[str, ...] = ()
    if arch.startswith("torchvision:") and differences(state, built.model):
        built, notes = _adapted(state, built)
    found = differences(state, built.model)
    for prefix in _WRAPPERS if found else ():  # of a class whose own attribute has that name
        outer = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        if not differences(outer, built.model):
            state, found, notes = outer, [], (*notes, f"the architecture has the prefix {prefix!r}: put back")
    for prefix in dict.fromkeys(f"{name.partition('.')[0]}." for name in state if "." in name) if found else ():
        inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if not differences(inner, built.model):
            others = sorted(name for name in state if not name.startswith(prefix))
            left = f"; left out: {', '.join(others[:_SHOWN])}" if others else ""
            notes = (*notes, f"stripped the prefix {prefix!r} from the names in the file{left}")
            state, found = inner, []
            break
    if found:
        raise LoadError(_describe(found, state, built, arch, label))
    notes = (*notes, *_caveats(state, built))
    _check_numbers(state, built, label)
    _fill(built.model, state)
    return replace(built, weights="file", notes=(*built.notes, *notes))


def _check_numbers(state: StateDict, built: Built, label: str) -> None:
    """Refuse whole numbers in the place of real ones: they are codes of a quantised network."""
    own = built.model.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            raise LoadError(
                f"{label}: {name} is {str(tensor.dtype)[6:]} where {built.name} has real numbers, so the file is of a "
                "quantised network. Give the float model's weights, and quantise the result."
            )


def _caveats(state: StateDict, built: Built) -> Iterator[str]:
    """What torchvision builds otherwise where it loads weights of its own, and a file does not tell."""
    if getattr(built.model, "transform_input", None) is False:
        yield (
            f"{built.name} was built with transform_input=False; torchvision's own weights want True, which scales "
            "their inputs (--arch package.module:factory builds it so)"
        )
    if is_detector(built.model) and built.model.state_dict().keys() - state.keys():
        yield (
            "the file has no counters of batch norms: if it was trained with FrozenBatchNorm2d, as torchvision's own "
            "detectors, their eps may be another (--arch package.module:factory builds it so)"
        )


def _fill(model: nn.Module, state: StateDict) -> None:
    own = model.state_dict()
    for name in own.keys() - state.keys():  # counters only, see differences()
        state = {**state, name: own[name]}
    model.load_state_dict(state, strict=True)


def differences(state: Mapping[str, Tensor], model: nn.Module) -> list[Difference]:
    """Tensors whose name or shape differs, in the order of the model; counters that old files lack do not count."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    names = [*own, *(name for name in theirs if name not in own)]
    return [
        Difference(name, theirs.get(name), own.get(name))
        for name in names
        if theirs.get(name) != own.get(name) and not (name.endswith("num_batches_tracked") and name not in theirs)
    ]


def _adapted(state: StateDict, built: Built) -> tuple[Built, tuple[str, ...]]:
    """Build again with the file's number of classes and auxiliary heads, where those are what differs."""
    options: dict[str, Any] = {}
    notes: list[str] = []
    found = differences(state, built.model)
    if any(part.name.startswith("aux_classifier.") and part.model is None for part in found):
        options["aux_loss"] = True
        notes.append("built with the auxiliary classifier that the file has")
    missing = [part for part in found if part.file is None]
    if missing and all(part.name.startswith(("aux", "AuxLogits")) for part in missing):
        options["aux_logits"] = False
        notes.append("built without the auxiliary heads, which the file does not have")
    classes = _file_classes(found)
    if classes is not None:
        options["num_classes"] = classes
        notes.append(f"built with num_classes={classes}, as the head in the file has {classes} outputs")
    if not options:
        return built, ()
    adapted = construct_torchvision(built.name, **options)
    if any(part.file and part.model for part in differences(state, adapted)):  # it was no head that differs
        return built, ()
    return replace(built, model=adapted), tuple(notes)


def _file_classes(found: list[Difference]) -> int | None:
    """The number of outputs in the file, if every tensor with another shape differs in the same first size alone."""
    pairs = [(part.file, part.model) for part in found if part.file and part.model]
    changes = {(file[0], model[0]) for file, model in pairs}
    same_rest = all(file[1:] == model[1:] for file, model in pairs)
    return changes.pop()[0] if len(changes) == 1 and same_rest and len(pairs) <= 6 else None


def _describe(found: list[Difference], state: StateDict, built: Built, arch: str, label: str) -> str:
    lines = [f"{label}: {len(found)} tensors do not fit {arch} (the file holds {len(state)}):"]
    lines += [f"  {p.name}: file {_shape(p.file)}, {built.name} {_shape(p.model)}" for p in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    lines.append(_hint(found, state, arch))
    return "\n".join(lines)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "has none" if shape is None else str(list(shape))


def _hint(found: list[Difference], state: StateDict, arch: str) -> str:
    from slimc.loading.suggest import matching_architectures, suggestion

    shapes = [part for part in found if part.file and part.model]
    matches = [match for match in matching_architectures(state) if f"torchvision:{match[0]}" != arch]
    if matches:
        return suggestion(matches, len(state))
    if _file_classes(found) is not None and len(shapes) == len(found):
        classes = _file_classes(found)
        return f"Only the head differs: let the factory build the model with num_classes={classes}."
    if len(shapes) == len(found) and all(_is_narrower(part) for part in shapes):
        return "Every differing tensor is narrower in the file: it may be pruned already, or of a smaller width."
    return "The file is of a different architecture, or of another version of it: give the one that saved it as --arch."


def _is_narrower(part: Difference) -> bool:
    assert part.file is not None
    assert part.model is not None
    return len(part.file) == len(part.model) and all(a <= b for a, b in zip(part.file, part.model, strict=True))
