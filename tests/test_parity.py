from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from slimc.errors import ParityError, UsageError
from slimc.exporters import parity
from slimc.exporters.formats import onnx as onnx_format
from slimc.exporters.parity import check, check_onnx, other_inputs, relative_error


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()


def written(model: nn.Module, path: Path) -> tuple[onnx_format.OnnxModel, Tensor]:
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},), strict=False)
    return onnx_format.export(program, path), x


def test_a_true_export_agrees_at_every_batch_size(tmp_path: Path) -> None:
    model = net()
    file, x = written(model, tmp_path / "m.onnx")
    found = check_onnx(file.path, model, other_inputs((x,), file.batched))
    assert found.max_relative_error < 1e-5
    assert (found.cases, found.batches, found.outputs_vary) == (4, (1, 2, 3), True)


def test_one_changed_weight_is_found_and_named(tmp_path: Path) -> None:
    model = net()
    file, x = written(model, tmp_path / "m.onnx")
    with torch.no_grad():
        model.get_parameter("4.bias")[3] += 1e-3
    with pytest.raises(ParityError, match=r"case 1 of 4 .*output 'output' differs .* relative"):
        check_onnx(file.path, model, other_inputs((x,), file.batched))


def test_an_error_in_small_outputs_is_not_excused_by_an_absolute_tolerance(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        for name in ("4.weight", "4.bias"):
            model.get_parameter(name).mul_(1e-9)
    file, x = written(model, tmp_path / "m.onnx")
    check_onnx(file.path, model, [(x,)])
    with torch.no_grad():
        model.get_parameter("4.bias").mul_(2)
    with pytest.raises(ParityError):
        check_onnx(file.path, model, [(x,)])


def test_a_net_that_answers_the_same_to_everything_is_reported_as_such(tmp_path: Path) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    file, x = written(Constant(), tmp_path / "m.onnx")
    assert not check_onnx(file.path, Constant(), other_inputs((x,), file.batched)).outputs_vary


def test_the_measure_is_the_largest_difference_over_the_largest_value() -> None:
    # 0.5 apart at most, largest value 4: 0.125
    assert relative_error(torch.tensor([1.0, -4.5, 2.0]), torch.tensor([1.25, -4.0, 2.0])) == 0.125


def test_an_all_zero_output_is_measured_by_its_size_in_other_cases() -> None:
    zero, nearly = torch.zeros(2), torch.tensor([0.0, 1e-3])
    assert relative_error(zero, zero) == 0.0
    assert relative_error(nearly, zero) == math.inf
    assert relative_error(nearly, zero, 10.0) == pytest.approx(1e-4)


def test_a_zero_case_borrows_the_scale_of_the_others() -> None:
    cases = [(torch.zeros(1),), (torch.full((1,), 100.0),)]

    def run(case: tuple[Tensor, ...]) -> list[Tensor]:
        return [case[0] + 1e-4]

    found = check(run, lambda x: x, cases, names=["y"], batched=[False], label="m")
    assert found.max_relative_error == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (torch.tensor([math.nan]), torch.tensor([1.0]), "not a number"),
        (torch.tensor([1.0]), torch.tensor([math.nan]), "of the model itself"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.inf]), "infinite in other places"),
        (torch.tensor([math.inf, 2.0]), torch.tensor([1.0, 2.0]), "infinite in other places"),
        (torch.tensor([math.inf]), torch.tensor([-math.inf]), "infinite in other places"),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), "shape"),
        (torch.tensor([1]), torch.tensor([1.0]), "type"),
    ],
)
def test_what_is_no_close_number_fails(actual: Tensor, expected: Tensor, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        relative_error(actual, expected)


def test_equal_infinities_and_empty_outputs_agree() -> None:
    masked = torch.tensor([-math.inf, 2.0])
    assert relative_error(masked, masked.clone()) == 0.0
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_whole_numbers_must_be_equal() -> None:
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0.0
    assert relative_error(torch.tensor([1, 3]), torch.tensor([1, 2])) == math.inf


@pytest.mark.parametrize(("size", "flipped", "own", "passes"), [
    (10_000, 2, 0, True), (10_000, 8, 3, True), (10_000, 5, 0, False), (10_000, 20, 20, False), (8, 1, 0, False),
])  # fmt: skip
def test_near_ties_of_an_argmax_may_fall_to_either_side(size: int, flipped: int, own: int, passes: bool) -> None:
    true = torch.arange(size) % 7

    def with_flips(count: int, start: int) -> Tensor:
        values = true.clone()
        values[start : start + count] += 1
        return values

    def run() -> float:
        return check(
            lambda case: [with_flips(flipped, 0)], lambda x: with_flips(own, size // 2), [(torch.zeros(1),)],
            names=["y"], batched=[False], label="m", exact=lambda x: true,
        ).max_relative_error  # fmt: skip

    if passes:
        assert run() == pytest.approx((flipped + own) / size)
    else:
        with pytest.raises(ParityError, match=rf"{flipped} of {size} from float64's \(the model {own}\)"):
            run()


def test_other_inputs_are_not_what_an_example_was_drawn_as() -> None:
    tokens = torch.randint(0, 2, (2, 16), generator=torch.Generator().manual_seed(0))
    assert all(not torch.equal(case[0], tokens) for case in other_inputs((tokens,), (True,))[1:])


def test_a_missing_output_fails() -> None:
    with pytest.raises(ParityError, match="has 1 outputs, the model 2"):
        check(
            lambda case: [case[0]],
            lambda x: (x, x),
            [(torch.ones(1),)],
            names=["y"],
            batched=[False],
            label="m",
        )


def test_no_inputs_prove_nothing() -> None:
    with pytest.raises(UsageError, match="at least one set"):
        check(lambda case: [], lambda: (), [], names=[], batched=[], label="m")


def _of_two_rows_or_more(x: Tensor) -> Tensor:
    return x + x[1]


def test_inputs_that_the_model_itself_refuses_are_left_out() -> None:
    inputs = [(torch.randn(rows, 4),) for rows in (2, 1, 3)]
    options: dict[str, Any] = {"names": ("y",), "batched": (True,), "label": "a file"}
    parity = check(lambda case: [_of_two_rows_or_more(*case)], _of_two_rows_or_more, inputs, **options)
    assert (parity.cases, parity.batches) == (2, (2, 3))
    with pytest.raises(IndexError):
        check(lambda case: [_of_two_rows_or_more(*case)], _of_two_rows_or_more, inputs[1:], **options)


def test_other_inputs_keep_type_and_range_and_fill_the_batch() -> None:
    tokens = torch.randint(5, 90, (2, 7))
    mask = torch.tensor([True, False])
    image = torch.rand(2, 3)
    sets = other_inputs((tokens, mask, image), (True, False, True))
    assert [tensor.shape[0] for tensor, _, _ in sets] == [2, 2, 1, 3]
    assert [tensor.shape[0] for _, tensor, _ in sets] == [2, 2, 2, 2]
    assert sets[0] == (tokens, mask, image)
    for ids, flags, pixels in sets[1:]:
        assert (ids.dtype, flags.dtype, pixels.dtype) == (tokens.dtype, mask.dtype, image.dtype)
        assert tokens.min() <= ids.min()
        assert ids.max() <= tokens.max()
        assert image.min() <= pixels.min()
        assert pixels.max() <= image.max()
    assert not torch.equal(sets[1][0], tokens)
    assert not torch.equal(sets[1][2], image)


def test_a_fixed_batch_gives_other_values_only() -> None:
    assert [case[0].shape for case in other_inputs((torch.rand(4, 2),), (False,))] == [(4, 2)] * 2


def test_an_example_of_zeros_does_not_make_a_check_of_zeros() -> None:
    assert other_inputs((torch.zeros(4, 4),), (False,))[1][0].std() > 0.1


def test_drawing_inputs_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = (other_inputs((torch.arange(9.0),), (False,)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[1][0], second[1][0])


def test_the_module_compares_without_numpys_tolerances() -> None:
    assert "allclose(" not in Path(parity.__file__).read_text()


def rounded_at(offset: float) -> Callable[[Tensor], Tensor]:
    """The identity, but for the digits that are lost next to `offset`."""
    return lambda x: (x + offset) - offset


def judged(run: Callable[[Tensor], Tensor], offset: float) -> parity.Parity:
    x = torch.linspace(-3, 3, 1001)
    return check(
        lambda case: [run(*case)],
        rounded_at(offset),
        [(x,)],
        names=("y",),
        batched=(False,),
        label="m.onnx",
        exact=lambda x: x.double(),
    )


def test_two_roundings_of_one_result_agree_if_the_file_is_as_near_to_float64_as_the_model() -> None:
    found = judged(rounded_at(1500.0), offset=3000.0)
    assert found.max_relative_error > 1e-5
    assert found.rounding is not None
    # Values near 3000 are 2**-12 apart, so that up to half of this is lost; the largest output is 3.
    assert found.rounding == pytest.approx(2**-13 / 3, rel=0.1)


def test_nothing_is_said_of_rounding_where_the_tolerance_holds() -> None:
    assert judged(rounded_at(30.0), offset=30.0).rounding is None


def test_a_fault_larger_than_the_models_own_rounding_is_refused() -> None:
    with pytest.raises(ParityError, match=r"output 'y' differs .* is 1\.\de-04 away from the model in float64, the"):
        judged(lambda x: rounded_at(1500.0)(x) * 1.0001, offset=3000.0)


def test_rounding_that_could_hide_a_fault_explains_nothing() -> None:
    with pytest.raises(ParityError, match="in float64, the model's own output 3"):
        judged(rounded_at(15000.0), offset=30000.0)


def test_an_error_without_a_float64_reference_is_refused() -> None:
    x = torch.linspace(-3, 3, 1001)
    with pytest.raises(ParityError, match="at most 1e-05 is allowed"):
        check(
            lambda case: [rounded_at(1500.0)(*case)],
            rounded_at(3000.0),
            [(x,)],
            names=("y",),
            batched=(False,),
            label="m.onnx",
        )


def test_rounding_that_cancels_out_in_one_case_is_judged_by_the_others() -> None:
    # Both cases end in the same outputs, one of them free of the model's rounding.
    x = torch.linspace(-3, 3, 1001)

    def model(x: Tensor, offset: Tensor) -> Tensor:
        return (x + offset) - offset

    found = check(
        lambda case: [model(case[0], torch.tensor(1500.0))],
        model,
        [(x, torch.tensor(0.0)), (x, torch.tensor(3000.0))],
        names=("y",),
        batched=(False, False),
        label="m.onnx",
        exact=lambda x, _: x.double(),
    )
    assert found.rounding == pytest.approx(2**-13 / 3, rel=0.1)


def test_large_outputs_are_compared_to_their_last_number() -> None:
    expected = torch.ones(2, 1_500_000)
    actual = expected.clone()
    actual[1, -1] = 1.5
    assert relative_error(actual, expected) == 0.5
    actual[1, -1] = math.nan
    with pytest.raises(ParityError, match="not a number"):
        relative_error(actual, expected)
