from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slimc.errors import UsageError
from slimc.inputs import example_inputs


@pytest.mark.parametrize("text", ["2x3x8x8", "2,3,8,8", "2x3,8x8", " 2x3x8x8 "])
def test_a_shape_gives_an_input_of_that_shape(text: str) -> None:
    (tensor,) = example_inputs([text], None, 0).args
    assert tensor.shape == (2, 3, 8, 8)
    assert tensor.dtype == torch.float32
    assert tensor.std() > 0.5


def test_a_batch_of_one_stays_unless_the_model_wants_another() -> None:
    for text, batch in (("1x3", 1), ("2x3", 2), ("5x3", 5)):
        assert example_inputs([text], None, 0).args[0].shape == (batch, 3)
    assert example_inputs(["1x3"], None, 0, batch=4).args[0].shape == (4, 3)
    assert example_inputs(["1"], None, 0).args[0].shape == (1,)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float32", torch.float32), ("float64", torch.float64), ("int64", torch.int64), ("long", torch.int64),
     ("int32", torch.int32), ("bool", torch.bool)],
)  # fmt: skip
def test_a_shape_may_name_its_type(kind: str, dtype: torch.dtype) -> None:
    (tensor,) = example_inputs([f"4x64:{kind}"], None, 0).args
    assert tensor.dtype == dtype
    assert len(tensor.unique()) > 1


def test_every_input_has_its_own_shape() -> None:
    image, text = example_inputs(["2x3x8x8", "2x16:int64"], None, 0).args
    assert (image.shape, text.shape) == ((2, 3, 8, 8), (2, 16))


def test_the_shape_that_the_model_is_known_to_take_needs_no_option() -> None:
    assert example_inputs([], (3, 8, 8), 0).args[0].shape == (2, 3, 8, 8)
    assert example_inputs(["2x3x4x4"], (3, 8, 8), 0).args[0].shape == (2, 3, 4, 4)


def test_the_seed_decides_the_values_and_no_global_state_does() -> None:
    state = torch.get_rng_state()
    first, again, other = (example_inputs(["2x3"], None, seed).args[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_names_the_arguments_unless_its_names_say_nothing(tmp_path: Path) -> None:
    x, y = np.ones((2, 3)), np.zeros((2, 4), np.int64)
    np.savez(tmp_path / "named.npz", image=x, ids=y)
    np.savez(tmp_path / "unnamed.npz", x, y)
    np.savez(tmp_path / "input.npz", input=x)
    np.save(tmp_path / "one.npy", x)
    named = example_inputs([str(tmp_path / "named.npz")], None, 0)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in named.kwargs.items()} == {
        "image": (torch.float32, (2, 3)),
        "ids": (torch.int64, (2, 4)),
    }
    assert [tuple(t.shape) for t in example_inputs([str(tmp_path / "unnamed.npz")], None, 0).args] == [(2, 3), (2, 4)]
    for file in ("input.npz", "one.npy"):
        (only,) = example_inputs([str(tmp_path / file)], None, 0).args
        assert torch.equal(only, torch.ones(2, 3))


@pytest.mark.parametrize("text", ["", "3y4", "2x", "x3", "2x-3", "2x3.5", "image.png", "2x3x"])
def test_what_is_no_shape_is_refused_with_shapes_that_are(text: str) -> None:
    with pytest.raises(UsageError, match=r"wanted a shape with its batch \(1x3x224x224"):
        example_inputs([text], None, 0)


def test_inputs_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones(2))
    for given, said in (
        ([], "give it with --input"),
        (["2x0"], "at least 1"),
        (["2x3:complex7"], "unknown type 'complex7'"),
        ([str(tmp_path / "x.npz"), "2x3"], "one file with all inputs"),
        ([str(tmp_path / "none.npz")], "none.npz"),
        (["2x999999999999x999999999999"], "too large"),
    ):
        with pytest.raises(UsageError) as refused:
            example_inputs(given, None, 0)
        assert said in str(refused.value)


def test_a_single_array_need_not_have_the_arguments_name_and_several_must(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    np.savez(tmp_path / "one.npz", pictures=np.ones((2, 3), np.float32))
    (own,) = example_inputs([str(tmp_path / "one.npz")], None, 0, None, model).args
    assert own.shape == (2, 3)
    np.savez(tmp_path / "two.npz", pictures=np.ones((2, 3)), labels=np.ones(2))
    with pytest.raises(UsageError, match=r"holds pictures, labels; .* the model takes input"):
        example_inputs([str(tmp_path / "two.npz")], None, 0, None, model)


def test_arrays_are_put_in_the_order_of_a_graphs_inputs(tmp_path: Path) -> None:
    class Graph(nn.Module):
        input_names = ("image", "ids")

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return inputs[0]

    np.savez(tmp_path / "named.npz", ids=np.zeros((2, 4), np.int64), image=np.ones((2, 3)))
    example = example_inputs([str(tmp_path / "named.npz")], None, 0, model=Graph())
    assert [tuple(tensor.shape) for tensor in example.args] == [(2, 3), (2, 4)]
    np.savez(tmp_path / "half.npz", image=np.ones((2, 3)))
    with pytest.raises(UsageError, match="lacks ids"):
        example_inputs([str(tmp_path / "half.npz")], None, 0, model=Graph())
