"""The compiler end to end on a small network: what comes back, what is left alone, what is refused."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from convnet import ConvNet, X, noise, plain, seeded, weights
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

import slimc
from slimc import building
from slimc.errors import CaptureError, PlanError, UnreachableTarget, UsageError, VerificationError
from slimc.graph.example import Example
from slimc.rewrite import Rewritten, rewrite


@pytest.fixture(scope="module")
def slim() -> slimc.Compressed:
    return plain(seeded(ConvNet), X, flops=0.5)


# -- the caller's world -------------------------------------------------------------------------------


def test_the_callers_model_and_random_states_are_left_as_they_were() -> None:
    model = seeded(ConvNet).train()
    model.get_submodule("bn1").eval()
    model.get_parameter("conv2.bias").requires_grad_(False)
    model.get_submodule("head").register_forward_hook(lambda *_: None)
    before = _everything(model)
    data = [noise(4, 3, 8, 8, seed=n) for n in range(2)]
    batch = X.clone().requires_grad_()
    plain(model, batch, flops=0.5, data=data, recover="bn")
    slimc.inspect(model, batch)
    assert _everything(model) == before
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
    shares = {metric: share for metric, share in targets.items() if isinstance(share, float)}
    assert {metric: slim.report.targets[metric].asked for metric in shares} == shares


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
    with pytest.raises(UsageError, match="holds no sample"):
        plain(seeded(ConvNet), noise(0, 3, 8, 8), flops=0.5)


def test_a_model_without_prunable_channels_has_no_reachable_target() -> None:
    with pytest.raises(UnreachableTarget, match="smallest that can be reached is 1 "):
        plain(seeded(lambda: nn.Linear(4, 3)), noise(2, 4), flops=0.5)


@pytest.mark.parametrize("scorer", ["auto", "fisher", "nisp", "lasso"])
def test_that_nothing_can_be_removed_is_said_before_anything_is_scored(scorer: str) -> None:
    data = [(noise(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64))]
    model = seeded(lambda: nn.Conv2d(3, 8, 3))
    for options in ({}, {"data": data}):
        if scorer == "fisher" and not options:
            continue
        with pytest.raises(UnreachableTarget, match="No channel of this model can be removed"):
            slimc.compress(model, X, flops=0.5, scorer=scorer, **options)  # type: ignore[arg-type]
    assert slimc.compress(model, X, flops="1G", scorer="magnitude").report.targets["flops"].met
    with pytest.raises(UnreachableTarget, match="left whole by --ignore"):
        slimc.compress(seeded(ConvNet), X, flops=0.5, ignore=["*"])


def test_the_smallest_amount_that_is_named_can_be_asked_for() -> None:
    model = seeded(lambda: ConvNet(width=13))
    with pytest.raises(UnreachableTarget) as refused:
        plain(model, X, flops="0.1k")
    found = re.search(r"of the original \(([\d.]+ [kM]?)\)", str(refused.value))
    assert found is not None
    plain(model, X, flops=found[1])


def test_a_model_of_torch_jit_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"compiled by torch\.jit"):
        plain(torch.jit.script(seeded(ConvNet)), X, flops=0.5)


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
        ({"flops": 0.5, "norm": "l1", "scorer": "fpgm"}, "--norm l1 is for --scorer magnitude"),
        ({"flops": 0.5, "seed": -1}, "--seed -1"),
        ({"flops": 0.5, "seed": 2**64}, f"--seed {2**64}"),
        ({"flops": 0.5, "ignore": "conv1"}, "ignore='conv1': give a list"),
        ({"flops": 0.5, "device": "nonsense"}, "device nonsense cannot be used"),
        ({"flops": 0.5, "recover": "auto,bn"}, "auto stands alone"),
        (
            {"flops": 0.5, "recover": "bn,finetune"},
            "--recover bn,finetune: finetune trains with labels; give slimc compress --epochs",
        ),
        ({"flops": 0.5, "schedule": "met"}, "no schedule 'met'; known: csgd"),
        ({"flops": 0.5, "recover": None}, "recover is None"),
        ({"flops": 0.5, "samples": 5.5}, "--samples 5.5"),
        ({"flops": 0.5, "round_to": 0}, "--round-to 0"),
        ({"flops": 0.5, "round_to": "eight"}, "--round-to eight"),
        ({"flops": 0.5, "recover": "magic"}, "no recovery step 'magic'"),
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

    monkeypatch.setattr(building, "rewrite", wrong)
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


def test_a_plan_is_applied_with_its_own_seed_unless_another_is_given(slim: slimc.Compressed) -> None:
    model = seeded(ConvNet)
    plan = replace(slim.plan, method={**slim.plan.method, "seed": 3})
    assert slimc.apply(model, plan, X).report.method.seed == 3
    assert slimc.apply(model, plan, X, seed=7).report.method.seed == 7
    assert slimc.apply(model, replace(plan, method={}), X).report.method.seed == 0


def test_a_plan_for_another_architecture_is_refused(slim: slimc.Compressed) -> None:
    with pytest.raises(PlanError, match="fits only the architecture"):
        slimc.apply(seeded(lambda: ConvNet(12)), slim.plan, X)
    with pytest.raises(PlanError, match="does not have"):
        slimc.apply(seeded(TwoInputs), slim.plan, (noise(4, 6), noise(4, 5)))


def test_multiples_that_leave_much_of_the_budget_unused_are_said() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 4, 3)))
    coarse = plain(model, X, flops=0.9, round_to=16)
    assert any("multiples of 16, which leaves 66.7% of --flops where 90.0%" in text for text in coarse.report.warnings)
    fine = plain(model, X, flops=0.9, round_to=1)
    assert not any("multiples" in text for text in fine.report.warnings)


def test_inputs_that_the_model_writes_into_are_the_callers_all_the_same() -> None:
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 8), nn.Linear(8, 2)), torch.randn(2, 6)
    before = x.clone()
    slimc.compress(model, x, params=0.8, round_to=1, recover="none")
    assert torch.equal(x, before)


def test_a_layer_may_be_ignored_by_any_of_its_names() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a = nn.Linear(6, 8), nn.Linear(8, 8)
            self.b = nn.ModuleDict({"shared": self.a, "own": nn.Linear(8, 8)})
            self.head, self.unused = nn.Linear(8, 2), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.relu(self.b["own"](self.b["shared"](self.a(self.first(x))))))
            return out

    analysis = slimc.inspect(Shared(), torch.randn(2, 6))
    assert analysis.matching(["b.shared"]) == analysis.matching(["a"]) != []
    assert set(analysis.matching(["b"])) >= set(analysis.matching(["a"]))
    assert analysis.matching(["unused"]) == []  # it is there, and stays anyway


def test_the_random_state_of_data_that_draws_is_the_callers() -> None:
    class Drawing:
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.randn(8, 6) * random.random() * np.random.rand()

    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), torch.randn(2, 6)
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    slim = slimc.compress(model, x, params=0.8, round_to=1, recover="bias", data=Drawing())
    slimc.apply(model, slim.plan, x, recover="bias", data=Drawing())
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before


def test_arguments_that_would_do_nothing_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), torch.randn(2, 6)
    with pytest.raises(UsageError, match="val is for training"):
        slimc.compress(model, x, params=0.8, val=[x])
    slim = slimc.compress(model, x, params=0.8, round_to=1, recover="none")
    with pytest.raises(UsageError, match="needs --data"):
        slimc.apply(model, slim.plan, x, recover="bias")
    (warning,) = slimc.apply(model, slim.plan, x, recover="auto").report.warnings
    assert "as the cut left them" in warning
