"""Schedules: one closed form for each, and that all of them meet the budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scoring
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import UnreachableTarget, UsageError
from slimc.graph.groups import Group
from slimc.graph.infer import attribute
from slimc.schedules import csgd, group_sparsity
from slimc.training import lifts
from slimc.training.gates import gates_of
from slimc.training.phase import Phase
from slimc.training.recipe import Recipe
from slimc.training.run import Run
from slimc.training.schedule import schedules

PLAIN = Recipe(
    rate=0.1, optimiser="sgd", shape="constant", warmup=0.0, momentum=0.0, weight_decay=0.0, precision="float32"
)
"""Plain SGD: what closed forms are about."""


class Wide(nn.Module):
    """A stream of 16 with two writers, and a branch of 12."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.bn1 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b, self.bn2 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.bn2(self.b(torch.relu(self.bn1(self.a(x))))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Plain(nn.Module):
    """Two layers with 40 and 60 channels, each its own group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(3, 40, 3, padding=1, bias=False), nn.BatchNorm2d(40)
        self.b, self.bn2 = nn.Conv2d(40, 60, 3, padding=1, bias=False), nn.BatchNorm2d(60)
        self.fc = nn.Linear(60, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn2(self.b(torch.relu(self.bn1(self.a(x))))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class PreActivation(nn.Module):
    """A batch norm and a scale that read the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.a = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2, self.b = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.scale, self.bn3 = nn.Parameter(torch.rand(8, 1, 1)), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale * self.b(torch.relu(self.bn2(self.a(torch.relu(self.bn1(x))))))
        out: Tensor = self.fc(torch.relu(self.bn3(x)).mean((2, 3)))
        return out


def seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        return model


def begin(name: str, model: nn.Module, *, flops: float = 0.5, epochs: float = 2, **more: Any) -> Run:
    """A run over three batches of four."""
    data = scoring.labelled()
    options: dict[str, Any] = {"data": data, "recover": "none", "round_to": 1, "recipe": PLAIN} | more
    run: Run = slimc.schedule(name, model, data[0][0], flops=flops, epochs=epochs, **options)
    return run


def nothing(outputs: Any, targets: Any) -> Tensor:
    """A loss without a gradient: what moves, the method moves."""
    zero: Tensor = 0.0 * outputs.sum()
    return zero


def first(run: Run, name: str) -> Phase:
    """The first phase of that name; those before it are trained."""
    return next(phase for phase in run if phase.name == name)


def steps(phase: Phase, count: int = 1, rate: float = 0.1) -> torch.optim.Optimizer:
    """Train a phase with a loop of our own, up to the end of an epoch."""
    optimiser = torch.optim.SGD(phase.parameters(), lr=rate)
    phase.attach(optimiser)
    step(phase, optimiser, count)
    return optimiser


