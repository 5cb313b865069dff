"""Numbers as people read them."""

from __future__ import annotations

_DECIMAL = ("", "k", "M", "G", "T", "P")


def amount(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 4089184256 is '4.09 G'; a unit follows where one is given."""
    scaled, prefix = float(value), 0
    while abs(scaled) >= 999.5 and prefix < len(_DECIMAL) - 1:
        scaled, prefix = scaled / 1000, prefix + 1
    return f"{three_digits(scaled)} {_DECIMAL[prefix]}{unit}".rstrip()


def three_digits(value: float) -> str:
    """At most three significant digits, without an exponent: 4.09, 40.9, 409."""
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"


def percent(share: float) -> str:
    """A share as a percentage: 0.3999 is '39.99%', 0.4 is '40%'."""
    return f"{share * 100:.2f}".rstrip("0").rstrip(".") + "%"


def milliseconds(value: float) -> str:
    """A latency, with as many digits as a measurement deserves."""
    return f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def target_value(name: str, value: float) -> str:
    """The value of a target in its own unit; `--flops` counts multiply-accumulates."""
    if name == "latency":
        return milliseconds(value)
    return amount(value, {"flops": "MACs", "size": "B", "memory": "B"}.get(name, ""))


def metric(value: float, name: str) -> str:
    """An accuracy is a share and shown as a percentage; any other metric is shown as it is."""
    return f"{value * 100:.2f}%" if name.startswith(("top", "acc")) else f"{value:.4g}"


def provider(name: str) -> str:
    """The part of an ONNX Runtime provider's name that tells: 'CPU' for 'CPUExecutionProvider'."""
    return name.removesuffix("ExecutionProvider")


def recovery(method: str, detail: str, before: float | None, after: float | None, kept: bool) -> str:
    """A recovery step by its name, and what it did."""
    return f"{method}{':' if kept else ''} {recovered(detail, before, after, kept)}"


def recovered(detail: str, before: float | None, after: float | None, kept: bool) -> str:
    """What a recovery step did, and by how much it brought the outputs nearer to the original's."""
    if before is None or after is None or (kept and after == before):  # it did nothing, and says why
        return detail
    if not kept:
        nearer = "brought the outputs nearer to the original's but the choice of class further from it"
        moved = nearer if after <= before else "moved the outputs away from the original's"
        return f"undone, since it {moved} ({before:.2g} → {after:.2g})"
    return f"{detail}; distance of the outputs from the original's {before:.2g} → {after:.2g}"
