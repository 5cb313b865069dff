"""NISP: importance of the final responses, carried back through the network by absolute weights.

Source: Yu et al., "NISP: Pruning Networks using Neuron Importance Score Propagation" (CVPR 2018): s_k = |W_(k+1)|^T
s_(k+1) from layer to layer, with Inf-FS (Roffo et al., "Infinite Feature Selection", ICCV 2015) to rank the final
responses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from slimc.absolute import Absolute, feature_axis
from slimc.activations import See, watch
from slimc.errors import UsageError
from slimc.graph.rule import operator_name
from slimc.passes import batches_of
from slimc.roles import CONVOLUTIONS, gated, joint, readers
from slimc.samples import Batch
from slimc.scores import Scores, Subject, scorer

_MIX = 0.5
_REACH = 0.9


@scorer("nisp", "importance of the final responses, propagated by absolute weights", "Yu et al., CVPR 2018", "inputs")
def nisp(subject: Subject) -> list[Scores]:
    """The importance that reaches a channel, summed over its readers and positions.

    The final responses are the inputs of the last convolutions or linear layers before the outputs. Attention passes
    importance to its values evenly over the sequence. Raises UsageError where the model has no such layer, or the
    numbers leave the range of float64.
    """
    sites = readers(subject.types)
    last = _final(subject)
    if not last:
        raise UsageError("--scorer nisp starts from the inputs of the last layers, and the model has no layer")
    wanted = {node: importance(features) for node, features in _features(subject, last).items()}
    run = Absolute(subject.types, sites, wanted)
    gradients = run.propagate(batches_of(subject).batches[0])
    total = joint(subject.types, sites, gradients)[0].abs()
    if not bool(total.isfinite().all()):
        raise UsageError(
            "--scorer nisp: importance grew beyond float64 on its way back; the network is too deep for it"
        )
    return subject.by_group(total.numpy(), gated(subject.types, sites))


def importance(features: Tensor) -> Tensor:
    """Inf-FS: all paths through the graph of features, [features], from observations [samples, features].

    An edge is the mean of the larger standard deviation, as a share of the largest, and of one less the absolute rank
    correlation. Scores are (I - r A)^-1 1 - 1 with r at 0.9 of the inverse spectral radius; never negative.
    """
    from scipy.stats import rankdata

    spread = features.std(0, correction=0)
    spread = spread / spread.max().clamp_min(1e-300)
    ranks = torch.from_numpy(
        rankdata(features.numpy(), axis=0)
    )  # ties share a rank, so that repeated samples do not count
    centred = ranks - ranks.mean(0)
    length = centred.norm(dim=0).clamp_min(1e-100)
    correlation = (centred.T @ centred / (length[:, None] * length)).abs().clamp_max(1)
    edges = _MIX * torch.maximum(spread[:, None], spread) + (1 - _MIX) * (1 - correlation)
    edges.fill_diagonal_(0)
    ones = torch.ones(len(edges), dtype=edges.dtype, device=edges.device)
    radius = torch.linalg.eigvalsh(edges).abs().max()
    if float(radius) == 0.0:
        return ones
    unit = torch.eye(len(edges), dtype=edges.dtype, device=edges.device)
    reached: Tensor = torch.linalg.solve(unit - _REACH / radius * edges, ones)
    return (reached - 1).clamp_min(0)


def _final(subject: Subject) -> list[Node]:
    """The first layers met on the way back from the outputs."""
    graph = subject.types.captured.module.graph
    waiting = [node for node in graph.nodes if node.op == "output"]
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in seen or source.op != "call_function" or subject.types.values.get(source) is None:
                continue
            seen.add(source)
            if _is_layer(source):
                found[source] = None
            else:
                waiting.append(source)
    return list(found)


def _is_layer(node: Node) -> bool:
    return operator_name(node) == "linear" or operator_name(node) in CONVOLUTIONS


def _features(subject: Subject, last: list[Node]) -> dict[Node, Tensor]:
    """[samples, features] of each final layer's input, averaged over positions."""
    found: dict[Node, list[Tensor]] = {node: [] for node in last}

    def seeing(node: Node) -> See:
        def see(value: Tensor, batch: Batch) -> None:
            moved = value.movedim(feature_axis(node, value), -1)
            found[node].append(moved.reshape(batch.count, -1, moved.shape[-1]).double().mean(1).cpu())

        return see

    watch(subject, {(node, node.args[0]): seeing(node) for node in last})  # type: ignore[misc]
    return {node: torch.cat(rows) for node, rows in found.items()}
