"""Capture: from an nn.Module to one graph of ATen operators.

`torch.export` runs at the level before decomposition, with a dynamic batch axis where the model allows one.
The graph keeps symbolic sizes as nodes, so the same graph serves inference (with the example's sizes),
verification and export; the rewriter only touches literal sizes. Where the batch cannot be dynamic the graph
is captured with the example's shapes and `Captured.batch_note` says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import keyword
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from slimc.errors import CaptureError, UsageError, first_line
from slimc.graph.example import Example
from slimc.graph.stateless import buffers_kept

_LOUD = ("torch.fx.experimental.symbolic_shapes", "torch.export._trace")
"""Loggers that say at length, before torch.export fails, what its error says."""


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    module: the graph; parameters and buffers are `get_attr` nodes named by their fully qualified names.
    example: the inputs it was captured with (batch doubled where the given batch was one).
    dynamic_shapes: what `torch.export` needs to capture the graph again with a dynamic batch; None if static.
    batch: the example's batch size, by which per-sample costs are divided.
    batch_note: why the batch axis is fixed, else None.
    constants: names of tensors that are neither parameters nor buffers of the model.
    """

    module: GraphModule
    example: Example
    dynamic_shapes: Any | None
    batch: int
    batch_note: str | None
    constants: frozenset[str] = frozenset()

    @property
    def samples(self) -> int:
        """How many samples costs are shared among: the batch, or 1 where no output has an axis of its size.

        The first axis of the first input need not be a batch, as in models that take one sample without such an axis.
        """
        output = next(node for node in self.module.graph.nodes if node.op == "output")
        values = [node.meta.get("val") for node in output.all_input_nodes]
        first = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
        sizes = [size if isinstance(size, int) else size.node.hint for size in first]
        return self.batch if self.batch in sizes else 1


def capture(model: nn.Module, inputs: Any) -> Captured:
    """Capture a model in eval mode; the model must be the caller's to change (it is put in eval mode).

    Raises CaptureError naming module and source line where the model cannot be captured.
    """
    model.eval()
    given = Example.of(inputs)
    _check_devices(model, given)
    _check_names(model)
    with torch.no_grad(), tensors_only(model), buffers_kept(model):
        with buffers_kept(model):  # what is captured is the model as it was given
            _run(model, given)
            doubled = _batched(model, given)
        note = "the model does not accept another batch size"
        if doubled is not None:
            for batch in (torch.export.Dim("batch"), torch.export.Dim.AUTO):
                spec = _batch_spec(doubled, batch)
                try:
                    return _captured(_export(model, doubled, spec), doubled, spec)
                except Exception as error:
                    note = f"torch.export could not keep the batch size open: {first_line(error)}"
        try:
            found = _captured(_export(model, given, None), given, None)
        except Exception as error:
            raise CaptureError(_explain(model, error)) from error
        return dataclasses.replace(found, batch_note=note)


def program_of(module: GraphModule, captured: Captured) -> torch.export.ExportedProgram:
    """An exported program of a graph with the inputs of `captured`, its batch open where torch.export keeps it so.

    A rewritten graph computes some sizes (five of twelve heads, times the batch) in ways that torch.export cannot
    always prove for every batch; then the program has the example's.
    """
    example, spec = captured.example, captured.dynamic_shapes
    with torch.no_grad():
        if spec is not None:
            for shapes in (spec, _batch_spec(example, torch.export.Dim.AUTO)):
                with contextlib.suppress(Exception):  # every kind: guards, constraints, its own assertions
                    return _export(module, example, shapes)
        return _export(module, example, None)


