"""Samples made of others: pictures moved, mirrored, mixed in pairs, in other colours.

The original network says what is right for any input, so that these need no labels. A few pictures show a network
little of what it was trained on; the same in other colours, and pasted into each other, show more of it.

Sources: Zhang et al., "mixup" (ICLR 2018) and Yun et al., "CutMix" (ICCV 2019) for the mixing.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .graph.example import Example
from .samples import Batch, Samples

_PASTED, _BLENDED = 0.75, 0.5
"""The share of batches of pictures that are pasted into each other (others are blended); of other floats, blended."""
_CONTRAST, _BRIGHTNESS, _NEGATIVES = 0.5, 0.25, 0.3
"""How far contrast goes from 1, brightness (over the whole range) from 0, and the share of pictures turned negative."""
_COLOURS = (1, 3)


def is_picture(tensor: Tensor) -> bool:
    """Whether a tensor looks like grey or coloured pictures, [N, 1 or 3, height, width]."""
    return (
        tensor.dim() == 4 and tensor.is_floating_point() and tensor.shape[1] in _COLOURS and min(tensor.shape[2:]) >= 8
    )


def are_pictures(samples: Samples) -> bool:
    """Whether samples are pictures and nothing else."""
    tensors = samples.batches[0].example.tensors()
    return len(tensors) == 1 and is_picture(tensors[0])


def variants(samples: Samples, count: int, seed: int = 0) -> Samples | None:
    """At least `count` pictures made of the samples' batches in turn; None where a model takes anything but pictures.

    Whole batches where these must keep their size, else exactly so many. They have no labels.
    """
    if count < 1 or not are_pictures(samples):
        return None
    generator = torch.Generator().manual_seed(seed)
    made: list[Batch] = []
    for batch in itertools.cycle(samples.batches):
        if (left := count - sum(one.count for one in made)) <= 0:
            break
        own = Batch(recoloured(varied(batch.example, generator), generator))
        made.append(own if samples.whole else own[:left])
    return Samples(tuple(made), "variants of them", samples.whole, True)


def recoloured(example: Example, generator: torch.Generator) -> Example:
    """Every picture with its colours in another order, another contrast and brightness, and sometimes as a negative.

    Values stay within the range that each colour has in the batch.
    """

    def recolour(pictures: Tensor) -> Tensor:
        count, colours = pictures.shape[:2]
        order = torch.rand(count, colours, generator=generator).argsort(1)
        contrast, brightness = torch.rand(2, count, colours, 1, 1, generator=generator) * 2 - 1
        negative = torch.rand(count, 1, 1, 1, generator=generator) < _NEGATIVES
        order, contrast, brightness, negative = (t.to(pictures.device) for t in (order, contrast, brightness, negative))
        low, high = pictures.amin((0, 2, 3), keepdim=True), pictures.amax((0, 2, 3), keepdim=True)
        middle, reach = (low + high) / 2, ((high - low) / 2).clamp_min(1e-12)
        plain = ((pictures - middle) / reach)[torch.arange(count, device=pictures.device)[:, None], order]
        # The middle of the range is 0 and its ends are 1 away.
        changed = (plain * (1 + _CONTRAST * contrast) + 2 * _BRIGHTNESS * brightness).clamp(-1, 1)
        return (torch.where(negative, -changed, changed) * reach + middle).to(pictures.dtype)

    return example.map(recolour)


def varied(example: Example, generator: torch.Generator) -> Example:
    """Pictures are moved and mirrored, each its own way, and floats mixed in pairs; whatever else stays as it is."""
    count = example.count
    if not all(t.is_floating_point() for t in example.rows()):
        return example
    mirror = torch.rand(count, generator=generator) < 0.5
    shift = torch.rand(2, count, generator=generator) * 2 - 1
    kind = float(torch.rand((), generator=generator))
    order = torch.randperm(count, generator=generator)
    share, across, down = torch.rand(3, count, generator=generator)

    def vary(tensor: Tensor) -> Tensor:
        device = tensor.device
        other = order.to(device)
        if tensor.dim() == 4:
            tensor = torch.where(mirror.to(device)[:, None, None, None], tensor.flip(3), tensor)
            tensor = _moved(tensor, shift.to(device))
            if kind < _PASTED:
                inside = _rectangles(share, across, down, tensor.shape[2], tensor.shape[3])
                return torch.where(inside.to(device)[:, None], tensor[other], tensor)
        if tensor.dim() == 4 or kind < _BLENDED:
            weight = 0.5 * share.to(tensor).reshape(-1, *[1] * (tensor.dim() - 1))
            tensor = (1 - weight) * tensor + weight * tensor[other]
        return tensor

    return example.map_rows(vary)


def _moved(pictures: Tensor, shift: Tensor) -> Tensor:
    """Pictures moved by up to an eighth of their sides, shift [2, count] from -1 to 1; border pixels are repeated."""
    places = []
    for size, own in zip(pictures.shape[2:], shift, strict=True):
        steps = (own * (size // 8)).round().long()
        places.append((torch.arange(size, device=pictures.device) + steps[:, None]).clamp(0, size - 1))
    rows, columns = places
    picture = torch.arange(len(pictures), device=pictures.device)
    moved = pictures.movedim(1, 3)[picture[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.movedim(3, 1).contiguous()


def _rectangles(area: Tensor, across: Tensor, down: Tensor, height: int, width: int) -> Tensor:
    """[count, height, width] whether a pixel is in a rectangle of a quarter to three quarters of the picture."""
    side = (0.25 + 0.5 * area).sqrt()

    def inside(size: int, place: Tensor) -> Tensor:
        length = (side * size).round()
        start = (place * (size - length + 1)).floor()
        pixels = torch.arange(size)
        return (pixels >= start[:, None]) & (pixels < (start + length)[:, None])

    return inside(height, down)[:, :, None] & inside(width, across)[:, None, :]
