"""Rows of a table that no value of the example reads: positions beyond its length, the rest of a mask.

A model that reads `positions[:, :length]` shows, for one example, only as many rows as that example is long.
Nothing in the graph depends on the other rows, but a longer input does, so they are no channels. The same goes
for a piece that is sliced off and never used: what it is for can't be seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.fx import Node

from .rule import INFER, operator_name
from .terms import Terms

if TYPE_CHECKING:
    from .infer import Inference

PASSING = ("getitem", "unsqueeze", "squeeze", "expand", "to", "_to_copy", "contiguous", "clone", "alias", "detach")
"""Operators beside slices and splits that hand on an axis as it is."""


def keep_unread(walk: Inference) -> None:
    """Freeze, in each parameter and buffer that is read through slices only, the indices that none of them reads."""
    read: dict[str, list[Terms]] = {}
    sliced: dict[str, Node] = {}
    for node in walk.module.graph.nodes:
        name = walk.tensor_name(node)
        if name is None:
            continue
        found, slices = _read_terms(walk, node)
        read.setdefault(name, []).extend(found)
        if slices:
            sliced.setdefault(name, slices[0])
    for name, node in sliced.items():
        known = np.concatenate([walk.store.frozen(1), *read[name]])
        for axis in walk.made(name):
            unread = axis[~np.isin(axis, known)]
            if unread.size:
                walk.freeze(node, unread, "beyond the example; a larger input may read it", "structure")


def _read_terms(walk: Inference, tensor: Node) -> tuple[list[Terms], list[Node]]:
    """The axes of a tensor as its readers see them, and the slices that they see it through."""
    found: list[Terms] = []
    slices: list[Node] = []
    queue = [tensor]
    while queue:
        source = queue.pop()
        for user in source.users:
            if _is_slice(user):
                slices.append(user)
            elif operator_name(user) not in PASSING:
                found.extend(walk.axes(source))
                continue
            queue.append(user)
    return found, slices


def _is_slice(node: Node) -> bool:
    # The rule of slices and splits, by whatever names it has registered itself.
    return INFER.get(operator_name(node)) is INFER["slice"]
