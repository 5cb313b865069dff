"""Does an exported file compute what the model it came from computes?

Two correct float32 programs differ by their rounding, which in deep networks can pass a fixed tolerance. So where an
output does, the model is run in float64 as well, and the file must be about as near to that as the model itself is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from slimc.errors import ParityError, UsageError
from slimc.exporters.formats import onnx as onnx_format

_AT_ONCE = 1 << 20
_SEED = 1021  # not one that an example was drawn with
ROUNDINGS = 2.0
"""The file may be this many times as far from the model in float64 as the model's own outputs are."""
TOLERANCE = 1e-5
"""The largest relative error of an output that is let pass without a look at the rounding."""
LARGEST_ROUNDING = 1e-4
"""Where the model's own outputs are further from float64 than this, rounding could hide a fault: refused."""
LARGEST_CHANGED = 1e-3
"""Of whole numbers, as an argmax gives: the largest share that rounding may change."""
_FEW = 3
_REFUSED = f"at most {TOLERANCE:.0e} is allowed. The file is not used; please report the model."


@dataclass(frozen=True)
class Parity:
    """The worst relative error over all outputs of all input sets.

    `rounding` is the largest distance of the model's own outputs from float64 among those that differ from the file's
    by more than TOLERANCE; None where none does.
    `cases` counts input sets, `batches` lists the batch sizes among them in ascending order, and
    `outputs_vary` tells whether the reference's outputs changed with the inputs' values: if not, the check says little.
    """

    max_relative_error: float
    cases: int
    batches: tuple[int, ...]
    outputs_vary: bool
    rounding: float | None = None


def check_onnx(
    path: Path,
    reference: Callable[..., object],
    inputs: Sequence[tuple[Tensor, ...]],
    exact: Callable[..., object] | None = None,
) -> Parity:
    """Compare the file, run by ONNX Runtime on the CPU, with `reference(*case)` for each input set.

    The error of an output is max|file - reference| / max|reference|. Raises ParityError, naming output, case
    and error, if one is above TOLERANCE or is not a number; shapes and types must be equal, and whole numbers too.
    exact: `reference` in float64, run only where an output is above TOLERANCE: there the file's distance from it may
    be ROUNDINGS times the reference's own, which is the largest over all input sets. Of whole numbers, such as an
        argmax over many places, as many may differ from float64's as do in the reference, and a few.
    """
    session = onnx_format.open_session(path)
    names = tuple(value.name for value in session.get_outputs())
    batched = tuple(list(value.shape[:1]) == [onnx_format.BATCH] for value in session.get_inputs())
    return check(
        lambda case: onnx_format.run_session(session, case),
        reference,
        inputs,
        names=names,
        batched=batched,
        label=path.name,
        exact=exact,
    )


def check(
    run: Callable[[tuple[Tensor, ...]], list[Tensor]],
    reference: Callable[..., object],
    inputs: Sequence[tuple[Tensor, ...]],
    *,
    names: Sequence[str],
    batched: Sequence[bool],
    label: str,
    exact: Callable[..., object] | None = None,
) -> Parity:
    """Compare any runner with `reference`, as `check_onnx` does; `label` opens each message.

    Input sets after the first that the model itself refuses, as where indices point beyond fewer rows, are left out.
    """
    if not inputs:
        raise UsageError(f"{label}: parity needs at least one set of inputs")
    inputs, expected = _computed(reference, inputs)
    actual = [run(case) for case in inputs]
    scales = [_common_scale(outputs) for outputs in zip(*expected, strict=True)]
    worst, beyond = 0.0, list[_Beyond]()
    for case, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        where = f"{label}: case {case + 1} of {len(inputs)} (inputs {_shapes(inputs[case])})"
        if not len(got) == len(wanted) == len(names):
            raise ParityError(f"{where}: the file has {len(got)} outputs, the model {len(wanted)}")
        for i, name in enumerate(names):
            place = f"{where}: output {name!r}"
            error = relative_error(got[i], wanted[i], scales[i], where=place)
            said = f"{place} differs from the model's by {error:.1e} relative to its largest value"
            if math.isinf(error) and not wanted[i].dtype.is_floating_point:
                error = float((got[i] != wanted[i]).double().mean())
                said = f"{place} differs from the model's in {error:.1%} of its numbers"
            worst = max(worst, error)
            if error <= (TOLERANCE if wanted[i].dtype.is_floating_point else 0.0):
                continue
            if exact is None:
                raise ParityError(f"{said}; {_REFUSED}")
            beyond.append(_Beyond(case, i, said))
    rounding = None
    if beyond and exact is not None:
        with torch.no_grad():
            truth = [_tensors(exact(*case)) for case in inputs]
        rounding = _rounding(beyond, actual, expected, truth, scales)
    return Parity(worst, len(inputs), _batches(inputs, batched), _vary(expected), rounding)


