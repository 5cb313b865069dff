"""CHIP: a channel whose feature map the other maps can stand in for matters little.

Source: Sui et al., "CHIP: CHannel Independence-based Pruning" (NeurIPS 2021): for each image, the nuclear norm of the
matrix of flattened maps less that of the matrix with the channel's rows set to zero, averaged over images.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from slimc.activations import Place, watch
from slimc.errors import UsageError
from slimc.gradients import batch_axis
from slimc.graph.cost import Model
from slimc.graph.groups import Group
from slimc.graph.terms import Terms
from slimc.roles import Site, readers
from slimc.samples import Batch
from slimc.scores import Scores, Subject, scorer

_STEP = 0.8
_NODES = torch.arange(-52.0, 52.0, _STEP, dtype=torch.float64)
_SMALL = 1e-4
_BLOCK = 2**21
_ROUNDING, _TINY = 1e-15, 1e-300
_SHARE = 0.3
"""Decompositions may take this share of the forward passes' work ..."""
_AT_LEAST = 2e11
"""... and so many multiply-accumulates anyway, which is a few seconds."""
_FEWEST = 32
"""Matrices of each group that are decomposed however long it takes; all, where there are no more samples."""


@dataclass
class _Tap:
    """A value whose maps are looked at, of every so many samples from the `first` on.

    rows: by group number, [width, each] the rows of each channel. falls: summed over the samples that were seen, by
    group number, as they are and divided by the norm.
    """

    site: Site
    rows: dict[int, Terms]
    samples_at: int
    first: int = 0
    every: int = 1
    passed: int = 0
    seen: int = 0
    falls: dict[int, tuple[Scores, Scores]] = field(default_factory=dict)

    def see(self, value: Tensor, batch: Batch) -> None:
        """Add what the maps of one batch say."""
        maps = _maps(value, self.site.axis, batch.count, self.samples_at)
        chosen = maps[(self.first - self.passed) % self.every :: self.every]
        self.passed += len(maps)
        self.seen += len(chosen)
        for group, index in self.rows.items():
            width, each = index.shape
            own, relative = self.falls.setdefault(group, (np.zeros(width), np.zeros(width)))
            for sample in chosen:
                fall, norm = independence(sample[index.reshape(-1)].double(), each)
                own += fall.cpu().numpy()
                relative += (fall / norm.clamp_min(torch.finfo(torch.float64).tiny)).cpu().numpy()

    def work(self, positions: int) -> float:
        """About what one sample's decompositions take, in multiply-accumulates of a convolution."""
        found = 0.0
        for index in self.rows.values():
            side = min(index.size, positions)
            found += 16.0 * side**3 + 4.0 * side * index.size * positions
        return found


@scorer(
    "chip", "fall of the feature maps' nuclear norm without the channel's map", "Sui et al., NeurIPS 2021", "inputs"
)
def chip(subject: Subject) -> list[Scores]:
    """The mean over samples of ||A||_* - ||A without channel i||_*, A [channels, positions] as a reader sees it.

    Where several values carry a group, each fall is divided by ||A||_* and they are summed. Where the decompositions
    of all samples would take much longer than the passes, each value is looked at in every n-th sample, the values of
    a group in different ones. Groups whose values have one position only have no maps and no score. Raises UsageError
    where that is so for all.
    """
    taps = _taps(subject)
    if not taps:
        names = ", ".join(group.name for group in subject.grouping.groups)
        raise UsageError(
            f"--scorer chip compares feature maps, and the values of these groups have one position only: {names}. "
            "Take another scorer, such as magnitude."
        )
    if subject.samples is not None:
        _spread(taps, subject, subject.samples.count)
    watch(subject, {place: tap.see for place, tap in taps.items()})
    scores = []
    for group in subject.grouping.groups:
        own = [tap for tap in taps.values() if group.number in tap.rows]
        found = [tap.falls[group.number][len(own) > 1] / tap.seen for tap in own]
        scores.append(np.sum(found, axis=0) if found else np.full(group.width, np.nan))
    return scores


def _taps(subject: Subject) -> dict[Place, _Tap]:
    """Each value that is read, at one of its readers."""
    sites = {(s.operand, s.axis): s for s in (_map(subject, site) for site in readers(subject.types)) if s is not None}
    number = {variable: group.number for group in subject.grouping.groups for variable in group.variables.tolist()}
    found: dict[Place, _Tap] = {}
    for site in sites.values():
        assert site.operand is not None
        held = {number[v] for v in np.unique(site.factors[site.factors >= 0]).tolist() if v in number}
        rows = {n: _rows(subject.grouping.groups[n], site) for n in sorted(held)}
        found[site.node, site.operand] = _Tap(site, rows, batch_axis(subject.types, site) or 0)
    return found


