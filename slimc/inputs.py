"""Example inputs from the command line: shapes or files."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .datasets import load_arrays
from .errors import UsageError
from .graph.example import Example

_SHAPE = re.compile(r"(?P<sizes>\d+([x,]\d+)*)(:(?P<kind>\w+))?")
KINDS = {
    "float32": torch.float32, "float": torch.float32, "float64": torch.float64, "int64": torch.int64,
    "int": torch.int64, "long": torch.int64, "int32": torch.int32, "int8": torch.int8, "uint8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
"""What `--input` may ask for."""
_BATCH = 2
_MOST = 2**31


def example_inputs(
    given: Sequence[str],
    known: tuple[int, ...] | None,
    seed: int,
    batch: int | None = None,
    model: nn.Module | None = None,
    notes: Sequence[str] = (),
) -> Example:
    """Inputs from --input (shapes or a file), or of the shape that the model is known to take.

    batch: the batch size that the model wants, where it wants one. model: tells the names of arguments. notes: what
        was found in the file, perhaps of its inputs.

    Raises UsageError where neither says what the input is.
    """
    generator = torch.Generator().manual_seed(seed)
    if not given:
        if known is None:
            said = "".join(f"\n  {note}" for note in notes)
            raise UsageError(
                f"this model's input is not known: give it with --input, for example --input 1x3x224x224{said}"
            )
        # Two samples, since torch.export takes a batch of one for a constant.
        return Example((torch.randn(batch or _BATCH, *known, generator=generator),), {})
    files = [text for text in given if Path(text).suffix in (".npz", ".npy")]
    if files and len(given) > 1:
        raise UsageError("--input: give one file with all inputs, or a shape for each input")
    if files:
        example = _from_file(Path(files[0]), names_of(model))
        return _in_order(example, Path(files[0]), getattr(model, "input_names", None))
    return Example(tuple(_tensor(text, generator, batch) for text in given), {})


def names_of(model: nn.Module | None) -> list[str] | None:
    """What a model's arguments are called; None where it takes any."""
    if names := getattr(model, "input_names", None):  # of a graph whose inputs have names, and are given in order
        return list(names)
    parameters = inspect.signature(model.forward).parameters if model is not None else {}
    if not parameters or any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values()):
        return None
    return list(parameters)


def _in_order(example: Example, path: Path, order: Sequence[str] | None) -> Example:
    """Arguments by name as a graph takes them: by position."""
    if not order or not example.kwargs:
        return example
    if missing := [name for name in order if name not in example.kwargs]:
        raise UsageError(f"{path} lacks {', '.join(missing)}; the model takes {', '.join(order)}")
    return Example(tuple(example.kwargs[name] for name in order), {})


def _from_file(path: Path, names: list[str] | None) -> Example:
    arrays = load_arrays(path)
    strange = [name for name in arrays if names is not None and name not in names]
    # Names that numpy gives (arr_0) or that stand for the only input say nothing of the model's arguments.
    if all(name.startswith("arr_") for name in arrays) or list(arrays) == ["input"] or (len(arrays) == 1 and strange):
        return Example(tuple(arrays.values()), {})
    if strange:
        held, wanted = ", ".join(arrays), ", ".join(names or ())
        raise UsageError(f"{path} holds {held}; arrays are arguments by name, and the model takes {wanted}")
    return Example((), dict(arrays))


def _tensor(text: str, generator: torch.Generator, batch: int | None) -> Tensor:
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--input {text}: wanted a shape with its batch (1x3x224x224, 1x128:int64) or an .npz file")
    kind = KINDS.get(match["kind"] or "float32")
    if kind is None:
        raise UsageError(f"--input {text}: unknown type {match['kind']!r}; known: {', '.join(KINDS)}")
    sizes = [int(size) for size in re.split("[x,]", match["sizes"])]
    if 0 in sizes:
        raise UsageError(f"--input {text}: every size must be at least 1")
    if len(sizes) > 1 and sizes[0] == 1 and batch is not None:
        sizes[0] = batch
    if math.prod(sizes) > _MOST:
        raise UsageError(f"--input {text}: {math.prod(sizes):.3g} numbers are too large an example")
    if kind.is_floating_point:
        return torch.randn(sizes, generator=generator).to(kind)
    return torch.randint(0, 2, sizes, generator=generator).to(kind)
