from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from slimc.data import open_data
from slimc.datasets import load_arrays, picture
from slimc.errors import UsageError
from slimc.graph.example import Example
from slimc.samples import collect

X, Y, LABELS = torch.arange(12.0).view(4, 3), torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)
ONE = Example((X,), {})
TWO = Example((X, Y), {})
NAMED = Example((), {"left": X, "right": Y})


def only(batch: Any, like: Example) -> Example:
    (found,) = collect([batch], like).batches
    return found.example


@pytest.mark.parametrize("batch", [X, (X,), [X], (X, LABELS), [X, LABELS], (X, LABELS, "name")])
def test_a_batch_gives_the_input_of_a_model_with_one(batch: Any) -> None:
    example = only(batch, ONE)
    assert len(example.args) == 1
    assert torch.equal(example.args[0], X)
    assert not example.kwargs


@pytest.mark.parametrize("batch", [(X, Y), (X, Y, LABELS), [X, Y, LABELS], ((X, Y), LABELS), ([X, Y],)])
def test_a_batch_gives_the_first_inputs_of_a_model_with_several(batch: Any) -> None:
    example = only(batch, TWO)
    assert [t.shape for t in example.args] == [X.shape, Y.shape]


@pytest.mark.parametrize(
    "batch",
    [{"left": X, "right": Y}, {"labels": LABELS, "right": Y, "left": X}, ({"right": Y, "left": X}, LABELS)],
)
def test_a_dictionary_gives_the_arguments_in_the_models_order(batch: Any) -> None:
    example = only(batch, NAMED)
    assert list(example.kwargs) == ["left", "right"]
    assert all(torch.equal(a, b) for a, b in zip(example.tensors(), (X, Y), strict=True))


def test_what_is_no_tensor_in_the_example_need_not_be_in_a_batch() -> None:
    assert only(X, Example((X, None, True), {})).args[1:] == (None, True)
    assert only({"x": X}, Example((), {"x": X, "cache": False})).kwargs["cache"] is False


@pytest.mark.parametrize(
    ("batch", "like", "said"),
    [
        ((), ONE, "a tuple of 0; wanted a tensor or (inputs, targets)"),
        ("text", ONE, "a str; wanted a tensor"),
        (3, ONE, "a int"),
        ({"left": X}, ONE, "a dict; wanted a tensor"),
        (X, TWO, "a tuple of 1; wanted a tuple of 2 inputs"),
        ({"left": X, "labels": LABELS}, NAMED, "lacks right; it has left, labels"),
        ({}, NAMED, "lacks left, right; it has nothing"),
        (X, NAMED, "wanted a dictionary with left, right"),
        (X.double(), ONE, "float64 [N, 3]; the example input is float32 [N, 3]"),
        (X.double(), ONE, "if the model takes it: --input 2x3:float64"),
        (X.view(4, 1, 3), ONE, "float32 [N, 1, 3]; the example input is float32 [N, 3]"),
        (X.view(4, 1, 3), ONE, "if the model takes it: --input 2x1x3"),
        ((Y, X), TWO, "float32 [N, 2]; float32 [N, 3]; the example input is"),
        (("text", LABELS), ONE, "no tensors; the example input is"),
    ],
)  # fmt: skip
def test_a_batch_with_other_inputs_is_refused_with_what_it_holds(batch: Any, like: Example, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        only(batch, like)
    assert str(refused.value).startswith("a batch of --data ")
    assert said in str(refused.value)


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (4, 1), (5, 2), (8, 2), (100, 3)])
def test_batches_are_read_until_there_are_samples_enough(limit: int, batches: int) -> None:
    read = []

    def three() -> Iterator[Tensor]:
        for number in range(3):
            read.append(number)
            yield X

    found = collect(three(), ONE, limit)
    assert len(found.batches) == batches
    assert found.count == min(limit, 12)
    assert len(read) == batches


def test_batches_are_split_to_the_only_size_that_a_model_takes() -> None:
    rows = torch.arange(33.0).view(11, 3)
    parts = collect([rows[:7], rows[7:8], rows[8:]], ONE, batch=2).examples()
    assert [part.args[0][:, 0].tolist() for part in parts] == [[0, 3], [6, 9], [12, 15], [24, 27]]


def test_a_data_loader_is_taken_as_it_is() -> None:
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=3)
    assert [batch.count for batch in collect(loader, ONE).batches] == [3, 1]


# -- from the command line ----------------------------------------------------------------------------


