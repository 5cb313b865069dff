"""One operator at a time between two layers: what stays free, what freezes, and every law for both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws import check_laws
from torch import Tensor, nn
from torch.nn import functional as F

from slimc.analysis import analyse
from slimc.errors import CaptureError, InternalError
from slimc.graph import rule
from slimc.graph.rules.view import segments

CHANNELS = 8
Operator = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """conv(3, 8), the operator on its [N, 8, 4, 4] map, and a linear layer on whatever comes out."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator, self.a = operator, nn.Conv2d(3, CHANNELS, 1)
        with torch.no_grad():
            out = self.run(torch.randn(2, 3, 4, 4))
        self.fc = nn.Linear(out.shape[1], 2)

    def run(self, x: Tensor) -> Tensor:
        """The features that the linear layer reads."""
        x = self.operator(self.a(x))
        return x if x.dim() == 2 else x.flatten(2).square().mean(2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.run(x))
        return result


def selected(x: Tensor) -> Tensor:
    return x.index_select(2, torch.tensor([0, 2]))


def overwritten(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 0] = 1.0
    return x


FREE: dict[str, Operator] = {
    # elementwise
    "gelu": F.gelu,
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "clamp_min": lambda x: x.clamp_min(0.1),
    "pow": lambda x: x**2,
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "addcmul": lambda x: x.addcmul(x, x),
    "masked_fill": lambda x: x.masked_fill(x > 1, 1.0),
    "to": lambda x: x.to(torch.float32),
    "type_as": lambda x: x.type_as(x[:1, :1, :2, 0]),
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "lerp": lambda x: x.lerp(x * 2, 0.3),
    "neg": lambda x: -x,
    "reciprocal": lambda x: 1 / (x.abs() + 1),
    "maximum": lambda x: torch.max(x, x * 0.5),
    "rsub": lambda x: 1 - x,
    "logit": lambda x: torch.logit(torch.sigmoid(x) * 0.9),
    "nan_to_num": torch.nan_to_num,
    "mish": F.mish,
    # movement
    "permute": lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
    "movedim": lambda x: x.movedim(1, -1).mean((1, 2)),
    "swapaxes": lambda x: x.swapaxes(1, 2).sum(1).sum(-1),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: torch.unflatten(x, 1, (2, 4)).flatten(1),
    "narrow": lambda x: x.narrow(1, 2, 4),
    "slice": lambda x: x[:, 1:-1],
    "select": lambda x: x[:, :, 1, 1],
    "unbind": lambda x: x.unbind(3)[2],
    "split": lambda x: torch.split(x, 3, 1)[1],
    "tensor_split": lambda x: x.tensor_split(3, 1)[0],
    "flip": lambda x: x.flip(1, 2),
    "roll": lambda x: x.roll((1, -3), (2, 1)),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)),
    "constant_pad_2": lambda x: F.pad(x, (1, 1, 1, 1), value=3.0),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 1),
    "tile": lambda x: x.tile(1, 2, 1, 1),
    "expand": lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1),
    "unfold": lambda x: x.unfold(2, 2, 1),
    "stack": lambda x: torch.stack([x, x * 2], 2),
    "stack_then_merge": lambda x: torch.stack([x, x * 2], 2).flatten(1, 2),
    "cat": lambda x: torch.cat([x, x * 2, x.new_ones(2, 3, 4, 4)], 1),
    "squeeze": lambda x: x.mean((2, 3), True).squeeze(-1).squeeze(-1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "view_as": lambda x: x.view(2, 2, 4, 4, 4).view_as(x),
    "expand_as": lambda x: x.mean(1, True).expand_as(x) * x,
    # reductions and norms
    "sum": lambda x: x.sum((2, 3)),
    "amax": lambda x: x.amax(1, True) * x,
    "var": lambda x: x / (1 + x.var(1, keepdim=True)),
    "logsumexp": lambda x: x.logsumexp((2, 3)),
    "max_over_places": lambda x: x.flatten(2).max(-1)[0],
    "normalize": lambda x: F.normalize(x, dim=1),
    "instance_norm": F.instance_norm,
    "softmax_over_places": lambda x: x.flatten(2).softmax(-1) * 3,
    "layer_norm": lambda x: F.layer_norm(x, (8, 4, 4)),
    "cumsum_over_places": lambda x: x.cumsum(2),
    "std": lambda x: x.std((2, 3)),
    "argmax_over_places": lambda x: x * x.flatten(2).argmax(-1)[..., None, None],
    "sort_over_places": lambda x: x.flatten(2).sort(-1)[0][..., :3],
    # space
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive": lambda x: F.adaptive_max_pool2d(x, 2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, size=6),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "grid_sample": lambda x: F.grid_sample(x, x.new_ones(2, 3, 3, 2) * 0.2, align_corners=False),
    # contraction and indexing
    "matmul": lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2),
    "bmm": lambda x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)).sum(2),
    "einsum": lambda x: torch.einsum("nchw,nchv->ncwv", x, x),
    "baddbmm": lambda x: torch.baddbmm(x.mean(3)[:, :, :1], x.flatten(2), x.flatten(2).transpose(1, 2)),
    "index_select": selected,
    "index": lambda x: x[:, :, torch.tensor([0, 3])],
    "copy": overwritten,
    "gather": lambda x: x.flatten(2).gather(2, torch.zeros(1, 1, 3, dtype=torch.int64).expand(2, 8, 3)),
    "tensordot": lambda x: torch.tensordot(x, x.new_ones(4, 5) * 0.3, dims=([3], [0])),
    "inner": lambda x: torch.inner(x, x[0, 0] * 0.5),
    "cdist": lambda x: torch.cdist(x.flatten(2), x.flatten(2) * 0.5).sum(2),
    "outer": lambda x: x * torch.outer(x[0, 0, 0], x[1, 0, 0]),
    "hstack": lambda x: torch.hstack([x, x * 2]),
    "fft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5),
    "diff": lambda x: x.diff(dim=2),
    # writing
    "index_put": lambda x: x.index_put((torch.tensor([0]),), x[1:] * 2),
    "index_put_apart": lambda x: (
        x.transpose(1, 2)
        .index_put((torch.tensor([0, 1]),) * 2, x[:, :, 0].transpose(1, 2)[:, 0, :, None])
        .transpose(1, 2)
    ),
    "scatter": lambda x: x.scatter(2, torch.zeros(1, 1, 4, 4, dtype=torch.int64).expand(2, 8, 4, 4), x * 2),
    "index_add": lambda x: x.index_add(2, torch.tensor([0, 3]), x[:, :, 1:3]),
    "index_copy": lambda x: x.index_copy(3, torch.tensor([2]), x[..., :1] * 3),
    "index_fill": lambda x: x.index_fill(2, torch.tensor([1]), 0.5),
    "slice_scatter": lambda x: x.slice_scatter(x[:, :4] * 2, 1, 3, 7),
    "slice_scatter_places": lambda x: x.slice_scatter(x[:, :, :2] * 2, 2, 1, 3),
    "select_scatter": lambda x: x.select_scatter(x[:, 0] * 2, 1, 3),
}

