"""Folding of batch normalisation into the convolution before it, or after it, where torch's exporter left one.

onnxscript's optimizer, which the exporter runs, folds the plain case. It leaves a convolution whose weight
serves several nodes (the same module called twice), which this module folds with a weight of its own, and one
whose output others read too (pre-activation blocks): there the normalisation goes into the convolution after it.
A normalisation that stays keeps ONNX Runtime from its fused convolutions: up to 3 times slower on small nets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import ir

_Cache = dict[tuple[object, ...], tuple[ir.Value, ir.Value]]


def fold(graph: ir.Graph) -> tuple[str, ...]:
    """Fold in place; returns, for each batch normalisation that still follows a convolution, its name and why."""
    kept: list[str] = []
    folded: _Cache = {}
    for norm in list(graph):
        convolution = _convolution_before(norm)
        if convolution is None:
            continue
        reason = _obstacle(convolution, norm)
        if reason is None:
            _fold_pair(graph, convolution, norm, folded)
        elif (reader := _convolution_after(norm)) is not None:
            _fold_forward(graph, norm, reader)
        else:
            kept.append(f"{_label(norm)}: {reason}")
    used = {value for node in graph.all_nodes() for value in node.inputs}
    for name, value in list(graph.initializers.items()):
        if value not in used and not value.is_graph_output():
            del graph.initializers[name]
    return tuple(kept)


def _convolution_before(node: ir.Node) -> ir.Node | None:
    if node.op_type != "BatchNormalization" or node.domain or node.inputs[0] is None:
        return None
    producer = node.inputs[0].producer()
    return producer if producer is not None and producer.op_type == "Conv" and not producer.domain else None


def _obstacle(convolution: ir.Node, norm: ir.Node) -> str | None:
    """Return why the pair cannot become one convolution, or None if it can."""
    readers = len(convolution.outputs[0].uses()) - 1
    if readers:
        return f"the output of its convolution has {readers} other reader{'s' if readers > 1 else ''}"
    if convolution.outputs[0].is_graph_output():
        return "the output of its convolution is an output of the model"
    training = norm.attributes.get("training_mode")
    if training is not None and training.as_int():
        return "it is in training mode and normalises with the statistics of the batch"
    if _obstacle_of_constants([*convolution.inputs[1:], *norm.inputs[1:]]):
        return "its parameters or its convolution's are computed, not constant"
    return None


def _convolution_after(norm: ir.Node) -> ir.Node | None:
    """Return the one convolution that reads a normalisation with constant parameters, if it pads nothing."""
    uses = list(norm.outputs[0].uses())
    if len(uses) != 1 or norm.outputs[0].is_graph_output() or _obstacle_of_constants(norm.inputs[1:]):
        return None
    training, reader = norm.attributes.get("training_mode"), uses[0].node
    if (training is not None and training.as_int()) or reader.op_type != "Conv" or reader.domain:
        return None
    if reader.inputs[0] is not norm.outputs[0] or _obstacle_of_constants(reader.inputs[1:]):
        return None
    pads, auto = reader.attributes.get("pads"), reader.attributes.get("auto_pad")
    # A border of zeros is not normalised, so the shift would be wrong there.
    padded = (pads is not None and any(pads.as_ints())) or (auto is not None and auto.as_string() not in _NO_PADDING)
    return None if padded else reader


_NO_PADDING = ("NOTSET", "VALID")


def _obstacle_of_constants(values: Sequence[ir.Value | None]) -> bool:
    return any(value is not None and value.const_value is None for value in values)


def _fold_forward(graph: ir.Graph, norm: ir.Node, reader: ir.Node) -> None:
    """Conv(a * x + b) as one convolution of x."""
    scale, shift = _scale_and_shift(norm)
    weight = _array(reader.inputs[1])
    group = reader.attributes.get("group")
    groups, inside = group.as_int() if group is not None else 1, weight.shape[1]
    # Row o of the weight reads the channels of its own group: [groups, out / groups, inside, kernel...].
    wide = weight.astype(np.float64).reshape(groups, -1, inside, *weight.shape[2:])
    ones = (1,) * (weight.ndim - 2)
    new_weight = wide * scale.reshape(groups, 1, inside, *ones)
    bias = (wide * shift.reshape(groups, 1, inside, *ones)).sum(axis=tuple(range(2, wide.ndim))).ravel()
    if len(reader.inputs) > 2 and reader.inputs[2] is not None:
        bias = bias + _array(reader.inputs[2])
    stem = f"{_value_name(norm.inputs[1])}_into_{_value_name(reader.inputs[1])}"
    new = [
        _register(graph, stem, new_weight.reshape(weight.shape).astype(weight.dtype)),
        _register(graph, f"{stem}_bias", bias.astype(weight.dtype)),
    ]
    reader.replace_input_with(0, norm.inputs[0])
    reader.replace_input_with(1, new[0])
    if len(reader.inputs) < 3:
        reader.resize_inputs(3)
    reader.replace_input_with(2, new[1])
    graph.remove(norm, safe=True)


def _scale_and_shift(norm: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    epsilon = norm.attributes.get("epsilon")
    eps = epsilon.as_float() if epsilon is not None else 1e-5
    gamma, beta, mean, variance = (_array(value).astype(np.float64) for value in norm.inputs[1:5])
    scale = gamma / np.sqrt(variance + eps)
    return scale, beta - mean * scale


def _fold_pair(graph: ir.Graph, convolution: ir.Node, norm: ir.Node, folded: _Cache) -> None:
    epsilon = norm.attributes.get("epsilon")
    eps = epsilon.as_float() if epsilon is not None else 1e-5
    # A module called several times with its norm yields the same pair each time: one folded weight serves all.
    key = (*(id(value) for value in (*convolution.inputs[1:], *norm.inputs[1:])), eps)
    if key not in folded:
        folded[key] = _folded_parameters(graph, convolution, norm)
    weight, bias = folded[key]
    output = norm.outputs[0]
    fused = ir.node(
        "Conv",
        inputs=[convolution.inputs[0], weight, bias],
        attributes={name: attribute.value for name, attribute in convolution.attributes.items()},
        name=convolution.name,
    )
    fused.outputs[0].shape, fused.outputs[0].type = output.shape, output.type
    name = output.name
    graph.insert_before(norm, fused)
    ir.convenience.replace_all_uses_with(output, fused.outputs[0], replace_graph_outputs=True)
    graph.remove([norm, convolution], safe=True)
    fused.outputs[0].name = name


def _folded_parameters(graph: ir.Graph, convolution: ir.Node, norm: ir.Node) -> tuple[ir.Value, ir.Value]:
    # In float64, so that folding adds one rounding rather than several.
    weight = _array(convolution.inputs[1])
    scale, shift = _scale_and_shift(norm)
    has_bias = len(convolution.inputs) > 2 and convolution.inputs[2] is not None
    bias = _array(convolution.inputs[2]).astype(np.float64) if has_bias else np.zeros_like(shift)
    new_weight = weight.astype(np.float64) * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    new_bias = bias * scale + shift
    stem = f"{_value_name(convolution.inputs[1])}_with_{_value_name(norm.inputs[1])}"
    return (
        _register(graph, stem, new_weight.astype(weight.dtype)),
        _register(graph, f"{stem}_bias", new_bias.astype(weight.dtype)),
    )


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def _value_name(value: ir.Value | None) -> str:
    assert value is not None
    return str(value.name)


def _register(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _label(norm: ir.Node) -> str:
    parameters: Sequence[ir.Value | None] = norm.inputs[1:2]
    return str(parameters[0].name) if parameters and parameters[0] is not None else str(norm.name)
