"""Structured Optimal Brain Surgeon: what is lost by removing a channel when the others are refitted to make up for it.

A reader computes y = W x. Without the inputs of channel i, the best other weights leave the error
sum over outputs o of s_o * w_oi^T [(H^-1)_ii]^-1 w_oi, where H = E[x x^T] over all places of its output, (H^-1)_ii is
the block of the channel's inputs, and w_oi are its weights. A channel whose place others can take costs little, however
large its weights. s_o is how much the model's outputs (each scaled to deviation 1) move with y_o: the expected squared
gradient of random combinations of outputs, which needs no labels. The scores of a channel's readers are summed; they
are all in one unit, the squared error of the model's outputs, so groups are compared by it as it is.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (NIPS 1992),
equation 5; Kurtic, Frantar and Alistarh, "ZipLM" (NeurIPS 2023), equation 2, for whole blocks. The factor s_o is the
diagonal of the output side in the Kronecker factorisation of Martens and Grosse (ICML 2015). Channels that no reader
sees (their consumer is attention, say) get the expected square of their own gate's derivative instead. Where batch
norms tell that training showed more of a reader's inputs than the samples do, H is mixed with what they tell (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from slimc.as_trained import moments_as_trained, overlap
from slimc.errors import UsageError
from slimc.graph.infer import attribute
from slimc.graph.terms import Terms
from slimc.lockstep import Frontier, sweep
from slimc.readers import Reader, readers, unhalved
from slimc.scores import Scores, Subject, scorer
from slimc.sensitivities import sensitivities

_RIDGE = 1e-3
_ROWS_PER_INPUT = 4
_FEWEST_ROWS = 8_000
_SMALL, _ROUNDS, _WIDE_ROUNDS, _SHARE_LEFT = 256, 32, 8, 32
"""Channels are eliminated one by one, or a 32nd of those left at a time; an eighth in groups of more than 256."""
_EXACT = 640
"""Inputs of a convolution beyond which its taps are taken for independent."""
_WIDEST = 6_144
"""Inputs of a reader beyond which its second moments would take too much memory. A linear layer behind a flattened map
then sees channels, as a convolution does whose kernel covers the map; any other says nothing."""


_NOT_FINITE = "the samples lead to values that are not finite (NaN or infinity), so obs cannot score"


@scorer(
    "obs",
    "squared error of the outputs left after the other channels make up for the removed one",
    "Hassibi and Stork, NIPS 1992; Kurtic et al., ZipLM, NeurIPS 2023",
    needs="inputs",
    normalisation="cost",
)
def obs(subject: Subject) -> list[Scores]:
    """One number per channel, larger for what cannot be made up for; needs unlabelled samples.

    Raises UsageError where the samples lead to values that are not finite.
    """
    assert subject.samples is not None
    module = subject.types.captured.module
    found = {node: reader for node, reader in readers(module).items() if _channels(subject, reader) is not None}
    unread = _unread(subject, found)
    sensitivity, gates = sensitivities(subject, set(found), set(unread.values()))
    total = np.zeros(subject.types.solution.variables + 1)
    for number, (node, position) in unread.items():
        rows = subject.types.solution.factors(subject.types.values[node][position])
        own = np.where(subject.grouping.group_of[rows] == number, rows, -1)
        for column in own.T:
            np.add.at(total, column, gates[node, position])
    generator = torch.Generator().manual_seed(subject.seed)
    parts: dict[int, list[Part]] = {}
    trained = moments_as_trained(module)

    def visit(node: Node, frontier: Frontier) -> None:
        taps = _taps(subject, found[node])
        second, matrix = _second_moments(found[node], taps, frontier, generator)
        known = trained.get(found[node].source)
        if known is not None and _reads_channels(found[node]):
            squares = known.square.to(second)
            if len(squares) > second.shape[0] * second.shape[1]:
                squares = squares.reshape(-1, taps).mean(1)  # of the places of a flattened map
            second = as_trained(second, squares)
        second = _ridged(second)
        matrix = matrix * _per_row(sensitivity[node], matrix).sqrt()
        for number, part in _parts(subject, found[node], second, matrix):
            parts.setdefault(number, []).append(part)

    sweep(module, subject.samples, visit, found.__contains__)
    for done, (number, own_parts) in enumerate(parts.items(), 1):
        group = subject.grouping.groups[number]
        total[group.variables] += eliminate(own_parts, group.width)
        subject.tick(done, len(parts))
    if not np.isfinite(total).all():
        raise UsageError(_NOT_FINITE)
    return [total[group.variables] for group in subject.grouping.groups]


def _channels(subject: Subject, reader: Reader) -> Any:
    """The variables behind each input channel; None where removing one takes the reader's outputs along with it."""
    axis = 1 if reader.kind.startswith("conv") else -1
    rows = subject.types.solution.factors(subject.types.values[reader.source][axis])
    results = subject.types.solution.factors(subject.types.values[reader.node][axis])
    taps = _taps(subject, reader)
    if not (rows >= 0).any() or _inputs(subject, reader) > _WIDEST * taps:
        return None
    if axis == -1:
        rows = rows[::taps]
    if reader.groups > 1 and np.isin(rows[rows >= 0], results).all():
        return None  # a depthwise convolution: its output goes with its input
    return rows


