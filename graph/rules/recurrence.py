"""LSTM and GRU: stacked gates are a split of each weight's rows into (gates, hidden)."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from slimc.graph.infer import Inference
from slimc.graph.rule import Axes, arguments, counts, infers, operator_name
from slimc.graph.terms import Terms

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@infers("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(walk: Inference, node: Node) -> tuple[Axes, ...]:
    """input [T, N, in] (or batch first), weights per layer and direction -> output, last states."""
    call = arguments(node)
    name = operator_name(node)
    x = walk.axes(call["input"])
    feature = x[-1]
    per = 2 + 2 * bool(call["has_biases"])
    weights = [walk.axes(weight) for weight in call["params"]]
    directions = 1 + bool(call["bidirectional"])
    hiddens: list[Terms] = []
    if len(weights) != int(call["num_layers"]) * directions * per:  # projections: another layout
        return _frozen(walk, node, weights)
    for layer in range(int(call["num_layers"])):
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * per
            outputs.append(_cell(walk, node, feature, weights[start : start + per], GATES[name]))
        hiddens.extend(outputs)
        feature = _joined(outputs)
    for axis in x[:-1]:
        walk.freeze(node, axis, "recurrence runs over time", "structure")
    _initial(walk, node, call["hx"], hiddens)
    state = _state(walk, node, hiddens)
    return ((*x[:-1], feature), *(state for _ in range(1 + (name == "lstm"))))


def _cell(walk: Inference, node: Node, feature: Terms, weights: Sequence[Axes], gates: int) -> Terms:
    """Rows are (gate, hidden); the recurrent weight's columns are hidden."""
    hidden = weights[1][1]
    rows = walk.store.grid([walk.store.frozen(gates), hidden]) if gates > 1 else hidden
    walk.unify(node, feature, weights[0][1])
    for weight in weights:
        walk.unify(node, weight[0], rows)
    return hidden


def _joined(outputs: list[Terms]) -> Terms:
    import numpy as np

    return np.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def _initial(walk: Inference, node: Node, states: Sequence[Node], hiddens: list[Terms]) -> None:
    """Initial states are stacked over layers, so all layers lose the same hidden channels as they do."""
    for state in states if isinstance(states, (list, tuple)) else [states]:
        for hidden in hiddens:
            walk.unify(node, walk.axes(state)[-1], hidden)


def _state(walk: Inference, node: Node, hiddens: list[Terms]) -> Axes:
    value = node.meta["val"][1]
    shape = [int(size) if isinstance(size, int) else size.node.hint for size in value.shape]
    for hidden in hiddens[1:]:
        walk.unify(node, hiddens[0], hidden)
    return (*walk.frozen(shape[:-1]), hiddens[0])


def _frozen(walk: Inference, node: Node, weights: Sequence[Axes]) -> tuple[Axes, ...]:
    for axes in (walk.axes(node.args[0]), *weights):
        for axis in axes:
            walk.freeze(node, axis, "a recurrence with projections is left alone")
    return tuple(walk.frozen([s if isinstance(s, int) else s.node.hint for s in v.shape]) for v in node.meta["val"])


@counts("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent_macs(walk: Inference, node: Node) -> list[tuple[float, Sequence[Terms]]]:
    """Every weight matrix once per step and sample."""
    call = arguments(node)
    x = walk.axes(call["input"])
    return [(1.0, [*walk.axes(w), *x[:-1]]) for w in call["params"] if len(walk.axes(w)) == 2]