def _computed(
    reference: Callable[..., object], inputs: Sequence[tuple[Tensor, ...]]
) -> tuple[list[tuple[Tensor, ...]], list[list[Tensor]]]:
    """The input sets on which the model runs, and what it gives for each; the first one must be among them."""
    cases, expected = [], []
    for number, case in enumerate(inputs):
        try:
            with torch.no_grad():
                outputs = _tensors(reference(*case))
        except Exception:
            if number == 0:
                raise
            continue
        cases.append(case)
        expected.append(outputs)
    return cases, expected


class _Beyond(NamedTuple):
    """An output that differs by more than the tolerance."""

    case: int
    output: int
    said: str


def _rounding(
    beyond: list[_Beyond],
    actual: list[list[Tensor]],
    expected: list[list[Tensor]],
    truth: list[list[Tensor]],
    scales: list[float],
) -> float:
    """Return how far the model's own outputs are from the true ones; ParityError where that cannot explain a file's.

    The model's distance is the largest of all cases: rounding strikes at random, and in one case may cancel out.
    """

    def off(values: list[list[Tensor]], case: int, i: int) -> float:
        return relative_error(values[case][i].double(), truth[case][i].double(), scales[i])

    def changed(values: list[list[Tensor]], i: int) -> int:
        return sum(int((own[i] != true[i]).sum()) for own, true in zip(values, truth, strict=True))

    largest = 0.0
    for case, i, said in beyond:
        if not expected[case][i].dtype.is_floating_point:
            # Near ties of an argmax, or values at a threshold, fall to either side; a fault changes many numbers.
            others, owns = changed(actual, i), changed(expected, i)
            count = sum(outputs[i].numel() for outputs in expected)
            if others > min(ROUNDINGS * owns + _FEW, LARGEST_CHANGED * count):
                raise ParityError(f"{said}, and {others} of {count} from float64's (the model {owns}); {_REFUSED}")
            continue
        own = max(off(expected, number, i) for number in range(len(expected)))
        files = off(actual, case, i)
        if own > LARGEST_ROUNDING or not files <= max(TOLERANCE, ROUNDINGS * own):
            raise ParityError(
                f"{said} and is {files:.1e} away from the model in float64, the model's own output {own:.1e}; "
                f"{_REFUSED}"
            )
        largest = max(largest, own)
    return largest