def _reads_channels(reader: Reader) -> bool:
    """Whether what is read is the first axis behind the batch, that of a batch norm's channels."""
    return reader.kind.startswith("conv") or reader.source.meta["val"].dim() == 2


def _inputs(subject: Subject, reader: Reader) -> int:
    return reader.matrix(subject.types.captured.module).shape[2]


def _taps(subject: Subject, reader: Reader) -> int:
    """Inputs of one channel that may be taken for independent of each other and alike.

    Places of a convolution's kernel; of a linear layer that is too wide for all, places of the map that was flattened.
    """
    if reader.kind.startswith("conv"):
        weight: Tensor = attribute(subject.types.captured.module, reader.weight)
        return weight[0, 0].numel()
    if _inputs(subject, reader) <= _WIDEST:
        return 1
    rows = subject.types.solution.factors(subject.types.values[reader.source][-1])
    changes = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1
    taps = int(changes[0]) if len(changes) else 1
    return taps if len(rows) % taps == 0 and np.array_equal(changes, np.arange(taps, len(rows), taps)) else 1


def _unread(subject: Subject, found: dict[Node, Reader]) -> dict[int, tuple[Node, int]]:
    """For every group that some of its readers do not see: the last node that carries it, and on which axis."""
    read = np.zeros(subject.types.solution.variables, np.bool_)
    for reader in found.values():
        rows = _channels(subject, reader)
        read[rows[rows >= 0]] = True
    left = {g.number for g in subject.grouping.groups if not read[g.variables].all()}
    places: dict[int, tuple[Node, int]] = {}
    for node in subject.types.captured.module.graph.nodes if left else ():
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        for position, axis in enumerate(subject.types.values[node]):
            rows = subject.types.solution.factors(axis)
            for number in np.unique(subject.grouping.group_of[rows[rows >= 0]]).tolist():
                if number in left:
                    places[number] = (node, position)
    return places


