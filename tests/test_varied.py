"""Samples made of others: moved, mirrored, mixed and recoloured pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimc.graph.example import Example
from slimc.samples import Batch, Samples
from slimc.varied import _moved, _rectangles, recoloured, variants, varied


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _samples(*batches: Tensor, whole: bool = False) -> Samples:
    return Samples(tuple(Batch(Example.of(batch)) for batch in batches), "--data", whole)


def test_varied_pictures_are_made_of_the_batch_alone_and_come_back_the_same_for_a_seed() -> None:
    pictures = torch.rand(16, 3, 24, 17, generator=_generator())
    known = set(pictures.flatten().tolist())
    pasted = 0
    for seed in range(12):
        (found,), (again,) = (varied(Example.of(pictures), _generator(seed)).tensors() for _ in range(2))
        assert torch.equal(found, again)
        assert found.shape == pictures.shape
        assert float(found.min()) >= float(pictures.min())
        assert float(found.max()) <= float(pictures.max())
        pasted += set(found.flatten().tolist()) <= known
    assert 4 <= pasted < 12, "some are pasted or only moved, some blended"


def test_pictures_are_moved_by_up_to_an_eighth_with_border_pixels_repeated() -> None:
    row = torch.arange(16.0).expand(3, 1, 16, 16)
    shift = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, 0.2]])
    moved = _moved(row, shift)[:, 0, 0]
    assert moved[0].tolist() == [*range(2, 16), 15, 15]
    assert moved[1].tolist() == [0, *range(15)]
    assert moved[2].tolist() == list(range(16))


def test_what_is_pasted_covers_a_quarter_to_three_quarters() -> None:
    area, across, down = torch.rand(3, 200, generator=_generator())
    share = _rectangles(area, across, down, 64, 48).double().mean((1, 2))
    assert torch.allclose(share, 0.25 + 0.5 * area.double(), atol=0.03)


def test_recoloured_pictures_keep_their_edges_and_the_range_of_their_colours() -> None:
    pictures = torch.zeros(64, 3, 8, 8)
    pictures[:, :, :, 4:] = torch.tensor([1.0, 2.0, 4.0])[:, None, None]  # one edge, of another height in each colour
    (found,) = recoloured(Example.of(pictures), _generator()).tensors()
    assert torch.equal(found[:, :, :, :4], found[:, :, :1, :1].expand(64, 3, 8, 4))
    assert torch.equal(found[:, :, :, 4:], found[:, :, :1, 4:5].expand(64, 3, 8, 4))
    for colour, highest in enumerate((1.0, 2.0, 4.0)):
        assert 0 <= float(found[:, colour].min()) <= float(found[:, colour].max()) <= highest
    rises = (found[:, 0, 0, 4] > found[:, 0, 0, 0]).float().mean()
    assert 0.5 < float(rises) < 0.9, "three in ten are negatives"
    heights = found[:, :, 0, 4] - found[:, :, 0, 0]
    assert len({round(float(height), 4) for height in heights[:, 0]}) > 40, "each picture has colours of its own"


def test_the_order_of_colours_is_drawn_for_every_picture() -> None:
    pictures = torch.zeros(64, 3, 8, 8)
    pictures[:, 0, :4] = 1.0  # the first colour has an edge across, the others none in this half
    pictures[:, 1:, :, :4] = 1.0
    (found,) = recoloured(Example.of(pictures), _generator()).tensors()
    across = found[:, :, 0, 7] != found[:, :, 7, 7]
    assert across.sum(1).max() == 1
    assert bool((across.float().mean(0) > 0.15).all()), "it is found in each of the three places"


def test_variants_are_made_of_all_batches_in_turn_and_come_back_the_same_for_a_seed() -> None:
    batches = [torch.rand(size, 3, 16, 16, generator=_generator(size)) for size in (8, 6)]
    found, again, other = (variants(_samples(*batches), 20, seed) for seed in (3, 3, 4))
    assert found is not None
    assert again is not None
    assert other is not None
    assert [batch.count for batch in found.batches] == [8, 6, 6]
    assert found.invented
    assert not found.labelled
    firsts = [one.batches[0].example.tensors()[0] for one in (found, again, other)]
    assert torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])


def test_batches_that_must_keep_their_size_keep_it() -> None:
    found = variants(_samples(torch.rand(8, 1, 16, 16), whole=True), 12)
    assert found is not None
    assert [batch.count for batch in found.batches] == [8, 8]


@pytest.mark.parametrize(
    "batch",
    [torch.rand(4, 10), torch.rand(4, 5, 16, 16), torch.rand(4, 3, 4, 4), torch.zeros(4, 3, 16, 16, dtype=torch.uint8)],
    ids=["vectors", "five channels", "tiny", "whole numbers"],
)
def test_only_pictures_have_variants(batch: Tensor) -> None:
    assert variants(_samples(batch), 10) is None


def test_none_are_made_where_none_are_wanted() -> None:
    assert variants(_samples(torch.rand(8, 3, 16, 16)), 0) is None