FROZEN: dict[str, Operator] = {
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "sort": lambda x: x.sort(1)[0],
    "argmax": lambda x: x * x.argmax(1, True),
    "topk": lambda x: x.topk(3, 1)[0],
    "flat_roll": lambda x: x.roll(1),
    "reflect": lambda x: F.pad(x.transpose(1, 3), (1, 1, 0, 0), mode="reflect").transpose(1, 3),
    "crop": lambda x: F.pad(x, (0, 0, 0, 0, -1, -1)),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1])),
    "unfold": lambda x: x.unfold(1, 3, 2).mean((2, 3)),
    "diagonal": lambda x: x.mean(3).diagonal(0, 1, 2),
    "triu": lambda x: x.flatten(2).triu(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.arange(8), 1, output_size=28),
    "cummax": lambda x: x.cummax(1)[0],
    "ragged_view": lambda x: x.reshape(2, 128)[:, :126].reshape(2, 6, 21),
    "scatter": lambda x: x.scatter(1, torch.zeros(2, 1, 4, 4, dtype=torch.int64), x[:, :1]),
    "index_put": lambda x: x.index_put((torch.tensor([0]), torch.tensor([1])), x[:1, 0]),
    "index_put_mask": lambda x: x.index_put((x > 0,), torch.tensor(0.5)),
    "slice_scatter": lambda x: x.slice_scatter(x[:, :4], 1, 0, 8, 2),
    "masked_scatter": lambda x: x.masked_scatter(x > 0, x * 2),
    "fft": lambda x: torch.fft.rfft(x, dim=1).real,
    "as_strided": lambda x: x.as_strided((2, 4), (128, 16)),
}


def build(operator: Operator) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Between(operator).eval(), torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize("name", FREE)
def test_channels_pass_through_and_every_law_holds(name: str) -> None:
    model, inputs = build(FREE[name])
    checked = check_laws(model, inputs, seed=3, fraction=0.5, inferred_again=False)
    assert not checked.analysis.types.unknown
    assert any(m.tensor == "a.weight" and m.axis == 0 for g in checked.analysis.groups for m in g.members)


@pytest.mark.parametrize("name", FROZEN)
def test_channels_that_an_operator_needs_whole_stay(name: str) -> None:
    analysis = analyse(*build(FROZEN[name]))
    assert not any(m.tensor == "a.weight" and m.axis == 0 for g in analysis.groups for m in g.members)


def test_a_size_that_depends_on_data_is_an_error_that_names_the_operator() -> None:
    with pytest.raises(CaptureError, match="depends on the data"):
        analyse(*build(lambda x: x[:, torch.tensor([True, False] * 4)]))


def test_two_rules_for_one_operator_are_an_error_that_names_both() -> None:
    rule.load()
    with pytest.raises(InternalError, match=r"linear has two rules: slimc\.graph\.rules\.contraction and .*test_rules"):
        rule.infers("linear")(lambda walk, node: None)


def test_every_resizing_and_counting_rule_belongs_to_an_operator_that_is_inferred() -> None:
    rule.load()
    assert rule.RESIZE.keys() | rule.COUNT.keys() <= rule.INFER.keys()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([2, 3, 4, 5], [2, 3, 5, 4], [([2], [2]), ([3], [3]), ([4, 5], [5, 4])]),
        ([4, 5, 6], [5, 4, 2, 3], [([4, 5], [5, 4]), ([6], [2, 3])]),
        ([1, 4, 6], [6, 1, 4], [([1, 4, 6], [6, 1, 4])]),
        ([4, 6, 1], [6, 4, 1, 1], [([4, 6, 1], [6, 4, 1, 1])]),
        ([2, 0, 3], [3, 0, 2], [([2, 0, 3], [3, 0, 2])]),
    ],
)
def test_a_view_is_split_where_both_shapes_have_had_the_same_elements(
    before: list[int], after: list[int], expected: list[tuple[list[int], list[int]]]
) -> None:
    assert [(before[old], after[new]) for old, new in segments(before, after)] == expected
