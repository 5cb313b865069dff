"""The dependency graph shows every group, every tensor, and what shrinks what."""

from __future__ import annotations

import networkx
import pytest
from zoo import CASES

from slimc.analysis import analyse
from slimc.graph.view import to_dot


@pytest.mark.parametrize("name", ["Chain", "CalledTwice", "FusedAttention"])
def test_there_is_one_edge_for_every_axis_that_a_group_shrinks(name: str) -> None:
    analysis = analyse(*CASES[name].build())
    view = analysis.to_networkx()
    ends = [(*sorted(edge[:2]), edge[2]) for edge in view.edges(data=True)]  # "group" comes before "tensor"
    edges = sorted((g[1], t[1], d["axis"], d["each"]) for g, t, d in ends)
    assert edges == sorted((g.name, m.tensor, m.axis, m.each) for g in analysis.groups for m in g.members)


def test_layers_that_share_a_group_are_connected_and_others_are_not() -> None:
    view = analyse(*CASES["Residual"].build()).to_networkx()
    assert networkx.has_path(view, ("tensor", "stem.weight"), ("tensor", "fc.weight"))
    shortcut = set(view.neighbors(("group", "stem.weight")))
    assert {("tensor", "b.weight"), ("tensor", "bn.running_mean")} <= shortcut
    assert ("tensor", "bn.num_batches_tracked") not in shortcut


def test_nodes_carry_widths_and_shapes() -> None:
    view = analyse(*CASES["Chain"].build()).to_networkx()
    assert view.nodes["group", "a.weight"] == {"kind": "group", "width": 8, "exact": True}
    assert view.nodes["tensor", "a.weight"] == {"kind": "tensor", "shape": (8, 3, 3, 3)}


def test_the_dot_text_names_every_node_and_edge_once() -> None:
    view = analyse(*CASES["Residual"].build()).to_networkx()
    text = to_dot(view)
    assert text.count(" -- ") == view.number_of_edges()
    assert text.count("label=") == view.number_of_nodes() + view.number_of_edges()
    assert text.startswith("graph slimc {")
    assert text.endswith("}\n")


def test_the_dot_text_marks_groups_that_renormalise() -> None:
    assert "dashed" in to_dot(analyse(*CASES["GroupNorm"].build()).to_networkx())
