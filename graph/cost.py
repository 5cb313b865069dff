"""Costs as polynomials in group widths.

Counting conventions: one MAC is one multiply-accumulate of a convolution, linear layer, matrix product,
attention or recurrence (a FLOP counter that counts additions apart gives twice as many); additions of biases,
normalisations, activations and pooling are not counted, nor is what the output does not depend on. All costs are per
sample. Activation memory is the largest sum of bytes of values that are alive at one moment when operators run one by
one; views share the storage of what they view. Time is none of them: it is shared out among operators from what was
measured (`Times`), and falls in step with each operator's multiply-accumulates, and with the sizes of all values, down
to what is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Node

from .groups import Grouping
from .infer import Types, hint, named_tensors, tensors_of
from .rule import operator_name
from .terms import Terms

Widths = npt.NDArray[np.int64]

_ONE = np.ones(1)

# These return their input when there is nothing to do, which is the case at inference.
_PASSES = {"dropout", "to", "alias", "detach"}
_LAID_OUT = {"contiguous", "reshape", "flatten"}
"""These do where the layout in memory allows it, and copy where axes have changed places."""


@dataclass(frozen=True)
class Costs:
    """What one choice of widths costs, per sample; time in milliseconds of one call, None where none was measured."""

    macs: float
    params: int
    size: int
    memory: float
    time: float | None = None


@dataclass(frozen=True)
class Times:
    """Milliseconds of the whole model's call.

    products: of each of `Types.macs`, in their order. rest: of all other work. fixed: what no removal saves.
    """

    products: npt.NDArray[np.float64]
    rest: float
    fixed: float = 0.0


class Model:
    """The cost of every choice of widths, ready to be evaluated in microseconds."""

    def __init__(self, types: Types, grouping: Grouping, times: Times | None = None) -> None:
        self._batch = types.captured.samples
        self._count = len(grouping.axes)
        self._axis = np.repeat(np.arange(self._count), np.array([len(axis.terms) for axis in grouping.axes], np.int64))
        self._monomials = _Products([term for axis in grouping.axes for term in axis.terms])
        number = grouping.axis_number
        constant = _without_samples(types)
        often = [self._batch if product.node in constant else 1 for product in types.macs]
        self._macs = _Products(
            [(n * p.factor, [number[id(a)] for a in p.axes]) for n, p in zip(often, types.macs, strict=True)]
        )
        owners = [(name, [number[id(a)] for a in axes]) for name, axes in types.tensors.items()]
        tensors = types.weights
        trained = [(1.0, axes) for name, axes in owners if isinstance(tensors[name], torch.nn.Parameter)]
        self._params = _Products(trained)
        self._bytes = _Products([(float(tensors[name].element_size()), axes) for name, axes in owners])
        self._values, self._birth, self._death = _lifetimes(types, number, constant)
        self._steps = int(self._death.max(initial=0)) + 2
        self._unused_params, self._unused_bytes = _unused(types)
        self._is_timed = times is not None
        self._per_mac, self._per_byte, self._fixed = np.zeros(len(types.macs)), 0.0, 0.0
        if times is not None:
            whole = np.array([n * product.macs for n, product in zip(often, types.macs, strict=True)])
            self._per_mac = np.divide(times.products, whole, out=np.zeros(len(whole)), where=whole > 0)
            written = self._values(self.sizes(grouping.widths)).sum()
            self._per_byte, self._fixed = times.rest / written if written else 0.0, times.fixed

    def __call__(self, widths: Widths | npt.NDArray[np.float64]) -> Costs:
        """Costs at these widths, one per group, whole or not."""
        sizes = self.sizes(widths)
        alive, macs = self._values(sizes), self._macs(sizes)
        born = np.bincount(self._birth, alive, self._steps)
        dead = np.bincount(self._death + 1, alive, self._steps)
        return Costs(
            macs=float(macs.sum()) / self._batch,
            params=round(float(self._params(sizes).sum())) + self._unused_params,
            size=round(float(self._bytes(sizes).sum())) + self._unused_bytes,
            memory=float(np.cumsum(born - dead).max()) / self._batch,
            time=float(self._fixed + macs @ self._per_mac + alive.sum() * self._per_byte) if self._is_timed else None,
        )

    def slopes(self, widths: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """The derivative of each cost by the logarithm of each width, [groups] by the names of `Costs`.

        Costs are sums of products of widths, with no minus: convex in the logarithms. What `memory` gives is the slope
        of the moment that takes most. widths: whole or not.
        """
        sizes, count = self.sizes(widths), len(widths)
        moved = np.zeros((self._count, count))
        np.add.at(moved, self._axis, self._monomials.slopes(widths, np.diag(widths)))
        alive = self._values(sizes)
        born, dead = (np.bincount(moment, alive, self._steps) for moment in (self._birth, self._death + 1))
        most = int(np.cumsum(born - dead).argmax())
        then = (self._birth <= most) & (most <= self._death)
        macs, values = self._macs.slopes(sizes, moved), self._values.slopes(sizes, moved)
        return {
            "macs": macs.sum(0) / self._batch,
            "params": self._params.slopes(sizes, moved).sum(0),
            "size": self._bytes.slopes(sizes, moved).sum(0),
            "memory": values[then].sum(0) / self._batch,
            "time": self._per_mac @ macs + self._per_byte * values.sum(0),
        }

    def sizes(self, widths: Widths | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The size of every distinct axis."""
        return np.bincount(self._axis, self._monomials(widths.astype(np.float64)), self._count).astype(np.float64)