def relative_error(actual: Tensor, expected: Tensor, zero_scale: float = 0.0, *, where: str = "output") -> float:
    """Return max|actual - expected| / max|expected|, computed in float64.

    Where `expected` is all zero, `zero_scale` divides instead (the output's largest value in other cases); if that
    is zero too, any difference is an infinite error. Whole numbers and truth values: 0 if all equal, else infinite.
    Raises ParityError if shapes or types differ, a value is not a number, or infinities are in other places.
    """
    if actual.shape != expected.shape:
        raise ParityError(f"{where} has shape {list(actual.shape)}; the model gives {list(expected.shape)}")
    if actual.dtype != expected.dtype:
        raise ParityError(f"{where} has type {actual.dtype}; the model gives {expected.dtype}")
    if expected.numel() == 0:
        return 0.0
    if not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(actual, expected) else math.inf
    difference = scale = 0.0
    for one, other in zip(_pieces(actual), _pieces(expected), strict=True):
        if other.isnan().any():
            raise ParityError(f"{where} of the model itself is not a number (NaN), so nothing can be compared")
        if one.isnan().any():
            raise ParityError(f"{where} is not a number (NaN); the model gives numbers")
        finite = other.isfinite()
        if not torch.equal(one[~finite], other[~finite]) or not one[finite].isfinite().all():
            raise ParityError(f"{where} is infinite in other places than the model's")
        if finite.any():
            difference = max(difference, (one[finite] - other[finite]).abs().max().item())
            scale = max(scale, other[finite].abs().max().item())
    if difference == 0.0:
        return 0.0
    scale = scale or zero_scale
    return difference / scale if scale else math.inf


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """Some values at a time, in float64: outputs can be a network's largest tensors."""
    return (piece.double() for piece in torch.split(values.flatten(), _AT_ONCE))


def other_inputs(
    example: tuple[Tensor, ...],
    batched: Sequence[bool],
    *,
    batches: Sequence[int | None] = (None, 1, 3),
) -> list[tuple[Tensor, ...]]:
    """Return `example` and more input sets like it, with other values: one for each batch size in `batches`.

    None is the example's own size, which alone is there without a free batch axis.

    Floats are drawn from the example's own values (normal noise where those are all equal), whole numbers from the
    example's range, so that indices stay valid. `batched` tells for each input whether axis 0 is a free batch axis.
    """
    generator = torch.Generator().manual_seed(_SEED)
    sizes = batches if any(batched) else (None,)
    varied = [
        tuple(_like(tensor, size if free else None, generator) for tensor, free in zip(example, batched, strict=True))
        for size in sizes
    ]
    return [example, *varied]


def _like(tensor: Tensor, batch: int | None, generator: torch.Generator) -> Tensor:
    shape = list(tensor.shape)
    if batch is not None:
        shape[0] = batch
    if tensor.numel() == 0:
        return tensor.new_zeros(shape)
    values = tensor.detach().cpu().flatten()
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool):
        low, high = int(values.min()), int(values.max())
        drawn = torch.randint(low, high + 1, shape, generator=generator, dtype=tensor.dtype)
    elif tensor.dtype.is_floating_point and bool((values == values[0]).all()):
        drawn = (values[0] + torch.randn(shape, generator=generator)).to(tensor.dtype)
    else:
        drawn = values[torch.randint(values.numel(), shape, generator=generator)]
    return drawn.to(tensor.device)


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf.detach().cpu() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _common_scale(outputs: Iterable[Tensor]) -> float:
    """Return the largest finite magnitude of one output over all cases."""
    scale = 0.0
    for output in outputs:
        if output.dtype.is_floating_point:
            for piece in _pieces(output):
                finite = piece[piece.isfinite()]
                scale = max(scale, finite.abs().max().item() if len(finite) else 0.0)
    return scale


def _vary(expected: Sequence[Sequence[Tensor]]) -> bool:
    first = expected[0]
    return any(
        one.shape == other.shape and not torch.equal(one, other)
        for outputs in expected[1:]
        for one, other in zip(first, outputs, strict=True)
    )


def _shapes(case: tuple[Tensor, ...]) -> str:
    return ", ".join("×".join(map(str, tensor.shape)) or "scalar" for tensor in case)


def _batches(inputs: Sequence[tuple[Tensor, ...]], batched: Sequence[bool]) -> tuple[int, ...]:
    """Return the sizes of the batch axis: of the inputs where it is free, else axis 0 of the first input."""
    chosen = next((index for index, free in enumerate(batched) if free), 0)
    sizes = {case[chosen].shape[0] for case in inputs if len(case) > chosen and case[chosen].dim()}
    return tuple(sorted(sizes))
