from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import slimc
from slimc import scores
from slimc.analysis import Analysis
from slimc.errors import InternalError, UsageError
from slimc.scores import Scores, Subject, normalise


class Net(nn.Module):
    """`inner` is one group; `outer` is the group of the shortcut: stem, second, and what reads their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1, bias=False)
        self.first = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 2, 1)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.second(torch.relu(self.norm(self.first(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def fill(parameter: Tensor | None, values: Sequence[object]) -> None:
    assert parameter is not None
    with torch.no_grad():
        parameter.copy_(torch.tensor(values, dtype=torch.float32).view(parameter.shape))


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    net = Net().eval()
    fill(net.stem.weight, [3, -1])
    fill(net.first.weight, [[1, -1], [2, 0], [0, 0.5]])  # [inner, outer]
    fill(net.first.bias, [1, -2, 0])
    fill(net.norm.weight, [1, 1, 2])
    fill(net.norm.bias, [0, 0.5, 0])
    fill(net.norm.running_mean, [100, 200, 300])  # buffers say nothing of a channel's weight
    fill(net.second.weight, [[1, 0, -3], [2, 0, 0]])  # [outer, inner]
    fill(net.second.bias, [-1, 1])
    fill(net.head.weight, [[5, -4]])
    return slimc.inspect(net, torch.randn(2, 1, 4, 4))


def by_name(analysis: Analysis, found: list[Scores]) -> dict[str, list[float]]:
    return {g.name: own.tolist() for g, own in zip(analysis.groups, found, strict=True)}


def score(analysis: Analysis, name: str, norm: str = "l1", seed: int = 0) -> list[Scores]:
    return scores.find(name).score(Subject(analysis.types, analysis.grouping, norm, seed))


def test_magnitude_l1_sums_over_all_members_of_a_group(analysis: Analysis) -> None:
    found = by_name(analysis, score(analysis, "magnitude"))
    assert found == {
        # stem row + second row + second bias + first column + head column
        "stem.weight": pytest.approx([3 + (1 + 3) + 1 + (1 + 2) + 5, 1 + 2 + 1 + (1 + 0.5) + 4]),
        # first row + first bias + norm weight + norm bias + second column
        "first.weight": pytest.approx([2 + 1 + 1 + 0 + 3, 2 + 2 + 1 + 0.5 + 0, 0.5 + 0 + 2 + 0 + 3]),
    }


def test_magnitude_l2_is_the_root_of_the_sum_of_squares(analysis: Analysis) -> None:
    found = by_name(analysis, score(analysis, "magnitude", "l2"))
    assert found == {
        "stem.weight": pytest.approx(np.sqrt([9 + (1 + 9) + 1 + (1 + 4) + 25, 1 + 4 + 1 + (1 + 0.25) + 16])),
        "first.weight": pytest.approx(np.sqrt([2 + 1 + 1 + 0 + (1 + 4), 4 + 4 + 1 + 0.25 + 0, 0.25 + 0 + 4 + 0 + 9])),
    }


def test_what_goes_twice_counts_twice() -> None:
    # Each channel of the flattened map takes 4 columns of the head with it.
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 1, bias=False)).eval()
    fill(net.get_parameter("0.weight"), [1, 2])
    fill(net.get_parameter("2.weight"), [1, 2, 3, 4, 0, 0, 0, 1])
    found = score(slimc.inspect(net, torch.randn(2, 1, 2, 2)), "magnitude")
    assert [own.tolist() for own in found] == [[1 + 10, 2 + 1]]


def test_random_scores_follow_the_seed_alone(analysis: Analysis) -> None:
    np.random.seed(0)
    first = score(analysis, "random", seed=1)
    np.random.seed(1)
    again, other = score(analysis, "random", seed=1), score(analysis, "random", seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(len(set(own.tolist())) == len(own) and (own > 0).all() for own in first)


# tests/test_scorers.py has those that look at data, or say nothing of some groups.
@pytest.mark.parametrize("name", ["fpgm", "fpgm-sum", "magnitude", "random"])
def test_every_scorer_gives_each_channel_one_finite_number_and_changes_nothing(analysis: Analysis, name: str) -> None:
    before = {n: t.clone() for n, t in analysis.model.state_dict().items()}
    found = score(analysis, name)
    assert [own.shape for own in found] == [(g.width,) for g in analysis.groups]
    assert all(np.isfinite(own).all() for own in found)
    assert all(torch.equal(t, before[n]) for n, t in analysis.model.state_dict().items())


def test_every_scorer_says_what_it_does_and_where_it_is_from() -> None:
    known = scores.methods()
    assert {"magnitude", "random"} <= known.keys()
    assert all(method.name == name and method.summary and method.source for name, method in known.items())


def test_an_unknown_scorer_or_norm_is_refused_with_the_known_ones(analysis: Analysis) -> None:
    with pytest.raises(UsageError, match=r"no scorer 'magnitud'; known: .*magnitude"):
        scores.find("magnitud")
    with pytest.raises(UsageError, match=r"--norm l3: known norms are l1 and l2"):
        score(analysis, "magnitude", "l3")


def test_registering_a_name_twice_is_an_error() -> None:
    with pytest.raises(InternalError, match="two scorers are called 'magnitude'"):
        scores.scorer("magnitude", "", "")(lambda _: [])


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), max_size=4), st.floats(0.001, 1000))
def test_normalised_scores_do_not_depend_on_a_groups_scale(groups: list[list[int]], scale: float) -> None:
    plain = normalise([np.array(own) for own in groups])
    scaled = normalise([scale * np.array(own) for own in groups])
    for own, again, raw in zip(plain, scaled, groups, strict=True):
        assert own.mean() == pytest.approx(1.0)
        np.testing.assert_allclose(own, again, rtol=1e-9)
        assert np.array_equal(np.argsort(own, kind="stable"), np.argsort(raw, kind="stable"))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("axes", [[0], [1], [0, 1], [0, 2]])
def test_power_sums_taken_in_blocks_are_those_of_the_whole_tensor(
    order: int, axes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimc.scorers import magnitude

    monkeypatch.setattr(magnitude, "_BLOCK", 31)  # two rows at a time, the last one alone
    tensor = torch.randn(5, 4, 3)
    found = magnitude._power_sums(tensor, axes, order)
    assert list(found) == axes
    for axis, own in found.items():
        whole = tensor.abs().double().pow(order).sum([other for other in range(3) if other != axis])
        assert torch.allclose(torch.from_numpy(own), whole)
