"""Costs are sums that a person can do by hand, and polynomials in the groups' widths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from laws import counted_macs, random_cut, widths
from torch import Tensor, nn
from zoo import CASES

import slimc
from slimc.analysis import Analysis, analyse


def analysed(name: str) -> Analysis:
    return analyse(*CASES[name].build())


def test_macs_and_parameters_of_a_chain_are_the_sums_done_by_hand() -> None:
    analysis = analysed("Chain")
    # 8 x 8 places; a: 3 to 8, b: 8 to 6, both 3 x 3; fc: 6 to 4.
    assert analysis.macs == 64 * (3 * 8 * 9) + 64 * (8 * 6 * 9) + 6 * 4 == 41_496
    # Weights and biases, and the batch norm's weight and bias.
    assert analysis.params == (3 * 8 * 9 + 8) + 2 * 8 + (8 * 6 * 9 + 6) + (6 * 4 + 4) == 706
    # 4 bytes each, and the running mean and variance; the count of batches (8 bytes) is in the file too.
    assert analysis.full.size == 4 * (706 + 2 * 8) + 8


def test_costs_at_other_widths_are_the_same_sums() -> None:
    costs = analysed("Chain").cost(np.array([5, 2]))
    assert costs.macs == 64 * (3 * 5 * 9) + 64 * (5 * 2 * 9) + 2 * 4
    assert costs.params == (3 * 5 * 9 + 5) + 2 * 5 + (5 * 2 * 9 + 2) + (2 * 4 + 4)


def test_a_grouped_convolution_is_counted_per_group() -> None:
    analysis = analysed("Grouped")
    # a: 3 to 8; g: 12 outputs of 2 inputs each; b: 12 to 5; fc: 5 to 2.
    assert analysis.macs == 64 * 9 * (3 * 8 + 12 * 2 + 12 * 5) + 5 * 2


def test_a_transposed_convolution_is_counted_at_its_input() -> None:
    analysis = analysed("TransposedConv")
    # a: 3 to 6 at 64 places; up: 6 to 4, 2 x 2 each at 64 places; b: 4 to 5 at 256 places.
    assert analysis.macs == 64 * 9 * 3 * 6 + 64 * 6 * 4 * 4 + 256 * 9 * 4 * 5 + 5 * 2


def test_attention_is_counted_as_its_two_products() -> None:
    analysis = analysed("FusedAttention")
    # 5 tokens of 8: qkv, scores and their use (2 heads x 5 x 5 x 4 each), out.
    assert analysis.macs == 5 * 8 * 24 + 2 * (2 * 5 * 5 * 4) + 5 * 8 * 8


def test_a_recurrence_is_counted_once_per_step() -> None:
    # 7 steps: 4 gates x 5 hidden x (4 inputs + 5 hidden); then the head at every step.
    assert analysed("Lstm").macs == 7 * (4 * 5 * (4 + 5)) + 7 * 5 * 2
    # 3 steps of a cell: 4 x 5 x (4 + 5); the embedding 3 to 4 at each; the head once.
    assert analysed("LstmCell").macs == 3 * (4 * 5 * (4 + 5)) + 3 * 3 * 4 + 5 * 2
    # 7 steps, two layers in two directions: 3 gates x 3 hidden x (inputs + 3), inputs 4 then 6.
    assert analysed("DeepGru").macs == 7 * 3 * 4 + 7 * 2 * (9 * (4 + 3) + 9 * (6 + 3)) + 7 * 6 * 2


@pytest.mark.parametrize("name", ["Einsum", "PositionBias", "MultiheadAttention", "GroupedQueryByFlag", "Unfolded"])
def test_a_flop_counter_finds_the_same_on_the_whole_model(name: str) -> None:
    analysis = analysed(name)
    assert analysis.macs * analysis.captured.batch == counted_macs(analysis.captured.module, analysis.captured.example)


def test_costs_are_per_sample_whatever_the_batch() -> None:
    model, _ = CASES["Chain"].build()
    two, five = (analyse(model, torch.randn(n, 3, 8, 8)).full for n in (2, 5))
    assert two == five


class Unbatched(nn.Module):
    """Its first input is a matrix of another length than the batch of the second, and no output is as long."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.relu(self.a(x))) @ weights.mT
        return result


def test_amounts_are_those_of_a_call_where_no_output_is_as_long_as_the_first_input() -> None:
    slim = slimc.compress(
        Unbatched().eval(), (torch.randn(10, 4), torch.randn(2, 8)), flops=0.7, round_to=1, recover="none"
    )
    assert slim.report.macs.before == 2 * (8 * 16 + 16 * 4) + 2 * 4 * 10
    assert any("amounts are for one call" in warning for warning in slim.report.warnings)
    assert slimc.inspect(nn.Linear(16, 32), torch.randn(16)).macs == 16 * 32


