"""LSTM and GRU: stacked gates are a split of each weight's rows into (gates, hidden)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.fx import Node

from slimc.graph.infer import Inference, hint
from slimc.graph.rule import Axes, Value, arguments, counts, infers, operator_name
from slimc.graph.terms import Terms

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@infers("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(walk: Inference, node: Node) -> tuple[Axes, ...]:
    """input [T, N, in] (or batch first), weights per layer and direction -> output, last states."""
    call = arguments(node)
    name = operator_name(node)
    per = 2 + 2 * bool(call["has_biases"])
    weights = [walk.axes(weight) for weight in call["params"]]
    directions = 1 + bool(call["bidirectional"])
    hiddens: list[Terms] = []
    if "input" not in call:
        return _frozen(walk, node, "a recurrence over packed sequences is left alone")
    if len(weights) != int(call["num_layers"]) * directions * per:
        return _frozen(walk, node, "a recurrence with projections is left alone")
    x = walk.axes(call["input"])
    feature = x[-1]
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
    return np.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def _initial(walk: Inference, node: Node, states: Sequence[Node], hiddens: list[Terms]) -> None:
    """Initial states are stacked over layers, so all layers lose the same hidden channels as they do."""
    for state in states if isinstance(states, (list, tuple)) else [states]:
        for hidden in hiddens:
            walk.unify(node, walk.axes(state)[-1], hidden)


def _state(walk: Inference, node: Node, hiddens: list[Terms]) -> Axes:
    value = node.meta["val"][1]
    shape = [hint(size) for size in value.shape]
    for hidden in hiddens[1:]:
        walk.unify(node, hiddens[0], hidden)
    return (*walk.frozen(shape[:-1]), hiddens[0])


def _frozen(walk: Inference, node: Node, reason: str) -> tuple[Axes, ...]:
    for source in node.all_input_nodes:
        for axis in walk.value(source) or ():
            walk.freeze(node, axis, reason)
    return tuple(walk.frozen([hint(size) for size in value.shape]) for value in node.meta["val"])


@counts("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent_macs(walk: Inference, node: Node) -> list[tuple[float, Sequence[Terms]]]:
    """Every weight matrix once per step and sample; packed sequences as if all were full."""
    call = arguments(node)
    x = walk.axes(call["input"] if "input" in call else call["data"])
    return [(1.0, [*walk.axes(w), *x[:-1]]) for w in call["params"] if len(walk.axes(w)) == 2]


# -- single steps -------------------------------------------------------------------------------------


@infers("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(walk: Inference, node: Node) -> Value:
    """input [N, in], state [N, hidden] (two for LSTM), the weights of one layer -> the next state."""
    call = arguments(node)
    x = walk.axes(call["input"])
    names = [name for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call[name] is not None]
    gates = GATES[operator_name(node).removesuffix("_cell")]
    hidden = _cell(walk, node, x[-1], [walk.axes(call[name]) for name in names], gates)
    _initial(walk, node, call["hx"], [hidden])
    state = (*x[:-1], hidden)
    return (state, state) if isinstance(node.meta["val"], (tuple, list)) else state


@counts("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell_macs(walk: Inference, node: Node) -> list[tuple[float, Sequence[Terms]]]:
    """Both weight matrices once per sample."""
    call = arguments(node)
    return [(1.0, [*walk.axes(call[name]), *walk.axes(call["input"])[:-1]]) for name in ("w_ih", "w_hh")]
