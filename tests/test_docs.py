"""What the documentation shows must work as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import library as operators
from torch.utils.data import DataLoader, TensorDataset

import slimc
from slimc import scores

DOCS = Path(__file__).parent.parent / "docs"


def adapter(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return x + (x @ down.T) @ up.T


@pytest.fixture
def adapter_operator() -> Iterator[None]:
    library: Any = getattr(operators, "Library")("mylib", "DEF")  # noqa: B009 - torch leaves it untyped
    library.define("adapter(Tensor x, Tensor down, Tensor up) -> Tensor")
    library.impl("adapter", adapter, "CompositeExplicitAutograd")
    operators.register_fake("mylib::adapter", adapter, lib=library)
    yield
    library._destroy()


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.down, self.up = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.ops.mylib.adapter(self.first(x), self.down, self.up))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("adapter_operator")
def test_the_worked_example_of_a_new_operator_is_proven_and_its_absence_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from slimc.graph import rule

    rule.load()  # else the copies below are empty, and the rules are lost to later tests
    monkeypatch.setattr(rule, "INFER", dict(rule.INFER))
    monkeypatch.setattr(rule, "COUNT", dict(rule.COUNT))
    torch.manual_seed(0)
    model, x = Adapted(), torch.randn(2, 8)
    assert [cause.op for cause in slimc.inspect(model, x).frozen] == ["mylib.adapter.default"]

    code = re.search(r"```python\n(.*?)```", (DOCS / "operators.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    exec(compile(code[1], "operators.md", "exec"), {})
    slim = slimc.compress(model, x, params=0.5, round_to=1)
    assert not slim.report.frozen
    # features 16 and rank 6 are the two groups, and both can shrink
    assert sorted(group.width for group in slim.report.groups) == [6, 16]
    # MACs: 8 x 16 + 2 x 16 x 6 + 16 x 3 = 368
    assert slim.report.macs.before == 368


def test_the_page_of_scorers_names_each_with_its_need_and_source() -> None:
    page = (DOCS / "scorers.md").read_text()
    for name, method in scores.methods().items():
        row = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |")), None)
        assert row is not None, f"docs/scorers.md lacks {name}"
        assert f"| {method.needs} | {method.normalisation} | {method.source} |" in row


def test_the_page_of_training_names_each_schedule_with_its_settings() -> None:
    from slimc.training.schedule import schedules

    page = (DOCS / "training.md").read_text()
    for name, method in schedules().items():
        row = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |")), None)
        assert row is not None, f"docs/training.md lacks {name}"
        assert f"| {method.summary} |" in row.replace("`--scorer`", "--scorer")
        assert f"| {method.source} |" in row
        for setting, default in method.settings({}).items():
            shown = re.search(rf"`{setting}` \(([^):,; ]+)", row)
            assert shown is not None, (name, setting)
            told = shown[1] == str(default) if isinstance(default, bool) else type(default)(shown[1]) == default
            assert told, (name, setting)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (32,), generator=generator)
    return DataLoader(TensorDataset(torch.randn(32, 1, 6, 6, generator=generator), labels), batch_size=8)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["tick-tock", "dcp"])
def test_the_loop_with_accelerate_that_is_shown_trains_and_cuts(name: str, precision: str) -> None:
    state = pytest.importorskip("accelerate.state", reason="the extra accelerate is not installed")
    state.AcceleratorState._reset_state(reset_partial_state=True)  # it holds the precision of the whole process
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(from accelerate.*?)```", page, re.DOTALL)
    assert code is not None
    assert code[1].count("\n") <= 30
    assert code[1].count('"tick-tock"') == 1
    shown: dict[str, Any] = {}
    exec(compile(code[1].replace('"tick-tock"', repr(name)), "training.md", "exec"), shown)
    slim = shown["train"](small(), torch.zeros(2, 1, 6, 6), batches(), 2, precision)
    assert slim.report.targets["flops"].met
    assert slim.report.verification.passed
    assert slim.module(torch.zeros(2, 1, 6, 6)).dtype == torch.float32


def test_the_loop_of_ones_own_that_is_shown_trains_and_cuts() -> None:
    code = re.search(r"```python\n(import torch.*?)```", (DOCS / "training.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    shown: dict[str, Any] = {}
    exec(compile(code[1], "training.md", "exec"), shown)
    slim = shown["train"](small(), torch.zeros(2, 1, 6, 6), batches(), 2)
    assert slim.report.targets["flops"].met
    assert slim.report.verification.passed