class _Products:
    """Constants times products of chosen sizes, one number per entry."""

    def __init__(self, entries: Sequence[tuple[float, Sequence[int]]]) -> None:
        self._constant = np.array([c for c, _ in entries], np.float64)
        most = max((len(chosen) for _, chosen in entries), default=0)
        # One row per factor; where an entry has no more factors, -1 points at the one appended to the sizes.
        self._chosen = np.array(list(zip_longest(*(chosen for _, chosen in entries), fillvalue=-1)), np.int64)
        self._chosen = self._chosen.reshape(most, len(entries))

    def __call__(self, sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        extended = np.concatenate([sizes, _ONE])
        result = self._constant
        for factor in self._chosen:
            result = result * extended[factor]
        return result

    def slopes(self, sizes: npt.NDArray[np.float64], moved: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What every entry moves where the sizes move by moved, [sizes, directions]; [entries, directions]."""
        inverse = np.divide(1, sizes, out=np.zeros(len(sizes)), where=sizes > 0)
        relative = np.vstack([moved * inverse[:, None], np.zeros((1, moved.shape[1]))])
        shares = np.zeros((len(self._constant), moved.shape[1]))
        for factor in self._chosen:
            shares += relative[factor]
        return self(sizes)[:, None] * shares


def _unused(types: Types) -> tuple[int, int]:
    """Parameters and bytes that the graph never reads but the file carries."""
    used = {id(tensor) for tensor in types.weights.values()}
    rest = {id(t): t for _, t in named_tensors(types.captured.module) if id(t) not in used}.values()
    params = sum(t.numel() for t in rest if isinstance(t, torch.nn.Parameter))
    return params, sum(t.numel() * t.element_size() for t in rest)


def _without_samples(types: Types) -> set[Node]:
    """What is computed from parameters alone, once for all samples of an open batch: each takes the whole of it."""
    if types.captured.dynamic_shapes is None:
        return set()
    found: set[Node] = set()
    for node in types.captured.module.graph.nodes:
        if node.op in ("get_attr", "call_function") and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _lifetimes(types: Types, number: dict[int, int], constant: set[Node]) -> tuple[_Products, Terms, Terms]:
    """For every storage: its size, the step that makes it and the last step that reads it or a view of it."""
    base: dict[Node, Node] = {}
    birth: dict[Node, int] = {}
    death: dict[Node, int] = {}
    entries: list[tuple[float, list[int]]] = []
    owners: list[Node] = []
    for step, node in enumerate(types.captured.module.graph.nodes):
        if node in types.unused:
            continue
        for source in node.all_input_nodes:
            if (owner := base.get(source)) is not None and owner in birth:
                death[owner] = step
        if node.op in ("get_attr", "output") or types.values.get(node) is None:
            continue
        base[node] = _storage(node, base)
        if base[node] is not node:
            continue
        birth[node] = death[node] = step
        values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
        for value, axes in zip(
            [v for v in values if isinstance(v, Tensor)], tensors_of(types.values[node]), strict=False
        ):
            often = types.captured.samples if node in constant else 1
            entries.append((float(often * value.dtype.itemsize), [number[id(axis)] for axis in axes]))
            owners.append(node)
    return (
        _Products(entries),
        np.array([birth[n] for n in owners], np.int64),
        np.array([death[n] for n in owners], np.int64),
    )


def _storage(node: Node, base: dict[Node, Node]) -> Node:
    """The node whose storage a node's value lies in: itself, unless it is a view or in place."""
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, Node) or source not in base:
        return node
    name = operator_name(node)
    if name == "to" and source.meta["val"].dtype != node.meta["val"].dtype:
        return node
    if name in _LAID_OUT and _is_copied(source, node):
        return node
    if name in ("getitem", *_PASSES, *_LAID_OUT):
        return base[source]
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else []
    return base[source] if returns and returns[0].alias_info is not None else node


def _is_copied(source: Node, node: Node) -> bool:
    """Whether a new shape or order of memory cannot be a view of what there is, as where axes have changed places."""
    before, after = source.meta["val"], node.meta["val"]
    if operator_name(source) == "clone" and source.kwargs.get("memory_format") is torch.contiguous_format:
        return False
    sizes, steps = ([hint(number) for number in own] for own in (before.shape, before.stride()))
    laid = torch.empty_strided(sizes, steps, device="meta")
    if operator_name(node) == "contiguous":
        return not laid.is_contiguous()
    try:
        laid.view([hint(size) for size in after.shape])
    except RuntimeError:
        return True
    return False