def test_an_npz_file_is_read_in_batches_of_all_its_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.arange(10.0).reshape(5, 2), y=np.arange(5))
    batches = list(open_data(f"npz:{tmp_path / 'data.npz'}", ONE, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert [len(batch[0]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch[0] for batch in batches]), torch.arange(10.0).view(5, 2))
    assert batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64


def test_an_npy_file_holds_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    assert {name: tuple(t.shape) for name, t in load_arrays(tmp_path / "x.npy").items()} == {"input": (2, 3)}


def test_files_that_hold_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "ragged.npz", x=np.ones((3, 2)), y=np.ones(4))
    np.savez(tmp_path / "scalar.npz", x=np.float32(1))
    np.savez(tmp_path / "texts.npz", x=np.array(["a", "b"]))
    np.savez(tmp_path / "half.npz", x=np.ones((2, 2)), y=np.ones(2))
    whole = (tmp_path / "half.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("missing", "text", "none", "ragged", "scalar", "texts", "half"):
        with pytest.raises(UsageError, match=rf"{name}\.npz"):
            open_data(f"npz:{tmp_path / name}.npz", ONE)
    with pytest.raises(UsageError, match=r"empty\.npy"):
        load_arrays(tmp_path / "empty.npy")


def test_pickled_objects_in_arrays_are_not_unpickled(tmp_path: Path) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (opened,))

    np.savez(tmp_path / "trap.npz", x=np.array([Trap()], dtype=object))
    with pytest.raises(UsageError, match=r"trap\.npz"):
        open_data(f"npz:{tmp_path / 'trap.npz'}", ONE)
    assert not opened.exists()


def test_a_function_of_the_users_own_package_gives_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_batches.py").write_text(
        "import torch\n"
        "def batches():\n    return [torch.ones(2, 3)]\n"
        "def number():\n    return 3\n"
        "def broken():\n    raise ValueError('no disk')\n"
        "value = 3\n"
    )
    (tmp_path / "our_broken.py").write_text("import no_such_package\n")
    (tmp_path / "our_files.py").write_text("open('no/such/labels.csv')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (batch,) = open_data("our_batches:batches", ONE)
    assert torch.equal(batch, torch.ones(2, 3))
    for name, said in (
        ("our_batches:number", "returned int"),
        ("our_batches:missing", "cannot be imported"),
        ("our_batches:value", "int"),
        ("our_batches:broken", "ValueError: no disk"),
        ("our_broken:batches", "no_such_package"),
        ("no_such_module:batches", "cannot be imported"),
        ("our_files:batches", "FileNotFoundError"),
    ):
        with pytest.raises(UsageError) as refused:
            open_data(name, ONE)
        assert f"--data {name}" in str(refused.value)
        assert said in str(refused.value)


@pytest.mark.parametrize("text", ["", "npz", "npz:", "module", ":function"])
def test_a_source_without_both_parts_is_refused(text: str) -> None:
    with pytest.raises(
        UsageError,
        match=r"wanted npz:FILE, fashion-mnist:DIR, imagefolder:DIR, synthetic:KIND or package\.module:function",
    ):
        open_data(text, ONE)


def test_what_goes_wrong_while_the_users_batches_are_read_is_said_to_be_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "our_streams.py").write_text(
        "import torch\n"
        "def stream():\n    yield torch.ones(2, 3)\n    raise KeyError('row 3')\n"
        "class Rows(torch.utils.data.Dataset):\n"
        "    def __len__(self):\n        return 9\n"
        "    def __getitem__(self, row):\n        raise ValueError('bad sample')\n"
        "def loader():\n    return torch.utils.data.DataLoader(Rows(), num_workers=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, said in (("stream", "failed with KeyError: 'row 3'"), ("loader", "ValueError: bad sample")):
        with pytest.raises(UsageError) as refused:
            collect(open_data(f"our_streams:{name}", ONE), ONE)
        assert f"--data our_streams:{name}" in str(refused.value)
        assert said in str(refused.value)
        assert "Traceback" not in str(refused.value)


def test_a_batch_of_no_samples_is_passed_over() -> None:
    assert collect([X[:0], X, X[:0]], ONE).count == 4
    with pytest.raises(UsageError, match="gave no batch"):
        collect([X[:0]], ONE)


def test_what_is_not_iterable_is_no_data() -> None:
    with pytest.raises(UsageError, match="data is a int"):
        collect(5, ONE)  # type: ignore[arg-type]


def test_a_dictionary_may_be_the_models_only_argument() -> None:
    like = Example(({"left": X, "right": Y},), {})
    for batch in ({"left": X, "right": Y}, ({"left": X, "right": Y},), ({"left": X, "right": Y}, LABELS)):
        assert [t.shape for t in only(batch, like).tensors()] == [X.shape, Y.shape]


@pytest.mark.parametrize(
    ("kind", "read"), [(">f4", "float32"), (">f8", "float32"), ("<f2", "float32"), (">i8", "int64")]
)
def test_arrays_are_read_in_any_byte_order_and_floats_as_float32(kind: str, read: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6).astype(kind).reshape(2, 3))
    found = load_arrays(tmp_path / "x.npy")["input"]
    assert str(found.dtype) == f"torch.{read}"
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_only_an_example_that_can_be_asked_for_is_suggested() -> None:
    for batch in (X.to(torch.int16), torch.zeros(4)):
        with pytest.raises(UsageError) as refused:
            only(batch, ONE)
        assert "--input" not in str(refused.value)


