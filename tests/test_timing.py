"""What operators take, and where a model's time goes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimc import timing
from slimc.analysis import Analysis
from slimc.compiler import inspect
from slimc.errors import UsageError
from slimc.exporters import operators
from slimc.exporters.formats import onnx
from slimc.exporters.operators import Operator, summed
from slimc.graph.capture import program_of
from slimc.graph.cost import Costs, Model, Times


class Mixed(nn.Module):
    """A convolution of each kind, a pool, and a linear layer; then attention's two products without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(4, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.dense(x).relu()).relu()).relu()
        tokens = x.flatten(2).mT
        scores = (tokens @ tokens.mT).softmax(-1)
        out: Tensor = self.head((scores @ tokens).mean(1))
        return out


DENSE, DEPTHWISE, UP = 64 * 16 * 4 * 9, 16 * 16 * 9, 16 * 16 * 12 * 4
PRODUCTS = [DENSE, DEPTHWISE, UP, 64 * 64 * 12, 64 * 64 * 12, 120]
"""MACs of one picture of 8 x 8, in the order of the graph."""


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    torch.manual_seed(0)
    found = inspect(Mixed().eval(), torch.zeros(2, 4, 8, 8))
    assert found.full.macs == sum(PRODUCTS)
    return found


def full(analysis: Analysis) -> Any:
    return np.array([group.width for group in analysis.groups], np.int64)


def ran(*known: tuple[str, float, int | None, int]) -> list[Operator]:
    return [Operator(kind, ms, macs, outputs) for kind, ms, macs, outputs in known]


def test_products_get_the_time_of_the_operators_that_they_became(analysis: Analysis) -> None:
    times = timing.shared_out(
        analysis.types,
        ran(
            ("Conv", 4.0, DENSE, 1024), ("Conv", 1.0, DEPTHWISE, 256), ("ConvTranspose", 2.0, UP, 768),
            ("FusedMatMul", 0.5, PRODUCTS[3], 4096), ("MatMul", 0.3, PRODUCTS[4], 768), ("Gemm", 0.1, 120, 10),
            ("Softmax", 0.1, None, 4096),
        ),
        16.0,
    )  # fmt: skip
    start = 2 * 0.02  # of each; the shortest operator takes longer than that
    assert times.products == pytest.approx(np.array([8.0, 2.0, 4.0, 1.0, 0.6, 0.2]) - start)
    assert times.rest == pytest.approx(0.2 - start)
    assert times.fixed == pytest.approx(7 * start)


def test_what_an_operator_takes_however_little_it_does_is_fixed(analysis: Analysis) -> None:
    known = ran(("Conv", 0.108, DENSE, 1024), ("Conv", 0.058, DEPTHWISE, 256), ("Reshape", 0.008, None, 768))
    times = timing.shared_out(analysis.types, known, 0.174)
    assert times.products[:2] == pytest.approx([0.1, 0.05])
    assert (times.rest, times.fixed) == pytest.approx((0.0, 0.024))
    cost = Model(analysis.types, analysis.grouping, times)
    assert cost(np.ones(len(analysis.groups), np.int64)).time == pytest.approx(0.024 + 0.1 / 16 + 0.05 / 16)


def test_what_is_not_recognised_goes_to_the_products_left_over(analysis: Analysis) -> None:
    known = ran(("Conv", 4.02, DENSE, 1024), ("Attention", 3.02, None, 768), ("Gemm", 1.02, 121, 10))
    times = timing.shared_out(analysis.types, known, 8.06)
    left = np.array([0, *PRODUCTS[1:]])
    assert times.products == pytest.approx([4.0, *(4.0 * left / left.sum())[1:]])
    assert (times.rest, times.fixed) == pytest.approx((0.0, 0.06))


def test_without_a_profile_time_goes_with_the_products(analysis: Analysis) -> None:
    times = timing.shared_out(analysis.types, [], 5.0)
    assert times.products == pytest.approx(5.0 * np.array(PRODUCTS) / sum(PRODUCTS))


