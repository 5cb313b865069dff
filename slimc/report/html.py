"""The report as one page: no network, no script, everything it shows is in the file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined

from slimc.report import format as text
from slimc.report import svg
from slimc.report.model import FrozenOperator, Latency, Report

ROWS_AT_MOST = 30  # beyond this, one row per group is longer than a screen and the groups become columns


@dataclass(frozen=True)
class Headline:
    """One box at the top of the page: the fact, and in small print what it rests on."""

    title: str
    value: str
    note: str
    tone: str  # good, bad or plain


@dataclass(frozen=True)
class CostRow:
    """One before/after bar."""

    name: str
    before: str
    after: str
    share: float
    note: str = ""


@dataclass(frozen=True)
class FrozenRow:
    """Frozen operators of one kind, frozen for one reason."""

    op: str
    reason: str
    places: tuple[str, ...]


def render_html(report: Report) -> str:
    """The page for `report`; text that comes from the model (layer names, paths) is escaped."""
    folder = resources.files("slimc.report")
    sources = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.html", "style.css")}
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        amount=text.amount, percent=text.percent, ms=text.milliseconds, secs=text.seconds, metric=text.metric
    )
    timed = {name: value for name, value in report.seconds.items() if value is not None}
    total = sum(timed.values())
    return environment.get_template("report.html").render(
        report=report,
        headlines=headlines(report),
        costs=costs(report),
        frozen=frozen_rows(report.frozen),
        timed=timed,
        not_run=[name for name, value in report.seconds.items() if value is None],
        total=total,
        stage_shares=[(name, value / total) for name, value in timed.items()] if total else [],
        widest=max((group.width for group in report.groups), default=1) or 1,
        show_rows=len(report.groups) <= ROWS_AT_MOST,
        latency_scale=svg.interval_scale(report.latency or ()),
        svg=svg,
        text=text,
        verdict=verdict,
        efficiency=efficiency,
    )


def write_html(report: Report, path: Path) -> None:
    """Write report.html."""
    path.write_text(render_html(report), "utf-8", "replace")


def verdict(row: Latency) -> str:
    """What may be said of a measurement: a speed-up whose interval is not clear of 1 is not claimed."""
    return "faster" if row.is_faster else "slower" if row.is_slower else "no difference shown"


def efficiency(report: Report, row: Latency) -> str:
    """How much of the cut in MACs became speed: measured speed-up over MACs before/after; none, none stated."""
    if not row.is_faster:
        return "–"
    return f"{row.speedup * report.macs.share:.0%}"


def headlines(report: Report) -> list[Headline]:
    """The boxes at the top: speed, targets, proof, accuracy."""
    return [_speed_headline(report), *_target_headlines(report), _proof_headline(report), _accuracy_headline(report)]


def _speed_headline(report: Report) -> Headline:
    title = "Measured speed"
    if not report.latency:
        note = report.latency_skipped[0] if report.latency_skipped else "no latency stage in this run"
        return Headline(title, "not measured", note, "plain")
    row = report.latency[0]
    low, high = row.ci95
    threads = f"{row.threads} thread" + ("s" if row.threads > 1 else "")
    place = f"{row.runtime} {text.provider(row.provider)}, batch {row.batch}, {threads}"
    span = f"{row.speedup:.2f}× (95% interval {low:.2f} to {high:.2f})"
    if row.is_faster:
        note = f"95% interval {low:.2f} to {high:.2f}; {place}"
        return Headline(title, f"{row.speedup:.2f}× faster", note, "good")
    if row.is_slower:
        return Headline(title, f"slower: {row.speedup:.2f}×", f"95% interval {low:.2f} to {high:.2f}; {place}", "bad")
    return Headline(title, "no speed-up shown", f"{span} is not clear of 1; {place}", "plain")


def _target_headlines(report: Report) -> list[Headline]:
    boxes = []
    for name, target in report.targets.items():
        note = f"asked: at most {text.percent(target.asked)}; {text.target_value(name, target.before)} → "
        note += text.target_value(name, target.after)
        boxes.append(
            Headline(f"Target {name}", f"{text.percent(target.got)} left", note, "good" if target.met else "bad")
        )
    return boxes


def _proof_headline(report: Report) -> Headline:
    proof = report.verification
    if proof is None:
        return Headline("Proof", "not verified", "the verification stage did not run", "bad")
    note = f"largest relative error {proof.max_relative_error:.1e} in {proof.dtype} on {proof.inputs} inputs"
    if proof.moved is not None:
        note += f"; the cut moved the output by {proof.moved:.2g}"
    if not proof.passed:
        return Headline("Proof", "failed", note, "bad")
    return Headline("Proof", "verified", f"removal equals masking: {note}", "good")


def _accuracy_headline(report: Report) -> Headline:
    accuracy, seen = report.accuracy, report.calibration
    if accuracy is None and seen is not None and seen.agreement is not None:
        note = f"same largest output on {seen.judged} samples set aside (fitted: {seen.source}); no labels were used"
        return Headline("Agreement with the original", text.percent(round(seen.agreement, 3)), note, "plain")
    if accuracy is None:
        return Headline("Accuracy", "not measured", "no accuracy stage in this run", "plain")
    before, after = (text.metric(v, accuracy.metric) for v in (accuracy.before, accuracy.after))
    note = f"{accuracy.metric} on {accuracy.data} data; original {before}"
    if accuracy.pruned is not None:
        note += f", plain cut {text.metric(accuracy.pruned, accuracy.metric)}"
    return Headline("Accuracy", after, note, "plain")


def costs(report: Report) -> list[CostRow]:
    """The before/after bars; FLOPs are told apart from MACs since papers mix them up."""
    macs = report.macs
    flops = f"FLOPs, at 2 per MAC: {text.amount(2 * macs.before)} → {text.amount(2 * macs.after)}"
    rows = [
        CostRow("MACs", text.amount(macs.before), text.amount(macs.after), macs.share, flops),
        CostRow("Parameters", text.amount(report.params.before), text.amount(report.params.after), report.params.share),
        CostRow("Weights", *_bytes(report.size.before, report.size.after), report.size.share),
    ]
    if report.memory is not None:
        memory = report.memory
        rows.append(CostRow("Peak activations", *_bytes(memory.before, memory.after), memory.share))
    return rows


def _bytes(before: int, after: int) -> tuple[str, str]:
    return text.amount(before, "B"), text.amount(after, "B")


def frozen_rows(frozen: tuple[FrozenOperator, ...]) -> list[FrozenRow]:
    """Frozen operators counted by kind and reason, the most frequent first."""
    counted = Counter((item.op, item.reason) for item in frozen)
    return [
        FrozenRow(op, reason, tuple(i.module or i.node for i in frozen if (i.op, i.reason) == (op, reason)))
        for (op, reason), _ in counted.most_common()
    ]
