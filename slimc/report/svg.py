"""The few pictures of the report page, as inline SVG.

Widths are percentages and there is no viewBox: the pictures follow the width of the page while their text keeps its
size, so that they stay readable on a phone. Colours come from the page's style sheet, by class.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from slimc.report.model import GroupRow, Latency

COLUMNS_PER_STRIP = 50
STRIP_HEIGHT = 96


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
