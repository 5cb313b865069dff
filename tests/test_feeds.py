from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimc.datasets import FASHION_MNIST
from slimc.errors import UsageError
from slimc.graph.example import Example
from slimc.training.feeds import Arrays, augment, open_training

PICTURE = Example.of(torch.zeros(2, 1, 8, 8))


def rows(batches: Any) -> Tensor:
    return torch.cat([batch[0].flatten(1) for batch in batches])


def test_arrays_are_whole_in_order_where_they_are_looked_at() -> None:
    data = torch.arange(10.0)[:, None]
    assert torch.equal(rows(Arrays([data, data], 4)), data)
    assert len(Arrays([data, data], 4)) == 3


def test_arrays_are_mixed_and_of_full_batches_where_they_are_trained_on() -> None:
    data = torch.arange(10.0)[:, None]
    batches = list(Arrays([data, 2 * data], 4, trains=True))
    assert [len(x) for x, _ in batches] == [4, 4]
    assert len(Arrays([data, data], 4, trains=True)) == 2
    seen = rows(batches).flatten().tolist()
    assert len(set(seen)) == 8
    assert seen != sorted(seen)
    assert all(torch.equal(2 * x, y) for x, y in batches)


def test_augmented_pictures_are_mirrored_and_moved_and_nothing_else() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 2, 14, 14)
    found = augment(image.expand(64, -1, -1, -1))
    assert found.shape == (64, 2, 14, 14)
    inner = (slice(None), slice(2, -2), slice(2, -2))
    same = [
        any(
            torch.equal(one[inner], image[0].flip(2).roll((r, c), (1, 2))[inner])
            or torch.equal(one[inner], image[0].roll((r, c), (1, 2))[inner])
            for r in (-1, 0, 1)
            for c in (-1, 0, 1)
        )
        for one in found
    ]
    assert all(same)
    assert len({bytes(one.numpy()) for one in found}) > 6  # 18 outcomes


def test_an_npz_file_is_split_and_never_shares_a_sample(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(60, 1)
    np.savez(tmp_path / "data.npz", x=values, y=np.arange(60))
    feeds = open_training(f"npz:{tmp_path / 'data.npz'}", Example.of(torch.zeros(2, 1)), batch_size=10)
    train, validation = (set(rows(part).flatten().tolist()) for part in (feeds.train, feeds.validation))
    assert (len(train), len(validation), feeds.test) == (50, 10, None)
    assert not train & validation


def test_an_npz_file_without_labels_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 1)))
    with pytest.raises(UsageError, match="inputs, then labels"):
        open_training(f"npz:{tmp_path / 'data.npz'}", PICTURE)


def save(folder: Path, classes: dict[str, int]) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(folder / name / f"{number}.png")


def test_a_folder_of_pictures_has_a_class_for_each_folder(tmp_path: Path) -> None:
    save(tmp_path / "train", {"cat": 4, "dog": 4})
    save(tmp_path / "val", {"cat": 1, "dog": 2})
    save(tmp_path / "test", {"dog": 1})
    feeds = open_training(f"imagefolder:{tmp_path}", PICTURE, batch_size=4)
    images, labels = zip(*feeds.train, strict=True)
    assert [tuple(part.shape) for part in images] == [(4, 1, 8, 8)] * 2
    assert sorted(torch.cat(labels).tolist()) == [0] * 4 + [1] * 4
    assert sorted(torch.cat([y for _, y in feeds.validation]).tolist()) == [0, 1, 1]
    assert feeds.test is not None
    assert [y.tolist() for _, y in feeds.test] == [[1]]


def test_a_folder_without_parts_is_split_the_same_way_every_time(tmp_path: Path) -> None:
    save(tmp_path, {"cat": 6, "dog": 6})
    parts = [open_training(f"imagefolder:{tmp_path}", PICTURE, batch_size=2) for _ in range(2)]
    assert [len(list(part.train)) for part in parts] == [5, 5]
    assert all(torch.equal(rows(parts[0].validation), rows(part.validation)) for part in parts)


def test_a_class_that_is_not_trained_on_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "train", {"cat": 1, "dog": 1})
    save(tmp_path / "val", {"cow": 1})
    with pytest.raises(UsageError, match="'cow'"):
        open_training(f"imagefolder:{tmp_path}", PICTURE)
    with pytest.raises(UsageError, match="a folder for each class"):
        open_training(f"imagefolder:{tmp_path / 'val'}", PICTURE)


def test_class_folders_may_be_links_and_what_is_hidden_is_no_class(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere", {"cat": 3, "dog": 3})
    (tmp_path / "data" / ".cache").mkdir(parents=True)
    (tmp_path / "data" / "stray.png").write_bytes(b"no picture of a class")
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "elsewhere")
    feeds = open_training(f"imagefolder:{tmp_path / 'data'}", PICTURE, batch_size=1)
    labels = torch.cat([y for part in (feeds.train, feeds.validation) for _, y in part])
    assert set(labels.tolist()) == {0, 1}
    (tmp_path / "data" / "empty").mkdir()
    with pytest.raises(UsageError, match="'empty' holds no picture"):
        open_training(f"imagefolder:{tmp_path / 'data'}", PICTURE)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((4, 1)), "mean": 0.5}, "one entry of each"),
        ({"x": np.zeros((1, 1)), "y": [0]}, "holds 1 sample"),
    ],
)
def test_arrays_that_cannot_be_split_are_refused(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UsageError, match=said):
        open_training(f"npz:{tmp_path / 'data.npz'}", PICTURE)


@pytest.mark.parametrize("text", ["", ":f", "./d.py:f", "./pictures", "module"])
def test_what_names_no_training_data_is_refused_with_what_does(text: str) -> None:
    with pytest.raises(UsageError, match=r"wanted fashion-mnist.*package\.module:function"):
        open_training(text, PICTURE)


def test_errors_in_a_loader_of_the_users_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_loaders.py").write_text(
        "class Broken:\n    def __iter__(self):\n        raise FileNotFoundError('labels.csv')\n"
        "def loaders():\n    return Broken(), Broken()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    feeds = open_training("own_loaders:loaders", PICTURE)
    with pytest.raises(UsageError, match=r"own_loaders:loaders failed with FileNotFoundError: labels\.csv"):
        list(feeds.train)
    with pytest.raises(UsageError, match="makes its own batches"):
        open_training("own_loaders:loaders", PICTURE, batch_size=8)


def test_digits_come_in_three_parts() -> None:
    feeds = open_training("digits:", Example.of(torch.zeros(2, 1, 24, 24)))
    assert feeds.test is not None
    counts = [sum(len(y) for _, y in part) for part in (feeds.validation, feeds.test)]
    assert counts == [270, 450]


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_keeps_its_test_set_apart() -> None:
    feeds = open_training(f"fashion-mnist:{FASHION_MNIST}", Example.of(torch.zeros(2, 1, 28, 28)))
    assert isinstance(feeds.train, Arrays)
    assert isinstance(feeds.validation, Arrays)
    assert isinstance(feeds.test, Arrays)
    assert [len(part.tensors[0]) for part in (feeds.train, feeds.validation, feeds.test)] == [50_000, 10_000, 10_000]
    assert (feeds.train.augmented, feeds.validation.augmented, feeds.test.trains) == (True, False, False)
