"""nisp and obs: scores that pass through the layers behind a group, or what these can make up for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scoring import build, run, score
from torch import Tensor, nn

from slimc.scorers.nisp import importance


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
        self.double()
        self.b.weight.data = torch.tensor([[1.0, -1, 0], [2, 0, 3]], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))  # type: ignore[no-any-return]


def test_nisp_carries_importance_back_by_absolute_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimc.scorers.nisp.importance", lambda _: torch.tensor([1.0, 2.0], dtype=torch.float64))
    found = score("nisp", Chain(), [torch.randn(4, 2).double()])
    np.testing.assert_allclose(found["b.weight"], [1, 2])
    np.testing.assert_allclose(found["a.weight"], [5, 1, 6])


def test_nisp_of_a_shortcut_adds_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimc.scorers.nisp.importance", lambda f: torch.ones(f.shape[1], dtype=torch.float64))
    model = build("resnet")
    scale = {n: (model.get_parameter(f"{n}.weight").abs()
                 / (model.get_buffer(f"{n}.running_var") + 1e-5).sqrt()).detach() for n in ("bn1", "bn2")}  # fmt: skip
    found = run("nisp", "resnet")
    # Importance at every position of the last map is 1 / 64 before the mean; b spreads it over its 3 x 3 window.
    ones = torch.full((1, 6, 8, 8), 1 / 64, dtype=torch.float64) * scale["bn2"][:, None, None]
    inner = nn.functional.conv_transpose2d(ones, model.get_parameter("b.weight").abs(), padding=1).detach()
    np.testing.assert_allclose(found[1], inner.sum((0, 2, 3)).numpy())
    through = inner * scale["bn1"][:, None, None]
    read = nn.functional.conv_transpose2d(through, model.get_parameter("a.weight").abs(), padding=1).detach()
    np.testing.assert_allclose(found[0], (1 + read.sum((0, 2, 3))).numpy())  # the head's own 1, and what a reads


def test_inf_fs_prefers_features_that_vary_and_are_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    features = torch.cat([base, base * 0.9, 3 * torch.randn(200, 1, generator=generator).double()], 1)
    own = importance(features)
    assert own[2] > own[:2].max()
    assert (own >= 0).all()
    torch.testing.assert_close(importance(features[:, [2, 0, 1]]), own[[2, 0, 1]])


def test_nisp_passes_importance_to_both_sides_of_a_difference_however_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slimc.scorers.nisp.importance", lambda features: torch.ones(features.shape[1]).double())

    class Difference(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.a, self.b, self.c, self.how = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), how

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x)
            z = x - y if self.how == "sub" else torch.add(x, y, alpha=-1) if self.how == "alpha" else x + (-1.0) * y
            return self.c(torch.relu(z))  # type: ignore[no-any-return]

    found = []
    for how in ("sub", "alpha", "factor"):
        torch.manual_seed(0)
        found.append(score("nisp", Difference(how).double().eval(), [torch.randn(8, 4).double()]))
    for other in found[1:]:
        for name, own in found[0].items():
            np.testing.assert_allclose(other[name], own)


def test_nisp_counts_a_value_that_is_added_to_itself_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimc.scorers.nisp.importance", lambda features: torch.ones(features.shape[1]).double())

    class Doubled(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.a, self.b, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x + x if self.how == "sum" else 2 * x + 1)  # type: ignore[no-any-return]

    found = []
    for how in ("sum", "factor"):
        torch.manual_seed(0)
        found.append(score("nisp", Doubled(how).double().eval(), [torch.randn(8, 4).double()]))
    for name, own in found[0].items():
        np.testing.assert_allclose(found[1][name], own)


def test_obs_of_a_model_with_one_output_does_not_depend_on_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 1)).double().eval()
    x = torch.randn(256, 16, dtype=torch.float64)
    totals = []
    for size in (1, 2, 256):
        (found,) = score("obs", model, list(torch.split(x, size))).values()
        totals.append(found.sum())
    assert max(totals) < 3 * min(totals)  # random combinations; was 4 orders of magnitude


@pytest.mark.parametrize("norm", [False, True])
def test_obs_sees_a_wide_layer_behind_a_flattened_map_as_a_convolution(
    norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 6, 3, padding=1), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU()]
    over_map, flat = nn.Conv2d(6, 10, 4), nn.Linear(96, 10)
    with torch.no_grad():
        flat.weight.copy_(over_map.weight.flatten(1))
        flat.bias.copy_(over_map.bias)  # type: ignore[arg-type]
    x = [torch.rand(16, 3, 4, 4) for _ in range(3)]
    exact = score("obs", nn.Sequential(*first, nn.Flatten(), flat).eval(), x)
    monkeypatch.setattr("slimc.scorers.obs._EXACT", 8)
    monkeypatch.setattr("slimc.scorers.obs._WIDEST", 50)
    (wide,) = score("obs", nn.Sequential(*first, nn.Flatten(), flat).eval(), x).values()
    (convolved,) = score("obs", nn.Sequential(*first, over_map, nn.Flatten()).eval(), x).values()
    np.testing.assert_allclose(wide, convolved, rtol=1e-4)
    assert not np.allclose(wide, next(iter(exact.values())), rtol=1e-6)


def test_obs_says_nothing_of_what_a_wide_layer_reads_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Last(nn.Module):
        """Flattened with channels last."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(96, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).relu().permute(0, 2, 3, 1).flatten(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    monkeypatch.setattr("slimc.scorers.obs._WIDEST", 50)
    monkeypatch.setattr("slimc.scorers.obs.eliminate", None)  # is not asked: its gate's gradient is taken
    (found,) = score("obs", Last().eval(), [torch.rand(16, 3, 4, 4)]).values()
    assert (found > 0).all()


