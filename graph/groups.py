"""Groups: the channels that can stand in for each other.

Two variables are in one group when they remove the same number of indices from the same axes, beside the same
groups. Colour refinement finds the coarsest such partition: every variable starts with one colour, and its next
colour is a hash of its places and of the colours that it is multiplied with there, until nothing splits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .infer import Types, tensors_of
from .terms import Terms

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Member:
    """One axis of a parameter or buffer that a group shrinks; each channel removes `each` indices of it."""

    tensor: str
    axis: int
    each: int


@dataclass(frozen=True)
class Group:
    """Channels that can stand in for each other.

    number: the group's place in the list of groups.
    variables: [width] the variable of each channel, in order of first appearance.
    exact: False where some normalisation takes its statistics over these channels.
    floor: how many channels must stay so that no axis becomes empty.
    """

    number: int
    name: str
    variables: Terms
    members: tuple[Member, ...]
    exact: bool
    floor: int

    @property
    def width(self) -> int:
        """How many channels there are."""
        return len(self.variables)


@dataclass(frozen=True)
class Axis:
    """The size of an axis as a polynomial: the sum of coefficients times products of group widths."""

    terms: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def holds_channels(self) -> bool:
        """Whether any index of the axis can go."""
        return any(names for _, names in self.terms)


@dataclass(frozen=True)
class Grouping:
    """All groups of a model.

    group_of: [variables] the number of each variable's group, -1 for variables that touch no parameter.
    axes: the size polynomial of every distinct axis, found by `axis_number` from the identity of its array.
    """

    groups: tuple[Group, ...]
    group_of: Terms
    axes: tuple[Axis, ...]
    axis_number: dict[int, int]

    @property
    def widths(self) -> npt.NDArray[np.int64]:
        """[groups] how many channels each group has."""
        return np.array([group.width for group in self.groups], np.int64)

    def size(self, axis: Terms) -> Axis:
        """The size polynomial of an axis."""
        return self.axes[self.axis_number[id(axis)]]


def group(types: Types) -> Grouping:
    """Partition the variables that touch parameters into groups."""
    axes = _distinct_axes(types)
    rows = types.solution.factors(np.concatenate([types.store.frozen(0), *axes]))  # of all axes, one after the other
    lengths = np.array([len(axis) for axis in axes], np.int64)
    factors = np.split(rows, np.cumsum(lengths))[:-1]
    count = types.solution.variables
    colour = _numbered(_refine(np.repeat(np.arange(len(axes)), lengths), rows, count), rows)
    while True:
        sizes, irregular = _polynomials(factors, colour)
        if not irregular.size:
            break
        # Not every combination of two groups exists; apart, each variable is a group and any set is complete.
        alone = np.isin(colour, irregular)
        colour = _numbered(np.where(alone, np.arange(count) + colour.max() + 1, colour), rows)
    return _named(types, axes, colour, sizes)


def _distinct_axes(types: Types) -> list[Terms]:
    """Every axis array once: parameters first, in order, then values."""
    seen: dict[int, Terms] = {}
    for value in (*types.tensors.values(), *types.values.values()):
        for axes in tensors_of(value):
            seen.update(zip(map(id, axes), axes, strict=True))
    for product in types.macs:
        seen.update(zip(map(id, product.axes), product.axes, strict=True))
    return list(seen.values())


def _refine(place: Terms, rows: Terms, count: int) -> Terms:
    if not count:
        return np.zeros(0, np.int64)
    live = (rows >= 0).any(axis=1)
    place, rows = place[live], rows[live]
    if rows.shape[1] > 1 and not (rows[:, 1:] >= 0).any():
        rows = rows[:, :1]
    colour = np.zeros(count, np.int64)
    kinds = 1
    while True:
        mixed = _signatures(place, rows, colour)
        refined = np.unique(mixed, return_inverse=True)[1]
        if refined.max() + 1 == kinds or rows.shape[1] == 1:
            return refined
        colour, kinds = refined, int(refined.max()) + 1


def _numbered(colour: Terms, rows: Terms) -> Terms:
    """Colours numbered from 0 in order of first appearance, which is the order of groups; unused ones come last."""
    if not len(colour):
        return colour
    colour = np.unique(colour, return_inverse=True)[1]
    seen = rows[:, ::-1].ravel()  # factors stand in falling order
    seen = colour[seen[seen >= 0]]
    first = np.full(int(colour.max()) + 1, len(seen))
    first[seen[::-1]] = np.arange(len(seen))[::-1]  # the last value written is that of the first appearance
    number = np.empty_like(first)
    number[np.argsort(first, kind="stable")] = np.arange(len(first))
    return number[colour]


def _signatures(place: Terms, rows: Terms, colour: Terms) -> Words:
    """A hash per variable of where it occurs and what stands beside it; sums make the order not matter."""
    ids = _scramble(colour.astype(np.uint64) + np.uint64(1))
    present = rows >= 0
    each = np.where(present, ids[np.maximum(rows, 0)], np.uint64(0))
    beside = each.sum(axis=1, dtype=np.uint64)
    total = ids.copy()
    for column in range(rows.shape[1]):
        here = present[:, column]
        word = _scramble(
            place[here].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ (beside - each[:, column])[here]
        )
        np.add.at(total, rows[here, column], word)
    return total


def _scramble(words: Words) -> Words:
    """splitmix64's finaliser: near inputs give unrelated outputs."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _polynomials(factors: list[Terms], colour: Terms) -> tuple[list[Axis], Terms]:
    """Each axis as a polynomial in widths of colours; and colours for which that is not exact."""
    widths = _widths(colour)
    found, irregular = [], []
    for rows in factors:
        if not (rows >= 0).any():
            found.append(Axis(((len(rows), ()),)))
        elif rows.shape[1] == 1 or not (rows[:, 1:] >= 0).any():
            found.append(_sum(rows[:, 0], colour, widths))
        else:
            axis, wrong = _sum_of_products(rows, colour, widths)
            found.append(axis)
            irregular.extend(wrong)
    return found, np.unique(np.array(irregular, np.int64))


