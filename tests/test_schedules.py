"""Schedules: one closed form for each, and that all of them meet the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scoring
import torch
from running import BRIEF
from scheduled import (
    Plain,
    PreActivation,
    Wide,
    begin,
    dearest,
    first,
    group_of,
    nothing,
    outputs,
    seeded,
    snapshot,
    step,
    steps,
)
from torch import nn

import slimc
from slimc.errors import UnreachableTarget, UsageError
from slimc.graph.infer import attribute
from slimc.report import render_html
from slimc.training.recipe import Recipe
from slimc.training.schedule import schedules

# -- all of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules())
def test_every_schedule_meets_the_budget_and_the_result_is_proven(name: str) -> None:
    model = scoring.build("resnet")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = Recipe(rate=0.05, optimiser="sgd", precision="float32")
    run = begin(name, model, recipe=recipe, val=scoring.labelled(1), settings=BRIEF.get(name, {}))
    phases = [(phase.name, phase.epochs) for phase in run]
    slim = run.result
    assert run.share <= 0.5
    assert slim.report.verification.passed
    assert slim.report.training.schedule == name
    assert slim.report.accuracy is not None
    assert phases[-1][0] == "finetune"
    assert sum(epochs for _, epochs in phases) == pytest.approx(2)
    assert 0.5 - dearest(run) < run.share
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # What was trained is what is handed over.
    torch.testing.assert_close(outputs(slim.module), outputs(run.network.module), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["tick-tock", "soft", "csgd", "group-sparsity", "iterative", "lottery", "joint-search"]
)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    one, two = (begin(name, scoring.build("resnet"), epochs=1).result.module.state_dict() for _ in range(2))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


WRONG: Sequence[tuple[str, dict[str, Any], str]] = [
    ("slimming", {"fraction": 0.1}, "fraction"),
    ("one-shot", {"penalty": 1}, "penalty"),
    ("slimming", {"penalty": "much"}, "penalty=much"),
    ("slimming", {"penalty": -1e-4}, "penalty"),
    ("slimming", {"finetune": 1.5}, "finetune"),
    ("soft", {"finetune": -0.1}, "finetune"),
    ("soft", {"select": "weakest"}, "select=weakest"),
    ("csgd", {"finetune": 2}, "finetune"),
    ("dcp", {"heads": 0}, "heads"),
    ("dcp", {"warmup": -0.1}, "warmup"),
    ("csgd", {"epsilon": -1}, "epsilon"),
    ("group-sparsity", {"alpha": "nan"}, "alpha"),
    ("group-sparsity", {"finetune": "nan"}, "finetune"),
    ("iterative", {"steps": 0}, "steps"),
    ("iterative", {"steps": 2.5}, "steps"),
    ("iterative", {"finetune": 1.01}, "finetune"),
    ("tick-tock", {"ticks": 0}, "ticks"),
    ("tick-tock", {"tocks": "-1"}, "tocks"),
    ("tick-tock", {"fraction": 1.0}, "fraction"),
    ("lottery", {"fraction": 0}, "fraction"),
    ("lottery", {"fraction": 1}, "fraction"),
    ("scratch", {"same": "time"}, "same=time"),
    ("meta", {"population": 0}, "population"),
    ("meta", {"generations": -1}, "generations"),
    ("meta", {"hidden": -1}, "hidden"),
    ("meta", {"finetune": 2}, "finetune"),
    ("joint-search", {"networks": 0}, "networks"),
    ("joint-search", {"coarse": 0.8}, "coarse"),
    ("joint-search", {"architecture": 1.5}, "architecture"),
    ("joint-search", {"noise": -1}, "noise"),
]


@pytest.mark.parametrize(("name", "settings", "said"), WRONG, ids=str)
def test_a_wrong_setting_is_refused_by_its_name(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"--set {said}"):
        next(iter(begin(name, scoring.build("resnet"), settings=settings)))


def test_settings_may_be_text_and_may_be_written_with_dashes() -> None:
    method = schedules()["tick-tock"]
    found = method.settings({"ticks": "3", "penalty": "1e-2", "per-cost": "false"})
    assert found == method.settings({}) | {"ticks": 3, "penalty": 0.01, "per_cost": False}


def test_an_unknown_schedule_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(UsageError) as raised:
        begin("tictoc", scoring.build("resnet"))
    assert all(str(raised.value).count(f" {name}") == 1 for name in schedules() if name != "tick-tock")


# -- slimming -----------------------------------------------------------------------------------------


def test_without_a_data_gradient_slimming_moves_gammas_by_rate_times_penalty() -> None:
    model = seeded(Wide)
    with torch.no_grad():
        attribute(model, "bn1.weight")[0] *= -1  # towards zero from below, too
    run = begin("slimming", model, loss=nothing, settings={"penalty": 1e-4, "finetune": 0.5})
    phase = first(run, "sparse")
    before = snapshot(phase.module)
    phase.train()  # one epoch of three batches
    after = snapshot(phase.module)
    for name, old in before.items():
        moved = 3 * 1e-5 * old.sign() if name in ("bn0.weight", "bn1.weight", "bn2.weight") else 0 * old
        torch.testing.assert_close(old - after[name], moved, rtol=0, atol=1e-12)


def test_slimming_cuts_the_smallest_gammas_summed_over_a_group() -> None:
    run = begin("slimming", seeded(Wide), flops=0.2)
    phase = first(run, "sparse")
    phase.train()
    norms = {name: attribute(phase.module, f"{name}.weight").detach().abs() for name in ("bn0", "bn1", "bn2")}
    totals = {16: norms["bn0"] + norms["bn2"], 12: norms["bn1"]}
    first(run, "finetune")
    gone, kept = [], []
    for width, total in totals.items():
        stays = torch.from_numpy(run.network.alive[group_of(run, width).variables])
        assert 0 < stays.sum() < width
        gone.append(total[~stays].max())
        kept.append(total[stays].min())
        assert total[~stays].max() < total[stays].min()
    # One ranking of all groups, but for channels that came back because they still fitted.
    assert min(gone) < max(kept)


def test_slimming_needs_batch_norms() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    with pytest.raises(UsageError, match="batch norms"):
        _ = begin("slimming", model).result


# -- lottery ------------------------------------------------------------------------------------------


def test_rounds_of_the_lottery_leave_080_064_0512_and_rewind_bit_for_bit() -> None:
    run = begin("lottery", seeded(Plain), flops=0.2, settings={"fraction": 0.2})
    start = {name: value.clone() for name, value in run.network.tensors().items()}
    left, trained = [], 0.0
    for phase in run:
        assert len(run.network.widths) == 2
        left.append(int(run.network.widths.sum()))
        cut, types = run.network.cut_so_far, run.analysis.types
        for name, value in run.network.tensors().items():
            assert torch.equal(value, cut.select(start[name], types.tensors[name]))
        phase.train()
        trained = max(trained, *(
            float((value.double() - cut.select(start[name], types.tensors[name])).detach().abs().max())
            for name, value in run.network.tensors().items()
        ))  # fmt: skip
    # 100 channels; 0.2 of 64 is 12.8, so that 13 go
    assert left[:4] == [100, 80, 64, 51]
    assert len(left) == 5  # ceil(log 0.2 / (2 log 0.8)) is 4 rounds, then fine-tuning
    assert trained > 1e-3


@pytest.mark.parametrize(("name", "settings"), [("lottery", {"fraction": 0.3}), ("tick-tock", {"fraction": 0.1})])
def test_cuts_of_a_share_of_all_channels_end_with_multiples(name: str, settings: dict[str, float]) -> None:
    run = begin(name, seeded(Plain), flops=0.2, settings=settings, round_to=8)
    between = {width % 8 for phase in run if phase.name != "finetune" for width in run.network.widths.tolist()}
    assert len(between) > 1  # or nothing would be shown
    assert run.share <= 0.2
    kept = dict(zip([group.width for group in run.analysis.groups], run.network.widths.tolist(), strict=True))
    assert kept[40] % 8 == 0
    assert kept[60] % 8 == 0


@pytest.mark.parametrize(("name", "settings"), [("lottery", {"fraction": 0.3}), ("tick-tock", {"fraction": 0.3})])
def test_cuts_of_a_share_go_as_far_as_the_alignment_that_can_be_reached(
    name: str, settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimc.exporters.machine.preferred_alignment", lambda: 16)
    run = begin(name, seeded(Wide), flops=0.1, settings=settings, round_to="auto")
    widths = [run.network.widths.tolist() for phase in run if phase.name != "finetune"]
    assert max(widths[-1]) < 16  # and not all at once in the last step
    assert run.share <= 0.1


# -- what users froze ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tick-tock", "resrep", "joint-search", "meta", "csgd"])
def test_frozen_parameters_are_not_changed_by_gates_generators_and_merging(name: str) -> None:
    model: Any = seeded(Plain)
    still = [*model.b.parameters(), *model.bn2.parameters()]
    for parameter in still:
        parameter.requires_grad_(False)
    run = begin(name, model, flops=0.6)
    slim: Any = run.result
    widths = dict(zip([group.width for group in run.analysis.groups], run.network.widths.tolist(), strict=True))
    assert widths[40] < 40
    assert widths[60] == 60  # a frozen layer makes it
    kept = run.network.cut_so_far.indices(run.analysis.types.tensors["a.weight"][0])
    assert torch.equal(slim.module.bn2.weight, model.bn2.weight)
    assert torch.equal(slim.module.bn2.bias, model.bn2.bias)
    if name != "csgd":  # there its columns are summed
        assert torch.equal(slim.module.b.weight, model.b.weight[:, kept])


def test_channels_of_frozen_parameters_are_cut_by_heads_all_the_same() -> None:
    model: Any = seeded(Plain)
    model.b.weight.requires_grad_(False)
    run = begin("dcp", model, flops=0.6)
    assert run.result.report.macs.share <= 0.6
    assert all(group.kept < group.width for group in run.result.plan.groups)  # the frozen layer's own as well
    assert not run.network.module.b.weight.requires_grad  # type: ignore[union-attr]


def test_frozen_norms_are_named_where_they_are_in_the_way() -> None:
    model: Any = seeded(Plain)
    for norm in (model.bn1, model.bn2):
        norm.weight.requires_grad_(False)
        norm.bias.requires_grad_(False)
    with pytest.raises(UnreachableTarget, match=r"frozen parameters make \(requires_grad is off\) stay"):
        _ = begin("tick-tock", model).result
    with pytest.raises(UsageError, match="batch norms that scale and train"):
        _ = begin("slimming", model).result


def test_filters_that_are_equal_are_cut_as_far_as_the_budget_asks_and_no_further() -> None:
    model: Any = seeded(Plain)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
    run = begin("csgd", model, flops=0.5, round_to=4)
    assert run.result.report.macs.share <= 0.5
    assert run.share > 0.5 - 4 * dearest(run)
    assert all(width % 4 == 0 for width in run.network.widths.tolist())


def test_ticks_without_gradients_are_refused() -> None:
    with pytest.raises(UsageError, match="no gradient reached the gates"):
        _ = begin("tick-tock", seeded(Plain), settings={"finetune": 1}).result


# -- soft ---------------------------------------------------------------------------------------------


def test_soft_zeroes_the_weakest_filters_after_an_epoch_and_lets_them_grow_back() -> None:
    model = seeded(Wide)
    # The norm of a filter that is zero gives beta: below zero, ReLU would hold it there.
    for name in ("bn0", "bn1", "bn2"):
        attribute(model, f"{name}.bias").data.abs_()
    run = begin("soft", model, settings={"finetune": 0.5})
    phase = first(run, "soft")
    optimiser = steps(phase, 3)
    whole = snapshot(phase.module)
    phase.epoch_done()
    shares = []
    for width, writers in ((16, ("stem.weight", "b.weight")), (12, ("a.weight",))):
        squares = np.sum([whole[name].flatten(1).square().sum(1).numpy() for name in writers], axis=0)
        zero = [~attribute(phase.module, name).detach().flatten(1).any(dim=1) for name in writers]
        count = int(zero[0].sum())
        weakest = np.argsort(squares)[:count]  # by the filters alone, not by what reads them
        for own in zero:
            assert sorted(weakest.tolist()) == own.nonzero().flatten().tolist()
        shares.append(count / width)
    # The same share of every group, as closely as whole channels allow.
    assert abs(shares[0] - shares[1]) <= 1 / 12
    assert min(shares) > 0.1
    for name, value in snapshot(phase.module).items():
        filters = name in ("stem.weight", "a.weight", "b.weight")
        assert filters or torch.equal(value, whole[name])  # weights alone: norms go on
    step(phase, optimiser)
    for name in ("stem.weight", "a.weight", "b.weight"):
        assert attribute(phase.module, name).detach().flatten(1).any(dim=1).all()


# -- scratch ------------------------------------------------------------------------------------------


def test_scratch_has_the_widths_of_the_plain_cut_and_weights_of_its_own() -> None:
    model = seeded(Wide)
    plain, scratch = begin("one-shot", model), begin("scratch", model)
    first(plain, "finetune")
    phase = first(scratch, "finetune")
    assert np.array_equal(plain.network.alive, scratch.network.alive)
    assert plain.network.widths.sum() < 28
    cut = snapshot(plain.network.module)
    for name, value in snapshot(phase.module).items():
        assert value.shape == cut[name].shape
        assert name == "fc.bias" or (value != cut[name]).all(), name
        if name.startswith("bn"):
            assert torch.equal(value, torch.full_like(value, float("weight" in name)))


def test_scratch_of_the_same_arithmetic_trains_longer_by_what_was_cut() -> None:
    run = begin("scratch", seeded(Wide), flops=0.3, settings={"same": "arithmetic"})
    phase = first(run, "finetune")
    assert phase.epochs == run.options.epochs == 2 / run.share >= 6


def test_scratch_names_what_it_cannot_draw() -> None:
    with pytest.raises(UsageError, match=r"cannot draw scale anew.*reset_parameters"):
        _ = begin("scratch", seeded(PreActivation)).result


# -- iterative ----------------------------------------------------------------------------------------


def test_iterative_cuts_geometrically_with_training_between() -> None:
    run = begin("iterative", seeded(Plain), settings={"steps": 4, "finetune": 0.4})
    found = []
    for phase in run:
        found.append((phase.name, phase.epochs, phase.flops))
        assert 0.5 ** (len(found) / 4) - dearest(run) < phase.flops <= 0.5 ** (len(found) / 4)
    assert [name for name, _, _ in found] == ["train", "train", "train", "finetune"]
    # 0.6 of two epochs in three parts
    assert [epochs for _, epochs, _ in found] == pytest.approx([0.4, 0.4, 0.4, 0.8])


def test_the_default_scorer_counts_on_the_fit_where_cuts_are_followed_by_one() -> None:
    for name in ("iterative", "one-shot"):
        assert begin(name, seeded(Plain), recover="reconstruct").options.scorer == "obs"
        assert begin(name, seeded(Plain), recover="none").options.scorer == "magnitude"
    assert begin("tick-tock", seeded(Plain), recover="reconstruct").options.scorer == "magnitude"


@pytest.mark.parametrize("name", ["lottery", "scratch", "meta", "joint-search", "one-shot"])
def test_what_is_said_to_have_been_fitted_was(name: str) -> None:
    slim = begin(name, scoring.build("resnet"), recover="auto", settings=BRIEF.get(name, {})).result
    wanted = ("reconstruct", "bn") if name == "one-shot" else ()
    assert slim.report.training.mended == wanted
    assert slim.plan.method["mended"] == list(wanted)
    ranked = {"one-shot": "obs", "joint-search": None}.get(name, "magnitude")
    assert slim.report.method.scorer == slim.plan.method["scorer"] == ranked
    model = scoring.build("resnet", seed=1)
    assert slimc.apply(model, slim.plan, scoring.pictures(2)).report.method.scorer == ranked
    assert ("none: the schedule has numbers of its own" in render_html(slim.report)) == (ranked is None)


def test_a_scorer_that_a_schedule_does_not_use_is_said_to_be_unused() -> None:
    slim = begin("joint-search", seeded(Wide), scorer="fpgm", settings=BRIEF["joint-search"]).result
    assert any("--scorer fpgm was not used" in warning for warning in slim.report.warnings)


def test_fine_tuning_is_part_of_every_schedule_and_may_be_named_among_what_recovers() -> None:
    assert begin("one-shot", seeded(Plain), recover="bn,finetune").options.mend == ("bn",)
    assert begin("one-shot", seeded(Plain), recover="finetune").options.mend == ()


@pytest.mark.parametrize(("scorer", "per_cost"), [("obs", True), ("magnitude", False)])
def test_scores_in_one_unit_are_divided_by_what_a_channel_frees(scorer: str, per_cost: bool) -> None:
    run = begin("one-shot", seeded(Plain), scorer=scorer)
    total = run.score(scorer)
    alive = run.chosen(0.5)
    assert np.array_equal(alive, run.selection.choose(total, 0.5, per_cost=per_cost))
    assert not np.array_equal(alive, run.selection.choose(total, 0.5, per_cost=not per_cost))


def test_a_budget_that_needs_what_a_schedule_cannot_cut_is_refused_before_training() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    half = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    trained: list[str] = []
    for name, body in (("csgd", model), ("slimming", half)):
        x = torch.randn(8, 6)
        data = [(x, torch.zeros(8, dtype=torch.int64))]
        run = slimc.schedule(name, body, x[:2], flops=0.2, epochs=1, data=data, round_to=1, recover="none")
        with pytest.raises(UnreachableTarget):
            trained.extend(phase.name for phase in run)
    assert not trained


def test_groups_that_a_scorer_says_nothing_of_stay_whole_in_schedules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(2)]
    options: dict[str, Any] = {"flops": 0.8, "epochs": 1, "scorer": "apoz", "recover": "none", "round_to": 1}
    run = slimc.schedule("iterative", model, data[0][0], data=data, **options)
    widths = {group.name: group.kept for group in run.result.plan.groups}
    assert widths["0.weight"] == 16  # no rectifier behind it
    assert widths["1.weight"] < 16
    assert any("says nothing of these groups, which stay whole: 0.weight" in w for w in run.result.report.warnings)