class Written(nn.Module):
    """Two layers as `nn.Linear`, or the same as products with a transposed weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.w = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in ((6, 4), (5, 6), (3, 5))])
        self.b = nn.ParameterList([nn.Parameter(torch.randn(len(w))) for w in self.w])

    def layer(self, x: Tensor, number: int) -> Tensor:
        w, b = self.w[number], self.b[number]
        found: dict[str, Callable[[], Tensor]] = {
            "addmm": lambda: torch.addmm(b, x, w.T),
            "einsum": lambda: torch.einsum("ni,oi->no", x, w) + b,
            "mm": lambda: torch.mm(x, w.T) + b,
            "linear": lambda: nn.functional.linear(x, w, b),
        }
        return found[self.how]()

    def forward(self, x: Tensor) -> Tensor:
        for number in range(2):
            x = torch.relu(self.layer(x, number))
        return nn.functional.linear(x, self.w[2], self.b[2])


@pytest.mark.parametrize("how", ["addmm", "mm", "einsum"])
def test_nisp_takes_absolute_weights_however_a_layer_is_written(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimc.scorers.nisp.importance", lambda features: torch.ones(features.shape[1]).double())
    data = torch.randn(8, 4).double()
    found = []
    for own in ("linear", how):
        torch.manual_seed(0)
        found.append(score("nisp", Written(own).double().eval(), [data]))
    for name, wanted in found[0].items():
        np.testing.assert_allclose(found[1][name], wanted)


def test_nisp_passes_norms_without_statistics() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), norm, nn.ReLU(), nn.Linear(6, 3))
    found = score("nisp", model.double().eval(), [torch.randn(8, 4).double()])
    assert all(np.isfinite(own).all() and own.max() > 0 for own in found.values())


@pytest.mark.parametrize("width", [24, 25])
def test_obs_takes_what_a_norm_of_tokens_saw_for_no_moments_of_features(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, width), nn.BatchNorm1d(6), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.norm(self.a(x))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, data = Tokens().double().eval(), torch.randn(64, 6, 8).double()
    with torch.no_grad():
        model.norm.running_var.mul_(torch.logspace(-2, 2, 6))  # type: ignore[union-attr]
    found = score("obs", model, [data])
    monkeypatch.setattr("slimc.scorers.obs.moments_as_trained", lambda module: {})
    for name, wanted in score("obs", model, [data]).items():
        assert np.isfinite(wanted).all()
        np.testing.assert_array_equal(found[name], wanted)
