"""Tick-Tock: what moves in a tick and in a tock, and what a tick removes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import scoring
import torch
from scheduled import Plain, Wide, begin, dearest, first, nothing, seeded, snapshot
from torch import nn

from slimc.graph.infer import attribute
from slimc.training import lifts
from slimc.training.gates import gates_of

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
