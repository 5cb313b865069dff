"""Loaders as users have them, what their losses and metrics may do, and what is found out before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import Stop, begin, crash_after, dataset, weights
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import slimc
from slimc.errors import UsageError
from slimc.graph.example import Example
from slimc.training import loop
from slimc.training.feeds import Arrays, open_training
from slimc.training.loop import Hooks
from slimc.training.recipe import Recipe

OPTIONS: dict[str, Any] = {"flops": 0.6, "epochs": 1, "round_to": 1, "recover": "none"}


# -- loaders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stays", [False, True])
def test_a_loader_with_random_numbers_of_its_own_goes_on_to_the_same_weights(
    stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def data() -> DataLoader[Any]:
        own: dict[str, Any] = {"num_workers": 1, "persistent_workers": True} if stays else {}
        own |= {} if stays else {"generator": torch.Generator().manual_seed(1)}
        return DataLoader(dataset(), 16, shuffle=True, **own)

    whole = weights(begin("iterative", data=data(), settings={"steps": 3}))
    options = {"data": data(), "settings": {"steps": 3}, "folder": tmp_path}
    with monkeypatch.context() as patched:
        crash_after(13, patched)
        with pytest.raises(Stop):
            _ = begin("iterative", **options).result
    again = weights(begin("iterative", **options | {"data": data()}, resume=True))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_workers_that_stay_serve_training_alone() -> None:
    loader: DataLoader[Any] = DataLoader(dataset(), 16, num_workers=1, persistent_workers=True)
    run = begin("iterative", data=loader, val=loader, settings={"steps": 3})
    assert run.stream is not None
    first = run.stream.next()
    assert len(list(loader)) == 6  # as validation, or the samples of a scorer, read it
    others = [run.stream.next() for _ in range(5)]
    assert run.stream.ended
    found = torch.cat([batch.example.args[0] for batch in (first, *others)])
    assert torch.equal(found, dataset().tensors[0])


class Longer:
    """Says that it has more batches than it gives, or gives an empty one at the end."""

    def __init__(self, empty: bool) -> None:
        images, labels = dataset(80).tensors
        self.batches = list(zip(images.split(16), labels.split(16), strict=True))  # type: ignore[no-untyped-call]
        if empty:
            self.batches.append((images[:0], labels[:0]))

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.mark.parametrize("empty", [False, True])
def test_epochs_end_where_a_loader_has_fewer_batches_than_it_says(empty: bool) -> None:
    ends: list[int] = []
    run = begin("one-shot", data=Longer(empty), epochs=3)
    assert run.stream is not None
    hooks = Hooks(after_epoch=lambda: ends.append(own.done))
    own = loop.Loop(run.network.module, run.stream, 16, Recipe(rate=0.01), hooks=hooks)
    for _ in range(16):
        own.step()
    assert ends == [5, 10, 15]


def test_what_is_no_iterable_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="the training data is a function; wanted an iterable of batches"):
        begin(data=lambda: [])
    with pytest.raises(UsageError, match="the validation data is a int; wanted an iterable of batches"):
        begin(val=5)


def test_a_last_batch_of_one_trains_auxiliary_heads_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(17, 6), torch.randint(0, 3, (17,))
    batches = list(zip(x.split(8), y.split(8), strict=True))  # type: ignore[no-untyped-call]
    run = slimc.schedule("dcp", model, x[:2], data=batches, **OPTIONS | {"epochs": 4})
    assert run.result.report.macs.after < run.result.report.macs.before


def test_a_run_that_failed_leaves_its_folder_free_while_its_workers_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data: DataLoader[Any] = DataLoader(dataset(), 16, num_workers=1)
    with monkeypatch.context() as patched:
        crash_after(8, patched)
        failed = begin("one-shot", data=data, folder=tmp_path)
        with pytest.raises(Stop):
            _ = failed.result
    assert failed.stream is not None  # it is still there, with its workers
    assert begin("one-shot", data=data, folder=tmp_path, resume=True).result.report.accuracy is not None


# -- losses and metrics -------------------------------------------------------------------------------


class Segmenting(nn.Module):
    """Gives maps; cuts them into rows with `view`, in training alone."""

    def __init__(self, views: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.views = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 2, 1), views

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.training and self.views:
            x = x.view(len(x), -1).view(x.shape)
        return self.b(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("views", [False, True])
def test_losses_metrics_and_models_may_view_maps(views: bool) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 1, 8, 8), torch.randn(4, 2, 8, 8)) for _ in range(3)]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(outputs.view(-1), targets.view(-1))

    def metric(outputs: Tensor, targets: Tensor) -> float:
        return float(outputs.view(len(outputs), -1).mean())

    run = slimc.schedule(
        "one-shot", Segmenting(views), batches[0][0], data=batches, val=batches, loss=loss, metric=metric, **OPTIONS
    )
    assert run.result.report.accuracy is not None


def test_a_loss_may_take_gradients_by_what_it_is_given() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found = functional.cross_entropy(outputs, targets)
        (slope,) = torch.autograd.grad(found, outputs, create_graph=True)
        return found + slope.square().sum()

    assert begin("one-shot", loss=loss).result.report.accuracy is not None


class Viewing(nn.Module):
    """Cuts maps into rows with `view`, in training alone, behind a norm and numbers drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.d = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.2)
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(torch.relu(self.n(self.a(x))))
        if self.training:
            x = x.view(len(x), -1).view(x.shape)
        return self.c(torch.relu(self.b(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_layout_that_training_does_not_take_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**options: Any) -> Any:
        torch.manual_seed(0)
        data: DataLoader[Any] = DataLoader(dataset(), 16, shuffle=True)
        return slimc.schedule(
            "one-shot", Viewing(), torch.zeros(2, 1, 8, 8), data=data, **OPTIONS | {"epochs": 3}, **options
        )

    whole = weights(run())
    with monkeypatch.context() as patched:
        crash_after(7, patched)
        with pytest.raises(Stop):
            _ = run(folder=tmp_path).result
    again = weights(run(folder=tmp_path, resume=True))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


class Pooling(nn.Module):
    """One class, two ways of reading its maps."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.a, self.b, self.flat = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * (64 if flat else 1), 3), flat

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.b(x.view(len(x), -1) if self.flat else x.mean((2, 3)))  # type: ignore[no-any-return]


def test_the_layout_is_tried_for_each_model_and_not_for_its_class() -> None:
    data: DataLoader[Any] = DataLoader(dataset(), 16)
    for flat in (False, True):
        run = slimc.schedule("one-shot", Pooling(flat), torch.zeros(2, 1, 8, 8), data=data, **OPTIONS)
        assert run.result.report.macs.after < run.result.report.macs.before


# -- the command line's data --------------------------------------------------------------------------


class Fixed(nn.Module):
    """Takes batches of four alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = torch.relu(self.a(x))
        return self.b(torch.stack([first, second, third, fourth]))  # type: ignore[no-any-return]


def test_files_are_read_in_batches_of_the_only_size_that_a_model_takes(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.random.randn(50, 6).astype(np.float32), y=np.zeros(50, np.int64))
    x = torch.randn(4, 6)
    feeds = open_training(f"npz:{tmp_path / 'data.npz'}", Example.of(x), 8)
    run = slimc.schedule("one-shot", Fixed(), x, data=feeds.train, val=feeds.validation, **OPTIONS)
    assert run.result.report.accuracy is not None


class Counting(nn.Module):
    """Takes any batch, but torch.export keeps the example's: it counts them in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.b(torch.relu(self.a(x[place]))) for place in range(x.shape[0])])


def test_files_are_read_in_batches_as_asked_where_the_model_takes_them() -> None:
    feed = Arrays([torch.randn(64, 6), torch.zeros(64, dtype=torch.int64)], 32, trains=True)
    run = slimc.schedule("one-shot", Counting(), torch.randn(2, 6), data=feed, **OPTIONS)
    assert run.stream is not None
    assert len(run.stream) == 2
    assert run.result.report.macs.after < run.result.report.macs.before


def test_an_error_that_has_nothing_to_do_with_sizes_is_told_as_it_is() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.steps = nn.Linear(6, 8), nn.Linear(8, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += self.training
            if self.steps > 6:
                raise OSError("disk full")
            return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    batches = [(torch.randn(size, 6), torch.zeros(size, dtype=torch.int64)) for size in (8, 5)]
    with pytest.raises(OSError, match="disk full"):
        _ = slimc.schedule("one-shot", Failing(), batches[0][0], data=batches, **OPTIONS | {"epochs": 9}).result


def test_arrays_that_have_the_names_of_inputs_are_given_by_name(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"labels": np.arange(12), "mask": np.ones((12, 5)), "tokens": np.zeros((12, 5), np.int64)}
    np.savez(tmp_path / "data.npz", **arrays)
    like = Example((), {"tokens": torch.zeros(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5)})
    feeds = open_training(f"npz:{tmp_path / 'data.npz'}", like, 4)
    batch = next(iter(feeds.train))
    assert batch.keys() == arrays.keys()
    assert batch["tokens"].shape == (4, 5)
    feeds = open_training(f"npz:{tmp_path / 'data.npz'}", Example.of(torch.zeros(2, 5)), 4)
    assert isinstance(next(iter(feeds.train)), tuple)
