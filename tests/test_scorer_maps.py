"""apoz, bn-scale, chip and fpgm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring import analysed, build, labelled, pictures, run, score
from torch import Tensor, nn

from slimc.errors import UsageError
from slimc.scorers import chip
from slimc.scorers.chip import independence


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


class Filters(nn.Module):
    """A convolution with given filters of one number each, and what reads it."""

    def __init__(self, filters: Tensor) -> None:
        super().__init__()
        count, inputs = filters.shape[:2]
        self.a, self.b = nn.Conv2d(inputs, count, 1, bias=False), nn.Conv2d(count, 2, 1)
        self.double()
        self.a.weight.data = filters.reshape(count, inputs, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


def fpgm(filters: Tensor, name: str = "fpgm") -> np.ndarray:
    model = Filters(filters)
    example = torch.randn(2, filters.shape[1], 4, 4, dtype=torch.float64)
    own = score(name, model, [example])["a.weight"]
    return np.asarray(own * float(filters.square().mean().sqrt()))  # the layer's root mean square is taken off


def test_fpgm_of_filters_on_a_line() -> None:
    np.testing.assert_allclose(fpgm(column(0, 1, 3, 7)), [11, 9, 9, 17])
    np.testing.assert_allclose(fpgm(column(0, 1, 3, 7), "fpgm-sum"), [11, 9, 9, 17])


def test_fpgm_prefers_the_centre_to_the_smallest_norm() -> None:
    points = torch.tensor([[3.0, 4], [0, 0], [3, 0], [0, 4], [1.5, 2]], dtype=torch.float64)
    np.testing.assert_allclose(fpgm(points), [14.5, 14.5, 14.5, 14.5, 10])
    shifted, turned = points + torch.tensor([5.0, -3.0]), points @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    np.testing.assert_allclose(fpgm(shifted), fpgm(points))
    np.testing.assert_allclose(fpgm(turned), fpgm(points))


def test_fpgm_tells_near_duplicates_apart_in_single_precision() -> None:
    # Inner products of vectors of length 1e3 would lose distances of 1e-3.
    model = Filters(torch.tensor([[1000.0, 0], [1000.0, 1e-3], [1000.0, 4e-3]])).float()
    own = score("fpgm", model, [torch.randn(2, 2, 4, 4)])["a.weight"]
    scale = float(model.a.weight.detach().square().mean().sqrt())
    np.testing.assert_allclose(own * scale, [5e-3, 4e-3, 7e-3], rtol=1e-4)


def test_fpgm_of_coupled_writers_joins_their_filters_or_adds_their_distances() -> None:
    model = build("resnet")
    vectors = []
    for name in ("stem.weight", "b.weight"):
        own = model.get_parameter(name).detach().flatten(1)
        vectors.append(own / own.square().mean().sqrt())
    joined = torch.cat(vectors, 1)
    distances = (joined[:, None] - joined).norm(dim=2).sum(1)
    np.testing.assert_allclose(run("fpgm", "resnet")[0], distances.numpy())
    added = torch.stack([(own[:, None] - own).norm(dim=2).sum(1) for own in vectors]).sum(0)
    np.testing.assert_allclose(run("fpgm-sum", "resnet")[0], added.numpy())


def test_bn_scale_is_the_mean_over_the_norms_of_a_channel() -> None:
    model = build("densenet")
    one, two, three = (model.get_parameter(f"n{i}.weight").detach().abs().numpy() for i in (1, 2, 3))
    stem, first, second = run("bn-scale", "densenet")
    np.testing.assert_allclose(stem, (one + two[:4] + three[:4]) / 3)
    np.testing.assert_allclose(first, (two[4:] + three[4:7]) / 2)
    np.testing.assert_allclose(second, three[7:])


def test_bn_scale_is_no_property_of_the_function() -> None:
    model = build("resnet")
    before = score("bn-scale", model)["a.weight"]
    x = pictures(2)
    wanted = model(x).detach()
    with torch.no_grad():
        for name in ("bn1.weight", "bn1.bias"):
            model.get_parameter(name)[0] *= 4
        model.get_parameter("b.weight")[:, 0] /= 4
    torch.testing.assert_close(model(x), wanted)
    assert score("bn-scale", model)["a.weight"][0] == pytest.approx(4 * before[0])


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 6)


class Rectified(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(2, 2, bias=False), activation, nn.Linear(2, 2)
        self.double()
        self.a.weight.data = torch.eye(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.SiLU(), Clamp()])
def test_apoz_counts_how_often_a_unit_is_off(activation: nn.Module) -> None:
    first = torch.tensor([0.0, 1, 0, -3, 2, 0], dtype=torch.float64)
    x = torch.stack([first, -torch.ones(6, dtype=torch.float64)], 1)
    own = score("apoz", Rectified(activation), [x])["a.weight"]
    np.testing.assert_allclose(own, [1 - 4 / 6, 0.0])  # the second is dead
    np.testing.assert_allclose(score("apoz", Rectified(activation), [7 * x])["a.weight"], own)


@pytest.mark.parametrize("activation", [nn.Identity(), nn.LeakyReLU(), nn.Tanh()])
def test_apoz_without_a_rectifier_is_refused_with_the_groups(activation: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"none follows any of these groups: a.weight"):
        score("apoz", Rectified(activation), [torch.randn(2, 2).double()])


def test_apoz_against_hooks_on_an_eager_module() -> None:
    model, shares = build("mobilenet"), {name: torch.zeros(8, dtype=torch.float64) for name in ("expand", "depth")}
    for x, _ in labelled():
        handles = []
        for name in shares:

            def hook(_m: nn.Module, _i: object, out: Tensor, name: str = name) -> None:
                shares[name] = shares[name] + (out != 0).double().mean((0, 2, 3)) / 3

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        with torch.no_grad():
            model(x)
        for handle in handles:
            handle.remove()
    names = [group.name for group in analysed("mobilenet").groups]
    wanted = (shares["expand"] + shares["depth"]) / 2
    np.testing.assert_allclose(run("apoz", "mobilenet")[names.index("expand.0.weight")], wanted.numpy())


def brute_force(maps: Tensor, each: int) -> Tensor:
    norm = torch.linalg.matrix_norm(maps, "nuc")
    falls = []
    for start in range(0, len(maps), each):
        without = maps.clone()
        without[start : start + each] = 0
        falls.append(norm - torch.linalg.matrix_norm(without, "nuc"))
    return torch.stack(falls)


def test_chip_of_three_maps() -> None:
    fall, norm = independence(torch.tensor([[1.0, 0], [0, 1], [1, 0]], dtype=torch.float64))
    torch.testing.assert_close(fall, torch.tensor([2**0.5 - 1, 1, 2**0.5 - 1], dtype=torch.float64))
    assert float(norm) == pytest.approx(1 + 2**0.5)


def test_chip_of_orthogonal_maps_is_their_length() -> None:
    scale = torch.tensor([3.0, 1e-3, 7.0, 0.0], dtype=torch.float64)
    fall, _ = independence(torch.diag(scale))
    torch.testing.assert_close(fall, scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("rows", "positions", "each"), [(8, 20, 1), (20, 8, 1), (12, 20, 3), (12, 5, 4), (6, 1, 1)])
def test_chips_one_decomposition_equals_one_for_each_channel(rows: int, positions: int, each: int) -> None:
    maps = torch.randn(rows, positions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[1] = maps[0]  # a map that another one replaces entirely
    torch.testing.assert_close(independence(maps, each)[0], brute_force(maps, each), rtol=1e-6, atol=1e-7)


def test_chip_against_maps_of_an_eager_module() -> None:
    model, total = build("resnet"), torch.zeros(4, dtype=torch.float64)
    for x, _ in labelled():
        with torch.no_grad():
            y = model.relu(model.bn0(model.stem(x)))  # type: ignore[operator]
            maps = torch.relu(model.bn1(model.a(y))).flatten(2)  # type: ignore[operator]
        total += torch.stack([brute_force(own, 1) for own in maps]).sum(0)
    np.testing.assert_allclose(run("chip", "resnet")[1], total.numpy() / 12, rtol=1e-6, atol=1e-7)


def falls_of_the_stream(part: slice) -> tuple[Tensor, Tensor]:
    """Of the small ResNet's stream, by sample: at the block's first convolution and in front of the pooling."""
    model, found = build("resnet"), []
    with torch.no_grad():
        for x, _ in labelled():
            y = torch.relu(model.bn0(model.stem(x)))  # type: ignore[operator]
            z = torch.relu(y + model.bn2(model.b(torch.relu(model.bn1(model.a(y))))))  # type: ignore[operator]
            found.append((y.flatten(2), z.flatten(2)))
    return tuple(  # type: ignore[return-value]
        torch.stack([brute_force(own, 1) / torch.linalg.matrix_norm(own, "nuc") for own in torch.cat(values)[part]])
        for values in zip(*found, strict=True)
    )


def test_chip_sums_the_values_of_a_group_relative_to_their_norm() -> None:
    first, last = falls_of_the_stream(slice(None))
    np.testing.assert_allclose(run("chip", "resnet")[0], (first.mean(0) + last.mean(0)).numpy(), rtol=1e-6, atol=1e-7)


def test_chip_looks_at_a_part_of_the_samples_where_all_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "_AT_LEAST", 0.0)
    monkeypatch.setattr(chip, "_SHARE", 1e-3)
    monkeypatch.setattr(chip, "_FEWEST", 8)
    own = score("chip", build("resnet"), labelled())
    # 12 samples; the stream has two values, of which each is looked at in every third sample, in different ones.
    first, last = falls_of_the_stream(slice(0, None, 3))[0], falls_of_the_stream(slice(1, None, 3))[1]
    wanted = (first.mean(0) + last.mean(0)).numpy()
    np.testing.assert_allclose(own["stem.weight"], wanted, rtol=1e-6, atol=1e-7)
    # Of the other group there are not twice as many matrices as it must have: all count.
    np.testing.assert_allclose(own["a.weight"], run("chip", "resnet")[1], rtol=1e-6, atol=1e-7)


def test_chip_without_maps_is_refused_with_the_groups() -> None:
    with pytest.raises(UsageError, match=r"have one position only: a.weight"):
        score("chip", Rectified(nn.ReLU()), [torch.randn(4, 2).double()])


class Swapped(nn.Module):
    """Its layers see [positions, samples, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x.transpose(0, 1)))).transpose(0, 1)  # type: ignore[no-any-return]


def test_chip_tells_samples_apart_wherever_their_axis_is() -> None:
    model, x = Swapped(), torch.randn(9, 5, 6, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        maps = torch.relu(model.a(x)).mT
    wanted = torch.stack([brute_force(own, 1) for own in maps]).mean(0)
    np.testing.assert_allclose(score("chip", model, [x])["a.weight"], wanted.numpy(), rtol=1e-6, atol=1e-7)
