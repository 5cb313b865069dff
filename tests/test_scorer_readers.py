"""thinet, lasso and dcp: scores from the layers that read a group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring import build, pictures, run, score, subject_of
from torch import Tensor, nn

import slimc
from slimc.errors import UsageError
from slimc.graph.groups import Group
from slimc.readings import Reading, readings
from slimc.scorers.dcp import Part, pick
from slimc.scorers.lasso import leaving
from slimc.scorers.thinet import greedy


def gram(*columns: tuple[float, ...]) -> np.ndarray:
    matrix = np.array(columns, np.float64)
    return np.asarray(matrix @ matrix.T)


# -- readings -----------------------------------------------------------------------------------------


def readings_of(model: nn.Module, x: Tensor) -> tuple[list[Reading], tuple[Group, ...]]:
    analysis = slimc.inspect(model, x)
    return readings(subject_of(analysis, [x]), "thinet"), analysis.groups


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(6, 4, 3, dilation=2, padding="same", bias=False),
        nn.Conv2d(6, 4, (3, 1), padding=(0, 1), groups=2, bias=False),
    ],
)
def test_contributions_sum_to_the_layers_outputs(layer: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimc.readings.POSITIONS", 10**6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.ReLU(), nn.Conv2d(4, 2, 1)).double().eval()
    x = pictures(2)
    found, _ = readings_of(model, x)
    mine = [reading for reading in found if reading.parameter == "1.weight"]
    with torch.no_grad():
        wanted = model[:2](x)
    made = [torch.einsum("rck,ock->ro", r.rows, r.weight) for r in mine]
    torch.testing.assert_close(torch.cat(made, 1), wanted.movedim(1, -1).reshape(-1, 4))


def test_inner_products_of_contributions_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimc.readings._BLOCK", 100)  # several blocks
    found, groups = readings_of(build("densenet"), pictures(3))
    for reading in found:
        for group in groups:
            members = reading.members(group)
            product = reading.gram(group)
            if (members < 0).all():
                assert product is None
                continue
            each = torch.einsum("rck,ock->cro", reading.rows, reading.weight)
            own = torch.zeros(group.width, *each.shape[1:], dtype=torch.float64)
            for channel, place in enumerate(members):
                if place >= 0:
                    own[place] += each[channel]
            assert product is not None
            torch.testing.assert_close(product, own.flatten(1) @ own.flatten(1).T)


def test_positions_are_few_and_drawn_from_the_sample_itself() -> None:
    x = pictures(3)
    forwards, _ = readings_of(build("resnet"), x)
    backwards, _ = readings_of(build("resnet"), x.flip(0))
    assert forwards[0].rows.shape[0] == 3 * 10
    for one, other in zip(forwards, backwards, strict=True):
        each = len(one.rows) // 3
        torch.testing.assert_close(one.rows, other.rows.reshape(3, each, *other.rows.shape[1:]).flip(0).flatten(0, 1))


# -- thinet -------------------------------------------------------------------------------------------


def test_thinet_takes_channels_that_cancel_first() -> None:
    order, errors = greedy(gram((1, 2), (-1, -2), (3, 0)))
    assert order.tolist() == [0, 1, 2]
    assert errors == [5, 0, 9]


def test_thinet_takes_the_first_of_a_tie() -> None:
    order, _ = greedy(gram((1, 2), (-1, -2), (2, 1)))
    assert order[0] == 0


def test_thinets_greedy_step_is_the_best_single_step() -> None:
    columns = np.random.default_rng(0).normal(size=(7, 20))
    order, errors = greedy(columns @ columns.T)
    gone = np.zeros(20)
    for step, channel in enumerate(order):
        left = [c for c in range(7) if c not in order[:step]]
        costs = {c: float(np.square(gone + columns[c]).sum()) for c in left}
        assert costs[channel] == pytest.approx(min(costs.values()))
        gone += columns[channel]
        assert errors[step] == pytest.approx(float(np.square(gone).sum()))


def test_thinet_of_a_whole_network_orders_by_the_error_it_names() -> None:
    for own in run("thinet", "resnet"):
        assert len(set(own.tolist())) == len(own)
        assert own.max() >= 1 - 1e-6  # without the last channel nothing is left


# -- lasso --------------------------------------------------------------------------------------------


def test_lasso_of_orthogonal_channels_is_their_squared_length() -> None:
    lengths = np.array([1.0, 3.0, 0.5, 2.0])
    np.testing.assert_allclose(leaving(np.diag(lengths**2)), lengths**2, rtol=1e-6)


def test_lasso_lets_one_of_two_equal_channels_go() -> None:
    score_of = leaving(gram((1, 0, 2), (1, 0, 2), (0, 1, 0)))
    assert min(score_of[0], score_of[1]) < score_of[2] < max(score_of[0], score_of[1])


def test_a_coefficient_is_zero_beyond_its_score_and_not_before() -> None:
    from sklearn.linear_model import Lasso

    columns = np.random.default_rng(0).normal(size=(30, 5)) * [1, 0.5, 2, 0.2, 1]
    target = columns.sum(1)
    found = leaving(columns.T @ columns)
    for channel, penalty in enumerate(found):
        for factor, stays in ((0.9, True), (1.1, False)):
            fit = Lasso(alpha=factor * penalty / 30, fit_intercept=False, tol=1e-12, max_iter=10**5).fit(
                columns, target
            )
            assert (abs(fit.coef_[channel]) > 1e-9) == stays


# -- dcp ----------------------------------------------------------------------------------------------


def part(rows: Tensor, weight: Tensor) -> Part:
    return Part.of(rows, weight, np.arange(rows.shape[1]))


def test_dcp_without_labels_first_picks_the_channel_that_sees_most_of_the_output() -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(50, 6, 9).double(), torch.randn(4, 6, 9).double()
    outputs = rows.flatten(1) @ weight.flatten(1).T
    pulls = torch.einsum("rck,ro->cko", rows, outputs).square().sum(1).sqrt().sum(1)
    own = pick([part(rows, weight)], 6)
    assert own.argmax() == int(pulls.argmax())
    assert own.max() >= 1 - 1e-6


def test_dcp_keeps_its_error_and_gradient_and_leaves_none_when_all_are_picked() -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(50, 6, 2).double(), torch.randn(4, 6, 2).double()
    reader = part(rows, weight)
    for channel in (3, 1, 5):
        reader.take(np.array([channel]))
    rest = [0, 2, 4]
    residual = rows[:, rest].flatten(1) @ weight[:, rest].flatten(1).T
    norms = torch.einsum("rck,ro->cko", rows, residual).div(residual.numel()).square().sum(1).sqrt().sum(1)
    torch.testing.assert_close(reader.norms(), norms)
    assert reader.error() == pytest.approx(float(residual.square().sum()))
    for channel in rest:
        reader.take(np.array([channel]))
    assert reader.error() == 0
    assert float(reader.norms().max()) < 1e-12


def test_dcp_weighs_the_loss_against_the_error() -> None:
    def weighed(weight: float) -> list[np.ndarray]:
        loss = lambda outputs, targets: weight * nn.functional.cross_entropy(outputs, targets)  # noqa: E731
        return [np.argsort(own) for own in run("dcp", "vit", loss=loss)]

    error_alone, both, loss_first = weighed(1e-6), weighed(1.0), weighed(1e3)
    assert not all(np.array_equal(a, b) for a, b in zip(error_alone, loss_first, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(both, loss_first, strict=True))


def test_without_a_layer_there_is_nothing_to_start_from() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    for name in ("nisp", "thinet"):
        with pytest.raises(UsageError, match=r"layer|readers|channels"):
            score(name, Scale(), [torch.randn(4, 3)])


@pytest.mark.parametrize("scorer", ["thinet", "lasso", "dcp"])
def test_fewer_rows_than_channels_and_channels_that_are_alike_are_scored(scorer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        for tensor in model[0].parameters():
            tensor[32:] = tensor[:32]
    labels = torch.randint(3, (8,), generator=torch.Generator().manual_seed(0))
    (found,) = score(scorer, model, [(torch.randn(8, 16), labels)]).values()
    assert np.isfinite(found).all()
    assert found.max() > 0


def test_dcps_gradient_is_a_mean_over_samples_whatever_the_batches() -> None:
    x, labels = pictures(24), torch.randint(5, (24,), generator=torch.Generator().manual_seed(0))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 1e4 * nn.functional.cross_entropy(outputs, targets)  # so that it decides what is picked

    def scored(*sizes: int) -> dict[str, np.ndarray]:
        batches = zip(torch.split(x, list(sizes)), torch.split(labels, list(sizes)), strict=True)
        return score("dcp", build("resnet"), list(batches), loss=loss)

    whole, uneven = scored(24), scored(22, 1, 1)
    for name, own in whole.items():
        np.testing.assert_allclose(uneven[name], own, rtol=1e-6)


class Blocks(nn.Module):
    """A grouped convolution, whose groups weigh less from one to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4, bias=False)
        self.c = nn.Conv2d(8, 2, 1)
        for number in range(4):
            self.b.weight.data[2 * number : 2 * number + 2] *= 10.0**-number

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("scorer", ["lasso", "dcp"])
def test_groups_of_a_convolution_count_by_their_share_of_the_whole_layer(scorer: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 4, 4)
    found = score(scorer, Blocks(), [(x, torch.zeros(32, 4, 4, dtype=torch.int64))])
    (own,) = (values for values in found.values() if len(values) == 4)  # which group of the convolution
    assert (own[1:] < 0.2 * own[0]).all()
