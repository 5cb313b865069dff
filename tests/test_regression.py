"""What reconstruction is made of: rows of readers, and ridge regression from streamed rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from slimc import readers as reading
from slimc.graph.capture import capture
from slimc.regression import Moments, choose, ridges


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- rows of readers ----------------------------------------------------------------------------------

LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "plain": (nn.Conv2d(3, 4, 3), noise(2, 3, 7, 6)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), noise(2, 3, 7, 6)),
    "dilated": (nn.Conv2d(3, 4, (3, 2), dilation=(2, 1), padding=(2, 0)), noise(2, 3, 7, 6)),
    "same": (nn.Conv2d(3, 4, 4, padding="same"), noise(2, 3, 7, 6)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, bias=False), noise(2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), noise(2, 4, 5, 5)),
    "one axis": (nn.Conv1d(3, 4, 3, stride=2), noise(2, 3, 9)),
    "three axes": (nn.Conv3d(2, 3, 2, padding=1), noise(2, 2, 4, 5, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), noise(2, 4, 4, 5)),
    "transposed, wide edge": (nn.ConvTranspose1d(3, 2, 2, padding=3, dilation=2), noise(2, 3, 9)),
    "transposed, cut edge": (nn.ConvTranspose2d(4, 2, 1, stride=2, padding=1, output_padding=1), noise(2, 4, 5, 6)),
    "linear": (nn.Linear(5, 3), noise(2, 4, 5)),
    "product": (type("P", (nn.Module,), {"forward": lambda self, x: x @ self.w})(), noise(3, 5)),
}
LAYERS["product"][0].w = nn.Parameter(noise(5, 2, seed=3))


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_matrix_plus_bias_is_what_the_operator_computes(name: str) -> None:
    layer, x = LAYERS[name]
    module = capture(copy.deepcopy(layer), x).module
    ((node, reader),) = reading.readers(module).items()
    with torch.no_grad():
        wanted = layer(x)
    places = torch.arange(reader.places(wanted.shape))
    weight = module.get_parameter(reader.weight).detach()
    rows = reader.rows(x, weight, wanted.shape[2:], places)
    got = (rows @ reader.matrix(module).transpose(1, 2)).transpose(0, 1).flatten(1)
    if reader.bias is not None:
        got = got + module.get_parameter(reader.bias).detach()
    torch.testing.assert_close(got, reader.results(wanted, places), rtol=1e-4, atol=1e-5)
    assert node is reader.node


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_that_is_written_is_read_back(name: str) -> None:
    layer, x = LAYERS[name]
    module = capture(copy.deepcopy(layer), x).module
    ((_, reader),) = reading.readers(module).items()
    other = noise(*reader.matrix(module).shape, seed=9)
    reader.write(module, other)
    assert torch.equal(reader.matrix(module), other)


def test_weights_that_something_else_uses_are_no_readers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(self.one(x)))
            return out

    found = reading.readers(capture(Tied(), noise(2, 4)).module)
    assert [reader.weight for reader in found.values()] == ["two.weight"]


# -- regression ---------------------------------------------------------------------------------------


def moments(x: Tensor, r: Tensor) -> Moments:
    sums = Moments(1, x.shape[1], r.shape[1], x.device)
    for part_x, part_r in zip(x.chunk(3), r.chunk(3), strict=True):
        sums.add(part_x[None], part_r[None])
    return sums


@pytest.mark.parametrize(("rows", "inputs"), [(40, 5), (12, 30), (9, 300)])
@pytest.mark.parametrize("offset", [True, False])
def test_ridge_is_the_least_squares_solution_with_a_penalty_as_rows(rows: int, inputs: int, offset: bool) -> None:
    x, r = noise(rows, inputs).double() + 1, noise(rows, 2, seed=1).double() * 3 - 2
    sums = moments(x, r)
    (fit,) = ridges(sums, [0.1], offset)
    shift_x, shift_r = (x.mean(0), r.mean(0)) if offset else (torch.zeros(inputs), torch.zeros(2).double())
    centred = x - shift_x
    penalty = 0.1 * centred.square().sum(0).mean()
    stacked = torch.cat([centred, penalty.sqrt() * torch.eye(inputs).double()])
    wanted = torch.linalg.lstsq(stacked, torch.cat([r - shift_r, torch.zeros(inputs, 2).double()])).solution
    assert fit.change is not None
    rtol, atol = (1e-7, 1e-9) if inputs <= 256 else (1e-4, 1e-5)  # wider rows are kept in float32
    torch.testing.assert_close(fit.change[0].double(), wanted, rtol=rtol, atol=atol)
    torch.testing.assert_close(fit.offset[0], shift_r - shift_x.double() @ wanted, rtol=rtol, atol=atol)
    left = (r - x @ fit.change[0].double() - fit.offset[0]).square().sum(0)
    torch.testing.assert_close(sums.error(fit)[0], left, rtol=rtol, atol=max(atol, 1e-7))


def test_rows_in_parts_few_and_many_give_the_same_sums() -> None:
    x, r = noise(2, 50, 8).double(), noise(2, 50, 3, seed=1).double()
    parts = [Moments(2, 8, 3, x.device) for _ in range(3)]
    for sums, start, stop in zip(parts, (0, 5, 10), (5, 10, 50), strict=True):  # 5 and 5 are few, together they are not
        for row in range(start, stop, 5):
            sums.add(x[:, row : row + 5], r[:, row : row + 5])
    assert [sums.few() is None for sums in parts] == [False, False, True]
    for together in (parts[0].merge(parts[1]).merge(parts[2]), parts[2].merge(parts[0]).merge(parts[1])):
        assert together.count == 50
        xx, xr = together.products()
        torch.testing.assert_close(xx, x.mT @ x)
        torch.testing.assert_close(xr, x.mT @ r)
    assert parts[0].few() is not None  # merging leaves both as they are
    torch.testing.assert_close(parts[2].products()[0], x[:, 10:].mT @ x[:, 10:])


def test_a_change_that_does_not_carry_over_is_not_made() -> None:
    x, r = noise(12, 8).double(), noise(12, 1, seed=1).double()
    others = moments(noise(400, 8, seed=2).double(), noise(400, 1, seed=3).double())
    fit = choose(moments(x, r - r.mean(0)), others, torch.ones(1, 1).double(), offset=False)
    assert fit.change is None
    useful = x @ torch.ones(8, 1).double()
    other = noise(400, 8, seed=2).double()
    fit = choose(
        moments(x, useful), moments(other, other.sum(1, keepdim=True)), torch.ones(1, 1).double(), offset=False
    )
    assert fit.change is not None
    torch.testing.assert_close(fit.change[0], torch.ones(8, 1).double(), rtol=0.02, atol=0.02)


def test_wide_inputs_that_vary_little_around_large_means_are_fitted_all_the_same() -> None:
    wide = 300
    x = noise(2000, wide, seed=1) + 1000
    slope = noise(wide, 1, seed=2)
    found = Moments(1, wide, 1, x.device)
    found.add(x[None], ((x - 1000) @ slope)[None].double())
    (fit,) = ridges(found, [1e-4], offset=True)
    assert fit.change is not None
    left = float(found.error(fit).sum() / (found.rr - found.r.square() / found.count).sum())
    assert left < 1e-3
