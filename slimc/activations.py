"""Activations: values of the graph, streamed over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graph.stateless import Stateless
from .passes import batches_of, parts, run_graph
from .samples import Batch
from .scores import Subject

Place = tuple[Node, Node]
"""An operand as a node sees it, before the node runs: (node, operand)."""
See = Callable[[Tensor, Batch], None]
_AT_ONCE = 8
"""Samples of a pass: values of more do not stay in a processor's caches."""


def watch(subject: Subject, places: Mapping[Place, See]) -> None:
    """Run every batch in parts through the original graph and show each watched operand as it goes by.

    A tensor may be overwritten later, so who wants to keep it copies it. Raises UsageError where there is no data.
    """
    samples = batches_of(subject)
    run = Watching(subject.types.captured.module, places)
    with torch.no_grad():
        for number, batch in enumerate(samples.batches, 1):
            for part in parts(subject.types, batch, _AT_ONCE):
                run.batch = part
                run_graph(run, part)
            subject.tick(number, len(samples.batches))


class Watching(Stateless):
    """Runs a graph and shows operands, without their gradients, together with the batch that they belong to."""

    def __init__(self, module: GraphModule, places: Mapping[Place, See]) -> None:
        super().__init__(module)
        self.batch: Batch | None = None
        self._watched: dict[Node, list[tuple[Node, See]]] = {}
        for (node, operand), see in places.items():
            self._watched.setdefault(node, []).append((operand, see))

    def run_node(self, n: Node) -> Any:
        """Show what the node is about to read."""
        for operand, see in self._watched.get(n, ()):
            assert self.batch is not None
            see(self.env[operand].detach(), self.batch)
        return super().run_node(n)
