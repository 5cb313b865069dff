"""Ridge regression from streamed rows, with the strength of the penalty chosen on rows that were not fitted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Tried penalties, as shares of the mean diagonal of the normal equations."""
_WIDE = 256
_FAR = 1_000
"""Squared means over variances from which float32 has too few digits for second moments around the mean."""


class Moments:
    """Rows of inputs x and residuals r of a regression: as they are while they are few, as sums of products after that.

    count: rows. x: [groups, inputs], r: [groups, outputs] sums; rr: [groups, outputs] sums of squares; in float64.
    With fewer rows than inputs, which need not fit in memory squared, the rows themselves are kept.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device) -> None:
        self.count = 0
        self.x, self.r, self.rr = (
            torch.zeros(groups, size, dtype=torch.float64, device=device) for size in (inputs, outputs, outputs)
        )
        self._products: tuple[Tensor, Tensor] | None = None
        self._rows: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, r: Tensor) -> None:
        """Add rows: x [groups, rows, inputs], r [groups, rows, outputs]."""
        # Products of wide rows are taken in float32, several times faster; the ridge is far above its rounding, unless
        # means that are far from 0 leave it few digits for what varies.
        narrow = x.shape[2] <= _WIDE and x.device.type == "cpu"
        exact = torch.float64 if narrow or _far_off(x) else torch.float32
        x, r = x.to(exact), r.to(exact)
        self.count += x.shape[1]
        self.x += x.sum(1, dtype=torch.float64)
        self.r += r.sum(1, dtype=torch.float64)
        self.rr += r.square().sum(1, dtype=torch.float64)
        self._keep([(x, r)])

    def _keep(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._rows.extend(rows)
        if sum(x.shape[1] for x, _ in self._rows) >= self.x.shape[1]:
            self.products()

    def few(self) -> tuple[Tensor, Tensor] | None:
        """x [groups, rows, inputs] and r [groups, rows, outputs] of all rows, if they are fewer than the inputs."""
        if self._products is not None or not self._rows:
            return None
        if len(self._rows) > 1:
            self._rows = [(torch.cat([x for x, _ in self._rows], 1), torch.cat([r for _, r in self._rows], 1))]
        return self._rows[0]

    def products(self) -> tuple[Tensor, Tensor]:
        """xx [groups, inputs, inputs] and xr [groups, inputs, outputs], sums of products over all rows, in float64."""
        if self._products is None:
            (groups, inputs), outputs = self.x.shape, self.r.shape[1]
            self._products = self.x.new_zeros(groups, inputs, inputs), self.x.new_zeros(groups, inputs, outputs)
        if self._rows:
            x, r = (torch.cat(parts, 1) for parts in zip(*self._rows, strict=True))
            self._rows = []
            self._products[0].add_(x.mT @ x)
            self._products[1].add_(x.mT @ r)
        return self._products

    def merge(self, other: Moments) -> Moments:
        """Both sets of rows together."""
        (groups, inputs), outputs = self.x.shape, self.r.shape[1]
        both = Moments(groups, inputs, outputs, self.x.device)
        both.count = self.count + other.count
        both.x, both.r, both.rr = self.x + other.x, self.r + other.r, self.rr + other.rr
        kept = [part._products for part in (self, other) if part._products is not None]
        if kept:
            xx, xr = zip(*kept, strict=True)
            both._products = sum(xx[1:], xx[0].clone()), sum(xr[1:], xr[0].clone())
        both._keep([*self._rows, *other._rows])
        return both

    def error(self, fit: Fit) -> Tensor:
        """Sum of squares that a fit leaves, [groups, outputs]."""
        change, offset = fit.change, fit.offset
        if change is None:
            return (self.rr - offset * (2 * self.r - self.count * offset)).clamp_min(0)
        if (rows := self.few()) is not None:
            x, r = rows
            left = r - x @ change.to(x.dtype) - offset[:, None].to(x.dtype)
            return left.square().sum(1, dtype=torch.float64)
        xx, xr = self.products()
        explained = 2 * (change * xr).sum(1) - (change * (xx @ change)).sum(1)
        shift = offset * (2 * self.r - 2 * (change * self.x[:, :, None]).sum(1) - self.count * offset)
        return (self.rr - explained - shift).clamp_min(0)


def _far_off(x: Tensor) -> bool:
    """Whether inputs [groups, rows, inputs] vary little around means that are far from 0."""
    variance, mean = torch.var_mean(x, 1, correction=0)
    return bool(mean.square().sum() > _FAR * variance.sum())


@dataclass(frozen=True)
class Fit:
    """r is near x @ change + offset: change [groups, inputs, outputs], None for no change; offset [groups, outputs]."""

    change: Tensor | None
    offset: Tensor
    ridge: float | None


def ridges(moments: Moments, strengths: Iterable[float], offset: bool) -> Iterator[Fit]:
    """For each strength the change that makes sum (r - x change - offset)^2 + penalty * change^2 smallest.

    penalty: the strength times the mean diagonal of the (centred) second moments of x. Of fewer rows than inputs
    the change is x' a with (x x' + penalty) a = r, the same by the push-through identity.
    """
    mean_x, mean_r = moments.x / moments.count, moments.r / moments.count
    inputs = mean_x.shape[1]
    rows = moments.few()
    if rows is not None:
        x, right = rows
        if offset:
            x, right = x - mean_x[:, None].to(x), right - mean_r[:, None].to(right)
        system, right = (x @ x.mT).double(), right.double()
    else:
        system, right = moments.products()
        if offset:
            system = system - moments.count * mean_x[:, :, None] * mean_x[:, None, :]
            right = right - moments.count * mean_x[:, :, None] * mean_r[:, None, :]
    scale = system.diagonal(dim1=1, dim2=2).sum(1) / inputs
    for strength in strengths:
        penalised = system.clone()
        penalised.diagonal(dim1=1, dim2=2).add_(strength * torch.where(scale > 0, scale, 1.0)[:, None])
        factor, failed = torch.linalg.cholesky_ex(penalised)
        if bool(failed.any()):
            yield none(moments)
            continue
        change = torch.cholesky_solve(right, factor)
        if rows is not None:
            change = x.mT @ change.to(x)
        shift = mean_r - (mean_x[:, None].to(change) @ change)[:, 0] if offset else torch.zeros_like(mean_r)
        yield Fit(change, shift, strength)


def scaled(moments: Moments, matrix: Tensor, each: int, weight: Tensor, strength: float, offset: bool) -> Fit:
    """The change that multiplies the weights of each input channel by one number, by weighted least squares.

    matrix: [groups, outputs, inputs] the weights; each: inputs per channel; weight: [groups, outputs] of the errors.
    """
    mean_x, mean_r = moments.x / moments.count, moments.r / moments.count
    xx, xr = moments.products()
    if offset:
        xx = xx - moments.count * mean_x[:, :, None] * mean_x[:, None, :]
        xr = xr - moments.count * mean_x[:, :, None] * mean_r[:, None, :]
    groups, _, inputs = matrix.shape
    channels = inputs // each
    among = (matrix.transpose(1, 2) @ (weight[:, :, None] * matrix)) * xx
    system = among.reshape(groups, channels, each, channels, each).sum((2, 4))
    wanted = (matrix.transpose(1, 2) * weight[:, None, :] * xr).sum(2).reshape(groups, channels, each).sum(2)
    scale = system.diagonal(dim1=1, dim2=2).mean(1)
    penalty = strength * torch.where(scale > 0, scale, torch.ones_like(scale))
    factor, failed = torch.linalg.cholesky_ex(system + torch.diag_embed(penalty[:, None].expand(-1, channels)))
    if bool(failed.any()):
        return none(moments)
    extra = torch.cholesky_solve(wanted[:, :, None], factor)[:, :, 0].repeat_interleave(each, dim=1)
    change = extra[:, :, None] * matrix.transpose(1, 2)
    shift = mean_r - (change * mean_x[:, :, None]).sum(1) if offset else torch.zeros_like(mean_r)
    return Fit(change, shift, strength)


def none(moments: Moments) -> Fit:
    """No change at all."""
    return Fit(None, torch.zeros_like(moments.r), None)


def mean_only(moments: Moments) -> Fit:
    """Only the offset: the mean residual."""
    return Fit(None, moments.r / moments.count, None)


def choose(fitted: Moments, judged: Moments, weight: Tensor, offset: bool) -> Fit:
    """The best of several penalties, of the offset alone and of no change, by the rows of `judged`.

    weight: [groups, outputs] how much each output's error counts. The winner is fitted again on all rows.
    """

    def error(fit: Fit) -> float:
        return float((judged.error(fit) * weight).sum())

    plain = [none(fitted), *([mean_only(fitted)] if offset else [])]
    best = min(itertools.chain(plain, ridges(fitted, RIDGES, offset)), key=error)
    everything = fitted.merge(judged)
    if best.ridge is not None:
        return next(ridges(everything, [best.ridge], offset))
    return mean_only(everything) if bool(best.offset.any()) else best
