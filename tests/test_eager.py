from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def cut(model: nn.Module, inputs: Any, **options: Any) -> slimc.Compressed:
    return slimc.compress(model, inputs, **{"round_to": 1, "recover": "none", **options})


class MobileBlock(nn.Module):
    """Expansion, depthwise convolution with a gate, projection: one group runs through all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.GroupNorm(1, 16)
        self.project = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.norm(self.depthwise(self.expand(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def mobile() -> slimc.Compressed:
    return cut(seeded(MobileBlock), noise(2, 3, 8, 8), flops=0.4)


def test_the_result_is_the_users_class_with_fewer_weights(mobile: slimc.Compressed) -> None:
    assert type(mobile.module) is MobileBlock
    assert mobile.plan.attributes_note is None
    kept = len(mobile.plan.kept["depthwise.weight"][0])
    assert 1 <= kept < 16
    assert mobile.module.get_parameter("depthwise.weight").shape == (kept, 1, 3, 3)


def test_a_repr_rebuilds_every_shape(mobile: slimc.Compressed) -> None:
    checked = 0
    for module in mobile.module.modules():
        if type(module).__module__.startswith("torch.nn") and next(module.parameters(recurse=False), None) is not None:
            rebuilt = eval(repr(module), vars(nn))  # the repr of torch's own classes
            assert _shapes(rebuilt) == _shapes(module), module
            checked += 1
    assert checked == 6


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in module.named_parameters(recurse=False)}


def test_a_depthwise_convolution_keeps_one_group_per_channel(mobile: slimc.Compressed) -> None:
    depthwise = mobile.module.get_submodule("depthwise")
    assert isinstance(depthwise, nn.Conv2d)
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == depthwise.weight.shape[0] < 16


def test_the_result_survives_saving_and_copying(mobile: slimc.Compressed) -> None:
    x = noise(3, 3, 8, 8, seed=2)
    file = io.BytesIO()
    torch.save(mobile.module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        wanted = mobile.module(x)
        assert torch.equal(loaded(x), wanted)
        assert torch.equal(copy.deepcopy(mobile.module)(x), wanted)
        assert wanted.abs().max() > 0


def test_a_copy_shares_nothing_with_the_result(mobile: slimc.Compressed) -> None:
    copied = copy.deepcopy(mobile.module)
    before = mobile.module.get_parameter("head.weight").clone()
    nn.init.zeros_(copied.get_parameter("head.weight"))
    assert torch.equal(mobile.module.get_parameter("head.weight"), before)


def test_the_result_trains() -> None:
    slim = cut(seeded(MobileBlock), noise(2, 3, 8, 8), flops=0.4)
    x, y = noise(32, 3, 8, 8), torch.arange(32) % 4
    model = slim.module.train()
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(slim.program.module()(x), model(x))


class Tied(nn.Module):
    """A decoder that shares the encoder's weight, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.mix = nn.Linear(12, 12)
        self.decode = nn.Linear(12, 11, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = torch.relu(self.mix(torch.relu(self.mix(x))))
        out: Tensor = self.decode(x)
        return out


def test_tied_weights_stay_one_parameter() -> None:
    slim = cut(seeded(Tied), torch.tensor([[1, 2, 3], [4, 5, 6]]), params=0.6)
    module = slim.module
    assert isinstance(module, Tied)
    assert module.decode.weight is module.embed.weight
    width = module.embed.weight.shape[1]
    assert 1 <= width < 12
    assert (module.embed.embedding_dim, module.mix.in_features, module.mix.out_features) == (width, width, width)
    assert module.decode.in_features == width
    assert len(list(module.parameters())) == len(list(Tied().parameters()))


class Attention(nn.Module):
    """Heads whose number and size are attributes, as in most transformers written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.head_dim = 6
        self.qkv = nn.Linear(10, 72)
        self.out = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4)
        out: Tensor = self.out(x.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))
        return out


def test_sizes_that_are_attributes_of_the_users_class_follow() -> None:
    slim = cut(seeded(Attention), noise(2, 5, 10), params=0.5)
    module = slim.module
    assert isinstance(module, Attention), slim.plan.attributes_note
    assert module.num_heads * module.head_dim < 24
    assert module.qkv.weight.shape[0] == 3 * module.num_heads * module.head_dim == module.qkv.out_features
    assert module.out.in_features == module.num_heads * module.head_dim


class HardCoded(nn.Module):
    """The number 16 stands in forward(), where no attribute can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x.view(x.shape[0], 16, -1).relu().view(x.shape[0], 16, x.shape[2], x.shape[3])
        out: Tensor = self.second(x).mean((2, 3))
        return out


def test_a_class_that_hard_codes_a_size_comes_back_as_a_graph_with_the_reason() -> None:
    slim = cut(seeded(HardCoded), noise(2, 3, 8, 8), flops=0.5)
    assert type(slim.module) is not HardCoded
    assert slim.module is slim.graph
    reason = slim.plan.attributes_note
    assert reason is not None
    assert reason.startswith("HardCoded does not run with the new sizes: ")
    assert any(reason in warning for warning in slim.report.warnings)
    assert slim.plan.attributes is None
    with torch.no_grad():
        assert slim.module(noise(5, 3, 8, 8)).shape == (5, 4)
    assert set(slim.state_dict()) == set(HardCoded().state_dict())
    assert slim.state_dict()["first.weight"].shape[0] < 16


class Misleading(nn.Module):
    """`alpha` equals a size by chance and is used as a number: the class must not get another one."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = 16
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.first(x)) * self.alpha)
        return out


def test_whatever_comes_back_computes_what_the_graph_computes() -> None:
    x = noise(4, 6)
    slim = cut(seeded(Misleading), x, params=0.5)
    with torch.no_grad():
        torch.testing.assert_close(slim.module(x), slim.graph(x))
    if isinstance(slim.module, Misleading):
        assert slim.module.alpha == 16


def test_the_number_of_groups_is_told_from_a_group_width_of_the_same_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(64, 8, 1)
    ).eval()
    with torch.no_grad():  # one channel of each of the 8 groups of 8 matters least, so that the width alone shrinks
        model[0].weight[0::8] *= 1e-3  # type: ignore[operator, index]
        model[0].bias[0::8] *= 1e-3  # type: ignore[operator, index]
        model[2].weight[:, 0] *= 1e-3  # type: ignore[operator, index]
    slim = slimc.compress(model, torch.randn(2, 3, 8, 8), flops=0.93, round_to=1)
    grouped = slim.module[2]  # type: ignore[index]
    assert isinstance(grouped, nn.Conv2d)
    assert grouped.groups == 8
    assert grouped.weight.shape[1] == 7


@pytest.mark.parametrize("pool", [nn.MaxPool2d(8), nn.AdaptiveAvgPool2d(8), nn.MaxPool2d(8, stride=2)])
def test_a_window_as_wide_as_there_are_channels_is_no_number_of_channels(pool: nn.Module) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), pool, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))

    model = seeded(make)
    slim = cut(model, noise(2, 3, 16, 16), params=0.6)
    assert type(slim.module) is nn.Sequential


class Numbers(nn.Module):
    """Numbers that equal sizes by chance and are none: what the user says with them stays."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.classes, self.split = 16, 16, 16
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, size=(self.size, self.size))
        x = torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3))
        out: Tensor = self.c(x.view(-1, self.split))
        return out


