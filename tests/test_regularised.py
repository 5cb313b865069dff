"""Schedules that draw channels together or to zero: C-SGD, group sparsity and ResRep."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import scoring
import torch
from scheduled import PLAIN, Plain, PreActivation, Wide, begin, first, group_of, nothing, outputs, seeded, snapshot
from torch import nn

import slimc
from slimc.errors import UsageError
from slimc.graph.infer import attribute
from slimc.schedules import csgd, group_sparsity
from slimc.schedules.resrep import closing, strengths
from slimc.training import lifts
from slimc.training.gates import gates_of
from slimc.training.phase import Phase
from slimc.training.recipe import Recipe
from slimc.training.run import Run

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


# -- resrep -------------------------------------------------------------------------------------------


def masked(make: type[nn.Module], **settings: Any) -> tuple[Run, Phase]:
    """A run in its first phase, in which every second channel is masked."""
    run = begin("resrep", seeded(make), settings=settings)
    phase = first(run, "compact")
    phase.tally["alive"][::2] = False
    return run, phase


@pytest.mark.parametrize("make", [Wide, Plain, PreActivation])
def test_compactors_start_as_the_identity_and_leave_no_trace(make: type[nn.Module]) -> None:
    model = seeded(make)
    wanted = outputs(model)
    run = begin("resrep", model)
    phase = first(run, "compact")
    gates = list(gates_of(run.network.module, run.network.places))
    assert gates
    assert all(torch.equal(phi, torch.ones_like(phi)) for _, phi in gates)
    torch.testing.assert_close(outputs(phase.module), wanted, rtol=0, atol=1e-12)
    with torch.no_grad():
        for _, phi in gates:
            phi.mul_(torch.linspace(0.5, 1.5, len(phi), dtype=phi.dtype))
    gated = outputs(phase.module)
    run.network.merge()
    torch.testing.assert_close(outputs(run.network.module), gated, rtol=0, atol=1e-12)
    assert not any("parametrizations" in name for name, _ in run.network.module.named_parameters())


def test_masked_gates_get_the_penalty_alone_and_the_others_both() -> None:
    run, phase = masked(Wide, penalty=10.0)  # more than what closes a gate in time
    run.stream = None  # masks as they are
    for _, phi in gates_of(run.network.module, run.network.places):
        phi.grad = torch.full_like(phi, -7.0)  # the data would have them grow
    assert phase.hooks.before_step is not None
    phase.hooks.before_step()
    for place, phi in gates_of(run.network.module, run.network.places):
        kept = lifts.living(run.network, place, phase.tally["alive"].numpy())
        assert kept.any()
        assert not kept.all()
        assert phi.grad is not None
        assert torch.equal(phi.grad, torch.where(kept, 3.0, 10.0).to(phi))


def test_a_masked_gate_moves_by_one_in_the_second_half() -> None:
    run = begin("resrep", seeded(Wide), epochs=400)
    steps = 300
    gate = torch.nn.Parameter(torch.ones(1))
    optimiser = torch.optim.SGD([gate], lr=0.1, momentum=0.99, nesterov=True)
    for _ in range(steps // 2):
        gate.grad = torch.full_like(gate, closing(run, PLAIN, steps))
        optimiser.step()
    assert gate.item() == pytest.approx(0, abs=1e-4)


def test_masks_come_little_by_little_and_meet_the_budget_half_way() -> None:
    run = begin("resrep", seeded(Plain), epochs=8, settings={"masks": 4, "finetune": 0.0})
    phase = first(run, "compact")
    assert phase.hooks.before_step is not None
    counts = []
    for _ in range(24):  # eight epochs of three batches
        phase.hooks.before_step()
        counts.append(int((~phase.tally["alive"]).sum()))
    assert counts[:2] == [0, 0]
    assert len(set(counts)) == 5
    assert counts == sorted(counts)
    assert run.selection.meets(phase.tally["alive"].numpy() & run.network.alive)
    assert counts[12] == counts[-1]


def test_masked_gates_close_by_the_end_and_are_what_is_cut() -> None:
    run = begin("resrep", seeded(Plain), epochs=60, recipe=dataclasses.replace(PLAIN, shape="cosine", rate=0.02))
    phase = first(run, "compact")
    phase.train()
    strong = strengths(run)
    alive = phase.tally["alive"].numpy()
    groups = np.concatenate([group.variables for group in run.analysis.groups])
    assert strong[groups[~alive[groups]]].max() < 0.25 < np.median(strong[groups[alive[groups]]])
    slim = run.result
    assert slim.report.targets["flops"].got <= 0.5
    assert np.array_equal(run.network.alive[groups], alive[groups])


@pytest.mark.parametrize(("name", "phase"), [("csgd", "centripetal"), ("resrep", "compact")])
def test_forces_in_gradients_are_left_to_sgd(name: str, phase: str) -> None:
    model = scoring.build("vit")
    run = begin(name, model, flops=0.9, recipe=Recipe(precision="float32"), settings={"finetune": 0.5})
    found = first(run, phase).recipe
    assert (found.optimiser, found.rate) == ("sgd", 0.05)
    assert first(run, "finetune").recipe.optimiser == "adamw"
    with pytest.raises(UsageError, match=f"{name} adds forces to gradients, which AdamW rescales"):
        next(iter(begin(name, model, flops=0.9, recipe=Recipe(optimiser="adamw"))))
