"""Checks of a compression. MACs and ONNX files are judged without slimc; steps and groups with its own cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import slimc


def counted_macs(module: nn.Module, inputs: Tensor) -> int:
    """Multiply-accumulates of one sample, by torch's counter on a real run."""
    counter = FlopCounterMode(display=False)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator is not counted
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            module(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops()) // 2 // len(inputs)


def normalisations_after_convolutions(path: Path) -> int:
    """Batch normalisations of an ONNX file that read a convolution's output, directly or through an Identity."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    makers = {name: node for node in nodes for name in node.output}

    def maker(name: str) -> str:
        node = makers.get(name)
        return maker(node.input[0]) if node is not None and node.op_type == "Identity" else node.op_type if node else ""

    return sum(node.op_type == "BatchNormalization" and maker(node.input[0]).startswith("Conv") for node in nodes)


def parity_error(path: Path, module: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Largest difference between ONNX Runtime's outputs and the module's, relative to each output's largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name, worst = session.get_inputs()[0].name, 0.0
    for value in inputs:
        with torch.no_grad():
            wanted = [leaf for leaf in pytree.tree_leaves(module(value)) if isinstance(leaf, Tensor)]
        got = session.run(None, {name: value.numpy()})
        for one, other in zip(got, wanted, strict=True):
            scale = float(other.abs().max())
            if scale == 0 or one.shape != tuple(other.shape):
                return math.inf  # nothing is compared where the output is zero
            worst = max(worst, float(np.abs(one - other.numpy()).max()) / scale)
    return worst


def one_more_step(slim: slimc.Compressed, limit: float) -> str | None:
    """The name of a group that could keep one rounding step more within the limit; None if there is none."""
    groups, cost = slim.analysis.groups, slim.analysis.cost
    kept = np.array([row.kept for row in slim.report.groups], np.int64)
    for group, step in zip(groups, _steps(slim), strict=True):
        wider = kept.copy()
        wider[group.number] = min(group.width, kept[group.number] // step * step + step)
        if wider[group.number] > kept[group.number] and cost(wider).macs <= limit:
            return f"{group.name}: {kept[group.number]} of {group.width} kept, {wider[group.number]} fit too"
    return None


def _steps(slim: slimc.Compressed) -> list[int]:
    """The fewest channels by which each group can grow with every tensor axis still a multiple of the alignment.

    An axis that is a product of groups (heads times head size) is aligned by the widest of them.
    """
    aligned = slim.report.method.round_to
    groups = slim.analysis.groups
    steps = [1] * len(groups)
    for axis in slim.analysis.grouping.axes:
        for each, members in axis.terms:
            if members:
                widest = max(members, key=lambda number: (groups[number].width, -number))
                steps[widest] = max(steps[widest], aligned // math.gcd(aligned, each))
    return steps


def never_removable(slim: slimc.Compressed, model: nn.Module, outputs: set[int]) -> list[str]:
    """Parameters no axis of which any group shrinks, other than vectors as long as an output of the model."""
    touched = {name for group in slim.report.groups for name, _ in group.members}
    loose = [(name, tensor) for name, tensor in _used(model, slim) if name not in touched]
    return [name for name, tensor in loose if not (tensor.dim() == 1 and len(tensor) in outputs)]


def _used(model: nn.Module, slim: slimc.Compressed) -> list[tuple[str, Tensor]]:
    """Parameters that an inference reads: those of the graph (auxiliary heads of training are none)."""
    read = {str(node.target) for node in slim.graph.graph.nodes if node.op == "get_attr"}
    return [(name, tensor) for name, tensor in model.named_parameters() if name in read]
