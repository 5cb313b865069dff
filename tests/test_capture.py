"""Capture: one graph from any call convention, an honest batch axis, and errors that say where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import CASES

from slimc.analysis import analyse
from slimc.errors import CaptureError, UsageError
from slimc.graph.capture import capture
from slimc.graph.example import Example


def chain() -> nn.Module:
    return CASES["Chain"].build()[0]


def test_the_batch_axis_is_open_where_the_model_allows_it() -> None:
    captured = capture(chain(), torch.randn(3, 3, 8, 8))
    assert captured.batch_note is None
    assert captured.dynamic_shapes is not None
    with torch.no_grad():
        assert captured.module(torch.randn(7, 3, 8, 8)).shape == (7, 4)


def test_a_batch_of_one_is_doubled_so_that_it_can_be_open() -> None:
    captured = capture(chain(), torch.randn(1, 3, 8, 8))
    assert captured.batch == 2
    assert captured.batch_note is None


class FixedBatch(nn.Module):
    """Writes its batch size into a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(4, 6), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.a(x).reshape(1, 12))
        return result


def test_a_fixed_batch_is_captured_and_said() -> None:
    captured = capture(FixedBatch().eval(), torch.randn(2, 4))
    assert captured.dynamic_shapes is None
    assert captured.batch_note


class ByName(nn.Module):
    """Takes keyword arguments and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        return {"y": self.b(torch.relu(self.a(x)) * scale)}


def test_inputs_by_name_are_captured_by_name() -> None:
    captured = capture(ByName().eval(), {"x": torch.randn(3, 4), "scale": torch.rand(3, 1)})
    with torch.no_grad():
        assert captured.module(x=torch.randn(5, 4), scale=torch.rand(5, 1))["y"].shape == (5, 2)


class Branch(nn.Module):
    """Looks at the data to decide what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(x)
        if x.sum() > 0:  # the line that the error must name
            result = -result
        return result


def test_control_flow_on_data_is_an_error_that_names_file_and_line() -> None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "the line that the error must name" in text)
    with pytest.raises(CaptureError, match=rf"Branch at .*test_capture\.py:{line}"):
        analyse(Branch().eval(), torch.randn(2, 4))


def test_inputs_that_do_not_fit_are_an_error_that_gives_their_shape() -> None:
    with pytest.raises(CaptureError, match=r"\(2, 5, 8, 8\)"):
        capture(chain(), torch.randn(2, 5, 8, 8))


def test_a_model_that_returns_nothing_is_refused() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(CaptureError, match="returns no tensor"):
        capture(Silent(), torch.randn(2, 3))


def test_an_output_that_is_not_finite_is_refused() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    with pytest.raises(CaptureError, match="not finite"):
        capture(Broken(), torch.randn(2, 3))


def test_inputs_of_no_known_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="give a tensor"):
        Example.of("a picture")


def test_the_callers_random_numbers_and_modes_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)).train()
    model[1].eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    analyse(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not model._forward_hooks


def test_what_only_the_output_object_holds_besides_tensors_is_dropped() -> None:
    class WithCache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"logits": self.b(torch.relu(self.a(x))), "cache": object()}

    analysis = analyse(WithCache().eval(), torch.randn(2, 4))
    assert [g.width for g in analysis.groups] == [6]


def test_regions_without_gradients_are_part_of_the_graph() -> None:
    model, inputs = CASES["NoGradInside"].build()
    analysis = analyse(model, inputs)
    assert not analysis.types.unknown
    assert not any("wrap_with" in str(node.target) for node in analysis.captured.module.graph.nodes)


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_names_that_torch_cannot_write_down_are_refused(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 8))
    with pytest.raises(CaptureError, match="names with quotes, backslashes or line breaks"):
        capture(model, torch.randn(2, 4))


@pytest.mark.parametrize("name", ["class", "global"])
def test_names_that_are_words_of_python_are_refused_by_name(name: str) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({name: nn.Linear(4, 2)})

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.heads[name](x)
            return out

    with pytest.raises(CaptureError, match=rf"'heads\.{name}\.weight': '{name}' is a word of Python"):
        capture(Words(), torch.randn(2, 4))


@pytest.mark.parametrize("name", ["graph", "code"])
def test_names_that_graphs_have_themselves_end_in_no_internal_error(name: str) -> None:
    class Reserved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.get_submodule(name)(x)
            return out

    with pytest.raises(CaptureError, match="Reserved cannot be captured"):
        capture(Reserved(), torch.randn(2, 4))


class Steered(nn.Module):
    """Branches on what its data is."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y * 2 if y.sum() > 0 else y


def test_data_that_steers_is_refused_with_its_line_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match=r"Steered cannot be captured in .*test_capture\.py:\d+: .*data of a tensor"):
        capture(Steered(), torch.randn(2, 4))
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_who_asks_for_torchs_logs_gets_them(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCH_LOGS", "export")
    with pytest.raises(CaptureError):
        capture(Steered(), torch.randn(2, 4))
    assert "def forward" in capfd.readouterr().err
