"""What `slimc inspect` and `slimc methods` show, as data."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter

from . import recover, scores
from .analysis import Analysis
from .graph.infer import attribute
from .training.schedule import schedules


def summary(analysis: Analysis, name: str) -> dict[str, Any]:
    """Groups with what they govern, totals, and what is frozen and why; JSON-ready.

    A group governs what would be saved if one of its channels stayed alone and all other groups stayed whole.
    """
    full = analysis.full
    widths = analysis.grouping.widths
    groups = []
    for group in analysis.groups:
        alone = widths.copy()
        alone[group.number] = min(1, group.width)
        left = analysis.cost(alone)
        groups.append(
            {
                "name": group.name,
                "width": group.width,
                "exact": group.exact,
                "at_least": group.floor,
                "governs_macs": round(full.macs - left.macs),
                "governs_params": full.params - left.params,
                "members": [[m.tensor, m.axis, m.each] for m in group.members],
            }
        )
    return {
        "model": name,
        "macs": round(full.macs),
        "params": full.params,
        "size": full.size,
        "memory": round(full.memory),
        "dynamic_batch": analysis.captured.dynamic_shapes is not None,
        "batch_note": analysis.captured.batch_note,
        "prunable_params": prunable_params(analysis),
        "groups": groups,
        "frozen": [
            {"op": c.op, "node": c.node, "module": c.module, "reason": c.reason, "kind": c.kind}
            for c in analysis.frozen
        ],
    }


def prunable_params(analysis: Analysis) -> int:
    """Parameters of tensors that at least one group shrinks."""
    names = {member.tensor for group in analysis.groups for member in group.members}
    tensors = (attribute(analysis.captured.module, name) for name in names)
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, Parameter))


def methods() -> list[dict[str, str]]:
    """Scorers, schedules and recovery steps: a line, the source and the needs (weights, inputs, labels) of each."""
    found = [
        {
            "kind": "scorer",
            "name": method.name,
            "summary": method.summary,
            "source": method.source,
            "needs": method.needs,
        }
        for method in scores.methods().values()
    ]
    found.extend(
        {"kind": "schedule", "name": own.name, "summary": own.summary, "source": own.source, "needs": "labels"}
        for own in schedules().values()
    )
    found.extend(
        {"kind": "recovery", "name": step.name, "summary": step.summary, "source": step.source, "needs": "inputs"}
        for step in recover.steps().values()
    )
    about = "train with labels after the last cut, for what --epochs leaves; part of every schedule"
    found.append(
        {
            "kind": "recovery",
            "name": recover.FINETUNE,
            "summary": about,
            "source": "Li et al., ICLR 2017",
            "needs": "labels",
        }
    )
    return found
