"""Budgets: what may stay of each cost, as a share of the original or as an amount."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import UsageError

METRICS = {
    "flops": "multiply-accumulates of one sample",
    "params": "parameters",
    "size": "bytes of weights",
    "memory": "bytes of activations at the peak, one sample",
    "latency": "milliseconds of one call",
}
"""What can be limited, in the order in which it is printed."""

_BYTES = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_COUNTS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_MILLISECONDS = {"US": 1e-3, "MS": 1.0, "S": 1e3}
_UNITS = {"size": _BYTES, "memory": _BYTES, "latency": _MILLISECONDS}
_EXAMPLES = {"size": "20MB", "memory": "20MB", "latency": "8ms", "flops": "1.6G"}
_ROUND_UP = 0.9995
"""From this share of a unit on, three digits are those of the unit itself."""
_NUMBER = re.compile(
    r"(?P<minus>-?)(?P<number>\d+\.?\d*|\.\d+)(?:e(?P<exponent>[+-]?\d+))?\s*(?P<unit>%|[a-z]*)", re.IGNORECASE
)


@dataclass(frozen=True)
class Target:
    """At most this much of one metric may stay: a share of the original, or an amount."""

    metric: str
    text: str
    share: float | None
    amount: float | None

    def limit(self, before: float) -> float:
        """The largest value allowed when the original has `before`."""
        if self.share is not None:
            return self.share * before
        assert self.amount is not None
        return self.amount


def parse(metric: str, value: str | float) -> Target:
    """Read a target: `0.4`, `40%`, `1.6G`, `20MB`; a leading minus states the cut (`-60%` leaves 40%)."""
    text = str(value).strip()
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise UsageError(f"--{metric} {text}: not a target. {_forms(metric)}")
    number = float(match["number"] + (f"e{match['exponent']}" if match["exponent"] else ""))
    unit = match["unit"].upper()
    if unit in ("", "%"):
        return Target(metric, text, _share(metric, text, number / 100 if unit else number, bool(match["minus"])), None)
    if match["minus"]:
        raise UsageError(f"--{metric} {text}: a cut is given as a share, for example -60%. {_forms(metric)}")
    units = _UNITS.get(metric, _COUNTS)
    if unit not in units:
        known = ", ".join(units).lower() if metric == "latency" else ", ".join(units)
        raise UsageError(f"--{metric} {text}: unknown unit {match['unit']!r}; known: {known}. {_forms(metric)}")
    if number == 0:
        raise UsageError(f"--{metric} {text}: nothing would be left. {_forms(metric)}")
    if math.isinf(number):
        raise UsageError(f"--{metric} {text}: not a finite amount. {_forms(metric)}")
    return Target(metric, text, None, number * units[unit])


def _share(metric: str, text: str, share: float, is_cut: bool) -> float:
    if share >= 1 and not text.rstrip().endswith("%"):
        amount = _plausible(metric, share)
        meant = f"{share:g}ms" if metric == "latency" else f"{share:g}%" if 1 < share < 100 else amount
        raise UsageError(f"--{metric} {text}: a share must be between 0 and 1. Did you mean {meant}? {_forms(metric)}")
    kept = round(1 - share, 15) if is_cut else share  # -70% leaves 0.3
    if not 0 < kept < 1:
        what = "everything would be removed" if kept <= 0 else "there would be nothing to remove"
        raise UsageError(f"--{metric} {text}: {what}. {_forms(metric)}")
    return kept


def _plausible(metric: str, number: float) -> str:
    """The amount that a bare number may have been meant for: as it is if it is large, else in millions."""
    if metric == "latency" or number < 1e3:
        return f"{number:g}M" if metric in ("flops", "params") else _EXAMPLES[metric]
    return amount(metric, number).replace(" ", "")


def _forms(metric: str) -> str:
    return f"Give the share that stays (0.4 or 40%), an amount ({_EXAMPLES.get(metric, '12M')}) or the cut (-60%)."


def amount(metric: str, value: float) -> str:
    """A quantity for people: `4.09 G`, `25.6 M`, `102 MB`, `8.25 ms`."""
    if metric == "latency":
        return f"{value:.3g} ms" if value < _ROUND_UP * 1e3 else f"{value / 1e3:.3g} s"
    steps = (
        (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
        if metric in ("size", "memory")
        else (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    )
    for unit, scale in steps:
        if value >= _ROUND_UP * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}{' B' if metric in ('size', 'memory') else ''}"


def describe(target: Target, before: float) -> str:
    """The target said both ways: `flops: 4.09 G → at most 1.64 G (keep 40%, cut 60%)`."""
    limit, metric = target.limit(before), target.metric
    if limit >= before:
        return f"{metric}: {amount(metric, before)}, within {amount(metric, limit)} as it is: nothing to remove"
    kept = 100 * limit / before
    spent = f"{amount(metric, before)} → at most {amount(metric, limit)}"
    digits = 3 if kept >= 1 else 6  # a cut of 99.99% is not all
    return f"{metric}: {spent} (keep {kept:.3g}%, cut {100 - kept:.{digits}g}%)"
