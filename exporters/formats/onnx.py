"""An ONNX file: a dense graph with batch normalisation folded away, one file where it fits, no paths inside."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import ir
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from slimc.errors import OutputError, UsageError, first_line
from slimc.exporters.artifact import whole_file
from slimc.exporters.formats.attention import with_four_axes
from slimc.exporters.formats.batchnorm import fold
from slimc.exporters.formats.pieces import slice_pieces
from slimc.exporters.formats.streamed import save

# A protobuf ends at 2 GB. Below this the weights travel in the same file, as people expect of a .onnx.
EXTERNAL_DATA_BYTES = 1_500_000_000
BATCH = "batch"


Names = tuple[Sequence[str], Sequence[str]]
"""What inputs and outputs are called."""


@dataclass(frozen=True)
class OnnxModel:
    """A written ONNX file.

    `batched` tells for each input whether axis 0 is the free batch axis, named "batch" in the file;
    `dynamic_batch` whether any is. `unfolded` names each batch normalisation that still follows a
    convolution, with the reason (it costs time, not correctness). `bytes` counts external data too.
    """

    path: Path
    opset: int
    nodes: int
    dynamic_batch: bool
    batched: tuple[bool, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    external_data: bool
    bytes: int
    unfolded: tuple[str, ...]


def export(
    program: ExportedProgram, path: Path, names: Names | None = None, *, external_data_bytes: int = EXTERNAL_DATA_BYTES
) -> OnnxModel:
    """Write `program` as ONNX, in the opset that torch chooses, and check the file with `onnx.checker`.

    names: of inputs and outputs; default, those of forward's arguments and of what it returns.
    Weights above `external_data_bytes` go to PATH.data. Raises OutputError if torch has no translation for
    an operator or the file fails the check; nothing is written then.
    """
    translated = _translate(program, path)
    model = translated.model
    unfolded = fold(model.graph)
    _rename_interface(model.graph, *(names or (_input_names(program), _output_names(program))))
    _rename_dimensions(model.graph)
    _remove_traces(model)
    external = sum(value.const_value.nbytes for value in _initializers(model.graph)) > external_data_bytes
    with whole_file(path) as temporary:
        if external:
            translated.save(str(temporary), external_data=True)
        else:
            with _silence():  # it says of each weight that its numbers are missing
                save(model, temporary)
        _check(temporary, path)
        size = sum(file.stat().st_size for file in temporary.parent.iterdir())
    batched = tuple(_is_batched(value) for value in model.graph.inputs)
    return OnnxModel(
        path=path,
        opset=int(model.opset_imports[""]),
        nodes=sum(1 for _ in model.graph.all_nodes()),
        dynamic_batch=any(batched),
        batched=batched,
        input_names=tuple(str(value.name) for value in model.graph.inputs),
        output_names=tuple(str(value.name) for value in model.graph.outputs),
        external_data=external,
        bytes=size,
        unfolded=unfolded,
    )


def open_session(path: Path) -> Any:
    """Return an onnxruntime InferenceSession on the CPU; UsageError without onnxruntime, OutputError if it refuses."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "running an ONNX file needs onnxruntime, which is not installed. Install it with "
            "`pip install onnxruntime` or, for NVIDIA GPUs, `pip install onnxruntime-gpu`."
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # it grows in powers of two and keeps what every batch size took
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds; it knows few operators in float64, for one
        raise OutputError(
            f"{path.name}: ONNX Runtime cannot run it ({first_line(error)}). A model in another precision should be "
            "given in float32 (model.float())"
        ) from error