def step(phase: Phase, optimiser: torch.optim.Optimizer, count: int = 1) -> None:
    for x, y in scoring.labelled(count):
        optimiser.zero_grad()
        scoring.eager_loss(phase.module.train(), x, y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(module).eval()(scoring.pictures(6, seed=7))
    return found


def group_of(run: Run, width: int) -> Group:
    return next(group for group in run.analysis.groups if group.width == width)


def dearest(run: Run) -> float:
    """The share of the MACs that the most expensive channel costs at the present widths."""
    widths, found = run.network.widths, 0.0
    for number in range(len(widths)):
        more = widths.copy()
        more[number] += 1
        found = max(found, run.analysis.cost(more).macs - run.network.costs.macs)
    return found / run.analysis.full.macs


# -- all of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules())
def test_every_schedule_meets_the_budget_and_the_result_is_proven(name: str) -> None:
    model = scoring.build("resnet")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = begin(name, model, recipe=Recipe(rate=0.05, optimiser="sgd", precision="float32"), val=scoring.labelled(1))
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


@pytest.mark.parametrize("name", ["tick-tock", "soft", "csgd", "group-sparsity", "iterative", "lottery"])
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


# -- tick-tock ----------------------------------------------------------------------------------------


def test_without_a_data_gradient_a_tock_moves_gates_by_rate_times_penalty() -> None:
    run = begin("tick-tock", seeded(Wide), settings={"penalty": 1e-3})
    phase = first(run, "tock")
    before = snapshot(phase.module)
    optimiser = torch.optim.SGD(phase.parameters(), lr=0.1)
    phase.attach(optimiser)
    for _ in range(2):
        optimiser.zero_grad()
        nothing(phase.module(scoring.pictures(4)), None).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    after = snapshot(phase.module)
    gates = {id(phi) for _, phi in gates_of(run.network.module, run.network.places)}
    counted = 0
    for name, parameter in phase.module.named_parameters():
        own = id(parameter) in gates
        moved = 2 * 0.1 * 1e-3 * before[name].sign() if own else torch.zeros_like(before[name])
        torch.testing.assert_close(before[name] - after[name], moved, rtol=0, atol=1e-12)
        counted += own
    assert counted == 3


def test_only_gates_betas_and_the_last_layer_move_in_a_tick() -> None:
    run = begin("tick-tock", seeded(Wide))
    phase = first(run, "tick")
    before = snapshot(phase.module)
    statistics = attribute(phase.module, "bn1.running_mean").clone()
    phase.train()
    moved = {name for name, value in snapshot(phase.module).items() if not torch.equal(value, before[name])}
    norms = ("bn0", "bn1", "bn2")
    assert moved == {
        *(f"{norm}.parametrizations.weight.0.phi" for norm in norms),
        *(f"{norm}.parametrizations.bias.original" for norm in norms),
        "fc.weight", "fc.bias",
    }  # fmt: skip
    assert not torch.equal(attribute(phase.module, "bn1.running_mean"), statistics)
    frozen = {name for name, parameter in phase.module.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"{norm}.parametrizations.weight.original" for norm in norms}  # as before the Tick


def test_ticks_and_tocks_take_turns_and_the_flops_fall_until_the_budget_holds() -> None:
    run = begin("tick-tock", seeded(Wide), settings={"ticks": 3, "tocks": 2})
    names, shares, lengths = [], [], []
    for phase in run:
        names.append(phase.name)
        lengths.append(phase.epochs)
        if phase.name != "tock":
            shares.append(phase.flops)
    assert names == ["tock", "tick", "tick", "tick"] * 2 + ["finetune"]
    # Before fine-tuning there are 0.3 of two epochs, of which Tocks have 0.6.
    tick = 0.4 * 0.6 / 6
    assert lengths == pytest.approx([0.18, tick, tick, tick] * 2 + [1.4])
    assert all(later < earlier for earlier, later in pairwise(shares))
    assert shares[0] == 1
    for done, share in enumerate(shares[1:], 1):
        assert share <= 0.5 ** (done / 6)
    assert 0.5 - dearest(run) < run.share <= 0.5


@pytest.mark.parametrize("make", [Plain, Wide])
def test_a_tick_as_published_removes_a_share_of_the_filters_counted_over_members(make: type[nn.Module]) -> None:
    run = begin("tick-tock", seeded(make), flops=0.2, settings={"ticks": 2, "tocks": 3, "lift": "sum", "fraction": 0.1})
    members = {40: 1, 60: 1, 16: 2, 12: 1}
    left = [members[group.width] for group in run.analysis.groups]
    before: Any = None
    cuts = 0
    for phase in run:
        if before is not None and not run.reached:
            alive, values, filters = before
            gone = alive & ~run.network.alive
            counted = sum(
                each * int(gone[group.variables].sum()) for each, group in zip(left, run.analysis.groups, strict=True)
            )
            # A channel of the stream is two filters, so that the last one may be one too many.
            assert math.floor(0.1 * filters) <= counted < math.floor(0.1 * filters) + max(left)
            # The weakest of all groups that are above a tenth of what they were.
            kept = [
                values[group.variables][run.network.alive[group.variables]].min()
                for group, width in zip(run.analysis.groups, run.network.widths.tolist(), strict=True)
                if width > math.ceil(group.width / 10)
            ]
            assert values[gone].max() <= min(kept)
            cuts += 1
        before = None
        if phase.name == "tick":
            phase.train()
            filters = sum(each * width for each, width in zip(left, run.network.widths.tolist(), strict=True))
            values = lifts.summed(run.network, run.network.places, phase.tally)
            before = run.network.alive.copy(), values, filters
    assert cuts >= 3


@pytest.mark.parametrize(("flops", "fraction"), [(0.004, 0.5), (0.5, 0.001)])
def test_ticks_of_a_fixed_share_end_with_the_budget_and_leave_epochs_to_fine_tune(
    flops: float, fraction: float
) -> None:
    # A tenth of each group is more than the first budget; the steps to the second one would not end in time.
    run = begin("tick-tock", seeded(Plain), flops=flops, settings={"ticks": 2, "tocks": 3, "fraction": fraction})
    phases = [(phase.name, phase.epochs) for phase in run]
    assert [name for name, _ in phases] == ["tock", "tick", "tick"] * 3 + ["finetune"]
    assert phases[-1][1] == pytest.approx(1.4)
    assert run.share <= flops


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


# -- soft ---------------------------------------------------------------------------------------------


def test_soft_zeroes_the_weakest_filters_after_an_epoch_and_lets_them_grow_back() -> None:
    model = seeded(Wide)
    # The norm of a filter that is zero gives beta: below zero, ReLU would hold it there.
    for name in ("bn0", "bn1", "bn2"):
        attribute(model, f"{name}.bias").data.abs_()
    run = begin("soft", model, settings={"finetune": 0.5})
    phase = first(run, "soft")
    optimiser = steps(phase, 3)
    norms = run.score("magnitude", "none")
    whole = snapshot(phase.module)
    phase.epoch_done()
    shares = []
    for width, writers in ((16, ("stem.weight", "b.weight")), (12, ("a.weight",))):
        zero = [~attribute(phase.module, name).detach().flatten(1).any(dim=1) for name in writers]
        count = int(zero[0].sum())
        weakest = np.argsort(norms[group_of(run, width).variables])[:count]
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
    assert phase.epochs == run.options.epochs == int(2 / run.share) >= 6


def test_scratch_names_what_it_cannot_draw() -> None:
    with pytest.raises(UsageError, match=r"cannot draw scale anew.*reset_parameters"):
        _ = begin("scratch", seeded(PreActivation)).result


# -- csgd ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_two_rows_of_a_cluster_come_nearer_by_one_minus_rate_times_epsilon(axis: int) -> None:
    random = torch.Generator().manual_seed(0)
    shape = [3, 2, 2]
    shape.insert(axis, 5)
    weight = torch.randn(shape, generator=random, dtype=torch.float64)
    cluster = torch.tensor([0, 1, 0, 0, 1])
    same = (cluster[:, None] == cluster[None]).double()
    mixing = same / same.sum(1, keepdim=True)
    rate, epsilon = 0.1, 0.3
    plain = weight.clone()
    for _ in range(3):
        gradient = 100 * torch.randn(shape, generator=random, dtype=torch.float64)
        moved = weight - rate * csgd.centripetal(weight, gradient, mixing, axis, epsilon)
        before, after = weight.transpose(0, axis), moved.transpose(0, axis)
        torch.testing.assert_close(after[0] - after[2], (1 - rate * epsilon) * (before[0] - before[2]))
        torch.testing.assert_close(after[1] - after[4], (1 - rate * epsilon) * (before[1] - before[4]))
        assert (moved - weight).abs().max() > 1
        weight, plain = moved, plain - rate * gradient
    # Means of clusters are those of plain SGD.
    rows, wanted = (t.transpose(0, axis).flatten(1) for t in (weight, plain))
    torch.testing.assert_close(mixing @ rows, mixing @ wanted)


@pytest.mark.parametrize("make", [Wide, PreActivation])
def test_members_of_a_cluster_come_nearer_in_everything_that_goes_with_a_channel(make: type[nn.Module]) -> None:
    epsilon, count = 0.5, 3
    run = begin("csgd", seeded(make), settings={"epsilon": epsilon, "finetune": 0.5})
    phase = first(run, "centripetal")
    labels = csgd.clusters(run)
    assert (labels != np.arange(len(labels))).sum() >= 3
    before = snapshot(phase.module)
    phase.train()
    after = snapshot(phase.module)
    compared = set()
    for name, row in lifted(make):
        factor = (1 - 0.1 * epsilon * (1.0 if before[name].dim() > 1 else 0.1)) ** count
        twin = labels[row]
        where = {variable: index for index, variable in enumerate(row.tolist())}
        for index, variable in enumerate(row.tolist()):
            other = where[int(twin[index])]
            if other != index:
                assert twin[index] != variable
                gap = before[name][index] - before[name][other]
                torch.testing.assert_close(
                    after[name][index] - after[name][other], factor * gap, rtol=1e-9, atol=1e-12
                )  # fmt: skip
                compared.add(name)
    assert compared == {name for name, _ in lifted(make)}


def lifted(make: type[nn.Module]) -> list[tuple[str, Any]]:
    """Parameters whose first axis is the channels of a group, by hand, with the group's variables."""
    names = {
        Wide: {16: ("stem.weight", "bn0.weight", "bn0.bias", "b.weight", "bn2.weight", "bn2.bias"),
               12: ("a.weight", "bn1.weight", "bn1.bias")},
        PreActivation: {8: ("stem.weight", "stem.bias", "bn1.weight", "bn1.bias", "b.weight", "scale", "bn3.weight",
                            "bn3.bias"),
                        6: ("a.weight", "bn2.weight", "bn2.bias")},
    }[make]  # fmt: skip
    analysis = slimc.inspect(seeded(make), scoring.pictures(4))
    return [(name, group.variables) for group in analysis.groups for name in names[group.width]]


@pytest.mark.parametrize("make", [Wide, PreActivation])
def test_merging_members_that_are_alike_changes_nothing(make: type[nn.Module]) -> None:
    run = begin("csgd", seeded(make))
    first(run, "centripetal")
    network = run.network
    labels = csgd.clusters(run)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, variables in lifted(make):
            where = {variable: index for index, variable in enumerate(variables.tolist())}
            twins = [where[int(label)] for label in labels[variables]]
            own = attribute(network.module, name)
            own.copy_(own[twins].clone())
            if name.startswith("bn"):
                for statistic in ("running_mean", "running_var"):
                    numbers = attribute(network.module, f"{name.split('.')[0]}.{statistic}")
                    numbers.uniform_(0.05, 0.2, generator=random)
                    numbers.copy_(numbers[twins].clone())
    before = outputs(network.module)
    assert (labels != np.arange(len(labels))).sum() >= 3
    csgd.merge(network, labels)
    network.cut(csgd.representatives(network, labels))
    assert run.share <= 0.5
    torch.testing.assert_close(outputs(network.module), before, rtol=0, atol=1e-10)
    # A merge that takes sums for means, or means for sums, doubles or halves parameters: it would be seen.
    for name in ("fc.weight", "b.weight", "stem.weight", *(["scale"] if make is PreActivation else [])):
        with torch.no_grad():
            attribute(network.module, name).mul_(2)
        assert (outputs(network.module) - before).abs().max() > 1e-3
        with torch.no_grad():
            attribute(network.module, name).div_(2)


# -- group sparsity -----------------------------------------------------------------------------------


def test_weights_of_the_penalty_run_from_two_to_the_alpha_to_one() -> None:
    # 2^(4 (4 - 2) / (4 - 1)) = 2^(8/3) = 6.3496
    np.testing.assert_allclose(group_sparsity.gammas(np.array([1.0, 2.0, 4.0]), 4), [16, 6.3496, 1], rtol=1e-5)
    assert group_sparsity.gammas(np.full(3, 0.7), 4).tolist() == [1, 1, 1]
    assert group_sparsity.gammas(np.zeros(3), 4).tolist() == [1, 1, 1]
    assert group_sparsity.gammas(np.zeros(0), 4).tolist() == []


def test_the_gradient_of_group_sparsity_is_penalty_times_gamma_times_the_weight() -> None:
    run = begin("group-sparsity", seeded(Wide), loss=nothing, settings={"penalty": 0.01, "alpha": 2.0})
    phase = first(run, "sparse")
    before = snapshot(phase.module)
    stream, inner = (group_of(run, width).variables for width in (16, 12))
    parts = {
        "stream": [before[f"{n}.weight"].flatten(1) for n in ("stem", "b")]
        + [before["a.weight"].transpose(0, 1).flatten(1), before["fc.weight"].T]
        + [before[f"{n}.{kind}"][:, None] for n in ("bn0", "bn2") for kind in ("weight", "bias")],
        "inner": [before["a.weight"].flatten(1), before["b.weight"].transpose(0, 1).flatten(1)]
        + [before[f"bn1.{kind}"][:, None] for kind in ("weight", "bias")],
    }
    norms = {key: torch.cat(own, 1).norm(dim=1) for key, own in parts.items()}
    outer, middle = (2 ** (2.0 * (own.max() - own) / (own.max() - own.min())) for own in norms.values())
    assert len(stream) == len(outer)
    assert len(inner) == len(middle)
    assert phase.hooks.before_step is not None
    nothing(phase.module(scoring.pictures(4)), None).backward()  # type: ignore[no-untyped-call]
    phase.hooks.before_step()
    factors = {
        "a.weight": (middle[:, None] + outer[None])[..., None, None], "bn1.weight": middle, "bn2.bias": outer,
        "stem.weight": outer[:, None, None, None], "fc.weight": outer[None],
    }  # fmt: skip
    for name, factor in factors.items():
        torch.testing.assert_close(attribute(phase.module, name).grad, 0.01 * factor * before[name])
    assert not attribute(phase.module, "fc.bias").grad.any()


def test_group_sparsity_without_a_difference_is_weight_decay() -> None:
    model = seeded(Wide)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    run = begin("group-sparsity", model, loss=nothing, settings={"penalty": 0.01})
    phase = first(run, "sparse")
    phase.train()
    after = snapshot(phase.module)
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    torch.testing.assert_close(after["bn1.weight"], torch.full((12,), 0.5 * (1 - 0.1 * 0.01) ** 3).double())


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
