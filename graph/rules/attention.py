"""Scaled dot-product attention.

query [..., H, L, E], key [..., H_kv, S, E], value [..., H_kv, S, Ev] -> [..., H, L, Ev]. Heads and head sizes
may shrink, E and Ev alike where they are the same number; the scale is part of the trained function, so it keeps
its original value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.resize import Resizing
from slimc.graph.rule import Axes, arguments, counts, infers, resizes, set_argument
from slimc.graph.terms import Terms

from .contraction import wider
from .elementwise import broadcast


@infers("scaled_dot_product_attention")
def attention(walk: Inference, node: Node) -> Axes:
    """Query and key share E; key and value share S, which softmax needs whole."""
    call = arguments(node)
    query, key, value = (walk.axes(call[name]) for name in ("query", "key", "value"))
    if len(query[-1]) == len(value[-1]):
        # Arithmetic lets them differ, but models compute both from one head size; so their own class can shrink.
        walk.unify(node, query[-1], value[-1])
    walk.unify(node, query[-1], key[-1])
    walk.unify(node, key[-2], value[-2])
    walk.freeze(node, key[-2], "attention needs the sequence whole", "structure")
    if call["is_causal"]:
        walk.freeze(node, query[-2], "who may look at whom is counted in positions", "structure")
    if call.get("enable_gqa") and len(query[-3]) != len(key[-3]):
        _grouped_query(walk, node, query[-3], key[-3], value[-3])
        batch = broadcast(walk, node, [query[:-3], key[:-3], value[:-3]])
        result = (*batch, query[-3], query[-2], value[-1])
    else:
        batch = broadcast(walk, node, [query[:-2], key[:-2], value[:-2]])
        result = (*batch, query[-2], value[-1])
    if call["attn_mask"] is not None:
        scores = (*result[:-1], key[-2])
        mask = walk.axes(call["attn_mask"])
        broadcast(walk, node, [scores, mask])
    return result


def _grouped_query(walk: Inference, node: Node, query: Terms, key: Terms, value: Terms) -> None:
    """Each key head serves the same number of query heads, in order."""
    repeat = walk.store.frozen(len(query) // len(key))
    walk.unify(node, key, value)
    walk.unify(node, query, walk.store.grid([key, repeat]))


@resizes("scaled_dot_product_attention")
def scale(work: Resizing, old: Node, new: Node) -> None:
    """Write down the scale that the original head size implies."""
    call = arguments(old)
    query = work.axes(call["query"])
    if call["scale"] is None and not work.whole(query[-1]):
        set_argument(new, "scale", 1.0 / math.sqrt(len(query[-1])))


@counts("scaled_dot_product_attention")
def attention_macs(walk: Inference, node: Node) -> list[tuple[float, Sequence[Terms]]]:
    """Scores take L x S x E, their use L x S x Ev, for each head; whichever operand broadcasts."""
    call = arguments(node)
    query, key, value = (walk.axes(call[name]) for name in ("query", "key", "value"))
    scores = wider(query[:-2], key[:-2])
    return [
        (1.0, [*scores, query[-2], key[-2], query[-1]]),
        (1.0, [*walk.axes(node)[:-1], value[-2], value[-1]]),
    ]