def run_session(session: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Run an open session on positional inputs; returns the outputs in the file's order."""
    expected = session.get_inputs()
    if len(inputs) != len(expected):
        names = ", ".join(value.name for value in expected)
        raise UsageError(f"the ONNX model takes {len(expected)} inputs ({names}), not {len(inputs)}")
    feed = {value.name: tensor.detach().cpu().numpy() for value, tensor in zip(expected, inputs, strict=True)}
    return [torch.from_numpy(np.array(output)) for output in session.run(None, feed)]


def run(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Run the file in ONNX Runtime on the CPU with positional inputs; returns the outputs in the file's order."""
    return run_session(open_session(path), inputs)


def _translate(program: ExportedProgram, path: Path) -> torch.onnx.ONNXProgram:
    try:
        with _silence():
            translated = torch.onnx.export(with_four_axes(program), dynamo=True, optimize=False, verbose=False)
            assert translated is not None
            slice_pieces(translated.model.graph)
            with _without(slice_split_rule):
                translated.optimize()
    except torch.onnx.OnnxExporterError as error:
        causes = [first_line(cause) for cause in _causes(error) if str(cause).strip()]
        raise OutputError(
            f"{path.name}: torch cannot express the model in ONNX: {causes[-1]}. --no-onnx (in Python "
            "save(..., onnx=False)) leaves this file out."
        ) from error
    _register_loose(translated.model.graph)
    return translated


@contextlib.contextmanager
def _without(rule: Any) -> Iterator[None]:
    """Leave one rule out of onnxscript's optimizer.

    A pattern with two results lists the whole graph at every node (onnxscript 0.7.2), which took 85% of the export of
    graphs with thousands of nodes. It would turn two slices into a split.
    """
    rule.try_rewrite = lambda *_args, **_options: None
    try:
        yield
    finally:
        del rule.try_rewrite


def _register_loose(graph: ir.Graph) -> None:
    """Make initializers of constants that onnxscript's optimizer has left outside of the graph.

    It gives the limits of a clip their input's name, and forgets those whose name was taken: clips of one value.
    """
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None or value.is_initializer():
                continue
            while value.name in graph.initializers:
                value.name = f"{value.name}_"
            graph.register_initializer(value)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress, warnings and log lines off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _initializers(graph: ir.Graph) -> Iterator[Any]:
    yield from (value for value in graph.initializers.values() if value.const_value is not None)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _rename_interface(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name what goes in and out; a value inside the graph that has one of the names gets another."""
    used = {str(value.name) for value in _values(graph)} | {*inputs, *outputs}
    ends = {id(value) for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for value in _values(graph):
        if value.name in (*inputs, *outputs) and id(value) not in ends:
            value.name = _unused(str(value.name), used)
            used.add(value.name)
    taken = {str(value.name) for value in graph.initializers.values()}
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if len(values) != len(names):
            continue
        for value, name in zip(values, names, strict=True):
            # An output that is at once a weight or an input has that name already.
            if values is graph.outputs and (value.is_initializer() or value.is_graph_input()):
                continue
            value.name = _unused(name, taken) if name in taken else name
            taken.add(value.name)


def _input_names(program: ExportedProgram) -> list[str]:
    """Of forward's arguments."""
    return [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    ]


def _output_names(program: ExportedProgram) -> list[str]:
    """Of the returned keys; "output", "output_0" ... where there are none."""
    signature = program.graph_signature
    tree = pytree.tree_unflatten(list(signature.user_outputs), program.call_spec.out_spec)
    paths = pytree.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)[0]
    tensors = {
        spec.arg.name
        for spec in signature.output_specs
        if isinstance(spec.arg, TensorArgument)  # None and numbers have no place in an ONNX file
    }
    return [_path_name(path) for path, leaf in paths if leaf in tensors]


def _path_name(path: Iterable[Any]) -> str:
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    if not parts or parts[0].isdigit():
        parts.insert(0, "output")
    return re.sub(r"\W+", "_", "_".join(parts)) or "output"  # ONNX takes no empty names


def _unused(name: str, used: set[str]) -> str:
    return next(candidate for i in range(1, 10**6) if (candidate := f"{name}_{i}") not in used)


def _rename_dimensions(graph: ir.Graph) -> None:
    """Call the batch axis "batch" and other free axes by input and axis, where torch wrote s77.

    Free first axes are one batch: torch tells them apart where it cannot prove that they are equal, as in a model
    that joins two inputs along the batch and chunks them again.
    """
    names: dict[str, str] = {}
    for axis_first in (True, False):  # a symbol that is some input's first axis is the batch wherever else it stands
        for value in graph.inputs:
            for axis, dimension in enumerate(value.shape or ()):
                if isinstance(dimension, int) or not dimension.value or (axis == 0) != axis_first:
                    continue
                names.setdefault(dimension.value, BATCH if axis == 0 else f"{value.name}_axis{axis}")
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_rename_dimension(dimension, names) for dimension in value.shape])


def _rename_dimension(dimension: Any, names: dict[str, str]) -> int | str | None:
    if isinstance(dimension, int):
        return dimension
    if dimension.value is None:
        return None
    # Derived axes are expressions such as "2*s77".
    return re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), dimension.value)


def _is_batched(value: ir.Value) -> bool:
    if not value.shape:
        return False
    first = value.shape[0]
    return not isinstance(first, int) and first.value == BATCH


def _remove_traces(model: ir.Model) -> None:
    """Drop documentation and metadata: torch writes stack traces with this machine's paths there."""
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
    for value in _values(model.graph):
        value.doc_string = None
        value.metadata_props.clear()
        if value.const_value is not None and value.const_value.metadata_props:
            value.const_value.metadata_props.clear()


def _check(written: Path, path: Path) -> None:
    try:
        onnx.checker.check_model(str(written))
    except onnx.checker.ValidationError as error:
        raise OutputError(f"{path.name}: the exported graph is not valid ONNX: {first_line(error)}") from error
