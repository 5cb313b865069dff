from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc import recover, scores
from slimc.analysis import Analysis
from slimc.inspection import methods, prunable_params, summary
from slimc.plan import Plan
from slimc.training.schedule import schedules


class Net(nn.Module):
    """Two groups, and a sorted branch whose channels cannot be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.sorted = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        out: Tensor = self.head(self.sorted(x).mean((2, 3)).sort(dim=1).values)
        return out


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return slimc.inspect(Net().eval(), X)


def test_a_summary_is_json_and_adds_up(analysis: Analysis) -> None:
    data = json.loads(json.dumps(summary(analysis, "net")))
    assert data["params"] == analysis.params == sum(p.numel() for p in Net().parameters())
    assert data["macs"] == analysis.macs == 64 * (3 * 8 * 9 + 8 * 6 * 9 + 6 * 5) + 5 * 2
    assert data["model"] == "net"
    assert data["dynamic_batch"] is True
    assert data["batch_note"] is None
    assert [g["width"] for g in data["groups"]] == [8, 6]
    assert data["prunable_params"] == prunable_params(analysis) <= data["params"]


def test_a_group_governs_what_goes_when_one_of_its_channels_is_left(analysis: Analysis) -> None:
    net, found = Net().eval(), summary(analysis, "net")["groups"]
    for number, group in enumerate(found):
        kept: dict[str, dict[int, list[int]]] = {}
        for tensor, axis, each in group["members"]:
            assert each == 1
            kept.setdefault(tensor, {})[axis] = [0]
        left = slimc.apply(net, Plan(kept, {}), X)
        assert group["governs_params"] == analysis.params - left.report.params.after
        assert group["governs_macs"] == analysis.macs - left.report.macs.after
        assert group["width"] == analysis.groups[number].width


def test_what_is_frozen_is_named_with_place_and_reason(analysis: Analysis) -> None:
    frozen = summary(analysis, "net")["frozen"]
    assert any("sort" in row["op"] and row["node"] and row["reason"] for row in frozen)
    assert not any(member[0] == "head.weight" for g in summary(analysis, "net")["groups"] for member in g["members"])


def test_nothing_is_frozen_in_a_plain_network() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = summary(slimc.inspect(net, torch.randn(2, 4)), "mlp")
    assert data["frozen"] == []
    assert data["prunable_params"] == 4 * 8 + 8 + 8 * 2  # all but the bias of the outputs


def test_a_model_without_groups_can_be_inspected() -> None:
    data = summary(slimc.inspect(nn.Linear(4, 2), torch.randn(2, 4)), "linear")
    assert data["groups"] == []
    assert data["prunable_params"] == 0


def test_the_dependency_graph_links_groups_to_the_tensors_they_shrink(analysis: Analysis) -> None:
    view: Any = analysis.to_networkx()
    pairs = [(*sorted(ends), data["axis"]) for *ends, data in view.edges(data=True)]
    edges = {(group[1], tensor[1], axis) for group, tensor, axis in pairs}
    assert edges == {(g.name, m.tensor, m.axis) for g in analysis.groups for m in g.members}
    assert {name for kind, name in view.nodes if kind == "tensor"} == set(dict(Net().named_parameters()))


def test_the_methods_listed_are_those_that_can_be_named() -> None:
    listed = {(row["kind"], row["name"]) for row in methods()}
    assert {name for kind, name in listed if kind == "scorer"} == set(scores.methods())
    assert {name for kind, name in listed if kind == "recovery"} == {*recover.steps(), "finetune"}
    assert {name for kind, name in listed if kind == "schedule"} == set(schedules())
    assert all(row["summary"] and row["source"] for row in methods())
