"""Samples that recovery takes, and the statistics that are re-estimated on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from convnet import ConvNet, X, noise, plain, seeded, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slimc
from slimc.errors import UsageError
from slimc.graph.capture import capture
from slimc.graph.example import Example
from slimc.samples import Batch, Samples, collect, set_apart
from slimc.synthetic import synthetic


@pytest.fixture(scope="module")
def slim() -> slimc.Compressed:
    return plain(seeded(ConvNet), X, flops=0.5)


# -- recovery -----------------------------------------------------------------------------------------


def reestimated(model: nn.Module, inputs: Any, data: Any, **options: Any) -> slimc.Compressed:
    """Cut plainly, then re-estimate batch norms on all of the data."""
    slim = plain(model, inputs, **options)
    slim.recover("bn", data)
    return slim


def _loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(noise(16, 3, 8, 8, seed=7) + 1, torch.zeros(16, dtype=torch.int64)), batch_size=16)


DATA: dict[str, Callable[[], Any]] = {
    "DataLoader": _loader,
    "pairs": lambda: [(x, y) for x, y in _loader()],
    "lists": lambda: [[x, y] for x, y in _loader()],
    "tensors": lambda: [x for x, _ in _loader()],
    "generator": lambda: (x for x, _ in _loader()),
}


@pytest.mark.parametrize("form", DATA)
def test_re_estimated_statistics_are_those_that_torch_computes(form: str, slim: slimc.Compressed) -> None:
    recovered = reestimated(seeded(ConvNet), X, DATA[form](), flops=0.5)
    wanted = copy.deepcopy(slim.module)
    for module in wanted.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
            module.train()
    with torch.no_grad():
        wanted(next(iter(_loader()))[0])
    moved = 0.0
    for name in ("bn1", "bn2"):
        for statistic in ("running_mean", "running_var"):
            got, reference = (m.get_submodule(name).get_buffer(statistic) for m in (recovered.module, wanted))
            torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-6)
            moved += float((got - slim.module.get_submodule(name).get_buffer(statistic)).abs().max())
    assert moved > 0.1
    assert {n: p.detach().numpy().tobytes() for n, p in recovered.module.named_parameters()} == {
        n: p.detach().numpy().tobytes() for n, p in slim.module.named_parameters()
    }
    assert recovered.report.recovery is not None
    assert [step.method for step in recovered.report.recovery] == ["bn"]


@pytest.mark.parametrize("form", ["inside", "beside", "alone"])
def test_dictionary_batches_feed_a_model_that_takes_no_keywords(form: str) -> None:
    pictures, labels = noise(16, 3, 8, 8, seed=7) + 1, torch.zeros(16, dtype=torch.int64)
    item: Any = {"x": pictures, "labels": labels}
    if form != "inside":
        item = ({"x": pictures}, labels) if form == "beside" else {"x": pictures}
    captured = slimc.inspect(seeded(ConvNet), X).captured
    batch = collect([item], captured.example).batches[0]
    assert torch.equal(batch.example.args[0], pictures)
    if form == "alone":
        assert batch.targets is None
    else:
        assert isinstance(batch.targets, Tensor)
        assert torch.equal(batch.targets, labels)
    with pytest.raises(UsageError, match="a batch of --data lacks x; it has pixels"):
        collect([{"pixels": pictures}], captured.example)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pictures_are_made_up_in_the_precision_of_the_model(dtype: torch.dtype) -> None:
    x = noise(2, 3, 16, 16).to(dtype)
    slim = slimc.compress(seeded(ConvNet).to(dtype), x, flops=0.5, round_to=1)
    assert slim.report.calibration is not None
    assert slim.report.calibration.source.startswith("synthetic pictures")
    assert {p.dtype for p in slim.module.parameters()} == {dtype}
    kept = [step for step in slim.report.recovery or () if step.kept]
    assert kept[0].after is not None
    assert kept[0].before is not None
    assert kept[0].after < 0.5 * kept[0].before


def test_dictionary_batches_feed_a_model_that_takes_keywords() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, features: Tensor) -> Tensor:
            out: Tensor = self.net(features)
            return out

    batches = [{"features": noise(8, 6) + 3, "labels": torch.zeros(8)}]
    slim = reestimated(seeded(Keyword), {"features": noise(4, 6)}, batches, params=0.5)
    hidden = slim.module.get_submodule("net.0")(batches[0]["features"])
    torch.testing.assert_close(slim.module.get_buffer("net.1.running_mean"), hidden.mean(0), rtol=1e-5, atol=1e-6)


def test_statistics_over_several_batches_are_those_of_all_samples() -> None:
    whole = noise(24, 3, 8, 8, seed=9)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3)))
    slim = reestimated(model, X, [whole[:8], whole[8:12], whole[12:]], flops=0.5)
    first = slim.module.get_submodule("0")(whole)
    torch.testing.assert_close(slim.module.get_buffer("1.running_mean"), first.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slim.module.get_buffer("1.running_var"), first.var((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_a_norm_that_is_used_twice_has_the_statistics_of_both_uses() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.norm(self.second(torch.relu(self.norm(self.first(x))))))
            return out

    x = noise(64, 6) + 1
    module = reestimated(seeded(Shared), noise(4, 6), [x], params=0.7).module
    assert isinstance(module, Shared)
    with torch.no_grad():
        one = module.first(x)
        normal = (one - one.mean(0)) / (one.var(0, unbiased=False) + module.norm.eps).sqrt()
        scaled = normal * module.norm.weight + module.norm.bias
        both = torch.cat([one, module.second(torch.relu(scaled))])
    torch.testing.assert_close(module.get_buffer("norm.running_mean"), both.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.get_buffer("norm.running_var"), both.var(0), rtol=1e-4, atol=1e-5)


def test_data_that_is_not_finite_is_refused_before_it_spoils_the_statistics() -> None:
    slim = plain(seeded(ConvNet), X, flops=0.5)
    before = weights(slim.module)
    with pytest.raises(UsageError, match=r"batch 1 of --data holds NaN or infinity in its sample 0"):
        slim.recover("bn", [torch.full_like(X, float("nan"))])
    assert weights(slim.module) == before
    assert slim.report.recovery is None


def test_a_model_with_a_fixed_batch_takes_data_in_any_batches() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.relu(self.norm(self.first(x)).view(4, 8)))
            return out

    data = noise(10, 6) + 2
    slim = reestimated(seeded(Fixed), noise(4, 6), [data], params=0.7)
    weight, bias = slim.module.get_parameter("first.weight"), slim.module.get_parameter("first.bias")
    hidden = nn.functional.linear(data[:8], weight, bias)
    torch.testing.assert_close(slim.module.get_buffer("norm.running_mean"), hidden.mean(0), rtol=1e-4, atol=1e-6)


def test_only_as_many_batches_are_read_as_are_needed() -> None:
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield noise(64, 3, 8, 8, seed=len(read))

    plain(seeded(ConvNet), X, flops=0.5, data=endless(), recover="bn")
    assert len(read) == 512 // 64


def test_without_data_pictures_are_made_up_for_models_that_take_them_and_nothing_is_done_for_others() -> None:
    slim = plain(seeded(ConvNet), X, flops=0.5, recover="auto")
    assert slim.report.calibration is not None
    assert slim.report.calibration.source.startswith("synthetic pictures")
    assert slim.report.method.scorer == "obs"
    vectors = plain(
        seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))),
        noise(4, 6),
        params=0.7,
        recover="auto",
    )
    assert vectors.report.recovery is None
    assert vectors.report.calibration is None
    assert vectors.report.method.scorer == "magnitude"


def test_progress_tells_the_stages_in_order_and_the_target_both_ways() -> None:
    told: list[tuple[str, str]] = []
    plain(seeded(ConvNet), X, flops=0.5, progress=lambda kind, text: told.append((kind, text)))
    stages = [text for kind, text in told if kind == "stage"]
    assert stages == ["capture", "infer", "score", "plan", "rewrite", "verify"]
    assert any("keep 50%, cut 50%" in text for _, text in told)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_statistics_do_not_depend_on_how_small_the_batches_are(size: int) -> None:
    whole = noise(64, 3, 8, 8, seed=7)
    inputs = seeded(ConvNet), X
    wanted = reestimated(*inputs, list(torch.split(whole, 16)), flops=0.5).module.state_dict()
    found = reestimated(*inputs, list(torch.split(whole, size)), flops=0.5).module.state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])


def test_a_last_batch_of_one_sample_is_measured_with_the_others() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))
    data = list(torch.split(noise(65, 8, seed=3), 16))
    assert len(data[-1]) == 1
    slim = slimc.compress(model, noise(2, 8), flops=0.6, round_to=1, data=data, recover=["bn"])
    assert slim.report.recovery is not None
    assert "on 53 samples" in slim.report.recovery[0].detail  # a fifth judges


def test_a_model_that_takes_one_sample_at_a_time_is_measured_on_all_of_them() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.n(self.a(x.reshape(1, 8)))))  # type: ignore[no-any-return]

    slim = reestimated(seeded(One), noise(1, 8), [noise(32, 8, seed=3)], flops=0.6)
    norm = slim.module.get_submodule("n")
    assert isinstance(norm.running_mean, Tensor)
    assert norm.running_mean.abs().min() > 1e-3  # was 0


def test_a_few_samples_are_set_aside_of_small_batches_together() -> None:
    def sizes(*counts: int) -> tuple[list[int], list[int]]:
        batches = tuple(Batch(Example((noise(count, 2),), {})) for count in counts)
        fit, judged = Samples(batches, "here").split(0.2)
        assert fit.count + judged.count == sum(counts)
        return [batch.count for batch in fit.batches], [batch.count for batch in judged.batches]

    assert sum(sizes(*[2] * 20)[1]) == 8
    assert sum(sizes(*[4] * 10, 1)[1]) == 8
    assert sizes(3) == ([2], [1])
    assert sizes(1, 1) == ([1], [1])
    assert sum(sizes(*[1] * 20)[1]) == 4
    assert sizes(10, 1) == ([8, 1], [2])
    assert set_apart([13, 64, 5], 0.2) == [3, 13, 1]
    assert sum(set_apart([1] * 30, 0.2)) == sum(set_apart([2] * 15, 0.2)) == 6
    assert set_apart([1, 2], 0.2) == [0, 1]


def test_a_step_is_judged_also_by_a_single_sample() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1)))
    slim = slimc.compress(model, X, flops=0.5, round_to=1, data=[noise(3, 3, 8, 8, seed=2)], recover=["reconstruct"])
    assert slim.report.recovery is not None
    (step,) = slim.report.recovery
    assert step.before is not None
    assert step.before > 1e-3


def test_an_input_that_all_samples_share_is_not_joined() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.b(torch.relu(self.n(self.a(x)))) * scale  # type: ignore[no-any-return]

    whole, scale = noise(32, 8, seed=3), torch.tensor([2.0])
    example = (noise(2, 8), scale)
    together = reestimated(seeded(Scaled), example, [(whole, scale)], flops=0.6).module.state_dict()
    apart = reestimated(seeded(Scaled), example, [(x[None], scale) for x in whole], flops=0.6).module.state_dict()
    torch.testing.assert_close(apart["n.running_mean"], together["n.running_mean"])


class Masked(nn.Module):
    """Tokens and a mask of [tokens, tokens] that all samples share; a scalar comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(50, 8), nn.Linear(8, 24), nn.Linear(24, 5)

    def forward(self, scale: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        x: Tensor = self.head(torch.relu(self.inner(self.table(ids)))) * scale
        return mask @ x


MASK = torch.tril(torch.ones(6, 6))


def test_an_input_that_all_samples_share_stays_whole_even_if_it_is_as_long_as_a_batch() -> None:
    ids = torch.randint(0, 50, (60, 6), generator=torch.Generator().manual_seed(0))
    like = Example((torch.tensor(2.0), ids[:2], MASK), {})
    found = collect([(torch.tensor(2.0), part, MASK) for part in torch.split(ids, 6)], like)
    assert found.count == 60
    for own in (*found.pieces(4), *found.joined(16).examples(), *found.split(0.3)[1].examples()):
        assert own.args[1].shape[1:] == (6,)
        torch.testing.assert_close(own.args[2], MASK)
    fit, judged = found.split(0.3)
    assert torch.equal(torch.cat([own.args[1] for part in (fit, judged) for own in part.examples()]).sum(), ids.sum())


def test_made_up_tokens_leave_shared_inputs_alone() -> None:
    example = (torch.tensor(2.0), torch.zeros(2, 6, dtype=torch.int64), MASK)
    made = synthetic(capture(seeded(Masked), example), 40, 1.0)
    assert made is not None
    assert made.count == 40
    for own in made.examples():
        assert len(own.args[1].unique()) > 5
        assert own.args[2] is MASK or torch.equal(own.args[2], MASK)
    slim = slimc.compress(seeded(Masked), example, params=0.8, round_to=1)
    assert slim.report.calibration is not None


def test_inputs_that_are_not_tensors_do_not_shift_the_places_of_tokens() -> None:
    class Flagged(Masked):
        def forward(self, flag: Any, ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.tensor(1.0), ids, torch.eye(6))

    example = (None, torch.zeros(2, 6, dtype=torch.int64))
    made = synthetic(capture(seeded(Flagged), example), 40, 1.0)
    assert made is not None
    assert all(len(own.args[1].unique()) > 5 for own in made.examples())


def test_targets_that_are_lists_of_samples_are_cut_with_them() -> None:
    boxes = [{"box": torch.full((2, 4), float(i))} for i in range(10)]
    batch = Batch(Example.of(noise(10, 3)), boxes)
    cut: Any = batch[3:6].targets
    assert [float(own["box"][0, 0]) for own in cut] == [3, 4, 5]
    pair = Batch(Example.of(noise(10, 3)), (torch.arange(10), {"weight": torch.arange(10.0), "name": "w"}))
    last: Any = pair[7:].targets
    labels, rest = last
    assert labels.tolist() == [7, 8, 9]
    assert rest["weight"].tolist() == [7.0, 8.0, 9.0]
    assert rest["name"] == "w"
    moved: Any = batch.to(torch.device("meta")).targets
    assert all(own["box"].is_meta for own in moved)


def test_pictures_are_fitted_where_norms_see_one_value_of_a_single_picture() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.linear, self.last, self.head = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(self.conv(x))).mean((2, 3))
            return self.head(torch.relu(self.last(self.linear(x))))  # type: ignore[no-any-return]

    made = synthetic(capture(seeded(Pooled), noise(2, 3, 16, 16)), 65, 1.0)
    assert made is not None
    assert "batch norms" in made.source
    assert made.count == 65
    assert all(bool(t.isfinite().all()) for own in made.examples() for t in own.tensors())


class GraphNetwork(nn.Module):
    """Nodes [N, features] and edges [2, E] between them: rows that are no samples of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        out: Tensor = self.b(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))
        return out


def test_rows_that_are_no_samples_are_refused_where_batches_are_taken_apart() -> None:
    torch.manual_seed(0)
    graph = torch.randn(20, 6), torch.randint(0, 20, (2, 60))
    model = GraphNetwork().eval()
    options: dict[str, Any] = {"flops": 0.6, "round_to": 1}
    with pytest.raises(UsageError, match=r"--data: half of a batch fails .* as the nodes of a graph"):
        slimc.compress(model, graph, data=[graph] * 3, **options)
    slim = slimc.compress(model, graph, recover="none", **options)
    assert slim.report.macs.after <= 0.6 * slim.report.macs.before