def test_numbers_that_are_no_sizes_keep_their_values() -> None:
    model = seeded(Numbers)
    slim = cut(model, noise(2, 3, 16, 16), params=0.5)
    assert isinstance(slim.module, Numbers)
    width = slim.module.c.in_features
    assert width < 16
    assert (slim.module.size, slim.module.classes, slim.module.split) == (16, 16, width)
    with torch.no_grad():
        other = noise(2, 3, 24, 24)
        torch.testing.assert_close(slim.module(other), slim.graph(other))


class Scaled(nn.Module):
    """What a class computes otherwise with other sizes stands behind a scale that hides it before training."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.last = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.full((16,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.tanh(self.q(x))
        out: Tensor = self.last(self.v(x) + self.scale * q * 4 / q.size(-1) ** 0.5)
        return out


def test_a_difference_behind_a_small_scale_is_seen() -> None:
    slim = cut(seeded(Scaled), noise(4, 6), params=0.5)
    assert slim.module is slim.graph
    assert slim.plan.attributes_note is not None
    assert "differs from the rewritten graph" in slim.plan.attributes_note
    assert float(slim.state_dict()["scale"].max()) == pytest.approx(1e-6)


class Unscaled(Attention):
    """Takes the scale from the head size."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(x.transpose(1, 2).flatten(2))
        return out


def test_an_attention_that_scales_by_its_head_size_is_named_with_what_to_do() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 10), Unscaled(), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))

    slim = cut(seeded(make), noise(2, 5, 10), params=0.5)
    note = slim.plan.attributes_note
    assert slim.module is slim.graph
    assert note is not None
    assert "Its attention in 1 scales by the head size, which was cut" in note
    assert "as does --ignore 1" in note
    kept = cut(seeded(make), noise(2, 5, 10), params=0.9, ignore=("1",))
    assert kept.module is not kept.graph
