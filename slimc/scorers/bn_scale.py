"""Batch-norm scale: a channel matters as much as the factor that its batch norms multiply it with.

Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (ICCV 2017), section 3.
It means most after training with an L1 penalty on those factors. It is no property of the function that the network
computes: scaling gamma by c and the weights that read the channel by 1/c changes the score and nothing else.
"""

from __future__ import annotations

import numpy as np

from slimc.errors import UsageError
from slimc.graph.rule import arguments, operator_name
from slimc.scores import Scores, Subject, scorer


@scorer("bn-scale", "mean |gamma| over the batch norms that a channel goes through", "Liu et al., ICCV 2017")
def bn_scale(subject: Subject) -> list[Scores]:
    """The mean of |gamma| over all entries of batch norms that go with a channel; none for groups without any.

    Raises UsageError where no group has a batch norm with a scale.
    """
    count = subject.types.solution.variables + 1
    total, members = np.zeros(count), np.zeros(count)
    for name in sorted(_scales(subject)):
        first = subject.types.first(name)
        gamma = subject.tensor(first).abs().double().cpu().numpy()
        for column in subject.types.solution.factors(subject.types.tensors[first][0]).T:
            np.add.at(total, column, gamma)
            np.add.at(members, column, 1.0)
    if not members[:-1].any():
        names = ", ".join(group.name for group in subject.grouping.groups)
        raise UsageError(
            f"--scorer bn-scale needs batch norms with a scale, and none of these groups has one: {names}. "
            "Take another scorer, such as magnitude."
        )
    return subject.by_group(total / np.maximum(members, 1.0), members > 0)


def _scales(subject: Subject) -> set[str]:
    """Names of the weights of all batch norms."""
    nodes = [node for node in subject.types.captured.module.graph.nodes if node.op == "call_function"]
    weights = [arguments(node)["weight"] for node in nodes if operator_name(node) == "batch_norm"]
    return {str(weight.target) for weight in weights if weight is not None and weight.op == "get_attr"}
