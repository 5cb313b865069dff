"""The rewriter: a new graph with sliced tensors and new literal sizes."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .graph import rule
from .graph.infer import Types, attribute
from .graph.resize import Cut, Resizing
from .graph.stateless import buffers_kept


class Rewritten:
    """The rewritten graph, and which of its nodes came from which original node."""

    def __init__(self, graph: Graph, owner: GraphModule, twins: dict[Node, Node]) -> None:
        self.graph = graph
        self.twins = twins
        self._owner = owner

    @cached_property
    def module(self) -> GraphModule:
        """The graph as a module; its Python code is written when first asked for, as slow a step as the cut itself."""
        self._owner.graph = self.graph
        return self._owner


def rewrite(types: Types, cut: Cut, tensors: dict[str, Tensor] | None = None) -> Rewritten:
    """Slice every tensor of a captured model and rewrite every literal that follows from a size.

    tensors: the sliced tensors by every name they have, where they are at hand already. The original graph and its
    tensors are left as they are.
    """
    original = types.captured.module
    owner = GraphModule(nn.Module(), Graph(), class_name="SlimGraph")
    _register(owner, slice_tensors(types, cut) if tensors is None else tensors)
    graph = Graph(owning_module=owner)
    graph.output(graph.graph_copy(original.graph, {}))
    graph.set_codegen(original.graph._codegen)  # how arguments and results are packed
    _copy_untensored(original, graph, owner)
    # The output node is not part of `graph_copy`'s map; both graphs hold their nodes in the same order.
    twins = dict(zip(original.graph.nodes, graph.nodes, strict=True))
    work = Resizing(types, cut.alive)
    for old, new in twins.items():
        if old.op == "call_function" and (resize := rule.RESIZE.get(rule.operator_name(old))) and work.touches(old):
            resize(work, old, new)
    owner.eval()
    return Rewritten(graph, owner, twins)


def slice_tensors(types: Types, cut: Cut) -> dict[str, Tensor]:
    """Every parameter and buffer of the graph with only its kept indices, by every name it has."""
    sliced: dict[str, Tensor] = {}
    for name, axes in types.tensors.items():
        tensor = types.weights[name]
        shrunk = [(position, axis) for position, axis in enumerate(axes) if not cut.whole(axis)]
        small = tensor.detach() if shrunk else tensor.detach().clone()
        for position, axis in shrunk:
            small = small.index_select(position, cut.indices(axis).to(small.device))
        if isinstance(tensor, nn.Parameter):
            small = nn.Parameter(small, requires_grad=tensor.requires_grad)
        for alias in types.aliases.get(name, (name,)):
            sliced[alias] = small
    return sliced


def _register(root: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors under their qualified names, in empty modules where there are none."""
    for name, tensor in tensors.items():
        owner = root
        *path, last = name.split(".")
        for part in path:
            child = owner._modules.get(part)
            if child is None:
                child = owner._modules[part] = nn.Module()
            owner = child
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)


def _copy_untensored(original: GraphModule, graph: Graph, root: nn.Module) -> None:
    """What the graph reads besides tensors: sub-graphs of higher-order operators and constant objects."""
    for node in graph.nodes:
        if node.op != "get_attr" or isinstance(node.meta.get("val"), Tensor):
            continue
        value = attribute(original, str(node.target))
        if not isinstance(value, Tensor):
            owner, _, last = str(node.target).rpartition(".")
            setattr(root.get_submodule(owner), last, value)


def shapes_agree(types: Types, cut: Cut, rewritten: Rewritten) -> str | None:
    """Name the first node whose shape differs from what the terms predict; None if all agree."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    work = Resizing(types, cut.alive)
    # Loops of torch ask for symbols, even where no size is one.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    prop = FakeTensorProp(rewritten.module, mode)
    try:
        with torch.no_grad(), buffers_kept(rewritten.module):  # what is computed from tensors alone runs for real
            prop.propagate(*types.captured.example.leaves())
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None  # sizes or checks that need the data: the proof, which has it, comes next
    for old, new in rewritten.twins.items():
        value, axes = new.meta.get("val"), types.values.get(old)
        if isinstance(value, Tensor) and isinstance(axes, tuple) and tuple(value.shape) != work.shape(axes):
            return f"{old.name}: shape {tuple(value.shape)}, predicted {work.shape(axes)}"
    return None