def _spread(taps: dict[Place, _Tap], subject: Subject, samples: int) -> None:
    """Choose the samples of each tap, so that decompositions take a share of the passes' work."""
    batch = subject.types.captured.batch
    work = 0.0
    for (_, operand), tap in taps.items():
        axes = subject.types.values[operand]
        work += tap.work(math.prod(len(axis) for at, axis in enumerate(axes) if at != tap.site.axis) // batch)
    passes = Model(subject.types, subject.grouping)(subject.grouping.widths).macs
    every = math.ceil(work / max(_SHARE * passes, _AT_LEAST / samples))
    among = Counter(group for tap in taps.values() for group in tap.rows)
    turn = Counter[int]()
    for tap in taps.values():
        most = min((samples * among[group] // _FEWEST for group in tap.rows), default=1)
        tap.every = max(1, min(every, most, samples))
        tap.first = max((turn[group] for group in tap.rows), default=0) % tap.every
        turn.update(tap.rows.keys())


def independence(maps: Tensor, each: int = 1) -> tuple[Tensor, Tensor]:
    """How much the nuclear norm falls when `each` neighbouring rows are zero, [rows / each], and the norm itself.

    maps: [rows, positions] in float64. With G = A'A and a the rows that go, the fall is
    -1/(2 pi) times the integral over s > 0 of s^(-1/2) log det(I - a (G + s)^-1 a'), since tr sqrt(X) is 1/pi times the
    integral of s^(-1/2) tr X (X + s)^-1. In log s the trapezoidal rule converges exponentially: one decomposition per
    matrix in place of one per channel, to about seven digits of the largest singular value.
    """
    is_wide = len(maps) <= maps.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(maps @ maps.T if is_wide else maps.T @ maps)
    largest = eigenvalues.max()
    eigenvalues = torch.where(eigenvalues > largest * _ROUNDING * len(eigenvalues), eigenvalues, 0.0)
    norm = eigenvalues.sqrt().sum()
    if float(largest) <= 0.0:
        return maps.new_zeros(len(maps) // each), norm
    shift = largest * _NODES.to(maps.device).exp()
    inverse = 1.0 / (eigenvalues[:, None] + shift)  # [eigenvalues, nodes]
    gone = (vectors * eigenvalues.sqrt() if is_wide else maps @ vectors).reshape(-1, each, len(eigenvalues))
    # I - a (G + s)^-1 a' without cancellation, where the eigenvectors make a square matrix: s u (l + s)^-1 u'.
    left = vectors.reshape(gone.shape) if is_wide else None
    if each == 1:
        floor = _ROUNDING if left is None else _TINY
        part = gone[:, 0].square() @ inverse
        rest = 1.0 - part if left is None else (left[:, 0].square() @ inverse) * shift
        drop = torch.where(part < 0.5, torch.log1p(-part.clamp_max(0.5)), rest.clamp_min(floor).log())
    else:
        step = max(1, _BLOCK // gone.numel())
        pieces = zip(inverse.T.split(step), shift.split(step), strict=True)
        drop = torch.cat([_log_det(gone, left, own, s) for own, s in pieces], 1)
    return -(drop @ shift.sqrt()) * (_STEP / (2 * torch.pi)), norm


def _log_det(gone: Tensor, left: Tensor | None, weights: Tensor, shift: Tensor) -> Tensor:
    """log det(I - a diag(w) a'), [blocks, nodes], for blocks a [blocks, each, eigenvalues] and w [nodes, eigenvalues].

    A series where what is taken off is small.
    """
    part = (gone[:, None] * weights[:, None]) @ gone[:, None].mT
    trace = part.diagonal(dim1=2, dim2=3).sum(2)
    series = -trace - part.square().sum((2, 3)) / 2
    if left is None:
        rest = torch.eye(part.shape[2], dtype=part.dtype, device=part.device) - part
    else:
        rest = (left[:, None] * weights[:, None]) @ left[:, None].mT * shift[:, None, None]
    floor = part.shape[2] * math.log(_ROUNDING if left is None else _TINY)
    return torch.where(trace < _SMALL, series, torch.linalg.slogdet(rest)[1].clamp_min(floor))


def _map(subject: Subject, site: Site) -> Site | None:
    """The last value on the way to a reader that has several positions: what global pooling pools, for one."""
    chosen = np.unique(site.factors[site.factors >= 0])
    node, operand = site.node, site.operand
    while operand is not None and operand.op == "call_function":
        axes = subject.types.values[operand]
        found = [subject.types.solution.factors(axis) for axis in axes]
        axis = max(range(len(axes)), key=lambda i: np.isin(chosen, found[i]).sum())
        if not np.isin(chosen, found[axis]).any():
            return None
        count = math.prod(len(other) for position, other in enumerate(axes) if position != axis)
        if count > subject.types.captured.batch:
            return Site(node, operand, axis, np.where(np.isin(found[axis], chosen), found[axis], -1))
        first = operand.args[0] if operand.args else None
        node, operand = operand, first if isinstance(first, Node) else None
    return None


def _rows(group: Group, site: Site) -> Terms:
    """[width, each] which indices of the axis belong to each channel of the group."""
    place = {variable: position for position, variable in enumerate(group.variables.tolist())}
    rows: list[list[int]] = [[] for _ in place]
    for index, factors in enumerate(site.factors.tolist()):
        for variable in factors:
            if variable in place:
                rows[place[variable]].append(index)
    return np.array(rows)


def _maps(value: Tensor, axis: int, count: int, rows_at: int) -> Tensor:
    """[samples, channels, positions]; the axis that counts samples perhaps with windows folded into it."""
    moved = value.movedim((rows_at, axis), (0, -1))
    return moved.reshape(count, -1, moved.shape[-1]).mT
