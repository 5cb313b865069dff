from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from slimc.exporters.paired import figures, median_interval, take_turns


def steady(seconds: float, noise: float, seed: int) -> Callable[[], list[float]]:
    generator = np.random.default_rng(seed)
    return lambda: [seconds * (1 + noise * generator.standard_normal())]


def test_the_interval_of_the_median_holds_it_nineteen_times_in_twenty() -> None:
    held = 0
    for seed in range(200):
        low, high = median_interval(np.random.default_rng(seed).normal(1.0, 0.1, 40), seed)
        held += low <= 1.0 <= high
    # 190 expected; 176 or fewer would happen by chance once in 20,000 times
    assert 176 < held < 200


def test_a_steady_ratio_ends_the_measurement_early() -> None:
    results = take_turns([steady(2.0, 0.001, 1), steady(1.0, 0.001, 2)], budget_seconds=60, precision=0.02)
    assert len(results) == 20
    assert np.median(figures(results)) == pytest.approx(2.0, rel=0.01)


def test_a_noisy_ratio_takes_more_rounds() -> None:
    results = take_turns([steady(2.0, 0.1, 1), steady(1.0, 0.1, 2)], budget_seconds=60, precision=0.02)
    low, high = median_interval(figures(results))
    assert len(results) > 20
    assert (high - low) / 2 <= 0.02 * 2.0


def test_the_budget_ends_what_never_becomes_precise() -> None:
    ticks = itertools.count()
    results = take_turns([steady(1.0, 0.5, 1)], budget_seconds=30, precision=0.0, clock=lambda: float(next(ticks)))
    assert len(results) == 30


@pytest.mark.parametrize(("seconds", "rounds"), [(2.0, 6), (7.0, 5), (40.0, 1)])
def test_two_slow_files_get_the_pairs_of_an_interval_within_three_times_the_budget(seconds: float, rounds: int) -> None:
    now = [0.0]

    def run() -> list[float]:
        now[0] += seconds / 2
        return [seconds / 2]

    results = take_turns([run, run], budget_seconds=10, precision=0.0, clock=lambda: now[0])
    assert len(results) == rounds


def test_noise_that_both_files_share_cancels() -> None:
    load = np.random.default_rng(0).uniform(1, 5, 1000)
    before, after = (iter(load * seconds) for seconds in (3.0, 2.0))
    results = take_turns(
        [lambda: [float(next(before))], lambda: [float(next(after))]], budget_seconds=60, precision=0.02
    )
    assert len(results) == 20
    np.testing.assert_allclose(figures(results), 1.5)


def test_the_order_within_a_round_is_random() -> None:
    calls: list[str] = []

    def called(name: str) -> list[float]:
        calls.append(name)
        return [1.0 + len(calls) % 7]

    ticks = itertools.count()
    take_turns(
        [lambda: called("A"), lambda: called("B")],
        budget_seconds=100,
        precision=0.0,
        clock=lambda: float(next(ticks)),
    )
    rounds = ["".join(calls[start : start + 2]) for start in range(0, len(calls), 2)]
    assert set(rounds) == {"AB", "BA"}
    assert 30 < rounds.count("AB") < 70
