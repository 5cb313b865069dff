"""A `torch.export` program as a .pt2 file: loads with torch alone."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

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
