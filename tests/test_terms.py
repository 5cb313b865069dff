"""Unification: what must be equal becomes equal, what cannot be freezes, and the order does not matter."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slimc.graph.terms import Cause, Solution, Store, Terms

WHY = Cause("node", "op", "module", "a reason")


def row(solution: Solution, term: int) -> frozenset[int]:
    """The variables that one term needs."""
    return frozenset(int(v) for v in solution.factors(np.array([term]))[0] if v >= 0)


def same(solution: Solution, left: Terms, right: Terms) -> bool:
    """Whether two axes live and die together, index by index."""
    return all(row(solution, a) == row(solution, b) for a, b in zip(left.tolist(), right.tolist(), strict=True))


def test_two_variables_become_one() -> None:
    store = Store()
    a, b = store.fresh(4), store.fresh(4)
    store.unify(a, b, WHY)
    solution = store.solve()
    assert same(solution, a, b)
    assert solution.variables == 4


def test_what_meets_a_frozen_term_is_frozen_for_its_reason() -> None:
    store = Store()
    a, b = store.fresh(3), store.fresh(3)
    store.freeze(a[1:2], WHY)
    store.unify(a, b, Cause("other", "", "", "not this"))
    assert store.is_frozen(b).tolist() == [False, True, False]
    assert store.cause(int(b[1])) == WHY


def test_a_product_lives_while_all_of_its_factors_do() -> None:
    store = Store()
    heads, sizes = store.fresh(2), store.fresh(3)
    merged = store.grid([heads, sizes])
    solution = store.solve()
    alive = np.ones(solution.variables, np.bool_)
    alive[list(row(solution, int(heads[0])))] = False
    # heads x sizes in row-major order: the first head's three places go.
    assert solution.kept(merged, alive).tolist() == [False] * 3 + [True] * 3


def test_products_of_one_shape_unify_factor_by_factor() -> None:
    store = Store()
    a, b, c, d = store.fresh(2), store.fresh(3), store.fresh(2), store.fresh(3)
    store.unify(store.grid([a, b]), store.grid([c, d]), WHY)
    solution = store.solve()
    assert same(solution, a, c)
    assert same(solution, b, d)
    assert solution.variables == 5


def test_a_variable_bound_to_a_product_splits_later_into_the_same_factors() -> None:
    store = Store()
    a, b, whole = store.fresh(2), store.fresh(3), store.fresh(6)
    store.unify(whole, store.grid([a, b]), WHY)
    c, d = store.fresh(2), store.fresh(3)
    store.unify(store.grid([c, d]), whole, WHY)
    solution = store.solve()
    assert same(solution, a, c)
    assert same(solution, b, d)


def test_frozen_factors_keep_their_place() -> None:
    store = Store()
    batch, heads, size = store.frozen(2), store.fresh(3), store.fresh(4)
    merged = store.grid([batch, heads, size])
    back = store.fresh(3), store.fresh(4)
    store.unify(merged, store.grid([store.frozen(2), *back]), WHY)
    solution = store.solve()
    assert same(solution, heads, back[0])
    assert same(solution, size, back[1])
    assert not store.is_frozen(heads).any()


def test_freezing_a_product_freezes_its_factors() -> None:
    store = Store()
    a, b = store.fresh(2), store.fresh(3)
    store.freeze(store.grid([a, b])[:1], WHY)
    assert store.is_frozen(a).tolist() == [True, False]
    assert store.is_frozen(b).tolist() == [True, False, False]


def test_products_that_do_not_match_freeze_with_the_given_reason() -> None:
    store = Store()
    a, b, c = store.fresh(2), store.fresh(2), store.fresh(2)
    flat = store.product([a, b, c])
    store.unify(flat, store.product([store.fresh(2), store.fresh(2)]), WHY)
    assert store.is_frozen(np.concatenate([a, b, c])).all()
    assert store.cause(int(a[0])) == WHY


def test_a_term_that_contains_itself_freezes() -> None:
    store = Store()
    a, b = store.fresh(2), store.fresh(2)
    store.unify(a, store.product([a, b]), WHY)
    solution = store.solve()
    assert row(solution, int(a[0])) == frozenset()
    assert "depends on itself" in store.cause(int(a[0])).reason


def test_a_term_that_is_itself_times_what_stays_is_left_free() -> None:
    store = Store()
    a = store.fresh(2)
    store.unify(a, store.product([store.frozen(2), a]), WHY)
    assert store.solve().variables == 2


def test_a_term_frozen_in_one_pair_is_frozen_in_the_next_pair_too() -> None:
    store = Store()
    frozen, x, y = store.fresh(2)[:1], store.fresh(2)[:1], store.fresh(2)[:1]
    store.freeze(frozen, WHY)
    store.unify(np.concatenate([frozen, x]), np.concatenate([y, y]), WHY)
    assert store.is_frozen(np.concatenate([x, y])).all()


def test_a_single_index_cannot_shrink() -> None:
    assert not Store().fresh(1).any()


def test_repeated_indices_in_one_unification_all_join() -> None:
    store = Store()
    a, b = store.fresh(1 + 1), store.fresh(6)
    store.unify(np.array([a[0], a[0], a[1], a[1], a[0], a[1]]), b, WHY)
    assert store.solve().variables == 2


# -- a second, naive solver -------------------------------------------------------------------------------


class Naive:
    """First-order unification one term at a time, by rewriting all terms at every step."""

    def __init__(self, count: int) -> None:
        self.meaning: list[object] = list(range(count))
        self.frozen: set[int] = set()
        self.equations: list[tuple[object, object]] = []

    def resolve(self, term: object, seen: frozenset[int] = frozenset()) -> object:
        """A term down to variables: a number, a tuple or None for frozen; ValueError for a cycle."""
        if isinstance(term, tuple):
            return tuple(self.resolve(part, seen) for part in term)
        if term is None or term in self.frozen:
            return None
        assert isinstance(term, int)
        if self.meaning[term] == term:
            return term
        if term in seen:
            raise ValueError
        return self.resolve(self.meaning[term], seen | {term})

    def freeze(self, term: object) -> None:
        for variable in leaves(self.resolve(term)):
            self.frozen.add(variable)

    def unify(self, left: object, right: object) -> None:
        a, b = self.resolve(left), self.resolve(right)
        if a == b:
            return
        if a is None or b is None:
            self.freeze(b if a is None else a)
        elif isinstance(a, int):
            if a in leaves(b):
                raise ValueError("a cycle")
            self.meaning[a] = b
        elif isinstance(b, int):
            self.unify(right, left)
        else:
            assert isinstance(a, tuple)
            assert isinstance(b, tuple)
            for one, other in zip(a, b, strict=True):
                self.unify(one, other)


def leaves(term: object) -> set[int]:
    if isinstance(term, tuple):
        return set(itertools.chain.from_iterable(leaves(part) for part in term))
    return {term} if isinstance(term, int) else set()


VARIABLES = 8
variable = st.integers(0, VARIABLES - 1)
side = st.one_of(variable, st.tuples(variable, variable))
equations = st.lists(st.tuples(side, side), min_size=1, max_size=8)


def solved(pairs: list[tuple[object, object]], frozen: list[int]) -> list[frozenset[int]]:
    """What each variable needs, by our solver, in a form that does not depend on how variables are numbered."""
    store = Store()
    own = store.fresh(VARIABLES)

    def term(one: object) -> Terms:
        if isinstance(one, tuple):
            return store.product([own[[part]] for part in one])
        assert isinstance(one, int)
        return own[[one]]

    for number in frozen:
        store.freeze(own[[number]], WHY)
    for left, right in pairs:
        store.unify(term(left), term(right), WHY)
    solution = store.solve()
    return [row(solution, int(t)) for t in own]


def partition(rows: list[frozenset[int]]) -> set[frozenset[int]]:
    """Which variables of the test have the same, non-empty needs."""
    return {frozenset(i for i, r in enumerate(rows) if r == one) for one in rows if one}


@settings(max_examples=200)
@given(equations, st.lists(variable, max_size=2))
def test_what_stays_alive_satisfies_every_equation(pairs: list[tuple[object, object]], frozen: list[int]) -> None:
    rows = solved(pairs, frozen)

    def needs(one: object) -> frozenset[int]:
        return frozenset(itertools.chain.from_iterable(rows[v] for v in sorted(leaves(one))))

    for left, right in pairs:
        assert needs(left) == needs(right)
    for number in frozen:
        assert not rows[number]


@settings(max_examples=200)
@given(equations, st.lists(variable, max_size=2))
def test_a_naive_solver_finds_the_same_where_there_is_no_cycle(
    pairs: list[tuple[object, object]], frozen: list[int]
) -> None:
    naive = Naive(VARIABLES)
    naive.frozen.update(frozen)
    try:
        for left, right in pairs * 3:  # later knowledge reaches earlier equations
            naive.unify(left, right)
        wanted = [frozenset(leaves(naive.resolve(v))) for v in range(VARIABLES)]
    except (ValueError, RecursionError):
        return
    ours = solved(pairs, frozen)
    # Ours may freeze more (that is sound), but never tells apart what must be equal.
    for one, other in itertools.combinations(range(VARIABLES), 2):
        if wanted[one] == wanted[other]:
            assert ours[one] == ours[other]
        if not wanted[one]:
            assert not ours[one]
    if all(wanted):
        assert all(ours)
        assert partition(ours) == partition(wanted)


@settings(max_examples=100)
@given(st.lists(st.tuples(variable, variable), min_size=1, max_size=8), st.lists(variable, max_size=2), st.randoms())
def test_the_order_of_unifications_does_not_matter(
    pairs: list[tuple[object, object]], frozen: list[int], random: object
) -> None:
    mixed = [pair[::-1] if i % 2 else pair for i, pair in enumerate(pairs)]
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert partition(solved(pairs, frozen)) == partition(solved(mixed, frozen))


def test_axes_that_are_unified_have_the_variables_of_one() -> None:
    store = Store()
    axes = [store.fresh(1_000) for _ in range(6)]
    for left, right in itertools.pairwise(axes):
        store.unify(left, right, WHY)
    assert store.solve().variables == 1_000
