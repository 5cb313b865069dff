"""taylor, taylor-sum, taylor-activation, gate, gate-joint, snip, snip-sum, fisher, obd against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring import analysed, build, eager_loss, labelled, run, score
from torch import Tensor, nn

from slimc.gradients import batch_axis
from slimc.graph.resize import Cut
from slimc.graph.shrink import shrink
from slimc.rewrite import rewrite
from slimc.roles import writers
from slimc.scores import Scores

NORMS = ("bn0", "bn1", "bn2")
STREAM, INNER = 0, 1


class Linear(nn.Module):
    """y = V W x with all weights given."""

    def __init__(self, *weights: list[list[float]]) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for rows in weights:
            layer = nn.Linear(len(rows[0]), len(rows), bias=False).double()
            layer.weight.data = torch.tensor(rows, dtype=torch.float64)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples of half the squared distance."""
    return (outputs - targets).square().sum(1).mean() / 2


def numbers(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def per_batch_products() -> list[list[Tensor]]:
    """For each batch and batch norm of the resnet, gamma g_gamma + beta g_beta by an eager backward pass."""
    model, found = build("resnet"), []
    for x, y in labelled():
        model.zero_grad()
        eager_loss(model, x, y).backward()  # type: ignore[no-untyped-call]
        norms = [model.get_submodule(name) for name in NORMS]
        found.append([(n.weight * n.weight.grad + n.bias * n.bias.grad).detach() for n in norms])  # type: ignore[operator]
    return found


def per_sample_products() -> tuple[list[Tensor], list[int]]:
    """For each batch norm, [samples, channels] the same of each sample's own loss; and positions of each map."""
    model = build("resnet")
    rows: list[list[Tensor]] = [[] for _ in NORMS]
    for x, y in labelled():
        for sample in range(len(x)):
            model.zero_grad()
            eager_loss(model, x[sample : sample + 1], y[sample : sample + 1]).backward()  # type: ignore[no-untyped-call]
            for own, name in zip(rows, NORMS, strict=True):
                n = model.get_submodule(name)
                own.append((n.weight * n.weight.grad + n.bias * n.bias.grad).detach())  # type: ignore[operator]
    return [torch.stack(own) for own in rows], [64, 64, 64]


def assert_scores(found: list[Scores], stream: Tensor, inner: Tensor) -> None:
    np.testing.assert_allclose(found[STREAM], stream.numpy(), rtol=1e-8)
    np.testing.assert_allclose(found[INNER], inner.numpy(), rtol=1e-8)


def test_taylor_squares_the_joint_gate_of_each_batchs_mean_loss() -> None:
    batches = per_batch_products()
    stream = torch.stack([(b[0] + b[2]).square() for b in batches]).mean(0)
    assert_scores(run("taylor", "resnet"), stream, torch.stack([b[1].square() for b in batches]).mean(0))


def test_gate_adds_absolute_values_of_members_and_gate_joint_their_signed_sum() -> None:
    batches = per_batch_products()
    inner = torch.stack([b[1].abs() for b in batches]).mean(0)
    apart = torch.stack([b[0].abs() + b[2].abs() for b in batches]).mean(0)
    together = torch.stack([(b[0] + b[2]).abs() for b in batches]).mean(0)
    assert_scores(run("gate", "resnet"), apart, inner)
    assert_scores(run("gate-joint", "resnet"), together, inner)
    assert not torch.allclose(apart, together, rtol=1e-2)


def test_snip_averages_shares_of_absolute_joint_gates() -> None:
    shares = []
    for b in per_batch_products():
        each = torch.cat([(b[0] + b[2]).abs(), b[1].abs()])
        shares.append(each / each.sum())
    mean = torch.stack(shares).mean(0)
    found = run("snip", "resnet")
    assert_scores(found, mean[:6], mean[6:])
    assert sum(own.sum() for own in found) == pytest.approx(1.0)


def test_taylor_activation_is_absolute_per_sample_and_a_mean_over_positions() -> None:
    (first, inner, last), positions = per_sample_products()
    stream = (first / positions[0] + last / positions[2]).abs().mean(0)
    assert_scores(run("taylor-activation", "resnet"), stream, (inner / positions[1]).abs().mean(0))
    # A batch's signed mean would be smaller: that is what the paper's absolute value is for.
    assert (inner.mean(0).abs() / 64 < 0.9 * (inner / 64).abs().mean(0)).any()


def test_fisher_squares_each_samples_joint_gate() -> None:
    (first, inner, last), _ = per_sample_products()
    assert_scores(run("fisher", "resnet"), (first + last).square().mean(0), inner.square().mean(0))


def test_fishers_normalisations_divide_by_what_a_channel_costs() -> None:
    plain, memory, flops = (run(name, "resnet") for name in ("fisher", "fisher-memory", "fisher-flops"))
    # stem and b make the stream at 64 positions each; a makes the inner group
    np.testing.assert_allclose(memory[STREAM], plain[STREAM] / 128)
    np.testing.assert_allclose(memory[INNER], plain[INNER] / 64)
    # MACs of one channel at 64 positions: stem 3 x 9, a reads 4 x 9, b writes 4 x 9; the head 5
    np.testing.assert_allclose(flops[STREAM], plain[STREAM] / (64 * (27 + 36 + 36) + 5))
    np.testing.assert_allclose(flops[INNER], plain[INNER] / (64 * (54 + 54)))


@pytest.mark.parametrize(("inputs", "joint"), [([[1.0, -1.0], [-1.0, 1.0]], 0.0), ([[1.0, 1.0], [-1.0, -1.0]], 4.0)])
def test_group_fisher_of_two_members(inputs: list[list[float]], joint: float) -> None:
    class Joined(nn.Module):
        """Two writers of two channels: of the first, each passes on one of two inputs; the second has one only."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = (nn.Linear(2, n, bias=False).double() for n in (2, 2, 1))
            self.a.weight.data, self.b.weight.data = numbers([1.0, 0.0], [0.5, 0.0]), numbers([0.0, 1.0], [0.0, 0.0])
            self.head.weight.data = numbers([1.0, 1.0])

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) + self.b(x))  # type: ignore[no-any-return]

    # Outputs are 1 above their targets, so that the members' gradients are the inputs: signs that cancel give 0, equal
    # signs the mean of 4 and 4; each member alone would give 1 + 1 either way.
    x = numbers(*inputs)
    model = Joined()
    (own,) = score("fisher", model, [(x, model(x).detach() - 1)], loss=half_square).values()
    np.testing.assert_allclose(own, [joint, 0.25], atol=1e-12)


def test_weight_scorers_against_an_eager_backward_pass() -> None:
    model = build("resnet")
    squares, absolutes = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for x, y in labelled():
        model.zero_grad()
        eager_loss(model, x, y).backward()  # type: ignore[no-untyped-call]
        each = {n: (p * p.grad).detach() for n, p in model.named_parameters() if p.grad is not None}
        whole = sum(float(own.abs().sum()) for own in each.values())
        inner = [each["a.weight"].flatten(1).T, each["bn1.weight"][None], each["bn1.bias"][None],
                 each["b.weight"].transpose(0, 1).flatten(1).T]  # fmt: skip
        products = torch.cat(inner)  # [everything of one channel, channels]
        squares, absolutes = squares + products.square().sum(0) / 3, absolutes + products.abs().sum(0) / whole / 3
    np.testing.assert_allclose(run("taylor-sum", "resnet")[INNER], squares.numpy())
    np.testing.assert_allclose(run("snip-sum", "resnet")[INNER], absolutes.numpy())


def test_obd_squares_each_samples_gradient_of_each_weight() -> None:
    model, total = build("resnet"), torch.zeros(4, dtype=torch.float64)
    for x, y in labelled():
        for sample in range(len(x)):
            model.zero_grad()
            eager_loss(model, x[sample : sample + 1], y[sample : sample + 1]).backward()  # type: ignore[no-untyped-call]
            each = {n: (p * p.grad).detach().square() for n, p in model.named_parameters() if p.grad is not None}
            total += each["a.weight"].sum((1, 2, 3)) + each["b.weight"].sum((0, 2, 3))
            total += each["bn1.weight"] + each["bn1.bias"]
    np.testing.assert_allclose(run("obd", "resnet")[INNER], 0.5 * total.numpy() / 12, rtol=1e-8)
    # The square of a batch's gradient is another, smaller number.
    assert (run("taylor-sum", "resnet")[INNER] / 2 < 0.9 * run("obd", "resnet")[INNER]).any()


# -- the sheets' numbers ------------------------------------------------------------------------------


def test_snip_of_one_layer() -> None:
    # W = [[1, 2], [3, 0]] x = (1, 2), behind an identity whose rows are the channels: the pair of W's columns.
    model = Linear([[1, 0], [0, 2]], [[1, 2], [3, 0]])
    found = score("snip-sum", model, [(numbers([1.0, 1.0]).repeat(2, 1), numbers([4.0, 4.0]).repeat(2, 1))],
                  loss=half_square)  # fmt: skip
    # |w g| of W is [[1, 4], [3, 0]], whose columns sum to 4 and 4; the rows before it have signs that cancel.
    (own,) = found.values()
    y = np.array([5.0, 3.0]) - 4.0  # outputs less targets: (1, -1)
    rows = np.abs(np.array([1 * (1 * y[0] + 3 * y[1]), 2 * (2 * y[0])]))
    columns = np.array([1 + 3, 4 + 0])
    np.testing.assert_allclose(own, (rows + columns) / (rows.sum() + columns.sum()))


def test_two_gates_that_first_order_cannot_tell_right() -> None:
    # L = (phi1 + 3 phi2 - 2)^2 / 2: derivatives 2 and 6, though closing either changes the loss by -1.5.
    model = Linear([[1], [1]], [[1, 3]])
    data = [(numbers([1.0], [1.0]), numbers([2.0], [2.0]))]
    (own,) = score("gate", model, data, loss=half_square).values()
    np.testing.assert_allclose(own, [2, 6])
    (own,) = score("taylor", model, data, loss=half_square).values()
    np.testing.assert_allclose(own, [4, 36])


def test_opposite_samples_cancel_in_a_batch_and_count_apart() -> None:
    # Gate gradients +1 and -1: nothing for the batch, 1 for each sample.
    model = Linear([[1], [2]], [[1, 1]])
    data = [(numbers([1.0], [1.0]), numbers([2.0], [4.0]))]  # outputs 3: differences 1 and -1
    (own,) = score("fisher", model, data, loss=half_square).values()
    np.testing.assert_allclose(own, [1, 4])
    (own,) = score("taylor-activation", model, data, loss=half_square).values()
    np.testing.assert_allclose(own, [1, 2])
    (own,) = score("obd", model, data, loss=half_square).values()
    np.testing.assert_allclose(own, [0.5 * (1 + 1), 0.5 * (4 + 4)])


def test_a_bias_free_chain_conserves_weight_times_gradient() -> None:
    # y = w2 w1 x with w1 = 2, w2 = 3, x = 1, t = 5: both products are 6 (written twice, so that channels can go).
    model = Linear([[2], [0]], [[3, 0]])
    (own,) = score("snip-sum", model, [(numbers([1.0], [1.0]), numbers([5.0], [5.0]))], loss=half_square).values()
    np.testing.assert_allclose(own, [1.0, 0.0])  # 12 of 12
    (own,) = score("taylor-sum", model, [(numbers([1.0], [1.0]), numbers([5.0], [5.0]))], loss=half_square).values()
    np.testing.assert_allclose(own, [36 + 36, 0])


def test_two_identical_members_count_twice_for_gate_and_squared_for_taylor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 5)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.a(x) + self.b(x))  # type: ignore[no-any-return]

    class One(nn.Module):
        def __init__(self, two: Two) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(3, 4), two.fc
            self.a.weight.data, self.a.bias.data = 2 * two.a.weight.data, 2 * two.a.bias.data

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.a(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    two = Two().double()
    one, data = One(two).double(), [(torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 3]))]
    for name in ("gate", "taylor", "fisher"):  # the function, and so the gate of the sum, is the same
        np.testing.assert_allclose(score(name, two, data)["a.weight"], score(name, one, data)["a.weight"])


def test_a_filters_weights_times_gradients_sum_to_nothing_in_front_of_a_training_batch_norm() -> None:
    model, (x, y) = build("resnet"), labelled(1)[0]
    model.train()
    eager_loss(model, x, y).backward()  # type: ignore[no-untyped-call]
    weight = model.get_parameter("a.weight")
    assert weight.grad is not None
    products = (weight * weight.grad).detach()
    signed = products.sum((1, 2, 3)).abs()
    assert float((signed / products.abs().sum((1, 2, 3))).max()) < 1e-4  # eps of the norm is left
    # The scorers do not fall into it: they square or take absolute values first.
    for name in ("taylor-sum", "snip-sum", "obd"):
        assert run(name, "resnet", [(x, y)])[INNER].max() > 1e-6


def test_a_scale_behind_the_norm_counts_for_gates() -> None:
    assert [group.width for group in analysed("resnet").groups] == [6, 4]
    model = build("resnet")
    norm = model.get_submodule("bn1")
    with torch.no_grad():
        norm.weight[2] = norm.bias[2] = 0.0  # type: ignore[operator]
    for name in ("gate", "taylor", "snip", "fisher", "taylor-activation"):
        assert score(name, model, labelled())["a.weight"][2] == 0.0


def test_samples_go_together_in_a_network_that_was_cut_as_well() -> None:
    analysis = analysed("resnet")
    cut = Cut(analysis.types, np.arange(analysis.types.solution.variables) % 2 == 0)
    slim = rewrite(analysis.types, cut)
    smaller, _ = shrink(analysis.types, analysis.grouping, cut, slim.module, slim.twins)
    for types in (analysis.types, smaller):
        assert {batch_axis(types, site) for site in writers(types)} == {0}


@pytest.mark.parametrize("scorer", ["taylor", "taylor-sum", "gate", "gate-joint", "snip", "snip-sum"])
def test_a_batch_counts_by_its_samples(scorer: str) -> None:
    model = Linear([[1.0, 2.0], [0.5, -1.0]], [[1.0, 1.0]])
    x, y = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(8, 1).double()
    alone = [score(scorer, model, [(x[part], y[part])], loss=half_square) for part in (slice(0, 7), slice(7, 8))]
    both = score(scorer, model, [(x[:7], y[:7]), (x[7:], y[7:])], loss=half_square)
    for name, own in both.items():
        np.testing.assert_allclose(own, (7 * alone[0][name] + alone[1][name]) / 8, rtol=1e-9)
