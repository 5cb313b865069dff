"""Results inside a network, caught while it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .graph.example import Example
from .graph.stateless import Stateless


class Catching(Stateless):
    """Runs a graph and keeps the results of some nodes as they were before anything wrote into them.

    slopes: what is caught can be derived by, whatever the parameters are.
    """

    def __init__(self, module: GraphModule, wanted: set[Node], slopes: bool = False) -> None:
        super().__init__(module)
        self.wanted, self.slopes = wanted, slopes
        self.caught: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """A wanted result is caught and a copy goes on."""
        value = super().run_node(n)
        if n not in self.wanted:
            return value
        self.caught[n] = value.requires_grad_() if self.slopes and not value.requires_grad else value
        return value.clone()

    def results(self, example: Example) -> list[Tensor]:
        """The output tensors of real numbers."""
        found = self.run(*example.copies(), enable_io_processing=False)
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