def _export(model: nn.Module, example: Example, spec: Any | None) -> torch.export.ExportedProgram:
    if isinstance(spec, tuple) and (rest := _first_rest(model)) is not None:
        spec = (*spec[:rest], tuple(spec[rest:]))  # those that *args takes are one argument to torch.export
    with warnings.catch_warnings(), _quiet():
        # Recurrent layers list their weights anew, and buffers that forward replaces are put back by us.
        warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)
        return torch.export.export(model, example.args, example.kwargs or None, dynamic_shapes=spec, strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the graphs that torch.export prints where it fails; their error says what matters.

    Not for those who ask for torch's logs.
    """
    if "TORCH_LOGS" in os.environ:
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.disabled for logger in loggers]
    namespace: dict[str, Any] = {}
    with contextlib.suppress(ImportError):  # it is private to torch
        namespace = vars(importlib.import_module("torch.export._trace"))
    try:
        for logger in loggers:
            logger.disabled = True
        namespace["print"] = lambda *_, **__: None
        yield
    finally:
        namespace.pop("print", None)
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _captured(program: torch.export.ExportedProgram, example: Example, spec: Any | None) -> Captured:
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    inline_regions(module)
    _free_layouts(module)
    is_open = any(_is_open(node) for node in module.graph.nodes)
    note = None if spec is None or is_open else "the model's operators fix the batch size"
    constants = frozenset(program.graph_signature.lifted_tensor_constants)
    return Captured(module, example, spec if is_open else None, example.count, note, constants)


def _free_layouts(module: GraphModule) -> None:
    """Ask for shapes only, since kernels give the memory layout that a view needs for some sizes and not for others.

    Attention kernels return their heads in one order or another, and tracing drops a copy that one of them makes
    needless. The copy is put back, else the ONNX exporter, which takes attention apart, meets a view that cannot be.
    """
    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        source = node.args[0] if node.target is aten.reshape.default else None
        if isinstance(source, Node) and _is_swapped(source) and _is_attention(source):
            with module.graph.inserting_before(node):
                copied = module.graph.call_function(
                    aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
                )
            copied.meta = dict(source.meta)
            node.update_arg(0, copied)
    module.recompile()


def _is_swapped(node: Node) -> bool:
    return node.target in (torch.ops.aten.transpose.int, torch.ops.aten.permute.default)


def _is_attention(node: Node) -> bool:
    """Whether a value is what an attention kernel returned, its axes swapped or reshaped."""
    while _is_swapped(node) or node.target is torch.ops.aten.reshape.default:
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    return node.target is torch.ops.aten.scaled_dot_product_attention.default


def inline_regions(module: GraphModule) -> None:
    """Put regions that only switch gradients, or switch autocast off, in line: at inference they are no-ops."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or (region := _region(module, node)) is None:
            continue
        inner, operands = region
        inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
        mapping: dict[Node, Node] = dict(zip(inputs, operands, strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner.graph, mapping)
        if isinstance(results, Node):
            node.replace_all_uses_with(results)
        else:
            assert isinstance(results, (tuple, list))
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code(lambda n: n.op not in ("get_attr",))
    module.recompile()


def _region(module: GraphModule, node: Node) -> tuple[GraphModule, Sequence[Any]] | None:
    """The graph inside a region and its operands; None for every other node."""
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        _, inner, *operands = node.args
    elif node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is False:
        *_, inner, _ = [*node.args[:5], None]
        operands = list(node.args[5:])
    else:
        return None
    assert isinstance(inner, Node)
    found = module.get_submodule(str(inner.target))
    assert isinstance(found, GraphModule)
    return found, operands


def _is_open(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "placeholder" and isinstance(value, Tensor) and any(map(_varies, value.shape))


def _varies(size: Any) -> bool:
    """Whether a size is a symbol still; one that export found to be a number keeps its symbolic type."""
    return not isinstance(size, int) and not size.node.expr.is_number


def _batched(model: nn.Module, given: Example) -> Example | None:
    """The example with a batch of at least two (torch.export treats one as special), if the model takes it."""
    if given.count > 1:
        return given
    doubled = given.map_rows(lambda t: torch.cat([t, t]))
    try:
        before, after = (_leaves(example.run(model)) for example in (given, doubled))
    except Exception:
        return None
    grew = any(b.dim() > 0 and a.shape[:1] == (2 * b.shape[0],) for a, b in zip(after, before, strict=False))
    return doubled if grew else None


def _batch_spec(example: Example, batch: Any) -> Any:
    places, shared = itertools.count(), example.without_rows()

    def axes(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) and next(places) not in shared else None

    # torch.export wants positional arguments by order and keyword arguments by name.
    args = pytree.tree_map(axes, example.args)
    return args if not example.kwargs else {**_by_name(args), **pytree.tree_map(axes, example.kwargs)}


def _first_rest(model: nn.Module) -> int | None:
    """The position of `*args` in forward's signature; None if there is none."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    return kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else None


def _by_name(args: Sequence[Any]) -> dict[str, Any]:
    if args:
        raise UsageError("give example inputs either as a tuple of arguments or as a dictionary, not both")
    return {}


def _leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@contextmanager
def tensors_only(model: nn.Module) -> Iterator[None]:
    """Let the model return only the tensors of its output: cache objects and the like cannot be exported."""
    handle = model.register_forward_hook(lambda _module, _args, output: _strip(output))
    try:
        yield
    finally:
        handle.remove()


def _strip(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        kept = {key: _strip(value) for key, value in output.items()}
        return {key: value for key, value in kept.items() if value is not None}
    if isinstance(output, (tuple, list)):
        return tuple(value for value in map(_strip, output) if value is not None)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return _strip({f.name: getattr(output, f.name) for f in dataclasses.fields(output)})
    return None


def _run(model: nn.Module, example: Example) -> None:
    try:
        output = example.run(model)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in example.tensors())
        raise CaptureError(
            f"the model does not run on the example input of shape {shapes}: {first_line(error)}. "
            "Give inputs that fit with --input, or example_inputs in Python."
        ) from error
    leaves = _leaves(output)
    if not leaves:
        raise CaptureError("the model returns no tensor, so there is nothing that compression could preserve")
    if not all(leaf.isfinite().all() for leaf in leaves):
        raise CaptureError(
            "the model's output on the example input is not finite (NaN or infinity). "
            "Check its weights, or give a realistic input with --input."
        )


def _check_devices(model: nn.Module, example: Example) -> None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise CaptureError(
            f"the model is spread over several devices ({', '.join(sorted(map(str, devices)))}); move it to one"
        )
    for tensor in example.tensors():
        if devices and tensor.device not in devices:
            raise UsageError(
                f"the example input is on {tensor.device} but the model on {devices.pop()}; move one of them"
            )


def _check_names(model: nn.Module) -> None:
    # torch writes names into the code of a graph as they are.
    for name in model.state_dict():
        if word := next((part for part in name.split(".") if keyword.iskeyword(part)), None):
            raise CaptureError(f"{name!r}: {word!r} is a word of Python, which cannot be captured; rename the module")
        if any(sign in name for sign in '"\\\n\r'):
            raise CaptureError(
                f"{name!r}: names with quotes, backslashes or line breaks cannot be captured; rename the module"
            )


_NOT_THE_USERS = tuple(f"{os.path.dirname(os.path.abspath(source))}{os.sep}" for source in (torch.__file__, __file__))


def _explain(model: nn.Module, error: BaseException) -> str:
    """Say which line of the user's code stopped the capture."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(("<", *_NOT_THE_USERS)):
            owner = trace.tb_frame.f_locals.get("self")
            kind = f"{type(owner).__name__} at " if isinstance(owner, nn.Module) else ""
            where = f" in {kind}{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return (
        f"{type(model).__name__} cannot be captured{where}: {first_line(error)}. "
        "Control flow that depends on the data of a tensor cannot be compiled; move it out of forward()."
    )
