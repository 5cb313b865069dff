"""Lockstep: the original graph and the slim one, run node by node on all samples at once.

Each node runs on every batch before the next one does, so a node's weights can be fitted from what all samples show
just before it runs, and every later node sees the fitted weights. Only values that are still needed are kept.

Where the values alive would take too much memory, as early in a network of large pictures, few samples are on the way;
each shows many places there. Others join once there is room for them: they run from the start through what is fitted
already, so that no sample runs any node twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .graph.example import Example
from .graph.infer import attribute, hint
from .graph.stateless import written
from .samples import Samples

MEMORY = 1 << 30
"""Bytes of values alive at once, of all samples and both graphs."""
_FEWEST = 8
"""Samples of a batch that is split: a part of each batch is set aside to judge by."""


class Frontier:
    """The living values of one graph, one dictionary for each batch; nodes run in order, each on all batches."""

    def __init__(self, module: GraphModule, examples: Sequence[Example]) -> None:
        self.module = module
        self._inputs = [example.copies() for example in examples]
        self._placeholders = 0
        self._expires, self._written = _last_uses(module), written(module)
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
                values[node], leaves[self._placeholders] = leaves[self._placeholders], None  # alive as long as needed
            elif node.op == "get_attr":
                values[node] = found.clone() if node.target in self._written else found
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

    def join(self, other: Frontier) -> None:
        """Take the batches of a frontier that is just as far."""
        self._inputs += other._inputs
        self.values += other.values

    def forget(self, node: Node) -> None:
        """Drop what nothing needs any more once this node has run."""
        for dead in self._expires.get(node, ()):
            for values in self.values:
                values.pop(dead, None)


Visit = Callable[[Node, Frontier, Frontier], None]
"""Called with an original node when its own result exists and that of its twin does not yet."""


@torch.no_grad()
def sweep(
    module: GraphModule, samples: Samples, visit: Callable[[Node, Frontier], None], wanted: Callable[[Node], bool]
) -> None:
    """Run one graph and visit each node that is `wanted` once it has run, while its inputs are still there."""
    nodes = _computed(module)
    # Half of the memory: what visits keep of each layer needs the other half in large models.
    frontier, waiting = Frontier(module, ()), _Waiting(module, samples, 2)
    for place, node in enumerate(nodes):
        for example in waiting.due(node) if wanted(node) else ():
            late = Frontier(module, (example,))
            for earlier in nodes[:place]:
                late.run(earlier)
                late.forget(earlier)
            frontier.join(late)
        frontier.run(node)
        if wanted(node):
            visit(node, frontier)
        frontier.forget(node)


@torch.no_grad()
def lockstep(
    original: GraphModule,
    slim: GraphModule,
    twins: dict[Node, Node],
    samples: Samples,
    visit: Visit,
    wanted: Callable[[Node], bool],
) -> int:
    """Run both graphs, the original first at each node, and visit the nodes that are `wanted`.

    Returns how many samples ran: fewer than there are where some found no room before the last visit.
    """
    nodes = _computed(original)
    follow = _followers(nodes, slim, twins)
    before, after, waiting = Frontier(original, ()), Frontier(slim, ()), _Waiting(original, samples, 2)

    def finish(old: Node, whole: Frontier, cut: Frontier) -> None:
        for new in follow[old]:
            cut.run(new)
        whole.forget(old)
        if old in twins:
            cut.forget(twins[old])

    for place, old in enumerate(nodes):
        for example in waiting.due(old) if wanted(old) else ():
            late = Frontier(original, (example,)), Frontier(slim, (example,))
            for earlier in nodes[:place]:
                late[0].run(earlier)
                finish(earlier, *late)
            before.join(late[0])
            after.join(late[1])
        before.run(old)
        if wanted(old):
            visit(old, before, after)
        finish(old, before, after)
    return waiting.on_the_way


def _followers(nodes: Sequence[Node], slim: GraphModule, twins: dict[Node, Node]) -> dict[Node, list[Node]]:
    """What the slim graph runs after each original node: its twin, and before that sizes that are computed anew.

    A size that an earlier cut computes anew has no twin.
    """
    twinned = set(twins.values())
    own = [node for node in slim.graph.nodes if node not in twinned]
    follow: dict[Node, list[Node]] = {}
    for old in nodes:
        follow[old] = []
        if (new := twins.get(old)) is not None:
            while own and own[0] < new:
                follow[old].append(own.pop(0))
            follow[old].append(new)
    return follow


class _Waiting:
    """Batches that are not on the way yet; each is due once everything from there on leaves room for it."""

    def __init__(self, module: GraphModule, samples: Samples, graphs: int) -> None:
        alive = [graphs * bytes_ for bytes_ in _alive(module)]
        most = list(itertools.accumulate(reversed(alive), max))[::-1]
        room = [int(MEMORY / max(1.0, own)) for own in most]
        self._room = dict(zip(_computed(module), room, strict=True))
        tightest = min(room, default=0)
        # Batches as they come where all fit, so that results do not depend on how they are split.
        size = samples.count if tightest >= samples.count else max(_FEWEST, tightest)
        self._batches = list(samples.pieces(size))
        self.on_the_way = 0

    def due(self, node: Node) -> list[Example]:
        """Those that start now; at least one is on the way."""
        found: list[Example] = []
        while self._batches:
            count = self._batches[0].count
            if self.on_the_way and self.on_the_way + count > self._room[node]:
                break
            self.on_the_way += count
            found.append(self._batches.pop(0))
        return found


def trainable_at_once(module: GraphModule) -> int:
    """How many samples fit into memory where every value is kept for a backward pass."""
    return max(1, int(MEMORY / max(1.0, sum(map(_bytes, _computed(module))) / _batch(module))))


def _alive(module: GraphModule) -> list[float]:
    """Bytes of one sample's values when each node has run, parameters left out."""
    expires, batch = _last_uses(module), _batch(module)
    now, found = 0.0, []
    for node in _computed(module):
        now += _bytes(node) / batch
        found.append(now)
        now -= sum(_bytes(dead) for dead in expires.get(node, ())) / batch
    return found


def _batch(module: GraphModule) -> int:
    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    return next((int(hint(value.shape[0])) for value in inputs if isinstance(value, Tensor) and value.dim()), 1)


def _bytes(node: Node) -> float:
    if node.op == "get_attr":
        return 0.0
    values = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    return float(sum(value.element_size() * math.prod(map(hint, value.shape)) for value in values))


def _computed(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op != "output"]


def _last_uses(module: GraphModule) -> dict[Node, list[Node]]:
    """After which node which values are not needed any more."""
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    last: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        last.setdefault(max((node, *node.users), key=order.__getitem__), []).append(node)
    return last
