"""Channel terms and their unification.

Every index of every axis carries a term. A term is a *variable* (a channel that may be removed), *frozen*
(it must stay) or a *product* of terms (it exists only while all its factors exist). Terms are numbers; an
axis is an array of them, and all operations work on whole arrays.

Unification follows first-order type inference: variable with variable makes them one; variable with product
binds the variable; product with product of the same arity goes factor by factor; anything else freezes both,
which is always sound because it only makes less removable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Terms = npt.NDArray[np.int64]
"""The terms of one axis, one number per index."""

FROZEN = 0
"""The term of an index that was never a channel: batch, time, space, a literal position."""

_LIVE = -1
_UNBOUND = -1
_DEPTH = 32  # products nest by one level per view; deeper than this is a cycle


@dataclass(frozen=True)
class Cause:
    """Why terms were frozen: the node that did it and a sentence.

    kind: "structure" for axes that are no channels (batch, time, space, kernel), "boundary" for the model's
    inputs and outputs, "limit" where an operator needs an axis whole, "unknown" for an operator without a rule.
    """

    node: str
    op: str
    module: str
    reason: str
    kind: str = "limit"


STRUCTURE = Cause("", "", "", "joined to a batch, time, space or literal axis", "structure")


class Store:
    """A union-find of terms with bindings to products; grows as the graph is walked."""

    def __init__(self) -> None:
        self.causes: list[Cause] = [STRUCTURE]
        self._count = 1
        self._parent = np.zeros(1024, np.int64)
        self._cause = np.zeros(1024, np.int64)  # _LIVE, else an index into causes
        self._binding = np.full(1024, _UNBOUND, np.int64)  # of roots: an index into the products
        self._products = 0
        self._offset = np.zeros(256, np.int64)
        self._arity = np.zeros(256, np.int64)
        self._factor_count = 0
        self._factors = np.zeros(1024, np.int64)
        self._frozen_axes: dict[int, Terms] = {}
        self._structures: dict[tuple[int, str], Terms] = {}

    # -- making terms ---------------------------------------------------------------------------------

    def fresh(self, size: int) -> Terms:
        """New variables for an axis of `size` indices; an axis of one index cannot shrink and is frozen."""
        return self.frozen(1) if size == 1 else self._allocate(size)

    def _allocate(self, size: int) -> Terms:
        start, self._count = self._count, self._count + size
        if self._count > len(self._parent):
            self._grow()
        ids = np.arange(start, self._count)
        self._parent[start : self._count] = ids
        self._cause[start : self._count] = _LIVE
        return ids

    def frozen(self, size: int) -> Terms:
        """The one shared array of `size` frozen terms."""
        axis = self._frozen_axes.get(size)
        if axis is None:
            axis = self._frozen_axes[size] = np.full(size, FROZEN, np.int64)
        return axis

    def structure(self, size: int, reason: str) -> Terms:
        """The one shared array of `size` terms that are frozen because they are no channels, for a reason."""
        axis = self._structures.get((size, reason))
        if axis is None:
            axis = self._structures[size, reason] = self._allocate(size)
            self.freeze(axis, Cause("", "", "", reason, "structure"))
        return axis

    def product(self, columns: Sequence[Terms]) -> Terms:
        """One product per row of equally long factor columns."""
        live = [bool(column.any()) for column in columns]
        if not any(live):
            return self.frozen(len(columns[0]))
        if len(columns) == 1:
            return columns[0]
        size, arity = len(columns[0]), len(columns)
        first, self._products = self._products, self._products + size
        start, self._factor_count = self._factor_count, self._factor_count + size * arity
        self._offset = _room(self._offset, self._products)
        self._arity = _room(self._arity, self._products)
        self._factors = _room(self._factors, self._factor_count)
        self._offset[first : self._products] = np.arange(start, self._factor_count, arity)
        self._arity[first : self._products] = arity
        self._factors[start : self._factor_count] = np.stack(columns, axis=1).ravel()
        terms = self._allocate(size)
        self._binding[terms] = np.arange(first, self._products)
        return terms

    def grid(self, axes: Sequence[Terms]) -> Terms:
        """The products of all combinations of the axes' terms, in row-major order."""
        if len(axes) == 1:
            return axes[0]
        sizes = [len(axis) for axis in axes]
        if not any(axis.any() for axis in axes):
            return self.frozen(int(np.prod(sizes)))
        mesh = np.meshgrid(*axes, indexing="ij")
        return self.product([column.ravel() for column in mesh])

    def _grow(self) -> None:
        self._parent = _room(self._parent, self._count)
        self._cause = _room(self._cause, self._count)
        self._binding = _room(self._binding, self._count, _UNBOUND)

    # -- solving --------------------------------------------------------------------------------------

    def find(self, terms: Terms) -> Terms:
        """The representative of each term."""
        above: Terms = self._parent[terms]
        higher = self._parent[above]
        if (higher == above).all():
            return above
        while not (higher == above).all():
            above, higher = higher, self._parent[higher]
        self._parent[terms] = above
        return above

    def is_frozen(self, terms: Terms) -> npt.NDArray[np.bool_]:
        """Which terms are frozen themselves; a product of frozen factors shows only in the solution."""
        frozen: npt.NDArray[np.bool_] = self._cause[self.find(terms)] != _LIVE
        return frozen

    def cause(self, term: int) -> Cause:
        """Why one frozen term is frozen."""
        return self.causes[int(self._cause[self.find(np.array([term]))[0]])]

    def freeze(self, terms: Terms, cause: Cause) -> None:
        """Make terms stay, and with a product all of its factors."""
        if not terms.any():
            return
        self.causes.append(cause)
        roots = np.unique(self.find(terms))
        self._freeze(roots[self._cause[roots] == _LIVE], len(self.causes) - 1)

    def unify(self, left: Terms, right: Terms, cause: Cause) -> None:
        """Make two axes the same, index by index.

        What meets a frozen term is frozen for that term's cause; `cause` is for products that do not match.
        """
        if left is right:
            return
        pending = [(left, right)]
        while pending:
            a, b = (self.find(side) for side in pending.pop())
            differ = a != b
            if not differ.any():
                continue
            a, b = a[differ], b[differ]
            cause_a, cause_b = self._cause[a], self._cause[b]
            frozen_a, frozen_b = cause_a != _LIVE, cause_b != _LIVE
            one = frozen_a != frozen_b
            if one.any():
                known = np.where(frozen_a, cause_a, cause_b)[one]
                self._freeze(np.where(frozen_a, b, a)[one], known)
            live = ~(frozen_a | frozen_b)
            if one.any():  # a term frozen just now may stand in another pair of this round, so look again
                pending.append((a[live], b[live]))
            elif live.any():
                pending.extend(self._merge(a[live], b[live], cause))

    def _freeze(self, roots: Terms, cause: Terms | int) -> None:
        self._cause[roots] = cause
        bound = self._binding[roots] >= 0
        if not bound.any():
            return
        causes = np.broadcast_to(np.asarray(cause), roots.shape)[bound]
        products = self._binding[roots[bound]]
        for arity in np.unique(self._arity[products]):
            chosen = self._arity[products] == arity
            factors = self.find(self._factors_of(products[chosen], int(arity)).ravel())
            repeated = np.repeat(causes[chosen], int(arity))
            live = self._cause[factors] == _LIVE
            if live.any():
                self._freeze(factors[live], repeated[live])

    def _merge(self, a: Terms, b: Terms, cause: Cause) -> list[tuple[Terms, Terms]]:
        """Join live roots pairwise; returns what must be unified because bindings met."""
        old = np.concatenate([a, b])
        bound = old[self._binding[old] >= 0]
        if bound.size:
            bound = np.unique(bound)
        products = self._binding[bound]
        while a.size:
            # Several pairs may name one root; the last link wins and the next round joins the rest.
            self._parent[np.maximum(a, b)] = np.minimum(a, b)
            a, b = self.find(a), self.find(b)
            differ = a != b
            a, b = a[differ], b[differ]
        if not bound.size:
            return []
        roots = self.find(bound)
        self._binding[roots] = products
        chosen = self._binding[roots]
        differ = chosen != products
        return self._same_products(products[differ], chosen[differ], cause)

    def _same_products(self, p: Terms, q: Terms, cause: Cause) -> list[tuple[Terms, Terms]]:
        pairs = []
        same = self._arity[p] == self._arity[q]
        for arity in np.unique(self._arity[p[same]]):
            chosen = same & (self._arity[p] == arity)
            left, right = (self._factors_of(side[chosen], int(arity)).ravel() for side in (p, q))
            pairs.append((left, right))
        for one, other in zip(p[~same].tolist(), q[~same].tolist(), strict=True):
            left, right = self._flat(one), self._flat(other)
            if len(left) == len(right):
                pairs.append((left, right))
            else:
                self.freeze(np.concatenate([left, right]), cause)
        return pairs

    def _factors_of(self, products: Terms, arity: int) -> Terms:
        factors: Terms = self._factors[self._offset[products][:, None] + np.arange(arity)]
        return factors

    def _flat(self, product: int, depth: int = 0) -> Terms:
        """The live, unbound roots of a product, in order."""
        flat: list[Terms] = []
        arity = int(self._arity[product])
        for factor in self.find(self._factors_of(np.array([product]), arity).ravel()):
            if self._cause[factor] != _LIVE:
                continue
            inner = int(self._binding[factor])
            if inner < 0 or depth > _DEPTH:
                flat.append(np.array([factor]))
            else:
                flat.append(self._flat(inner, depth + 1))
        return np.concatenate(flat) if flat else np.zeros(0, np.int64)

    def solve(self) -> Solution:
        """Resolve every term to the set of variables it depends on."""
        while True:
            solution = self._resolve()
            if solution is not None:
                return solution

    def _release(self) -> None:
        """Unbind roots whose product is themselves times what stays: that says nothing (rotary embeddings do it)."""
        bound = np.flatnonzero(self._binding[: self._count] >= 0)
        bound = bound[(self._parent[bound] == bound) & (self._cause[bound] == _LIVE)]
        products = self._binding[bound]
        for arity in np.unique(self._arity[products]):
            chosen = self._arity[products] == arity
            roots = bound[chosen]
            factors = self.find(self._factors_of(products[chosen], int(arity)).ravel()).reshape(-1, int(arity))
            itself = factors == roots[:, None]
            trivial = (itself | (self._cause[factors] != _LIVE)).all(axis=1) & itself.any(axis=1)
            self._binding[roots[trivial]] = _UNBOUND

    def _resolve(self) -> Solution | None:
        self._release()
        everything = np.arange(self._count)
        roots = self.find(everything)
        is_root = roots == everything
        live = self._cause[: self._count] == _LIVE
        bound = self._binding[: self._count] >= 0
        variables = np.flatnonzero(is_root & live & ~bound)
        number = np.full(self._count, -1)
        number[variables] = np.arange(len(variables))

        products = np.flatnonzero(is_root & live & bound)
        rows, cyclic = self._expand(products)
        if cyclic.size:  # a term that contains itself has no solution but staying
            self.freeze(cyclic, Cause("", "", "", "its size depends on itself"))
            return None
        rows = np.where(rows >= 0, number[rows], -1)
        # Equal factors count once, and order does not matter.
        rows = -np.sort(-rows, axis=1)
        if rows.shape[1] > 1:
            rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1
            rows = -np.sort(-rows, axis=1)

        width = max(1, rows.shape[1])
        single = np.full((len(variables), width), -1)
        single[:, 0] = np.arange(len(variables))
        table = np.full((1 + len(variables) + len(products), width), -1)
        table[1 : 1 + len(variables)] = single
        table[1 + len(variables) :, : rows.shape[1]] = rows
        row_of_root = np.zeros(self._count, np.int64)
        row_of_root[variables] = 1 + np.arange(len(variables))
        row_of_root[products] = 1 + len(variables) + np.arange(len(products))
        return Solution(row_of_root[roots], table, len(variables))

    def _expand(self, products: Terms) -> tuple[Terms, Terms]:
        """Factors of bound roots down to variables, [n, k] padded with -1; and the roots that never end."""
        if not len(products):
            return np.zeros((0, 1), np.int64), products
        rows = products[:, None]
        for _ in range(_DEPTH):
            flat = rows.ravel()
            bound = np.flatnonzero((flat >= 0) & (self._binding[np.maximum(flat, 0)] >= 0))
            if not bound.size:
                return rows, products[:0]
            arity = int(self._arity[self._binding[flat[bound]]].max())
            wide = np.full((len(flat), arity), -1)
            wide[:, 0] = flat
            wide[bound, 0] = -1
            inner = self._binding[flat[bound]]
            for size in np.unique(self._arity[inner]):
                chosen = self._arity[inner] == size
                factors = self.find(self._factors_of(inner[chosen], int(size)).ravel())
                factors = np.where(self._cause[factors] == _LIVE, factors, -1)
                wide[bound[chosen], :size] = factors.reshape(-1, int(size))
            rows = _squeeze(wide.reshape(len(products), -1))
        return rows, products[(self._binding[np.maximum(rows, 0)] >= 0).any(axis=1)]


