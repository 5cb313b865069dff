"""What was read from an ONNX file, run on inputs made up for it and compared with ONNX Runtime where that is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from slimc.errors import LoadError, first_line
from slimc.loading.onnx_module import torch_type

_TOLERANCE = 1e-3
_HALF_TOLERANCE = 3e-2  # the file rounds each result to three digits, the module does not
_PICTURE, _SEQUENCE = 64, 16  # sizes for axes that the file leaves open, of inputs with four axes and with fewer
_NUMBERS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
_WHOLE = (TensorProto.INT64, TensorProto.INT32, TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL)
_NOT_COMPARED = "not compared with ONNX Runtime"
_ONE = "the network works on one sample at a time only, though the file leaves the batch open"


@dataclass(frozen=True)
class Input:
    """An input of the file: its ONNX type, and a size or a label for each axis, a label for one that is open."""

    name: str
    kind: int
    axes: tuple[int | str, ...]

    @staticmethod
    def of(value: onnx.ValueInfoProto) -> Input:
        """As the file declares it; sizes of no meaning, which some exporters write, leave the axis open."""
        kind = value.type.tensor_type
        axes = (d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in kind.shape.dim)
        return Input(value.name, kind.elem_type, tuple(axes))

    def __str__(self) -> str:
        sizes = "x".join(str(axis) for axis in self.axes)
        return f"{self.name} {sizes} {TensorProto.DataType.Name(self.kind).lower()}"


@dataclass(frozen=True)
class Checked:
    """The batch size that is fixed, by the file or as no other works, and what is to be said of the comparison."""

    batch: int | None
    notes: tuple[str, ...]


class _CannotRun(LoadError):
    """The module fails on inputs that were made up for it."""


def check(module: nn.Module, path: Path, inputs: Sequence[Input], single: frozenset[int], is_half: bool) -> Checked:
    """Run the module and compare what it gives with what ONNX Runtime gives on the file.

    single: types of which the module takes float32. is_half: the file computes in half precision, the module does not.
    Where the batch is open, two samples are tried and then one; other open axes get a size that suits most networks.
    Raises LoadError where the module cannot run, or gives something else.
    """
    first = inputs[0].axes[0] if inputs and inputs[0].axes else "?"
    fixed = first if isinstance(first, int) else None
    if unknown := [entry for entry in inputs if entry.kind not in (*_NUMBERS, *_WHOLE)]:
        return Checked(fixed, (f"{_NOT_COMPARED}: no values are made up for {unknown[0]}",))
    session = _session(path)
    failures: list[_CannotRun] = []
    reasons: list[str] = []
    for rows in (2, 1) if fixed is None else (fixed,):
        try:
            samples = [[_values(entry, rows, first, make) for entry in inputs] for make in (torch.randn, torch.rand)]
            reason = _compared(module, session, path, inputs, samples, single, is_half)
        except _CannotRun as error:
            failures.append(error)
            continue
        if reason is None:
            return Checked(rows, (_ONE,)) if fixed is None and rows == 1 else Checked(fixed, ())
        reasons.append(f"{_NOT_COMPARED}: {reason}")
    if reasons:
        return Checked(1, (_ONE, reasons[0])) if failures and fixed is None else Checked(fixed, tuple(reasons[:1]))
    if all(isinstance(axis, int) for entry in inputs for axis in entry.axes[1:]):
        raise LoadError(str(failures[0])) from failures[0]
    return Checked(fixed, (f"{_NOT_COMPARED}: {failures[0]}",))  # perhaps of a size that does not suit this network


def _session(path: Path) -> Any:
    """ONNX Runtime with the file; why it takes no such file; or None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has classes of its own, for versions and operators that it lacks
        return _said(error)


def _compared(
    module: nn.Module, session: Any, path: Path, inputs: Sequence[Input], samples: Sequence[Sequence[Tensor]],
    single: frozenset[int], is_half: bool,
) -> str | None:  # fmt: skip
    """Compare on samples until something finite comes out of each result; or say why it cannot be done."""
    for given in samples:
        ours = _run(
            module, [v.float() if entry.kind in single else v for entry, v in zip(inputs, given, strict=True)], path
        )
        if session is None or isinstance(session, str):
            return session
        try:
            theirs = session.run(None, {entry.name: v.numpy() for entry, v in zip(inputs, given, strict=True)})
        except Exception as error:
            return _said(error)
        if _agree(ours, theirs, path, is_half):
            return None
    return "it gives nothing finite for random inputs"


def _values(entry: Input, rows: int, batch: int | str, make: Callable[..., Tensor]) -> Tensor:
    """Random numbers; whole ones are 0 and 1, which are indices and masks for every network."""
    generator = torch.Generator().manual_seed(sum(entry.name.encode()))  # numbers of its own for each input
    usual = _PICTURE if len(entry.axes) > 3 else _SEQUENCE
    named = {} if batch == "?" else {batch: rows}
    shape = [
        axis if isinstance(axis, int) else rows if place == 0 else named.get(axis, usual)
        for place, axis in enumerate(entry.axes)
    ]
    kind = torch_type(entry.kind)
    if entry.kind in _WHOLE:
        return torch.randint(0, 2, shape, generator=generator).to(kind)
    return make(shape, generator=generator).to(kind)


def _run(module: nn.Module, inputs: Sequence[Tensor], path: Path) -> list[Tensor]:
    try:
        with torch.no_grad():
            found = module(*inputs)
    except LoadError as error:
        raise _CannotRun(f"{path}: {error}") from error
    except Exception as error:  # a use of an operator that nobody has thought of
        raise _CannotRun(
            f"{path}: cannot be run as a PyTorch module: {first_line(error)}. Please report it."
        ) from error
    return [value.detach() for value in (found if isinstance(found, tuple) else (found,))]


def _agree(ours: Sequence[Tensor], theirs: Sequence[Any], path: Path, is_half: bool) -> bool:
    """Whether every result could be compared, which takes a finite number in it; raises LoadError where one differs."""
    is_complete = True
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        got, wanted = ours_.numpy().astype(np.float64), theirs_.astype(np.float64)
        if got.shape != wanted.shape:
            raise LoadError(
                f"{path}: read with the shape {got.shape} where the file has {wanted.shape}. Please report it."
            )
        finite = np.isfinite(got) & np.isfinite(wanted)
        # Half precision has infinity for what float32 can still hold.
        if not is_half and not np.array_equal(got[~finite], wanted[~finite], equal_nan=True):
            raise LoadError(
                f"{path}: what was read has NaN or infinity where the file has other numbers. "
                "Please report it with the file."
            )
        if not finite.any():
            is_complete = is_complete and not wanted.size
            continue
        if theirs_.dtype.kind in "biu":  # an argmax, or a comparison: rounding changes a few of many
            worst = float((got != wanted).mean())
        else:
            size = float(np.abs(wanted[finite]).max()) or 1.0
            worst = float(np.abs(got[finite] - wanted[finite]).max()) / size
        if worst > (_HALF_TOLERANCE if is_half else _TOLERANCE):
            raise LoadError(
                f"{path}: what was read differs from the file by {worst:.2g}. Please report it with the file."
            )
    return is_complete


def _said(error: Exception) -> str:
    """What ONNX Runtime says, without the places in its own code."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src\S+ .*\) ", "", str(error).strip())
    return first_line(ValueError(text)).rstrip(". ")
