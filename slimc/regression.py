"""Ridge regression from streamed rows, with the strength of the penalty chosen on rows that were not fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Tried penalties, as shares of the mean diagonal of the normal equations."""
_WIDE = 256


class Moments:
    """Sums over rows that a regression from inputs x to residuals r needs.

    count: rows. x: [groups, inputs], r: [groups, outputs] sums; xx: [groups, inputs, inputs],
    xr: [groups, inputs, outputs] sums of products; rr: [groups, outputs] sums of squares; all float64.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(groups, *size, dtype=torch.float64, device=device)

        self.count = 0
        self.x, self.r, self.rr = zeros(inputs), zeros(outputs), zeros(outputs)
        self.xx, self.xr = zeros(inputs, inputs), zeros(inputs, outputs)

    def add(self, x: Tensor, r: Tensor) -> None:
        """Add rows: x [groups, rows, inputs], r [groups, rows, outputs]."""
        # Products of wide rows are taken in float32, several times faster; the ridge is far above its rounding.
        exact = torch.float64 if x.shape[2] <= _WIDE and x.device.type == "cpu" else torch.float32
        x, r = x.to(exact), r.to(exact)
        self.count += x.shape[1]
        self.x += x.sum(1, dtype=torch.float64)
        self.r += r.sum(1, dtype=torch.float64)
        self.xx += x.transpose(1, 2) @ x
        self.xr += x.transpose(1, 2) @ r
        self.rr += r.square().sum(1, dtype=torch.float64)

    def merge(self, other: Moments) -> Moments:
        """Both sets of rows together."""
        both = Moments.__new__(Moments)
        both.count = self.count + other.count
        for name in ("x", "r", "rr", "xx", "xr"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def error(self, fit: Fit) -> Tensor:
        """Sum of squares that a fit leaves, [groups, outputs]."""
        change, offset = fit.change, fit.offset
        explained = 2 * (change * self.xr).sum(1) - (change * (self.xx @ change)).sum(1)
        shift = offset * (2 * self.r - 2 * (change * self.x[:, :, None]).sum(1) - self.count * offset)
        return (self.rr - explained - shift).clamp_min(0)


@dataclass(frozen=True)
class Fit:
    """r is near x @ change + offset: change [groups, inputs, outputs], offset [groups, outputs], both float64."""

    change: Tensor
    offset: Tensor
    ridge: float | None


def ridge(moments: Moments, strength: float, offset: bool) -> Fit:
    """The change that makes sum (r - x change - offset)^2 + penalty * change^2 smallest.

    penalty: `strength` times the mean diagonal of the (centred) second moments of x.
    """
    mean_x, mean_r = moments.x / moments.count, moments.r / moments.count
    xx, xr = moments.xx, moments.xr
    if offset:
        xx = xx - moments.count * mean_x[:, :, None] * mean_x[:, None, :]
        xr = xr - moments.count * mean_x[:, :, None] * mean_r[:, None, :]
    scale = xx.diagonal(dim1=1, dim2=2).mean(1)
    penalty = strength * torch.where(scale > 0, scale, torch.ones_like(scale))
    system = xx + torch.diag_embed(penalty[:, None].expand(-1, xx.shape[1]))
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()):
        return none(moments)
    change = torch.cholesky_solve(xr, factor)
    shift = mean_r - (change * mean_x[:, :, None]).sum(1) if offset else torch.zeros_like(mean_r)
    return Fit(change, shift, strength)


def scaled(moments: Moments, matrix: Tensor, each: int, weight: Tensor, strength: float, offset: bool) -> Fit:
    """The change that multiplies the weights of each input channel by one number, by weighted least squares.

    matrix: [groups, outputs, inputs] the weights; each: inputs per channel; weight: [groups, outputs] of the errors.
    """
    mean_x, mean_r = moments.x / moments.count, moments.r / moments.count
    xx, xr = moments.xx, moments.xr
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
    return Fit(torch.zeros_like(moments.xr), torch.zeros_like(moments.r), None)


def mean_only(moments: Moments) -> Fit:
    """Only the offset: the mean residual."""
    return Fit(torch.zeros_like(moments.xr), moments.r / moments.count, None)


def choose(fitted: Moments, judged: Moments, weight: Tensor, offset: bool) -> Fit:
    """The best of several penalties, of the offset alone and of no change, by the rows of `judged`.

    weight: [groups, outputs] how much each output's error counts. The winner is fitted again on all rows.
    """
    fits = [none(fitted), *([mean_only(fitted)] if offset else []), *(ridge(fitted, s, offset) for s in RIDGES)]
    errors = [float((judged.error(fit) * weight).sum()) for fit in fits]
    best = fits[min(range(len(fits)), key=errors.__getitem__)]
    everything = fitted.merge(judged)
    if best.ridge is not None:
        return ridge(everything, best.ridge, offset)
    return mean_only(everything) if bool(best.offset.any()) else best
