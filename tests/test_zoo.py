"""Every zoo model has exactly the groups that were worked out by hand, and meets every law."""

from __future__ import annotations

import pytest

from laws import check_laws, signatures
from slimc.analysis import analyse
from zoo import CASES


@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_worked_out_by_hand(name: str) -> None:
    model, inputs = CASES[name].build()
    assert signatures(analyse(model, inputs).grouping) == CASES[name].expected(model)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_every_law_holds_for_a_random_cut(name: str, seed: int) -> None:
    case = CASES[name]
    model, inputs = case.build()
    # A class with sizes in its forward may still run by luck, when the cut leaves those sizes alone.
    check_laws(model, inputs, seed=seed, eager_result=case.own_class or None, inferred_again=case.inferred_again)


@pytest.mark.parametrize("name", ["Chain", "Grouped", "FusedAttention", "DenseConcat"])
def test_every_law_holds_when_each_group_is_cut_to_its_floor(name: str) -> None:
    model, inputs = CASES[name].build()
    check_laws(model, inputs, fraction=1.0)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_alone_is_named(name: str) -> None:
    model, inputs = CASES[name].build()
    named = {cause.op for cause in analyse(model, inputs).frozen}
    assert named >= set(CASES[name].frozen_by)
    assert all(cause.reason for cause in analyse(model, inputs).frozen)


def test_an_operator_without_a_rule_is_counted_and_named_with_its_place() -> None:
    model, inputs = CASES["UnknownOperator"].build()
    (cause,) = analyse(model, inputs).types.unknown
    assert (cause.node, cause.op, cause.kind) == ("mystery", "slimc_zoo.mystery.default", "unknown")
