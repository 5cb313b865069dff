"""Rows of a table that no value of the example reads: positions beyond its length, the rest of a mask.

A model that reads `positions[:, :length]` shows, for one example, only as many rows as that example is long.
Nothing in the graph depends on the other rows, but a longer input does, so they are no channels. The same goes
for a piece that is sliced off and never used: what it is for can't be seen. And for whole branches that nothing of what
the model returns depends on, such as an auxiliary head that is computed at inference as well: a deployed model leaves
them out, so that cutting them would save nothing there and spoil what they are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.fx import Graph, Node

from .rule import INFER, operator_name

if TYPE_CHECKING:
    from .infer import Inference
    from .terms import Solution, Terms


_TYPED_LIKE = ("to", "type_as")
"""Their second operand gives a type only."""
_PERHAPS_VIEWS = {"to", "reshape", "flatten", "contiguous", "dropout", "alias", "detach", "type_as"}
"""These return their input or a view of it where there is nothing to do."""


def keep_unread(walk: Inference) -> None:
    """Freeze what slices leave out of values that are made of parameters and buffers alone, unless it is read."""
    tables = _made_of_parameters(walk)
    slices = [node for node in walk.module.graph.nodes if _is_slice(node) and node.args[0] in tables]
    dropped = [(node, np.setdiff1d(_terms(walk, node.args[0]), _terms(walk, node))) for node in slices]
    if not any(terms.size for _, terms in dropped):
        return
    read = np.concatenate([walk.store.frozen(1), *(_read(walk, node, tables) for node in walk.module.graph.nodes)])
    for node, terms in dropped:
        unread = np.setdiff1d(terms, read)
        if unread.size:
            walk.freeze(node, unread, "beyond the example; a larger input may read it", "structure")


def unused(graph: Graph) -> frozenset[Node]:
    """The nodes that the output does not depend on, neither by what they return nor by what they write into."""
    storage: dict[Node, Node] = {}  # what a value may lie in; rather one too many than a write overlooked
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        storage[node] = node if source is None or not _may_alias(node) else storage[source]
    needed: set[Node] = set()
    count = -1
    while count < len(needed):
        count = len(needed)
        written = {storage[node] for node in needed}
        for node in reversed(graph.nodes):
            writes = _schema(node) is not None and _schema(node).is_mutable and storage[node] in written
            if node in needed or node.op in ("placeholder", "output") or writes:
                needed.update((node, *node.all_input_nodes))
    return frozenset(node for node in graph.nodes if node not in needed)


def _schema(node: Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _may_alias(node: Node) -> bool:
    schema = _schema(node)
    if schema is None or operator_name(node) in _PERHAPS_VIEWS:
        return True
    return any(own.alias_info is not None for own in schema.returns)


def keep_unused(walk: Inference, solution: Solution) -> bool:
    """Freeze the channels that only unused nodes have; False if there are none."""
    branches = [node for node in walk.module.graph.nodes if node in walk.unused and node.op == "call_function"]
    if not branches:
        return False
    own, others = ([walk.store.frozen(1)] for _ in range(2))
    for node in walk.module.graph.nodes:
        (own if node in walk.unused else others).append(_terms(walk, node))
    terms = np.unique(np.concatenate(own))
    found, seen = solution.factors(terms), solution.factors(np.unique(np.concatenate(others)))
    alone = terms[np.isin(found, np.setdiff1d(found[found >= 0], seen)).any(axis=1)]
    walk.freeze(branches[-1], alone, "the model's output does not depend on it", "structure")
    return bool(alone.size)


def _made_of_parameters(walk: Inference) -> set[Node]:
    """Parameters, buffers, and what is computed from these alone, or from nothing."""
    found: set[Node] = set()
    for node in walk.module.graph.nodes:
        operands = node.all_input_nodes[: 1 if operator_name(node) in _TYPED_LIKE else None]
        sources = [source for source in operands if walk.value(source) is not None]
        is_tensor = node.op == "call_function" and walk.value(node) is not None
        if node.op == "get_attr" or (is_tensor and found.issuperset(sources)):
            found.add(node)
    return found


def _read(walk: Inference, node: Node, tables: set[Node]) -> Terms:
    """The terms of tables that a node reads: those that it does not hand on to another table."""
    if _is_slice(node) or (node.op != "output" and walk.value(node) is None):  # as an assertion about a type
        return walk.store.frozen(0)
    seen = [_terms(walk, source) for source in node.all_input_nodes if source in tables]
    terms = np.concatenate([walk.store.frozen(0), *seen])
    return np.setdiff1d(terms, _terms(walk, node)) if node in tables else terms


def _terms(walk: Inference, node: object) -> Terms:
    """All terms of a value, frozen ones too."""
    from .infer import tensors_of

    assert isinstance(node, Node)
    return np.concatenate([walk.store.frozen(0), *(axis for axes in tensors_of(walk.value(node)) for axis in axes)])


def _is_slice(node: Node) -> bool:
    # The rule of slices and splits, by whatever names it has registered itself; and taking one of several pieces.
    return node.op == "call_function" and INFER.get(operator_name(node)) in (INFER["slice"], INFER["getitem"])
