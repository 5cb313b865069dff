"""The rewritten graph as a module that trains.

A captured graph holds dropout and batch norm as they are at inference. Here their `training` literals are read from
the module's own mode, so that `train()` and `eval()` mean what they mean everywhere.
"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from .graph.rule import arguments, operator_name, set_argument

_MODE = "training_mode"
_FLAG = {"dropout": "train", "feature_dropout": "train", "alpha_dropout": "train", "batch_norm": "training"}


class TrainingMode(nn.Module):
    """Says whether the module it belongs to is in training mode."""

    def forward(self) -> bool:
        """True in training mode."""
        return self.training


def trainable(module: GraphModule) -> GraphModule:
    """Make dropout and batch norm of a graph follow `train()` and `eval()`; changes and returns the graph.

    What a graph at inference does not hold is lost: stochastic depth, attention dropout, auxiliary heads.
    """
    switched = [n for n in module.graph.nodes if n.op == "call_function" and _is_off(n)]
    if switched:
        module.add_submodule(_MODE, TrainingMode())
        with module.graph.inserting_before(switched[0]):
            mode = module.graph.call_module(_MODE)
        for node in switched:
            set_argument(node, _FLAG[operator_name(node)], mode)
        module.graph.lint()
        module.recompile()
        module.eval()
    return module


def _is_off(node: Node) -> bool:
    flag = _FLAG.get(operator_name(node))
    return flag is not None and arguments(node)[flag] is False
