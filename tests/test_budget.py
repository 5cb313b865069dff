from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimc.budget import METRICS, amount, describe, parse
from slimc.errors import UsageError

BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
COUNTS = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("text", ["0.4", ".4", "40%", "40 %", " 0.4 ", "4e-1", "-60%", "-0.6", "-.6", "0.40"])
def test_a_share_that_stays_and_the_cut_that_leaves_it_are_the_same_target(metric: str, text: str) -> None:
    assert parse(metric, text).limit(1000) == pytest.approx(400, rel=1e-12)


def test_a_number_means_what_its_text_means() -> None:
    assert parse("flops", 0.4) == parse("flops", "0.4")
    assert parse("flops", -0.6).limit(10) == pytest.approx(4)
    assert parse("flops", 1e-5).limit(10**6) == pytest.approx(10)
    assert [parse("flops", text).share for text in ("-70%", "30%", "-0.93", "7%")] == [0.3, 0.3, 0.07, 0.07]


@given(st.floats(0.001, 0.999))
def test_every_share_is_read_back_as_it_was_written(share: float) -> None:
    assert parse("flops", share).limit(1.0) == share
    assert parse("flops", f"{100 * share!r}%").limit(1.0) == pytest.approx(share)
    assert parse("flops", f"-{100 * share!r}%").limit(1.0) == pytest.approx(1 - share)


@pytest.mark.parametrize("metric", ["flops", "params"])
@pytest.mark.parametrize("unit", COUNTS)
def test_an_amount_of_operations_or_parameters_has_a_decimal_unit(metric: str, unit: str) -> None:
    for text in (f"1.6{unit}", f"1.6 {unit.lower()}"):
        assert parse(metric, text).limit(math.nan) == pytest.approx(1.6 * COUNTS[unit])


@pytest.mark.parametrize("metric", ["size", "memory"])
@pytest.mark.parametrize("unit", BYTES)
def test_an_amount_of_bytes_has_a_decimal_or_a_binary_unit(metric: str, unit: str) -> None:
    for text in (f"20{unit}", f"20 {unit.lower()}"):
        assert parse(metric, text).limit(math.nan) == pytest.approx(20 * BYTES[unit])


@pytest.mark.parametrize(
    "text",
    ["0", "0%", "0.0", "-0", "1", "1.0", "-1", "100%", "-100%", "1.5", "150%", "-150%", "-0%", "40", "banana", "12Q",
     "-12M", "nan", "inf", "", "  ", "%", "-", "--40%", "40%%", "0x4", "4,5", "0M", "1e400", "NaN%", "1e400M", "٤"],
)  # fmt: skip
def test_what_is_no_target_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse("flops", text)
    message = str(refused.value)
    assert message.startswith(f"--flops {text.strip()}: ")
    assert "the share that stays (0.4 or 40%)" in message


@pytest.mark.parametrize(
    ("metric", "text", "meant"),
    [("flops", "1.5", "1.5%"), ("flops", "40", "40%"), ("params", "12.5", "12.5%"), ("params", "250", "250M"),
     ("size", "200", "20MB"), ("params", "5000", "5k"), ("flops", "1e9", "1G"), ("size", "20000", "20kB")],
)  # fmt: skip
def test_a_share_above_one_is_refused_with_what_was_probably_meant(metric: str, text: str, meant: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(metric, text)
    assert f"Did you mean {meant}?" in str(refused.value)


def test_what_is_suggested_is_accepted() -> None:
    cases = ("flops 1.5", "flops 40", "params 250", "memory 200", "params 5000", "size 123456", "memory 999999999")
    for metric, text in map(str.split, cases):
        with pytest.raises(UsageError) as refused:
            parse(metric, text)
        parse(metric, str(refused.value).partition("Did you mean ")[2].partition("?")[0])


@pytest.mark.parametrize(("text", "reason"), [("0", "everything"), ("-100%", "everything"), ("100%", "nothing to")])
def test_a_cut_of_all_or_of_nothing_is_refused_for_what_it_is(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse("flops", text)


def test_an_unknown_unit_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown unit 'Q'.*K, M, G, B, T"):
        parse("flops", "12Q")
    with pytest.raises(UsageError, match=r"unknown unit 'M'.*MB"):
        parse("size", "12M")
    with pytest.raises(UsageError, match="unknown unit 'MB'"):
        parse("params", "12MB")


def test_a_negative_amount_is_refused_since_a_cut_is_a_share() -> None:
    with pytest.raises(UsageError, match=r"a cut is given as a share"):
        parse("params", "-12M")


def test_a_target_is_said_as_what_stays_and_as_what_goes() -> None:
    # 40% of 4.09 G is 1.636 G
    line = "flops: 4.09 G → at most 1.64 G (keep 40%, cut 60%)"
    assert describe(parse("flops", "40%"), 4.09e9) == line
    assert describe(parse("flops", "-60%"), 4.09e9) == line
    assert describe(parse("size", "20MB"), 80e6) == "size: 80 MB → at most 20 MB (keep 25%, cut 75%)"


def test_an_amount_that_the_model_does_not_exceed_is_said_to_be_met() -> None:
    assert describe(parse("flops", "2G"), 1e9) == "flops: 1 G, within 2 G as it is: nothing to remove"
    assert describe(parse("flops", "2G"), 0) == "flops: 0, within 2 G as it is: nothing to remove"


@given(st.sampled_from(list(METRICS)), st.floats(1.0, 1e15))
def test_a_quantity_for_people_is_the_quantity_to_three_digits(metric: str, value: float) -> None:
    scales = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
    scales |= {"ms": 1.0, "s": 1e3}
    number, _, unit = amount(metric, value).partition(" ")
    assert float(number) * scales[unit] == pytest.approx(value, rel=5.1e-3)
    assert unit.endswith("B") == (metric in ("size", "memory"))
    assert unit.endswith("s") == (metric == "latency")


def test_a_deep_cut_is_not_said_to_be_all() -> None:
    assert "(keep 0.01%, cut 99.99%)" in describe(parse("flops", "0.0001"), 1e9)