def test_pictures_of_16_bits_are_read_like_those_of_8(tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    (tmp_path / "16.pgm").write_bytes(b"P5 8 8 65535\n" + (grey.astype(">u2") * 257).tobytes())
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    for channels in (1, 3):
        shape = (channels, 8, 8)
        for name in ("16.png", "16.pgm"):
            torch.testing.assert_close(picture(tmp_path / name, shape), picture(tmp_path / "8.png", shape))
        with pytest.raises(UsageError, match=r"float\.tiff holds 32-bit values"):
            picture(tmp_path / "float.tiff", shape)


def test_arrays_are_inputs_by_name_where_the_example_has_these_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", meta=np.ones((5, 2)), image=np.zeros((5, 3)), label=np.arange(5))
    like = Example((), {"image": torch.zeros(2, 3), "meta": torch.zeros(2, 2)})
    found = collect(open_data(f"npz:{tmp_path / 'named.npz'}", like), like)
    assert found.labelled
    assert found.batches[0].example.kwargs["image"].shape == (5, 3)
    assert torch.equal(torch.as_tensor(found.batches[0].targets), torch.arange(5))


def test_an_archive_of_other_files_is_no_npz(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as file:
        file.writestr("readme.txt", "no array")
    with pytest.raises(UsageError, match=r"no \.npz file: readme.txt"):
        load_arrays(tmp_path / "other.npz")


def test_the_only_input_of_a_named_example_needs_no_name_in_a_batch() -> None:
    like = Example((), {"pixels": X, "flag": True})
    for batch in (X, (X,), [X, LABELS]):
        assert torch.equal(only(batch, like).kwargs["pixels"], X)
    (found,) = collect([(X, LABELS)], like).batches
    assert found.targets is not None
    assert torch.equal(found.targets, LABELS)
    with pytest.raises(UsageError, match="wanted a dictionary with left, right"):
        only((X, Y), NAMED)


def test_loaders_for_training_give_what_they_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "both_loaders.py").write_text(
        "import torch\nfrom torch.utils.data import DataLoader\n"
        "def loaders():\n    return tuple(DataLoader(torch.full((4, 3), v), batch_size=2) for v in (1.0, 2.0))\n"
    )
    (tmp_path / "both_lists.py").write_text(
        "import torch\n"
        "def loaders():\n    return tuple([(torch.full((2, 3), v), torch.zeros(2))] * 2 for v in (1.0, 2.0))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert [float(batch.mean()) for batch in open_data("both_loaders:loaders", ONE)] == [1.0, 1.0]
    assert [float(inputs.mean()) for inputs, _ in open_data("both_lists:loaders", ONE)] == [1.0, 1.0]


@pytest.mark.parametrize("count", [48, 100])
def test_files_are_read_in_batches_that_a_fixed_model_takes(count: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((2 * count, 3)))
    like = Example.of(torch.zeros(count, 3))
    assert collect(open_data(f"npz:{tmp_path / 'data.npz'}", like), like, batch=count).count == 2 * count


def test_damaged_files_are_named(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(400, 3)))
    content = bytearray((tmp_path / "data.npz").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = b"\xff" * 40
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"data\.npz cannot be read"):
        load_arrays(tmp_path / "data.npz")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "broken.png")
    whole = (tmp_path / "broken.png").read_bytes()
    place = whole.index(b"IDAT")
    (tmp_path / "broken.png").write_bytes(whole[:place] + b"\x00\x00\x00\x00" + whole[place + 4 :])
    with pytest.raises(UsageError, match=r"broken\.png cannot be read as a picture"):
        picture(tmp_path / "broken.png", (1, 8, 8))