def test_products_that_are_alike_share() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    own = inspect(net, torch.zeros(2, 4, 8, 8))
    macs = 64 * 4 * 4 * 9
    times = timing.shared_out(own.types, ran(("Conv", 1.02, macs, 256), ("Conv", 2.02, macs, 256)), 3.04)
    assert times.products == pytest.approx([1.5, 1.5])


def test_time_falls_with_products_and_with_sizes(analysis: Analysis) -> None:
    times = Times(np.array([8.0, 2.0, 4.0, 1.0, 0.6, 0.2]), 0.4)
    cost, widths = Model(analysis.types, analysis.grouping, times), full(analysis)
    assert analysis.full.time is None
    assert cost(widths).time == pytest.approx(16.2)
    assert cost(widths) == Costs(**{**vars(analysis.full), "time": cost(widths).time})
    number = next(g.number for g in analysis.groups if any(m.tensor == "dense.weight" for m in g.members))
    fewer = widths.copy()
    fewer[number] //= 2  # the outputs of dense, all of depthwise, the inputs of up
    written = 256 + 2 * 1024 + 2 * 256 + 2 * 768 + 2 * 4096 + 768 + 12 + 10  # numbers of all values of one picture
    freed = 2 * 512 + 2 * 128
    assert cost(fewer).time == pytest.approx(16.2 - 7.0 - 0.4 * freed / written)


def test_slopes_of_time(analysis: Analysis) -> None:
    cost = Model(analysis.types, analysis.grouping, Times(np.arange(1.0, 7.0), 3.0))
    widths, step = full(analysis) * 0.7, 1e-6

    def time(own: Any) -> float:
        found = cost(own).time
        assert found is not None
        return found

    slopes = cost.slopes(widths)["time"]
    for number in range(len(widths)):
        moved = widths.copy()
        moved[number] *= np.exp(step)
        assert slopes[number] == pytest.approx((time(moved) - time(widths)) / step, rel=1e-4)


def test_every_product_of_a_real_file_is_recognised(analysis: Analysis, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.export(program_of(analysis.captured.module, analysis.captured), path)
    found = operators.measure(path, threads=1, budget_seconds=0.2)
    assert sorted(own.macs for own in found if own.macs is not None) == [*sorted({*PRODUCTS} - {UP}), PRODUCTS[3]]
    assert [own.macs for own in found if own.kind == "ConvTranspose"] == [None]  # its weights are packed
    assert all(own.ms >= 0 for own in found)
    times = timing.shared_out(analysis.types, found, 1.0)
    assert times.products.sum() + times.rest + times.fixed == pytest.approx(1.0)
    assert (times.products >= 0).all()


def test_a_file_that_cannot_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(UsageError, match="cannot load"):
        operators.measure(tmp_path / "m.onnx", threads=1)


def event(name: str, kind: str, microseconds: int, inputs: list[list[int]], outputs: list[list[int]]) -> dict[str, Any]:
    args = {
        "op_name": kind, "node_index": "1", "input_type_shape": [{"float": s} for s in inputs],
        "output_type_shape": [{"float": s} for s in outputs],
    }  # fmt: skip
    return {"name": name, "dur": microseconds, "args": args}


def test_the_first_calls_do_not_count() -> None:
    calls = [event("a", "Conv", us, [[1, 3, 8, 8], [5, 3, 1, 1]], [[1, 5, 8, 8]]) for us in (9000, 10, 20, 30, 20)]
    assert summed(calls, 5) == [Operator("Conv", 0.02, 64 * 15, 320)]


def test_an_operator_in_a_loop_counts_with_all_its_runs() -> None:
    calls = [event("a", "Gemm", 10, [[1, 4], [2]], [[1, 2]]) for _ in range(6)]
    assert summed(calls, 2) == [Operator("Gemm", 0.03, None, 6)]
