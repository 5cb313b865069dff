"""Every zoo model has exactly the groups that were worked out by hand, and meets every law."""

from __future__ import annotations

import functools

import pytest
from laws import check_laws, signatures
from torch import nn
from zoo import CASES, Case

from slimc.analysis import Analysis, analyse


@functools.cache
def analysed(name: str) -> tuple[Analysis, Case, nn.Module]:
    model, inputs = CASES[name].build()
    return analyse(model, inputs), CASES[name], model


@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_worked_out_by_hand(name: str) -> None:
    analysis, case, model = analysed(name)
    assert signatures(analysis.grouping) == case.expected(model)


@pytest.mark.parametrize("name", CASES)
def test_every_law_holds_for_a_random_cut(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build()
    # A class with sizes in its forward may still run by luck, when the cut leaves those sizes alone.
    check_laws(model, inputs, seed=1, eager_result=case.own_class or None, inferred_again=case.inferred_again)


@pytest.mark.parametrize("name", ["Chain", "Grouped", "FusedAttention", "DenseConcat"])
def test_every_law_holds_when_each_group_is_cut_to_its_floor(name: str) -> None:
    model, inputs = CASES[name].build()
    check_laws(model, inputs, fraction=1.0)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_alone_is_named(name: str) -> None:
    analysis, case, _ = analysed(name)
    assert {cause.op for cause in analysis.frozen} >= set(case.frozen_by)
    assert all(cause.reason for cause in analysis.frozen)


def test_an_operator_without_a_rule_is_counted_and_named_with_its_place() -> None:
    analysis, _, _ = analysed("UnknownOperator")
    (cause,) = analysis.types.unknown
    assert (cause.node, cause.op, cause.kind) == ("mystery", "slimc_zoo.mystery.default", "unknown")