def _squeeze(rows: Terms) -> Terms:
    """Drop repeated factors and the columns that only pad."""
    rows = -np.sort(-rows, axis=1)
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1
    rows = -np.sort(-rows, axis=1)
    used = np.flatnonzero((rows >= 0).any(axis=0))
    return rows[:, used if used.size else slice(0, 1)]


def _room(array: Terms, needed: int, fill: int = 0) -> Terms:
    if needed <= len(array):
        return array
    larger = np.full(max(needed, 2 * len(array)), fill, np.int64)
    larger[: len(array)] = array
    return larger


@dataclass(frozen=True)
class Solution:
    """Solved terms: which variables each term needs.

    row_of: [terms] the row of each term in `rows`; row 0 is frozen.
    rows: [rows, k] variable numbers, padded with -1; an index lives while all of its row's variables do.
    variables: how many variables there are, numbered from 0.
    """

    row_of: Terms
    rows: Terms
    variables: int

    def factors(self, axis: Terms) -> Terms:
        """Variables of each index of an axis, [n, k] padded with -1."""
        found: Terms = self.rows[self.row_of[axis]]
        return found

    def kept(self, axis: Terms, alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which indices of an axis survive when only the `alive` variables do."""
        if not self.variables:
            return np.ones(len(axis), np.bool_)
        factors = self.factors(axis)
        return np.asarray((alive[factors] | (factors < 0)).all(axis=1), np.bool_)
