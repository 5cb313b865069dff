"""Channel types as text, small enough to be reviewed by eye: the goldens of the tests."""

from __future__ import annotations

from .groups import Axis, Grouping
from .infer import Types, tensors_of
from .terms import Terms


def dump(types: Types, grouping: Grouping) -> str:
    """Every group, tensor and value with the size polynomial of each axis, for example [N, g3, 14, 14]."""
    lines = []
    for group in grouping.groups:
        kind = "exact" if group.exact else "renormalising"
        places = ", ".join(f"{m.tensor}:{m.axis}" + (f"*{m.each}" if m.each > 1 else "") for m in group.members)
        lines.append(f"g{group.number} = {group.width} {kind} at least {group.floor}: {places}")
    lines.append("")
    lines.extend(f"{name} {_axes(grouping, axes)}" for name, axes in types.tensors.items())
    lines.append("")
    for node, value in types.values.items():
        if node.op in ("call_function", "placeholder") and (tensors := tensors_of(value)):
            lines.append(f"{node.name} {' '.join(_axes(grouping, axes) for axes in tensors)}")
    lines.extend(f"frozen by {cause.op} at {cause.node}: {cause.reason}" for cause in types.unknown)
    return "\n".join(lines) + "\n"


def _axes(grouping: Grouping, axes: tuple[Terms, ...]) -> str:
    return "[" + ", ".join(_size(grouping.size(axis)) for axis in axes) + "]"


def _size(axis: Axis) -> str:
    constants = sum(count for count, names in axis.terms if not names)
    parts = [
        "*".join([*([str(count)] if count > 1 else []), *(f"g{name}" for name in names)])
        for count, names in axis.terms
        if names
    ]
    return " + ".join([*([str(constants)] if constants or not parts else []), *parts])
