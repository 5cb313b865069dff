"""Lockstep: the original graph and the slim one, run node by node on all samples at once.

Each node runs on every batch before the next one does, so a node's weights can be fitted from what all samples show
just before it runs, and every later node sees the fitted weights. Only values that are still needed are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .graph.capture import Example
from .graph.infer import attribute


class Frontier:
    """The living values of one graph, one dictionary for each batch; nodes run in order, each on all batches."""

    def __init__(self, module: GraphModule, examples: Sequence[Example]) -> None:
        self.module = module
        leaves = (pytree.tree_leaves((example.args, example.kwargs)) for example in examples)
        # Copies: in-place operators write into their arguments, and the caller's inputs must stay as they are.
        self._inputs = [[leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in batch] for batch in leaves]
        self._placeholders = 0
        self._expires = _last_uses(module)
        self.values: list[dict[Node, Any]] = [{} for _ in self._inputs]

    def of(self, node: Node) -> list[Any]:
        """What a node gave on each batch."""
        return [values[node] for values in self.values]

    def run(self, node: Node) -> None:
        """Run one node on every batch."""
        if node.op == "get_attr":
            found = attribute(self.module, str(node.target))
            found = found.detach() if isinstance(found, Tensor) else found
        for values, leaves in zip(self.values, self._inputs, strict=True):
            if node.op == "placeholder":
                values[node] = leaves[self._placeholders]
            elif node.op == "get_attr":
                values[node] = found
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = self._call(node, args, kwargs)
        self._placeholders += node.op == "placeholder"

    def _call(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def forget(self, node: Node) -> None:
        """Drop what nothing needs any more once this node has run."""
        for dead in self._expires.get(node, ()):
            for values in self.values:
                values.pop(dead, None)


@torch.no_grad()
def sweep(module: GraphModule, examples: Sequence[Example], visit: Callable[[Node, Frontier], None]) -> None:
    """Run one graph and call `visit` after each node, while its inputs are still there."""
    frontier = Frontier(module, examples)
    for node in module.graph.nodes:
        if node.op == "output":
            break
        frontier.run(node)
        visit(node, frontier)
        frontier.forget(node)


Visit = Callable[[Node, Frontier, Frontier], None]
"""Called with an original node when its own result exists and that of its twin does not yet."""


@torch.no_grad()
def lockstep(
    original: GraphModule,
    slim: GraphModule,
    twins: dict[Node, Node],
    examples: Sequence[Example],
    visit: Visit,
    wanted: Callable[[Node], bool],
) -> None:
    """Run both graphs, the original first at each node, and visit the nodes that are `wanted`."""
    before, after = Frontier(original, examples), Frontier(slim, examples)
    twinned = set(twins.values())
    # The slim graph has nodes of its own (sizes that are computed anew): each runs before the twin that needs it.
    own = [node for node in slim.graph.nodes if node not in twinned]
    for old in original.graph.nodes:
        if old.op == "output":
            break
        before.run(old)
        new = twins.get(old)
        if new is None:  # a size that an earlier cut computes anew
            before.forget(old)
            continue
        if wanted(old):
            visit(old, before, after)
        while own and own[0] < new:
            after.run(own.pop(0))
        after.run(new)
        before.forget(old)
        after.forget(new)


def _last_uses(module: GraphModule) -> dict[Node, list[Node]]:
    """After which node which values are not needed any more."""
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    last: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        last.setdefault(max((node, *node.users), key=order.__getitem__), []).append(node)
    return last