def _widths(colour: Terms) -> list[int]:
    """How many variables have each colour."""
    counts: list[int] = np.bincount(colour, minlength=1).tolist()
    return counts


def _sum(variables: Terms, colour: Terms, widths: list[int]) -> Axis:
    live = variables >= 0
    constant = len(variables) - int(np.count_nonzero(live))
    counts = np.bincount(colour[variables[live] if constant else variables])
    kinds = np.flatnonzero(counts)
    terms = [(n // widths[c], (c,)) for c, n in zip(kinds.tolist(), counts[kinds].tolist(), strict=True)]
    return Axis((*([(constant, ())] if constant else []), *terms))


def _sum_of_products(rows: Terms, colour: Terms, widths: list[int]) -> tuple[Axis, list[int]]:
    kinds = np.where(rows >= 0, colour[np.maximum(rows, 0)], -1)
    _, first, which = np.unique(_digest(kinds), return_index=True, return_inverse=True)
    terms: list[tuple[int, tuple[int, ...]]] = []
    wrong: list[int] = []
    products = _digest(rows)
    for number, place in enumerate(first.tolist()):
        chosen = products[which == number]
        names = tuple(sorted(c for c in kinds[place].tolist() if c >= 0))
        combinations = math.prod([widths[c] for c in names])
        times = np.unique(chosen, return_counts=True)[1]
        if len(names) != len(set(names)) or len(times) != combinations or (times != times[0]).any():
            wrong.extend(names)
        terms.append((len(chosen) // max(1, combinations), names))
    return Axis(tuple(sorted(terms, key=lambda term: term[1]))), wrong


def _digest(rows: Terms) -> Words:
    """A hash of each row of numbers; -1 is nothing, and sums make the order not matter."""
    words = _scramble(rows.astype(np.uint64))
    words[rows < 0] = 0
    digests: Words = words.sum(axis=1, dtype=np.uint64)
    return digests


def _named(types: Types, axes: list[Terms], colour: Terms, sizes: list[Axis]) -> Grouping:
    """Number the groups that touch parameters, in order of first appearance, and describe them."""
    numbers = {id(axis): i for i, axis in enumerate(axes)}
    widths = _widths(colour)
    each_of: dict[int, dict[int, int]] = {}
    members: dict[int, list[Member]] = {}
    for name, tensor_axes in types.tensors.items():
        for position, axis in enumerate(tensor_axes):
            number = numbers[id(axis)]
            found = each_of.get(number)
            if found is None:
                found = each_of[number] = _each(sizes[number], widths)
            for kind, each in found.items():
                members.setdefault(kind, []).append(Member(name, position, each))
    renormalised = _colours_of([axis for _, axis in types.renormalising], types, colour)
    floors = _anchors(sizes)
    variables = _by_colour(colour)
    # Nearly always the same; not where kinds touch no parameter, or where one axis first shows two of them.
    order = {kind: number for number, kind in enumerate(members)}
    labels = _labels(members)
    groups = tuple(
        Group(
            number, labels[kind], variables[kind], tuple(members[kind]), kind not in renormalised, int(kind in floors)
        )
        for kind, number in order.items()
    )
    lookup = np.full(len(widths), -1)
    lookup[list(order)] = np.arange(len(order))
    if list(order) != list(range(len(widths))):
        sizes = _renumber(sizes, lookup.tolist(), widths)
    return Grouping(groups, lookup[colour] if len(colour) else colour, tuple(sizes), numbers)


def _renumber(sizes: list[Axis], lookup: list[int], widths: list[int]) -> list[Axis]:
    """Polynomials over groups instead of kinds; what touches no parameter always stays and is a constant."""
    renumbered = []
    for axis in sizes:
        terms = []
        for count, kinds in axis.terms:
            names = tuple([lookup[c] for c in kinds])
            if -1 in names:
                stays = math.prod([widths[c] for c in kinds if lookup[c] < 0])
                terms.append((count * stays, tuple([name for name in names if name >= 0])))
            else:
                terms.append((count, names))
        renumbered.append(Axis(tuple(terms)))
    return renumbered


def _each(axis: Axis, widths: list[int]) -> dict[int, int]:
    """Indices that one channel of each kind removes from an axis: the derivative of its size at full widths."""
    found: dict[int, int] = {}
    for count, kinds in axis.terms:
        for kind in kinds:
            beside = math.prod([widths[c] for c in kinds if c != kind]) if len(kinds) > 1 else 1
            found[kind] = found.get(kind, 0) + count * beside
    return found


def _colours_of(axes: list[Terms], types: Types, colour: Terms) -> set[int]:
    found: set[int] = set()
    for axis in axes:
        rows = types.solution.factors(axis)
        found.update(np.unique(colour[rows[rows >= 0]]).tolist())
    return found


def _anchors(sizes: list[Axis]) -> set[int]:
    """Kinds that must keep a channel: in every axis without a constant, those of the largest term."""
    anchors: set[int] = set()
    for axis in sizes:
        if any(not kinds for _, kinds in axis.terms) or any(set(kinds) <= anchors for _, kinds in axis.terms):
            continue
        anchors.update(max(axis.terms, key=lambda term: term[0])[1])
    return anchors


def _by_colour(colour: Terms) -> list[Terms]:
    if not len(colour):
        return []
    order = np.argsort(colour, kind="stable")
    return np.split(order, np.cumsum(np.bincount(colour))[:-1])


def _labels(members: dict[int, list[Member]]) -> dict[int, str]:
    """Each group by the first axis that it shrinks; repeats are numbered."""
    used: dict[str, int] = {}
    labels = {}
    for kind, places in members.items():
        first = next((m for m in places if m.axis == 0), places[0])
        label = first.tensor if first.axis == 0 else f"{first.tensor}:{first.axis}"
        used[label] = used.get(label, 0) + 1
        labels[kind] = label if used[label] == 1 else f"{label}#{used[label]}"
    return labels
