"""Programs saved by torch.export, loaded only after everything in the file that torch would trust was checked."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from slimc.errors import LoadError, first_line
from slimc.graph.rule import arguments, operator_name
from slimc.loading.archive import Archive, open_archive
from slimc.loading.pickled import checked_copy, weights_only_forced
from slimc.loading.program import checked_payloads, checked_program

_PROGRAM = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/model_weights_config.json"
_CONSTANTS = "data/constants/model_constants_config.json"
_HEADERS = ("archive_format", "archive_version", "byteorder", "version", ".data/version")
_HARMLESS = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+|extra/.*|\.data/serialization_id", re.ASCII)


@dataclass(frozen=True)
class ProgramFile:
    """A loaded program as a module, with the shape of its first example input without the batch.

    batch: the only batch size that it takes; None where it takes any.
    """

    module: nn.Module
    input_shape: tuple[int, ...] | None
    notes: tuple[str, ...]
    batch: int | None = None


def is_program(names: list[str]) -> bool:
    """Whether the entries of an archive (with or without root folder) are those of torch.export.save."""
    return any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names)


def load_program(archive: Archive) -> ProgramFile:
    """Check and load a .pt2 archive; nothing in the file is unpickled freely or evaluated."""
    label = archive.label
    if "serialized_exported_program.json" in archive.entries:
        raise LoadError(f"{label}: written by torch before 2.8, a format torch has given up. Export it again.")
    _check_entries(archive)
    try:
        program, notes = checked_program(archive.read(_PROGRAM), label)
        weights, weight_names = checked_payloads(archive.read(_WEIGHTS), _sizes(archive, "data/weights/"), label)
        constants, constant_names = checked_payloads(
            archive.read(_CONSTANTS), _sizes(archive, "data/constants/"), label
        )
    except (TypeError, AttributeError, KeyError, RecursionError) as error:  # a value of another kind than it should be
        raise LoadError(f"{label}: its descriptions are malformed ({error}). Export the model again.") from error
    inputs, example = _sample_inputs(archive)
    replaced = {_PROGRAM: program, _WEIGHTS: weights, _CONSTANTS: constants, _INPUTS: inputs}
    names = [
        *replaced,
        *(name for name in _HEADERS if name in archive.entries),
        *(f"data/weights/{name}" for name in sorted(weight_names)),
        *(f"data/constants/{name}" for name in sorted(constant_names)),
    ]
    module, batch = _load(archive.repack(names, replaced), label)
    return ProgramFile(module, _only_shape(example), notes, batch)


def _load(copy: io.BytesIO, label: str) -> tuple[nn.Module, int | None]:
    with weights_only_forced(), _quiet():
        try:
            # guards were removed from the file; slimc checks shapes itself and says where they do not fit
            program = torch.export.load(copy)
            module = program.module(check_guards=False)
        except Exception as error:  # the deserializer raises everything from AssertionError to KeyError
            raise LoadError(
                f"{label}: torch {torch.__version__} cannot load the program ({type(error).__name__}: "
                f"{first_line(error)}). Export it again with this version of torch."
            ) from error
    if any(_trains(node) for node in program.graph.nodes):
        raise LoadError(
            f"{label}: the program was exported in training mode, in which dropout draws and batch norms use the "
            "batch's own statistics. Export it again after model.eval()."
        )
    return module, _fixed_batch(program)


def _trains(node: Node) -> bool:
    """Whether an operator does what it does in training only; a norm without stored statistics has no other way."""
    name = operator_name(node) if node.op == "call_function" else ""
    if name == "batch_norm":
        return bool(arguments(node)["training"] and arguments(node)["running_mean"] is not None)
    return name in ("dropout", "feature_dropout", "alpha_dropout") and arguments(node)["train"] is True


def _fixed_batch(program: torch.export.ExportedProgram) -> int | None:
    """The first size of the first input, where the program holds it as a number."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, torch.Tensor) and value.dim() > 1:
            size = value.shape[0]
            return size if isinstance(size, int) else None
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own log lines and warnings about a file that slimc will describe in its error."""
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _check_entries(archive: Archive) -> None:
    expected = {_PROGRAM, _INPUTS, _WEIGHTS, _CONSTANTS, *_HEADERS}
    missing = sorted({_PROGRAM, _INPUTS, _WEIGHTS, _CONSTANTS, "archive_format"} - set(archive.entries))
    foreign = sorted(n for n in archive.entries if n not in expected and not _HARMLESS.fullmatch(n))
    if foreign:
        raise LoadError(
            f"{archive.label}: holds {foreign[0]}, which a plain exported program does not need and which may run "
            "code. Export the model again with torch.export.save, without compiled kernels or custom objects."
        )
    if missing:
        raise LoadError(f"{archive.label}: {missing[0]} is missing. Export the model again with torch.export.save.")


def _sizes(archive: Archive, folder: str) -> dict[str, int]:
    return {name.removeprefix(folder): archive.size(name) for name in archive.entries if name.startswith(folder)}


def _sample_inputs(archive: Archive) -> tuple[bytes, Any]:
    """Re-packed example inputs and their value: torch unpickles this entry freely when a strict read fails."""
    content = archive.read(_INPUTS)
    if not content:
        return content, None
    inner = open_archive(io.BytesIO(content), f"{archive.label} ({_INPUTS})")
    with inner.zip:
        value, copy = checked_copy(inner, ())
    return copy.getvalue(), value


def _only_shape(example: Any) -> tuple[int, ...] | None:
    """Shape of the example without its batch axis, where it is one tensor of real numbers and nothing else."""
    match example:
        case ([torch.Tensor() as tensor], {**rest}) | ((torch.Tensor() as tensor,), {**rest}) if not rest:
            return tuple(tensor.shape[1:]) if tensor.dim() > 1 and tensor.is_floating_point() else None
    return None