def _per_row(sensitivity: Tensor, matrix: Tensor) -> Tensor:
    """Each output's number at its rows of the matrix, [groups, rows, 1]."""
    if not sensitivity.dim():  # the outputs do not depend on it
        return torch.zeros(1, 1, 1, dtype=torch.float64, device=matrix.device)
    own = sensitivity.to(matrix).reshape(len(matrix), -1, 1)
    return own.repeat_interleave(matrix.shape[1] // own.shape[1], dim=1)


def _second_moments(reader: Reader, taps: int, frontier: Frontier, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """E[x x^T] over places, [groups, n, n] in float64, and the weights as [groups, rows, n] to go with it.

    n is the reader's inputs; where a kernel makes these many, n is its input channels: the taps of the kernel are then
    taken for independent of each other and alike, and each tap's weights are rows of their own.
    """
    module = frontier.module
    weight: Tensor = attribute(module, reader.weight).detach()
    matrix = reader.matrix(module)
    groups, outputs, inputs = matrix.shape
    convolves = reader.kind.startswith("conv")
    matrix = matrix.to(torch.float64 if inputs <= _WIDEST or convolves else torch.float32)
    values, results = frontier.of(reader.source), frontier.of(reader.node)
    merged = taps > 1 and inputs > _EXACT
    size = inputs // taps if merged else inputs
    counts = (
        [value.numel() // (groups * size) for value in values]
        if merged
        else [reader.places(result.shape) for result in results]
    )
    share = min(1.0, max(_FEWEST_ROWS, _ROWS_PER_INPUT * size) / sum(counts))
    total = torch.zeros(groups, size, size, dtype=torch.float64, device=weight.device)
    rows = 0
    for value, result, count in zip(values, results, counts, strict=True):
        if merged:
            flat = value.movedim(1, -1) if convolves else value.reshape(-1, size, taps).mT
            flat = flat.reshape(-1, groups * size)
            places = torch.randperm(count, generator=generator)[: max(1, round(share * count))].to(weight.device)
            x = flat[places].reshape(len(places), groups, size).transpose(0, 1)
        else:
            places = torch.randperm(count, generator=generator)[: max(1, round(share * count))].to(weight.device)
            x = reader.rows(value, weight, result.shape[2:], places)
        x = unhalved(x)
        total += (x.transpose(1, 2) @ x).double()
        rows += len(places)
    total /= rows
    if merged:
        split = matrix.reshape(groups, outputs, size, taps)
        matrix = split.transpose(2, 3).reshape(groups, outputs * taps, size)
    return total, matrix


def _ridged(second: Tensor) -> Tensor:
    """With a little added to the diagonal, so that there is an inverse."""
    mean = second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    return second + torch.diag_embed((_RIDGE * mean)[:, None].expand(-1, second.shape[1]))


def as_trained(second: Tensor, squares: Tensor) -> Tensor:
    """Second moments of samples, [groups, n, n], drawn towards the expected squares in training, [channels].

    The diagonal of these is mixed in with the share of it that the samples do not show: 1 - sum min / sum max of both
    diagonals. Samples like those in training change next to nothing; of narrow ones, channels that they do not use
    are not taken for useless.
    """
    own = second.diagonal(dim1=1, dim2=2)
    each = own.numel() // len(squares)
    wanted = squares.repeat_interleave(each).reshape(own.shape)
    share = overlap(own, wanted)
    return share * second + (1 - share) * torch.diag_embed(wanted)


@dataclass
class Part:
    """What one reader says of one group's channels, while they are eliminated.

    inverse: [n, n] the group's part of H^-1, given what is gone; weights: [n, n] its part of W^T diag(s) W, after
    the remaining weights made up for what is gone; n is channels times `each`, channel after channel.
    """

    inverse: Tensor
    weights: Tensor
    each: int

    def costs(self) -> Scores:
        """[channels] what it costs to remove each channel alone."""
        channels = len(self.inverse) // self.each
        blocks = (channels, self.each, channels, self.each)
        diagonal = torch.arange(channels, device=self.inverse.device)
        inverse = self.inverse.reshape(blocks)[diagonal, :, diagonal]
        weights = self.weights.reshape(blocks)[diagonal, :, diagonal]
        solved = torch.linalg.solve(inverse, weights) if self.each > 1 else weights / inverse
        return np.asarray(solved.diagonal(dim1=1, dim2=2).sum(1).double().cpu())

    def remove(self, gone: Sequence[int]) -> float:
        """Eliminate channels (by their present places) and give what that costs in all."""
        own = torch.zeros(len(self.inverse), dtype=torch.bool, device=self.inverse.device)
        own.reshape(-1, self.each)[list(gone)] = True
        gone_rows, left = own.nonzero()[:, 0], (~own).nonzero()[:, 0]
        inverse, weights = (matrix[gone_rows] for matrix in (self.inverse, self.weights))
        lower = torch.linalg.cholesky(inverse[:, gone_rows])
        factor = torch.cholesky_solve(inverse[:, left], lower)
        cost = float(torch.cholesky_solve(weights[:, gone_rows], lower).diagonal().sum())
        self.inverse = self.inverse[left[:, None], left].addmm_(inverse[:, left].T, factor, alpha=-1)
        # W - C - C^T + F^T W_oo F with C = W_:o F, in one product: the last term goes half to each side.
        change = (weights[:, left] - 0.5 * weights[:, gone_rows] @ factor).T @ factor
        self.weights = self.weights[left[:, None], left].sub_(change).sub_(change.T)
        return cost


def eliminate(parts: Sequence[Part], width: int) -> Scores:
    """Remove a group's channels from the cheapest on; each one's score is what its removal cost at its turn.

    Scores never fall along the order, so that ranking by them gives it back. The last channel is scored as the one
    before it at least.
    """
    scores = np.zeros(width)
    left = np.arange(width)
    highest = 0.0
    while len(left):
        costs = np.maximum(sum(part.costs() for part in parts), 0.0)
        if width > _SMALL and len(left) <= width // _SHARE_LEFT:
            count = len(left)  # of a wide group the last few go as one: no budget gets that far
        else:
            count = max(1, min(len(left) // (_ROUNDS if width <= _SMALL else _WIDE_ROUNDS), len(left) - 1))
        chosen = np.argsort(costs, kind="stable")[:count]
        together = float(costs[chosen].sum())
        if len(left) > count:
            together = max(together, sum(part.remove(chosen.tolist()) for part in parts))
        share = together / max(float(costs[chosen].sum()), 1e-300)
        for place in chosen:
            highest = max(highest, float(costs[place]) * share)
            scores[left[place]] = highest
        left = np.delete(left, chosen)
    return scores


def _parts(subject: Subject, reader: Reader, second: Tensor, matrix: Tensor) -> list[tuple[int, Part]]:
    """What a reader says of each group that it reads; matrix [groups, rows, n], each row scaled by its sensitivity."""
    groups, _, size = matrix.shape
    rows = _channels(subject, reader)
    each = size * groups // len(rows)  # inputs of one index: places of the kernel
    factor, failed = torch.linalg.cholesky_ex(second)
    if bool(failed.any()):
        raise UsageError(_NOT_FINITE)
    inverse = torch.cholesky_inverse(factor)
    per_group = len(rows) // groups
    found = []
    for block in range(groups):
        places = _places(rows[block * per_group : (block + 1) * per_group])
        for number in np.unique(subject.grouping.group_of[list(places)]).tolist():
            variables = subject.grouping.groups[number].variables.tolist() if number >= 0 else []
            own = [places[variable] for variable in variables if variable in places]
            if not own or len(own) != len(variables) or len({len(indices) for indices in own}) != 1:
                continue
            index = torch.tensor(own, device=matrix.device)
            index = (index[:, :, None] * each + torch.arange(each, device=matrix.device)).flatten()
            weights = matrix[block][:, index]
            product = (weights.T @ weights).to(inverse)
            part = Part(inverse[block][index][:, index], product, len(index) // len(own))
            found.append((number, part))
    return found


def _places(rows: Terms) -> dict[int, list[int]]:
    """For each variable the indices that go with it."""
    found: dict[int, list[int]] = {}
    for column in rows.T:
        live = np.flatnonzero(column >= 0)
        for variable, index in zip(column[live].tolist(), live.tolist(), strict=True):
            found.setdefault(variable, []).append(index)
    return {variable: sorted(set(indices)) for variable, indices in found.items()}
