"""Gradients of gates and of parameters, streamed over batches.

The graph runs in eval mode, so samples do not see each other and a batch can be taken in parts, whose size keeps
the activations that a backward pass needs within a limit. Losses are means over samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .activations import Place, See, Watching
from .errors import UsageError
from .graph.infer import Types, attribute, hint
from .graph.rule import operator_name, writes
from .graph.shrink import open_axes
from .graph.stateless import Stateless
from .losses import check_finite, loss_of
from .onednn import Guard
from .passes import batches_of, is_view, parts, run_graph
from .roles import Site
from .samples import Batch
from .scores import Loss, Subject


@dataclass(frozen=True)
class Found:
    """What one batch gave.

    values: per site, [samples or 1, size of the site's axis], float64.
    count: samples in the batch.
    """

    values: tuple[Tensor, ...]
    count: int


# -- gates --------------------------------------------------------------------------------------------


def gate_gradients(subject: Subject, sites: Sequence[Site], *, per_sample: bool = False) -> Iterator[Found]:
    """The derivative of the loss by the gate of every index of every site, batch by batch.

    per_sample: the derivative of each sample's own loss, one row a sample; else that of the batch's mean loss, one row.
    One backward pass a batch in either case, except where a site's value has no batch axis of its own (windows and
    heads folded into it): samples then run one by one if they are to be told apart.
    Raises UsageError where labels or loss do not fit, or every derivative is zero.
    """
    samples, loss = batches_of(subject), loss_of(subject)
    axes = [batch_axis(subject.types, site) for site in sites] if per_sample else [None] * len(sites)
    apart = per_sample and any(axis is None for axis in axes)
    if apart and subject.types.captured.dynamic_shapes is None and subject.types.captured.batch > 1:
        raise UsageError(
            "samples cannot be told apart in this model, whose batch size is fixed at "
            f"{subject.types.captured.batch}: give an example input with a batch of 1"
        )
    run = _Gated(subject.types.captured.module, sites, axes)
    seen = False
    for number, batch in enumerate(samples.batches, 1):
        rows: list[list[Tensor]] = [[] for _ in sites]
        for part in parts(subject.types, batch, 1 if apart else None):
            share = part.count / batch.count
            for own, value in zip(rows, run.derivatives(part, loss, number), strict=True):
                # The loss of a part is its mean; rows are samples' own derivatives, or the part's share of the batch's.
                own.append(value * part.count if per_sample else value * share)
        values = tuple(torch.cat(own) if per_sample else torch.stack(own).sum(0) for own in rows)
        seen = seen or any(bool(value.any()) for value in values)
        yield Found(values, batch.count)
        subject.tick(number, len(samples.batches))
    check_seen(seen)


def check_seen(seen: bool) -> None:
    """Raise UsageError where a whole run has met no gradient."""
    if not seen:
        raise UsageError(
            "the gradient of the loss is zero everywhere, so it ranks nothing. Check the labels and the loss, and "
            "that the model is not at a perfect fit or all its activations dead."
        )


class _Gated(Stateless):
    """Runs the graph with gates: hooks see each gated value and its gradient; parameters take no gradient."""

    def __init__(self, module: GraphModule, sites: Sequence[Site], axes: Sequence[int | None]) -> None:
        super().__init__(module)
        self._sites, self._axes = sites, axes
        self._of_node: dict[Node, list[int]] = {}
        self._of_operand: dict[Node, dict[Node, list[int]]] = {}
        for number, site in enumerate(sites):
            if site.operand is None:
                self._of_node.setdefault(site.node, []).append(number)
            else:
                self._of_operand.setdefault(site.node, {}).setdefault(site.operand, []).append(number)
        self._copied = {site.value for site in sites if _is_overwritten(site.value)}
        self._leaves: list[Tensor] = []
        self._found: list[Tensor | None] = []

    def derivatives(self, batch: Batch, loss: Loss, number: int) -> list[Tensor]:
        """Value times gradient summed over all but channels (and samples), for the mean loss of some samples."""
        self._leaves, self._found = [], [None] * len(self._sites)
        with torch.enable_grad():
            outputs = run_graph(self, batch)
            value = loss(outputs, batch.targets)
            check_finite(value.detach(), number)
            if value.requires_grad and self._leaves:
                torch.autograd.grad(value, self._leaves, allow_unused=True)
        found = list(self._found)
        self._leaves, self._found = [], []
        return [
            torch.zeros((batch.count if axis is not None else 1, len(site.factors)), dtype=torch.float64)
            if own is None
            else own
            for own, site, axis in zip(found, self._sites, self._axes, strict=True)
        ]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Parameters stand still."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: Node) -> Any:
        """Gate operands before the node runs, and its result after."""
        kept: dict[Node, Any] = {}
        for operand, numbers in self._of_operand.get(n, {}).items():
            value = kept[operand] = self.env[operand]
            if operator_name(n) in ("add", "sub"):
                others = [self.env[source] for source in n.all_input_nodes]
                shapes = [other.shape for other in others if isinstance(other, Tensor)]
                value = value.expand(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
            self.env[operand] = self._gate(value.view_as(value), numbers, operand in self._copied)
        result = super().run_node(n)
        self.env.update(kept)
        if n in self._of_node:
            result = self._gate(result, self._of_node[n], n in self._copied)
        return result

    def _gate(self, value: Tensor, numbers: list[int], copied: bool) -> Tensor:
        if not value.requires_grad:
            leaf = value.detach().requires_grad_()
            self._leaves.append(leaf)
            value = leaf.clone()  # a leaf must not be written in place
        kept = value.detach().clone() if copied else value.detach()

        def hook(gradient: Tensor) -> None:
            each = kept * gradient
            for number in numbers:
                site, rows = self._sites[number], self._axes[number]
                found = _summed(each, site.axis, rows).cpu()
                before = self._found[number]
                self._found[number] = found if before is None else before + found

        value.register_hook(hook)  # type: ignore[no-untyped-call]
        return value


def _summed(each: Tensor, axis: int, rows: int | None) -> Tensor:
    """[samples or 1, size of the axis] in float64."""
    wide = each if each.dtype in (torch.float32, torch.float64) else each.float()
    others = [other for other in range(wide.dim()) if other not in (axis, rows)]
    total = wide.sum(others) if others else wide
    if rows is None:
        return total.double()[None]
    return (total if rows < axis else total.T).double()


# -- parameters ---------------------------------------------------------------------------------------


def parameter_gradients(
    subject: Subject,
    *,
    one_by_one: bool = False,
    names: Sequence[str] | None = None,
    places: Mapping[Place, See] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The gradient of the loss by parameters, batch by batch, or sample by sample.

    names: those that matter, by the names of `Types.tensors`; all floating-point parameters if not given.
    places: operands to show on the way, as `watch` does.
    Raises UsageError where labels or loss do not fit, or every gradient is zero.
    """
    samples, loss = batches_of(subject), loss_of(subject)
    captured = subject.types.captured
    if one_by_one and captured.dynamic_shapes is None and captured.batch > 1:
        raise UsageError(
            f"gradients of single samples need a batch of 1, and this model's batch size is fixed at {captured.batch}: "
            "give an example input with a batch of 1"
        )
    chosen = [n for n, t in subject.types.weights.items() if subject.is_parameter(n) and t.is_floating_point()]
    chosen = chosen if names is None else [name for name in chosen if name in set(names)]
    run = _Trained(subject, chosen, places or {})
    seen = False
    for number, batch in enumerate(samples.batches, 1):
        total: dict[str, Tensor] = {}
        for part in parts(subject.types, batch, 1 if one_by_one else None):
            found = run.gradients(part, loss, number)
            seen = seen or any(bool(gradient.any()) for gradient in found.values())
            if one_by_one:
                yield found
                continue
            for name, gradient in found.items():
                gradient.mul_(part.count / batch.count)
                total[name] = gradient if name not in total else total[name].add_(gradient)
        if not one_by_one:
            yield total
        subject.tick(number, len(samples.batches))
    check_seen(seen)


