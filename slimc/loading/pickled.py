"""Objects saved by torch.save, read without running anything that the file brings along.

Reduces risk; it is no sandbox. For files from strangers, run slimc in a container.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from slimc.errors import LoadError
from slimc.loading import policy
from slimc.loading.archive import Archive
from slimc.loading.scan import Call, Program, Storage, scan, shortened

_HEADER_ENTRIES = ("byteorder", "version", ".format_version", ".storage_alignment")
_TYPED_STORAGE_BYTES = {
    "Double": 8, "Long": 8, "ComplexFloat": 8, "ComplexDouble": 16, "Float": 4, "Int": 4, "QInt32": 4,
    "Untyped": 1, "Half": 2, "BFloat16": 2, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "QInt8": 1, "QUInt8": 1,
}  # fmt: skip


def checked_copy(archive: Archive, allow: Sequence[str]) -> tuple[Any, io.BytesIO]:
    """Check an archive of torch.save and load it; returns the object and the checked bytes it was loaded from."""
    label = archive.label
    if "data.pkl" not in archive.entries:
        raise LoadError(f"{label}: a zip archive without data.pkl, so not written by torch.save. Give a model file.")
    description = archive.read("data.pkl")
    program = scan(description, label)
    _check_storages(program.storages, archive)
    for call in program.calls:
        _check_extent(call, label)
    data = [f"data/{key}" for key in dict.fromkeys(storage.key for storage in program.storages)]
    headers = [name for name in _HEADER_ENTRIES if name in archive.entries]
    copy = archive.repack(["data.pkl", *headers, *data], {"data.pkl": description})
    return _unpickle(copy, program, allow, label), copy


def _unpickle(copy: io.BytesIO, program: Program, allow: Sequence[str], label: str) -> Any:
    with _no_safe_globals():
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(copy)
            torch.serialization.add_safe_globals([*policy.check(program, unknown, allow, label)])
            copy.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about protocols and storages: nothing that a user can act on
                return torch.load(copy, map_location="cpu", weights_only=True)
        except LoadError:
            raise
        except Exception as error:  # torch and __setstate__ of any allowed class raise what they like
            raise LoadError(f"{label}: torch cannot read it: {_first_line(error)}. Save the model again.") from error


@contextlib.contextmanager
def _no_safe_globals() -> Iterator[None]:
    """Start from torch's own list, whatever other libraries have added to it, and put theirs back afterwards."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@contextlib.contextmanager
def weights_only_forced(enabled: bool = True) -> Iterator[None]:
    """Make every torch.load in the process weights-only, whatever its caller asks for, or undo that."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    opposite = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {key: os.environ.pop(key) for key in (name, opposite) if key in os.environ}
    if enabled:
        os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        os.environ.update(before)


def read_trusted(path: Path) -> Any:
    """Unpickle a file without any protection: whatever code it names, runs."""
    with policy.project_on_path(), weights_only_forced(enabled=False):
        try:
            return torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:  # the file's own code may raise anything
            raise LoadError(f"{path}: unpickling fails with {type(error).__name__}: {_first_line(error)}.") from error


def _check_storages(storages: Sequence[Storage], archive: Archive) -> None:
    for storage in storages:
        entry = f"data/{storage.key}"
        if entry not in archive.entries:
            raise LoadError(f"{archive.label}: the tensor data {entry} is missing. Copy or save the file again.")
        kind = storage.type.rpartition(".")[2].removesuffix("Storage")
        if kind not in _TYPED_STORAGE_BYTES:
            raise LoadError(f"{archive.label}: {entry} is said to be a {storage.type}, which no saved tensor is.")
        needed = storage.elements * _TYPED_STORAGE_BYTES[kind]
        if needed > archive.size(entry):
            raise LoadError(
                f"{archive.label}: {entry} holds {archive.size(entry)} bytes and the file claims {needed}. Not loaded."
            )


def _check_extent(call: Call, label: str) -> None:
    """Refuse a tensor that needs more elements than its storage has (a few bytes shown as terabytes)."""
    function, arguments = str(call.function), call.arguments
    if function == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4 and isinstance(arguments[2], tuple):
        function, arguments = str(arguments[0]), arguments[2]
    if not function.startswith(("torch._utils._rebuild_tensor", "torch._utils._rebuild_qtensor")):
        return
    match arguments:
        case (Storage() as storage, int(offset), tuple(size), tuple(stride), *_):
            shape, steps = _integers(size, label), _integers(stride, label)
        case _:
            raise LoadError(f"{label}: a tensor is described as {shortened(arguments)}. Save the model again.")
    if len(shape) != len(steps) or offset < 0 or min((*shape, *steps), default=0) < 0:
        raise LoadError(f"{label}: a tensor over data/{storage.key} has shape {shape} and strides {steps}. Not loaded.")
    last = offset + sum((width - 1) * step for width, step in zip(shape, steps, strict=True))
    elements = math.prod(shape)
    if elements and (elements > storage.elements or last >= storage.elements):
        raise LoadError(
            f"{label}: a tensor of shape {list(shape)} is stored as data/{storage.key}, which has "
            f"{storage.elements} elements. If it was expanded on purpose, save it after .contiguous() or .clone()."
        )


def _integers(values: tuple[Any, ...], label: str) -> tuple[int, ...]:
    if any(not isinstance(value, int) for value in values):
        raise LoadError(f"{label}: a tensor's shape is described as {shortened(values)}. Save the model again.")
    return values


def _first_line(error: BaseException) -> str:
    text = str(error)
    # torch puts its advice about switching protection off before the reason
    reason = text.partition("WeightsUnpickler error: ")[2] or text
    lines = reason.strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
