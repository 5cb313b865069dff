"""The dependency graph for people and tools: which group shrinks which tensor."""

from __future__ import annotations

import networkx

from .groups import Grouping
from .infer import Types


def to_networkx(types: Types, grouping: Grouping) -> networkx.Graph:
    """A bipartite graph. Nodes: ("group", name) and ("tensor", name); edges carry `axis` and `each`.

    An edge says that one channel of the group removes `each` indices of that axis of the tensor; a tensor may
    have two edges to one group, hence a multigraph.
    """
    view = networkx.MultiGraph()
    for name, axes in types.tensors.items():
        view.add_node(("tensor", name), kind="tensor", shape=tuple(len(axis) for axis in axes))
    for group in grouping.groups:
        view.add_node(("group", group.name), kind="group", width=group.width, exact=group.exact)
        for member in group.members:
            view.add_edge(("group", group.name), ("tensor", member.tensor), axis=member.axis, each=member.each)
    return view


def to_dot(view: networkx.Graph) -> str:
    """The same as text for Graphviz."""
    lines = ["graph slimc {", "  rankdir=LR;", "  node [fontname=sans, fontsize=10];"]
    for node, data in view.nodes(data=True):
        kind, name = node
        if kind == "group":
            style = "solid" if data["exact"] else "dashed"
            lines.append(f"  {_quote(node)} [shape=box, style={style}, label={_text(name, data['width'])}];")
        else:
            lines.append(f"  {_quote(node)} [shape=plain, label={_text(name, list(data['shape']))}];")
    for one, other, data in view.edges(data=True):
        lines.append(f'  {_quote(one)} -- {_quote(other)} [label="{data["axis"]}"];')
    return "\n".join([*lines, "}"]) + "\n"


def _quote(node: tuple[str, str]) -> str:
    return '"' + ":".join(node).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _text(name: str, size: object) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}\\n{size}"'
