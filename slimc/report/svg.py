"""The few pictures of the report page, as inline SVG.

Widths are percentages and there is no viewBox: the pictures follow the width of the page while their text keeps its
size, so that they stay readable on a phone. Colours come from the page's style sheet, by class.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup

from slimc.report.format import metric
from slimc.report.model import GroupRow, Latency, Training

COLUMNS_PER_STRIP = 50
STRIP_HEIGHT = 96
TRAJECTORY_HEIGHT = 190


def bar(share: float) -> Markup:
    """The part that stayed, on a track that is the original."""
    stayed = min(max(share, 0.0), 1.0) * 100
    return Markup(
        '<svg class="bar" width="100%" height="14" aria-hidden="true">'
        '<rect class="track" width="100%" height="14" rx="3"/>'
        f'<rect class="kept" width="{stayed:.2f}%" height="14" rx="3"/></svg>'
    )


def width_bar(group: GroupRow, widest: int) -> Markup:
    """One group as a row: the length of the track is its width, of the filled part what is kept."""
    width, kept = group.width / widest * 100, group.kept / widest * 100
    return Markup(
        '<svg class="bar" width="100%" height="14" role="img" aria-label="{label}">'
        '<rect class="track" width="{width}%" height="14" rx="2"/>'
        '<rect class="kept" width="{kept}%" height="14" rx="2"/></svg>'
    ).format(label=f"{group.kept} of {group.width} kept", width=f"{width:.2f}", kept=f"{kept:.2f}")


def width_strips(groups: Sequence[GroupRow]) -> list[Markup]:
    """Many groups as columns in network order, `COLUMNS_PER_STRIP` to a strip, all strips on one scale."""
    widest = max((group.width for group in groups), default=1)
    starts = range(0, len(groups), COLUMNS_PER_STRIP)
    return [_strip(groups[start : start + COLUMNS_PER_STRIP], start, widest) for start in starts]


def _strip(groups: Sequence[GroupRow], start: int, widest: int) -> Markup:
    # A strip is as high as its own widest group: early layers are narrow and would leave most of it empty.
    floor = max(group.width for group in groups) / widest * STRIP_HEIGHT + 2
    slot = 100 / COLUMNS_PER_STRIP
    axis = Markup('<line class="axis" x1="0" x2="{x}%" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts = [axis.format(x=len(groups) * slot, y=floor)]
    for offset, group in enumerate(groups):
        number = start + offset + 1
        parts.append(Markup("<g><title>{}</title>").format(f"{number}. {group.name}: {group.kept} of {group.width}"))
        for name, channels in (("track", group.width), ("kept", group.kept)):
            height = channels / widest * STRIP_HEIGHT
            parts.append(
                Markup('<rect class="{}" x="{:.2f}%" y="{:.2f}" width="{:.2f}%" height="{:.2f}"/>').format(
                    name, (offset + 0.1) * slot, floor - height, slot * 0.8, height
                )
            )
        parts.append(Markup("</g>"))
        if offset % 10 == 0:
            parts.append(Markup('<text x="{:.2f}%" y="{:.1f}">{}</text>').format(offset * slot, floor + 13, number))
    head = Markup('<svg class="strip" width="100%" height="{:.0f}" role="img" aria-label="{}">').format(
        floor + 18, f"widths of groups {start + 1} to {start + len(groups)}"
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def interval(row: Latency, low: float, high: float) -> Markup:
    """A speed-up and its interval on the scale from `low` to `high`, with a line at 1 (no change)."""

    def place(value: float) -> str:
        return f"{(value - low) / (high - low) * 100:.2f}%"

    verdict = "faster" if row.is_faster else "slower" if row.is_slower else "unclear"
    label = f"speed-up {row.speedup:.2f}, interval {row.ci95[0]:.2f} to {row.ci95[1]:.2f}"
    return Markup(
        '<svg class="interval {verdict}" width="100%" height="18" role="img" aria-label="{label}">'
        '<line class="one" x1="{one}" x2="{one}" y1="0" y2="18"/>'
        '<line class="whisker" x1="{start}" x2="{end}" y1="9" y2="9"/>'
        '<circle cx="{centre}" cy="9" r="4"/></svg>'
    ).format(
        verdict=verdict,
        label=label,
        one=place(1.0),
        start=place(row.ci95[0]),
        end=place(row.ci95[1]),
        centre=place(row.speedup),
    )


def interval_scale(rows: Sequence[Latency]) -> tuple[float, float]:
    """A scale that holds every interval and the line at 1, with some room on both sides."""
    low = min([1.0, *(row.ci95[0] for row in rows)])
    high = max([1.0, *(row.ci95[1] for row in rows)])
    room = max(high - low, 0.1) * 0.08
    return low - room, high + room


def trajectory(training: Training) -> Markup:
    """FLOPs left, falling to the right, against accuracy: a dot for every phase that was measured, in order.

    The original's accuracy is a dotted line.
    """
    before = training.before
    seen = [(point, point.accuracy) for point in training.points if point.accuracy is not None]
    values = [accuracy for _, accuracy in seen] + ([] if before is None else [before])
    low, high = min(values), max(values)
    room = max(high - low, 0.01) * 0.1
    low, high, least = low - room, high + room, min(point.flops for point, _ in seen)

    def x(flops: float) -> str:
        return f"{8 + 88 * (1 - flops) / max(1 - least, 1e-9):.2f}%"

    def y(accuracy: float) -> str:
        return f"{8 + (TRAJECTORY_HEIGHT - 16) * (high - accuracy) / (high - low):.1f}"

    label = Markup('<text x="0" y="{}">{}</text>')
    parts = [label.format(y(value), metric(value, training.metric)) for value in (low + room, high - room)]
    if before is not None:
        line = '<line class="one" x1="8%" x2="96%" y1="{y}" y2="{y}"/>'
        parts.append(Markup(line).format(y=y(before)))
    for (start, first), (end, second) in pairwise(seen):
        line = '<line class="whisker" x1="{}" y1="{}" x2="{}" y2="{}"/>'
        parts.append(Markup(line).format(x(start.flops), y(first), x(end.flops), y(second)))
    for point, accuracy in seen:
        shown = metric(accuracy, training.metric)
        told = f"{point.phase}: {100 * point.flops:.1f}% of the FLOPs, {shown}, {point.epochs:.3g} epochs"
        kind = "last" if point is seen[-1][0] else "tuned" if point.phase == "finetune" else "phase"
        dot = '<circle class="{}" cx="{}" cy="{}" r="4"><title>{}</title></circle>'
        parts.append(Markup(dot).format(kind, x(point.flops), y(accuracy), told))
    bottom = TRAJECTORY_HEIGHT + 12
    for flops, anchor in ((1.0, "start"), (least, "end")):
        text = '<text x="{}" y="{}" text-anchor="{}">{:.0f}% of the FLOPs</text>'
        parts.append(Markup(text).format(x(flops), bottom, anchor, 100 * flops))
    head = '<svg class="trajectory" width="100%" height="{}" role="img" aria-label="FLOPs left against accuracy">'
    return Markup(head).format(bottom + 6) + Markup("").join(parts) + Markup("</svg>")


def stages(shares: Sequence[tuple[str, float]]) -> Markup:
    """Stage times as one bar; `shares` are (stage, share of the total)."""
    parts, x = [], 0.0
    for index, (name, share) in enumerate(shares):
        parts.append(
            Markup('<rect class="stage{}" x="{}%" width="{}%" height="14"><title>{}</title></rect>').format(
                index % 2, f"{x * 100:.2f}", f"{share * 100:.2f}", f"{name}: {share:.0%}"
            )
        )
        x += share
    return (
        Markup('<svg class="bar" width="100%" height="14" aria-hidden="true">')
        + Markup("").join(parts)
        + Markup("</svg>")
    )
