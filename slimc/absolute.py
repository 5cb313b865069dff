"""A network with absolute weights, whose gradient is how much of an importance reaches each value.

A layer's inputs get |W|' times the importance of its outputs; batch norms multiply by |gamma| / sigma, pooling spreads
it evenly, sums pass it to both sides and activations pass it on. All stand-ins are linear with factors that are not
negative, so the values that run forward do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from .graph.infer import Types, attribute
from .graph.rule import arguments, is_pointwise, operator_name
from .roles import CONVOLUTIONS, Site
from .samples import Batch
from .verify import Plain


def feature_axis(node: Node, value: Tensor) -> int:
    """The axis of a layer's input that it sums over."""
    if operator_name(node) == "linear":
        return value.dim() - 1
    rank: int = arguments(node)["weight"].meta["val"].dim() - 2
    return value.dim() - rank - 1


class Absolute(Plain):
    """The network with absolute weights: what it hands back as a gradient is importance."""

    def __init__(self, types: Types, sites: Sequence[Site], wanted: dict[Node, Tensor]) -> None:
        module = types.captured.module
        super().__init__(module, lambda name: attribute(module, name), torch.float64)
        self._types, self._sites, self._wanted = types, sites, wanted
        self._operands: dict[Node, set[Node]] = {}
        for site in sites:
            assert site.operand is not None
            self._operands.setdefault(site.node, set()).add(site.operand)
        self._taps: dict[tuple[Node, Node], Tensor] = {}
        self._total: Tensor | None = None

    def propagate(self, batch: Batch) -> list[Tensor]:
        """For each site, [1, size of its axis], the importance summed over positions."""
        part = batch[:1] if self._types.captured.dynamic_shapes is not None else batch
        with torch.enable_grad():
            zeros = part.example.map(lambda value: torch.zeros_like(value) if value.is_floating_point() else value)
            self.results(zeros.leaves())
            assert self._total is not None
            found = torch.autograd.grad(self._total, list(self._taps.values()), allow_unused=True)
        gradients = dict(zip(self._taps, found, strict=True))
        return [_along(gradients.get((s.node, s.operand)), s) for s in self._sites if s.operand is not None]

    def value(self, n: Node) -> Any:
        """Tap what readers read, then let the operator's stand-in run."""
        kept = {operand: self.env[operand] for operand in self._operands.get(n, ())}
        for operand, value in kept.items():
            tap = value.detach().requires_grad_() if not value.requires_grad else value
            self.env[operand] = self._taps[n, operand] = tap.view_as(tap)
        if n in self._wanted:
            value = self.env[n.args[0]]  # type: ignore[index]
            own = self._wanted[n].to(value.device)
            given = (value.movedim(feature_axis(n, value), -1) * own).sum()
            self._total = given if self._total is None else self._total + given
        result = self._stand_in(n)
        self.env.update(kept)
        return result

    def _stand_in(self, n: Node) -> Any:
        if n.op != "call_function" or self._types.values.get(n) is None:
            return super().value(n)
        name = operator_name(n)
        call = {key: self.env[v] if isinstance(v, Node) and v in self.env else v for key, v in arguments(n).items()}
        operands = [self.env[s] for s in n.all_input_nodes if isinstance(self.env.get(s), Tensor)]
        live = [value for value in operands if value.requires_grad]
        if not live:
            return super().value(n)
        if name == "linear":
            return functional.linear(call["input"], call["weight"].abs())
        if name in CONVOLUTIONS:
            return n.target(**{**call, "weight": call["weight"].abs(), "bias": None})  # type: ignore[operator]
        if name == "batch_norm" and call["running_var"] is not None:
            return _scaled(call, (call["running_var"] + call["eps"]).rsqrt(), 1)
        if name in ("layer_norm", "rms_norm"):
            return call["input"] * call["weight"].abs() if call.get("weight") is not None else call["input"]
        if name in ("batch_norm", "group_norm", "instance_norm"):
            return _scaled(call, torch.ones((), dtype=torch.float64), 1)
        if name == "scaled_dot_product_attention":
            return _even(call["query"], call["value"])
        if name in ("matmul", "mm", "bmm"):
            left, right = list(call.values())[:2]
            return _product(left, right)
        if name in ("addmm", "baddbmm"):
            added, left, right = list(call.values())[:3]
            product = _product(left, right)
            return product + added * abs(call["beta"]) if added.requires_grad else product
        if name == "einsum":
            parts = [self.env[source] for source in call["tensors"]]
            if sum(part.requires_grad for part in parts) == 1:
                parts = [part if part.requires_grad else part.abs() for part in parts]
                return n.target(call["equation"], parts)  # type: ignore[operator]
        if name.startswith("max_pool") or name.startswith("adaptive_max_pool"):
            return _average(name, n, call)
        if name in ("softmax", "_softmax", "log_softmax"):
            return operands[0]
        if name in ("mul", "div") and len(operands) > 1:
            first, second = operands
            if len(live) == 2:
                return first + second
            fixed = second if first.requires_grad else first
            return live[0] * (fixed.abs() if name == "mul" else fixed.abs().clamp_min(1e-12).reciprocal())
        if name in ("add", "sub", "rsub"):
            left, right = (call["other"], call["self"]) if name == "rsub" else (call["self"], call["other"])
            if len(operands) == 1 and not (isinstance(left, Tensor) and isinstance(right, Tensor)):
                return operands[0]  # beside a number
            share = abs(call["alpha"]) if isinstance(call.get("alpha"), (int, float)) else 1
            return left + share * right
        if is_pointwise(n) and len(live) == 1:
            return live[0].expand(torch.broadcast_shapes(*(o.shape for o in operands)))  # type: ignore[no-untyped-call]
        return super().value(n)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A product with absolute weights; of two values, as attention that looks everywhere alike."""
    if left.requires_grad and right.requires_grad:
        return right.mean(-2, keepdim=True).expand(*left.shape[:-1], right.shape[-1])
    return torch.matmul(left if left.requires_grad else left.abs(), right if right.requires_grad else right.abs())


def _scaled(call: dict[str, Any], factor: Tensor, axis: int) -> Tensor:
    weight = call["weight"]
    scale = factor if weight is None else factor * weight.abs()
    value: Tensor = call["input"]
    return value * (scale.reshape(*[-1 if i == axis else 1 for i in range(value.dim())]) if scale.dim() else scale)


def _even(query: Tensor, value: Tensor) -> Tensor:
    """Attention that looks everywhere alike; value heads that serve several query heads are repeated."""
    mean = value.mean(-2, keepdim=True)
    if mean.dim() > 3 and mean.shape[-3] != query.shape[-3]:
        mean = mean.repeat_interleave(query.shape[-3] // mean.shape[-3], -3)
    return mean.expand(*query.shape[:-1], value.shape[-1])


def _average(name: str, node: Node, call: dict[str, Any]) -> Any:
    """Average pooling in place of max pooling, so that importance spreads over the window."""
    rank = int(name[-2])
    if name.startswith("adaptive"):
        pooled = getattr(functional, f"adaptive_avg_pool{rank}d")(call["self"], call["output_size"])
        return (pooled, pooled)
    stride = call["stride"] or call["kernel_size"]
    pool = getattr(functional, f"avg_pool{rank}d")
    found = pool(call["self"], call["kernel_size"], stride, call["padding"], bool(call["ceil_mode"]))
    return (found, found) if isinstance(node.meta["val"], (tuple, list)) else found


def _along(gradient: Tensor | None, site: Site) -> Tensor:
    if gradient is None:
        return torch.zeros(1, len(site.factors), dtype=torch.float64)
    others = [axis for axis in range(gradient.dim()) if axis != site.axis]
    return (gradient.sum(others) if others else gradient)[None].cpu()