class Peak(nn.Module):
    """One value after another, the second of them wide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.tanh(self.a(x)))
        return result


def test_memory_is_the_largest_sum_of_values_alive_at_once() -> None:
    # At tanh, its input and its output are alive: 10 + 10 numbers of 4 bytes.
    assert analyse(Peak().eval(), torch.randn(3, 4)).full.memory == 4 * (10 + 10)


def test_parameters_that_the_graph_never_reads_are_still_in_the_file() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.spare = nn.Linear(3, 2), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(x)
            return result

    assert analyse(Unused().eval(), torch.randn(2, 3)).params == (3 * 2 + 2) + (3 * 5 + 5)


@pytest.mark.parametrize("name", ["Chain", "Grouped", "DenseConcat", "FusedAttention", "Lstm"])
def test_no_cost_rises_when_channels_go(name: str) -> None:
    analysis = analysed(name)
    rng = np.random.default_rng(0)
    full: Any = analysis.full
    for _ in range(5):
        cut = random_cut(analysis, rng)
        costs = analysis.cost(widths(analysis.grouping, cut))
        for metric in ("macs", "params", "size", "memory"):
            assert getattr(costs, metric) <= getattr(full, metric)


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bi,ij->bj", [(2, 8), (8, 5)], 2 * 8 * 5),
        ("bi,ij,jk->bk", [(2, 8), (8, 5), (5, 4)], 2 * 8 * 5 + 2 * 5 * 4),
        ("bij,ij,bk->bk", [(2, 3, 4), (3, 4), (2, 6)], 2 * 3 * 4 + 2 * 6),
        ("bik,ij->bj", [(2, 8, 7), (8, 5)], 2 * 8 * 5),  # what only one operand has is summed over before
        ("...i,ij,...j->...", [(2, 3, 8), (8, 5), (2, 3, 5)], 2 * 3 * 8 * 5 + 2 * 3 * 5),
    ],
)
def test_a_product_of_several_tensors_counts_pair_by_pair(
    equation: str, shapes: list[tuple[int, ...]], macs: int
) -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes[1:]])

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, *self.rest)

    counted = slimc.inspect(Einsum(), torch.randn(shapes[0])).macs
    assert counted == macs / 2


class Probes(nn.Module):
    """Learned queries, the same for all samples, look at what each sample holds."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.key, self.value = nn.Parameter(torch.randn(1, 3, 8)), nn.Linear(4, 8), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.queries, self.key(x), self.value(x))


def test_attention_of_shared_queries_is_counted_for_every_sample() -> None:
    macs = slimc.inspect(Probes(), torch.randn(5, 7, 4)).macs
    assert macs == 7 * 4 * (8 + 6) + 3 * 7 * (8 + 6)


def test_a_bilinear_layer_is_counted_as_two_products() -> None:
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(4, 6, 5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = self.pair(x, y)
            return result

    assert slimc.inspect(Paired(), (torch.randn(2, 3, 4), torch.randn(2, 3, 6))).macs == 3 * 5 * (4 * 6 + 6)


def test_a_cast_has_a_storage_of_its_own() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh().double()

    # tanh's result and the cast of it, of 4 and 8 bytes a number.
    assert analyse(Cast().eval(), torch.randn(2, 10)).full.memory == 10 * (4 + 8)


def test_a_reshape_behind_swapped_axes_copies_and_one_of_a_map_does_not() -> None:
    class Tokens(nn.Module):
        def __init__(self, swapped: bool) -> None:
            super().__init__()
            self.conv, self.swapped = nn.Conv2d(4, 32, 1), swapped

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            out: Tensor = y.permute(0, 2, 3, 1) if self.swapped else y
            return out.flatten(1)

    x = torch.randn(2, 4, 8, 8)
    one, other = 4 * 64 * 4, 4 * 64 * 32  # bytes of the input and of a map
    assert slimc.inspect(Tokens(swapped=False), x).full.memory == one + other
    assert slimc.inspect(Tokens(swapped=True), x).full.memory == 2 * other


@pytest.mark.parametrize("batch", [2, 8])
def test_what_is_computed_from_weights_alone_is_work_of_every_sample(batch: int) -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(64, 8)), nn.Parameter(torch.randn(8, 64))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = nn.functional.linear(x, self.a @ self.b)
            return out

    assert slimc.inspect(LowRank(), torch.randn(batch, 64)).macs == 64 * 8 * 64 + 64 * 64
