from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import slimc
from slimc import compiler
from slimc.errors import CaptureError, PlanError, UnreachableTarget, UsageError, VerificationError
from slimc.graph.capture import Example
from slimc.rewrite import Rewritten, rewrite


class ConvNet(nn.Module):
    """Two convolutions with batch norms, dropout and a linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.head(self.dropout(x.mean((2, 3))))
        return out


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = noise(2, 3, 8, 8)


def plain(model: nn.Module, inputs: Any, **options: Any) -> slimc.Compressed:
    """The cut alone, with widths as the budget gives them."""
    return slimc.compress(model, inputs, **{"round_to": 1, "recover": "none", **options})


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in model.state_dict().items()}


@pytest.fixture(scope="module")
def slim() -> slimc.Compressed:
    return plain(seeded(ConvNet), X, flops=0.5)


# -- the caller's world -------------------------------------------------------------------------------


def test_the_callers_model_and_random_states_are_left_as_they_were() -> None:
    model = seeded(ConvNet).train()
    model.get_submodule("bn1").eval()
    model.get_parameter("conv2.bias").requires_grad_(False)
    calls: list[int] = []
    model.get_submodule("head").register_forward_hook(lambda *_: calls.append(1))
    before = _everything(model)
    data = [noise(4, 3, 8, 8, seed=n) for n in range(2)]
    batch = X.clone().requires_grad_()
    plain(model, batch, flops=0.5, data=data, recover="bn")
    slimc.inspect(model, batch)
    assert _everything(model) == before
    assert calls == [] or len(model.get_submodule("head")._forward_hooks) == 1
    assert batch.grad is None
    assert torch.equal(batch, X)


def _everything(model: nn.Module) -> list[Any]:
    modules = [
        (name, id(m), m.training, repr(m), [list(getattr(m, k)) for k in vars(m) if k.endswith("_hooks")])
        for name, m in model.named_modules()
    ]
    tensors = [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()]
    states = (torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), random.getstate())
    return [weights(model), modules, tensors, states]


def test_no_default_argument_can_leak_between_runs() -> None:
    for function in (slimc.compress, slimc.apply, slimc.inspect, slimc.load):
        for parameter in inspect.signature(function).parameters.values():
            assert isinstance(parameter.default, (type, str, int, tuple, type(None)))


def test_the_mode_of_every_module_comes_back() -> None:
    model = seeded(ConvNet).train()
    model.get_submodule("bn2").eval()
    slim = plain(model, X, flops=0.5)
    assert {n: m.training for n, m in slim.module.named_modules()} == {n: m.training for n, m in model.named_modules()}


def test_what_was_frozen_for_training_stays_frozen() -> None:
    model = seeded(ConvNet)
    model.get_parameter("conv1.weight").requires_grad_(False)
    slim = plain(model, X, flops=0.5)
    assert {n: p.requires_grad for n, p in slim.module.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


# -- the result ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [{"flops": 0.5}, {"params": "30%"}, {"size": "-40%"}, {"memory": 0.7}, {"flops": 0.6, "params": 0.5},
     {"flops": "30K", "memory": 0.8}],
)  # fmt: skip
def test_no_target_is_exceeded(targets: dict[str, Any]) -> None:
    slim = plain(seeded(ConvNet), X, **targets)
    assert slim.report.targets.keys() == targets.keys()
    for result in slim.report.targets.values():
        assert result.after <= result.asked * result.before
        assert result.got <= result.asked
        assert result.got == pytest.approx(result.after / result.before)


def test_the_reported_costs_are_those_counted_on_the_module(slim: slimc.Compressed) -> None:
    model = seeded(ConvNet)
    for module, macs, params in (
        (model, slim.report.macs.before, slim.report.params.before),
        (slim.module, slim.report.macs.after, slim.report.params.after),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(X)
        assert macs * len(X) == counter.get_total_flops() // 2
        assert params == sum(p.numel() for p in module.parameters())
    assert slim.report.size is not None
    assert slim.report.size.after == sum(t.numel() * t.element_size() for t in slim.module.state_dict().values())


def test_a_torchvision_network_comes_back_as_its_own_class_at_the_cost_that_was_predicted() -> None:
    model = seeded(lambda: torchvision.models.squeezenet1_1(num_classes=10))
    x = noise(2, 3, 64, 64)
    slim = plain(model, x, flops=0.5, params=0.6)
    assert type(slim.module) is type(model)
    assert any(0.99 * target.asked < target.got for target in slim.report.targets.values())
    assert all(target.got <= target.asked for target in slim.report.targets.values())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        slim.module(x)
    assert 2 * slim.report.macs.after == counter.get_total_flops() // 2
    assert slim.report.params.after == sum(p.numel() for p in slim.module.parameters())


def test_the_module_the_graph_and_the_program_compute_the_same(slim: slimc.Compressed) -> None:
    with torch.no_grad():
        wanted = slim.graph(X)
        torch.testing.assert_close(slim.module(X), wanted)
        torch.testing.assert_close(slim.program.module()(X), wanted)
        assert (wanted - seeded(ConvNet)(X)).abs().max() > 1e-3


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    plans = [plain(seeded(ConvNet), X, flops=0.5, scorer="random", seed=seed).plan for seed in (3, 3, 4)]
    assert plans[0] == plans[1]
    assert plans[0].kept != plans[2].kept


def test_a_target_that_leaves_nearly_everything_is_met_with_nearly_everything() -> None:
    slim = plain(seeded(ConvNet), X, flops=0.999)
    assert 0.8 < slim.report.targets["flops"].got <= 0.999
    assert 0 < sum(g.width - g.kept for g in slim.report.groups) <= 2
    assert slim.report.verification is not None
    assert slim.report.verification.passed


def test_an_amount_that_is_met_already_removes_nothing() -> None:
    model = seeded(ConvNet)
    slim = plain(model, X, flops="1G")
    assert weights(slim.module) == weights(model)
    assert slim.plan.kept == {}


def test_widths_are_multiples_of_what_was_asked() -> None:
    slim = plain(seeded(ConvNet), X, flops=0.6, round_to=4)
    assert all(g.kept % 4 == 0 for g in slim.report.groups)
    assert slim.report.method.round_to == 4
    assert any(g.kept < g.width for g in slim.report.groups)


@pytest.mark.parametrize("pattern", ["conv1", "conv1.weight", "conv1*", "*v1"])
def test_an_ignored_layer_stays_whole(pattern: str) -> None:
    slim = plain(seeded(ConvNet), X, flops=0.6, ignore=[pattern])
    assert slim.module.get_parameter("conv1.weight").shape[0] == 8
    assert slim.module.get_parameter("conv2.weight").shape[0] < 16


def test_a_pattern_that_matches_nothing_is_refused_with_a_name_that_would() -> None:
    with pytest.raises(UsageError, match=r"--ignore layer9: no module .* conv1\.weight"):
        plain(seeded(ConvNet), X, flops=0.6, ignore=["layer9"])


# -- inputs and outputs -------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Returns a dictionary with a nested tuple; the second input is optional to some callers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 16)
        self.right = nn.Linear(5, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Any]:
        both = torch.relu(self.left(image) + self.right(text))
        return {"logits": self.out(both), "extra": (self.out(both).sum(-1), [image * 2])}


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_tuple_and_dictionary_inputs_and_nested_outputs_keep_their_form(as_dictionary: bool) -> None:
    image, text = noise(4, 6), noise(4, 5)
    inputs = {"image": image, "text": text} if as_dictionary else (image, text)
    slim = plain(seeded(TwoInputs), inputs, params=0.6)
    with torch.no_grad():
        wanted, got = Example.of(inputs).run(slim.graph), slim.module(image, text)
    assert got.keys() == {"logits", "extra"}
    torch.testing.assert_close(got["logits"], wanted["logits"])
    torch.testing.assert_close(got["extra"][0], wanted["extra"][0])
    assert torch.equal(got["extra"][1][0], 2 * image)
    assert got["logits"].shape == (4, 3)


def test_a_batch_of_one_is_enough() -> None:
    slim = plain(seeded(ConvNet), X[:1], flops=0.5)
    assert slim.report.macs.before == plain(seeded(ConvNet), X, flops=0.5).report.macs.before
    with torch.no_grad():
        assert slim.module(X).shape == (2, 4)


# -- what cannot be done ------------------------------------------------------------------------------


def test_an_output_that_is_not_finite_is_refused() -> None:
    model = seeded(ConvNet)
    nn.init.constant_(model.get_parameter("conv1.weight"), float("nan"))
    with pytest.raises(CaptureError, match="not finite"):
        plain(model, X, flops=0.5)


def test_inputs_that_do_not_fit_are_refused_with_their_shape() -> None:
    with pytest.raises(CaptureError, match=r"\(2, 4, 8, 8\)"):
        plain(seeded(ConvNet), noise(2, 4, 8, 8), flops=0.5)


def test_a_model_without_prunable_channels_has_no_reachable_target() -> None:
    with pytest.raises(UnreachableTarget, match="smallest that can be reached is 1 "):
        plain(seeded(lambda: nn.Linear(4, 3)), noise(2, 4), flops=0.5)


def test_a_model_without_operations_has_no_flops_to_cut() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
    with pytest.raises(UsageError, match=r"--flops 0\.5: the model has no multiply-accumulates"):
        plain(model, noise(2, 4), flops=0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no target"),
        ({"flops": 1.5}, "--flops 1.5"),
        ({"flops": 0.5, "scorer": "nonsense"}, "no scorer 'nonsense'"),
        ({"flops": 0.5, "norm": "l7"}, "--norm l7"),
        ({"flops": 0.5, "round_to": 0}, "--round-to 0"),
        ({"flops": 0.5, "round_to": "eight"}, "--round-to eight"),
        ({"flops": 0.5, "recover": "magic"}, "--recover magic"),
        ({"flops": 0.5, "samples": 1}, "--samples 1"),
        ({"flops": 0.5, "data": [noise(1, 3, 8, 8)]}, "gave 1 sample"),
        ({"flops": 0.5, "scorer": "taylor"}, "--scorer taylor needs data"),
        ({"flops": 0.5, "recover": "bn", "data": []}, "--data"),
        ({"flops": 0.5, "data": ["text"]}, "--data"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        slimc.compress(seeded(ConvNet), X, **options)
    assert said in str(refused.value)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"wanted an nn\.Module, got function"):
        slimc.compress(lambda x: x, X, flops=0.5)  # type: ignore[arg-type]


def test_a_rewritten_model_with_wrong_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(module: GraphModule) -> None:
        with torch.no_grad():
            module.get_parameter("conv2.bias").copy_(module.get_parameter("conv2.bias").flip(0))

    assert "first node that differs is conv2_bias" in _refusal_of_tampering(monkeypatch, flip)


def test_a_rewritten_model_with_a_wrong_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(module: GraphModule) -> None:
        node = next(n for n in module.graph.nodes if n.target is torch.ops.aten.relu.default)
        node.target = torch.ops.aten.silu.default
        module.recompile()

    assert "first node that differs is relu" in _refusal_of_tampering(monkeypatch, swap)


def _refusal_of_tampering(monkeypatch: pytest.MonkeyPatch, tamper: Callable[[GraphModule], None]) -> str:
    real = rewrite

    def wrong(*arguments: Any) -> Rewritten:
        rewritten = real(*arguments)
        tamper(rewritten.module)
        return rewritten

    monkeypatch.setattr(compiler, "rewrite", wrong)
    with pytest.raises(VerificationError) as refused:
        plain(seeded(ConvNet), X, flops=0.5)
    return str(refused.value)


# -- another checkpoint -------------------------------------------------------------------------------


def test_a_plan_gives_another_checkpoint_the_same_shapes_and_its_own_weights(slim: slimc.Compressed) -> None:
    other = seeded(ConvNet, seed=5)
    again = slimc.apply(other, slim.plan, X)
    shapes = {name: t.shape for name, t in slim.module.state_dict().items()}
    assert {name: t.shape for name, t in again.module.state_dict().items()} == shapes
    wanted = slim.plan.apply(other.state_dict())
    assert all(torch.equal(t, wanted[name]) for name, t in again.module.state_dict().items())
    assert not torch.equal(again.module.get_parameter("head.weight"), slim.module.get_parameter("head.weight"))
    assert again.plan.kept == slim.plan.kept
    assert again.plan.source_sha256 != slim.plan.source_sha256


def test_a_plan_for_another_architecture_is_refused(slim: slimc.Compressed) -> None:
    with pytest.raises(PlanError, match="fits only the architecture"):
        slimc.apply(seeded(lambda: ConvNet(12)), slim.plan, X)
    with pytest.raises(PlanError, match="does not have"):
        slimc.apply(seeded(TwoInputs), slim.plan, (noise(4, 6), noise(4, 5)))


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