class _Trained(Watching):
    """Runs the graph with copies of parameters that take gradients; the model's own stay out of it."""

    def __init__(self, subject: Subject, names: Sequence[str], places: Mapping[Place, See]) -> None:
        super().__init__(subject.types.captured.module, places)
        weights = subject.types.weights
        self._leaves = {name: weights[name].detach().requires_grad_() for name in names}
        self._by_id = {id(weights[name]): name for name in names}

    def gradients(self, batch: Batch, loss: Loss, number: int) -> dict[str, Tensor]:
        """Of the mean loss of some samples; zeros for a parameter that the loss does not see."""
        self.batch = batch
        with torch.enable_grad():
            with Guard():
                outputs = run_graph(self, batch)
            value = loss(outputs, batch.targets)
            check_finite(value.detach(), number)
            leaves = list(self._leaves.values())
            if not value.requires_grad:
                return {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}
            found = torch.autograd.grad(value, leaves, allow_unused=True)
        return {
            # Copies, since gradients of two parameters may be one tensor and callers work in place.
            name: torch.zeros_like(leaf) if own is None else own.detach().clone()
            for (name, leaf), own in zip(self._leaves.items(), found, strict=True)
        }

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The copy that takes a gradient."""
        value = attribute(self.module, str(target))
        name = self._by_id.get(id(value))
        if name is not None:
            return self._leaves[name]
        return self.apart(target, value.detach()) if isinstance(value, Tensor) else value


def _is_overwritten(node: Node) -> bool:
    """Whether an operator writes into a node's value later, directly or through a view."""
    for user in node.users:
        if not isinstance(user.target, torch._ops.OpOverload):
            if operator_name(user) == "getitem" and _is_overwritten(user):
                return True
            continue
        first = user.args[0] if user.args else None
        if first is node and (writes(user) or (is_view(user) and _is_overwritten(user))):
            return True
    return False


def batch_axis(types: Types, site: Site) -> int | None:
    """The axis of a gated value that counts samples; None where there is none of that size alone."""
    batch = types.captured.batch
    shape = site.shaped.meta["val"].shape
    if types.captured.dynamic_shapes is None:
        return 0 if shape and hint(shape[0]) == batch and site.axis > 0 else None
    found = open_axes(site.shaped)
    return found[0] if len(found) == 1 and hint(shape[found[0]]) == batch and found[0] != site.axis else None
