"""A `torch.export` program as a .pt2 file: loads with torch alone."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from slimc.errors import LoadError
from slimc.exporters.artifact import Artifact, describe, whole_file


def export(program: ExportedProgram, path: Path) -> Artifact:
    """Write a program; example inputs are zeroed and stack traces dropped, so that neither data nor paths leak."""
    with whole_file(path) as temporary, _Sink(temporary.open("wb", buffering=0)) as sink:
        torch.export.save(_without_traces(program), sink)
        if sink.error is not None:
            raise sink.error
    return describe(path, "pt2")


class _Sink(io.BufferedWriter):
    """Keeps the first error of a file to itself: torch's writer ends the process where its last write fails."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """As if all were written."""
        if self.error is None:
            try:
                super().write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """As `write`."""
        if self.error is None:
            try:
                super().flush()
            except OSError as error:
                self.error = error


def load(path: Path) -> ExportedProgram:
    """Read a program that slimc wrote, with unpickling restricted to weights.

    Not a gate for hostile files: a .pt2 can hold pickled objects that torch reads by other ways.
    """
    try:
        with _weights_only():
            return torch.export.load(io.BytesIO(path.read_bytes()))
    except Exception as error:  # torch raises anything here: RuntimeError, KeyError, UnpicklingError ...
        raise LoadError(f"{path}: is not a .pt2 file that torch {torch.__version__} reads ({error})") from error


def run(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Run the file's program on positional inputs; returns the output tensors, flattened."""
    with torch.no_grad():
        outputs = load(path).module()(*inputs)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _without_traces(program: ExportedProgram) -> ExportedProgram:
    """Build a program that shares the weights of `program` but not its graph, free of the machine's paths."""
    graph = copy.deepcopy(program.graph)
    for node, original in zip(graph.nodes, program.graph.nodes, strict=True):
        node.name = original.name  # copying renames what is a Python builtin, such as an argument called `input`
        node.meta = {key: value for key, value in node.meta.items() if key != "stack_trace"}
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=pytree.tree_map_only(Tensor, torch.zeros_like, program.example_inputs),
        constants=program.constants,
        verifiers=program.verifiers,
    )


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    # torch.export.load falls back to full unpickling when the strict way fails; only this variable stops it
    # (torch 2.14). Drop it once torch.export.load takes weights_only.
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before: Any = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
