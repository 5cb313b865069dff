"""Schedules that search widths: MetaPruning and Joint Search-and-Training."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import scoring
import torch
from running import BRIEF
from scheduled import PLAIN, Wide, begin, dearest, first, group_of, outputs, seeded, snapshot
from torch import Tensor, nn

from slimc.errors import UsageError
from slimc.graph.infer import attribute
from slimc.schedules.joint_search import THRESHOLDS, _Search, kept
from slimc.training import widths
from slimc.training.gates import gates_of
from slimc.training.judge import Judge
from slimc.training.loop import evaluate
from slimc.training.network import Network
from slimc.training.run import Run


def trained_generator(run: Run) -> Network:
    """The network of a run with a generator that has seen a few steps, and so makes other weights for other widths."""
    phase = first(run, "generator")
    phase.train()
    generator = run.network.generator
    assert generator is not None
    with torch.no_grad():
        for name, parameter in run.network.module.named_parameters():
            if name.endswith(".outer"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 50)
    return run.network


def opened(network: Network, alive: np.ndarray) -> None:
    assert network.generator is not None
    shares = np.array([alive[group.variables].mean() for group in network.analysis.groups])
    network.generator.open(alive, shares)


def fewer(network: Network, *counts: int) -> np.ndarray:
    """The first channels of each group."""
    alive = network.alive.copy()
    for group, count in zip(network.analysis.groups, counts, strict=True):
        alive[group.variables[count:]] = False
    return alive


# -- the generator ------------------------------------------------------------------------------------


def test_a_generator_starts_as_the_network_that_it_is_put_on_and_leaves_no_trace() -> None:
    model = seeded(Wide)
    run = begin("meta", model)
    names, wanted = list(run.network.module.state_dict()), outputs(model)
    run.network.generate(4)
    made = {name.partition(".parametrizations.")[0] for name in run.network.module.state_dict() if ".outer" not in name}
    assert made >= {"stem", "a", "b", "bn0", "bn1", "bn2"}
    torch.testing.assert_close(outputs_of(run.network.module), wanted, rtol=0, atol=1e-12)
    run.network.settle()
    assert sorted(run.network.module.state_dict()) == sorted(names)
    torch.testing.assert_close(outputs(run.network.module), wanted, rtol=0, atol=1e-12)


def outputs_of(module: nn.Module) -> Tensor:
    """As `outputs`, of a module that cannot be copied."""
    with torch.no_grad():
        found: Tensor = module.eval()(scoring.pictures(6, seed=7))
    return found


def test_what_is_opened_computes_what_the_cut_network_computes() -> None:
    network = trained_generator(begin("meta", seeded(Wide), settings=BRIEF["meta"]))
    alive = fewer(network, *(5 if group.width == 16 else 3 for group in network.analysis.groups))
    opened(network, alive)
    wanted = outputs_of(network.module)
    network.settle()
    network.cut(alive)
    assert {tuple(p.shape) for p in network.module.parameters()} >= {(3, 5, 3, 3), (5, 3, 3, 3)}
    torch.testing.assert_close(outputs_of(network.module), wanted, rtol=0, atol=1e-10)


def test_weights_are_a_crop_of_whole_ones_that_other_widths_do_not_share() -> None:
    network = trained_generator(begin("meta", seeded(Wide), settings=BRIEF["meta"]))
    groups = network.analysis.groups
    found = []
    for count in (8, 4):
        opened(network, fewer(network, *(count for _ in groups)))
        found.append([attribute(network.module, name).detach().clone() for name in ("b.weight", "bn2.weight")])
    (wide, wide_scale), (narrow, narrow_scale) = found
    assert wide.shape == narrow.shape == (16, 12, 3, 3)
    assert wide_scale.count_nonzero() == 8
    assert narrow_scale.count_nonzero() == 4
    assert not torch.allclose(wide[:4, :4], narrow[:4, :4])
    assert not torch.allclose(wide_scale[:4], narrow_scale[:4])


def test_hidden_units_become_fewer_where_the_generator_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin("meta", seeded(Wide))
    run.network.generate()
    assert run.network.generator is not None
    assert run.network.generator.hidden == 4
    run.network.settle()
    weights = 16 * 3 * 9 + 12 * 16 * 9 + 16 * 12 * 9 + 2 * (16 + 12 + 16)
    monkeypatch.setattr("slimc.training.generator._LARGEST", 3 * weights + 1)
    run.network.generate()
    assert run.network.generator is not None
    assert run.network.generator.hidden == 3


def test_every_step_of_training_sees_other_widths_at_the_budget() -> None:
    run = begin("meta", seeded(Wide), settings=BRIEF["meta"])
    phase = first(run, "generator")
    seen = []
    before = phase.hooks.before_step
    assert before is not None
    for _ in range(8):
        before()
        buffers = phase.module.named_buffers()
        stays = [own.flatten() for name, own in buffers if ".weight" in name and "stays" in name]
        counts = np.array([next(int(s.sum()) for s in stays if len(s) == group.width) for group in run.analysis.groups])
        share = run.analysis.cost(counts).macs / run.analysis.full.macs
        assert 0.5 - dearest(run) < share <= 0.5
        seen.append(tuple(counts))
    assert len(set(seen)) > 3


# -- the search ---------------------------------------------------------------------------------------


def test_shares_have_31_steps_from_a_tenth_to_all() -> None:
    found = widths.shares(np.arange(31))
    assert found[[0, 1, 30]] == pytest.approx([0.1, 0.13, 1.0])


def test_a_budget_leaves_the_same_multiple_of_each_share_best_channels_first() -> None:
    run = begin("meta", seeded(Wide), flops=0.2)
    network = run.network
    scores = np.arange(len(network.alive), dtype=np.float64)  # the last channel of each group is the best
    places = widths.order(network, scores)
    for group in network.analysis.groups:
        assert places[group.variables] == pytest.approx(np.arange(group.width, 0, -1) / group.width)
    wide, narrow = group_of(run, 16), group_of(run, 12)
    wanted = np.ones(len(network.analysis.groups))
    wanted[narrow.number] = 0.5
    alive = run.selection.choose(widths.preference(network, places, wanted))
    left = {group.width: alive[group.variables] for group in (wide, narrow)}
    assert left[12].mean() == pytest.approx(0.5 * left[16].mean(), abs=1 / 12)
    for own in left.values():
        assert 0 < own.sum() < len(own)
        assert own[-int(own.sum()) :].all()


def _is_new(seen: set[tuple[int, ...]], own: widths.Genes) -> bool:
    return tuple(own.tolist()) not in seen


def evolved(genes: widths.Genes, loss: Any, generations: int, rng: np.random.Generator) -> widths.Genes:
    """All vectors of so many generations, none of them twice."""
    count = len(genes)
    for _ in range(generations):
        seen = {tuple(own) for own in genes.tolist()}
        fresh = widths.bred(genes, loss(genes), count, rng, partial(_is_new, seen))
        genes = np.concatenate([genes, fresh])
    return genes


def test_evolution_beats_random_search_with_as_many_vectors() -> None:
    target = np.array([0.2, 0.9, 0.5, 0.3, 0.7, 1.0, 0.1, 0.6])

    def loss(genes: widths.Genes) -> Any:
        return ((widths.shares(genes) - target) ** 2).sum(axis=1)

    wins = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        genes = evolved(widths.drawn(8, 20, rng), loss, 9, rng)
        assert len(genes) == 200
        wins += loss(genes).min() < loss(widths.drawn(8, 200, rng)).min()
    assert wins >= 19


def test_evolution_of_one_share_finds_the_largest() -> None:
    rng = np.random.default_rng(0)
    genes = evolved(widths.drawn(1, 3, rng), lambda genes: -genes[:, 0].astype(float), 8, rng)
    assert genes.max() == widths.STEPS - 1


def test_vectors_that_are_not_new_are_drawn_again() -> None:
    rng = np.random.default_rng(0)
    asked: list[tuple[int, ...]] = []

    def is_new(own: widths.Genes) -> bool:
        asked.append(tuple(own.tolist()))
        return len(asked) > 3

    genes = widths.drawn(4, 12, rng)
    found = widths.bred(genes, np.arange(12.0), 1, rng, is_new)
    assert [tuple(own) for own in found.tolist()] == asked[3:]
    parents = {tuple(own) for own in genes[:10].tolist()}
    mutant = asked[3]
    assert max(sum(a == b for a, b in zip(mutant, parent, strict=True)) for parent in parents) >= 2
    widths.bred(genes, np.arange(12.0), 1, rng, lambda own: False)  # ends all the same


def test_generations_keep_the_best_ever_and_the_cut_is_the_best_of_all() -> None:
    run = begin("meta", scoring.build("resnet"), settings=BRIEF["meta"])
    _ = run.result
    told = [event["value"] for event in run._journal.events if event["kind"] == "generation"]
    assert len(told) == 3
    best = [float(value["losses"][0]) for value in told]
    assert best == sorted(best, reverse=True)
    for value in told:
        assert value["losses"].tolist() == sorted(value["losses"].tolist())
        assert value["genes"].shape == (4, len(run.analysis.groups))


def test_from_scratch_the_weights_are_new() -> None:
    settings = BRIEF["meta"] | {"scratch": "true", "finetune": 0.0}
    weights = []
    for scratch in ("true", "false"):
        run = begin("meta", seeded(Wide), settings=settings | {"scratch": scratch})
        weights.append(run.result.module.state_dict())
    fresh, made = weights
    assert fresh["bn1.weight"].unique().tolist() == [1.0]
    assert len(made["bn1.weight"].unique()) == len(made["bn1.weight"])
    assert fresh["a.weight"].shape == made["a.weight"].shape


@pytest.mark.parametrize("name", ["meta", "joint-search"])
def test_samples_without_labels_are_refused_before_anything_is_trained(name: str) -> None:
    images = [(x, None) for x, _ in scoring.labelled()]
    with pytest.raises(UsageError, match=r"let every batch be \(inputs, targets\)"):
        next(iter(begin(name, seeded(Wide), data=images, loss=lambda outputs, targets: outputs.sum())))


def test_a_generator_has_no_accuracy_since_it_stands_for_many_networks() -> None:
    run = begin("meta", seeded(Wide), settings=BRIEF["meta"], val=scoring.labelled(1))
    found = {phase.name: phase.metrics["accuracy"] for phase in run}
    assert found["generator"] is None
    assert found["finetune"] is not None


def test_networks_are_compared_on_at_most_256_samples_of_which_half_measure_norms() -> None:
    run = begin("meta", seeded(Wide), data=scoring.labelled(90))
    judge = Judge(run)
    assert run.samples.count == 360
    assert (judge._fit.count, judge._judge.count) == (128, 128)
    wanted = judged_loss(run, judge)
    assert judge() != pytest.approx(wanted)  # statistics of norms are measured first
    again = judged_loss(run, judge)
    assert judge() == pytest.approx(again)


def judged_loss(run: Run, judge: Judge) -> float:
    """Of the network with the statistics that its norms have now."""
    batches = judge._judge.batches
    return -evaluate(run.network.module, batches, lambda *pair: -float(nn.functional.cross_entropy(*pair)))


@pytest.mark.parametrize("name", ["meta", "joint-search"])
def test_judging_changes_nothing_but_the_statistics_of_norms(name: str) -> None:
    run = begin(name, seeded(Wide), settings=BRIEF[name], flops=0.2)
    first(run, {"meta": "generator", "joint-search": "coarse"}[name]).train()
    if name == "meta":
        opened(run.network, fewer(run.network, *(5 for _ in run.network.analysis.groups)))
    judge, before = Judge(run), snapshot(run.network.module)
    found = judge()
    assert all(torch.equal(value, before[key]) for key, value in snapshot(run.network.module).items())
    assert judge() == pytest.approx(found, abs=1e-12)
    assert found == pytest.approx(judged_loss(run, judge))


# -- joint search -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "count"), [(0.6, 2), (0.4, 1), (0.41, 2), (1.0, 4), (0.0, 1)])
def test_as_many_channels_stay_as_reach_the_threshold(threshold: float, count: int) -> None:
    assert kept(torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64), threshold) == count


def searching(rate: float = 0.1) -> tuple[Run, _Search]:
    run = begin("joint-search", seeded(Wide), flops=0.2)
    run.network.gate(identity=True)
    return run, _Search(run, rate)


def test_gates_start_as_ones_and_share_out_the_number_of_open_channels() -> None:
    run, search = searching()
    search._put()
    for _, phi in gates_of(run.network.module, run.network.places):
        torch.testing.assert_close(phi, torch.ones_like(phi), rtol=0, atol=1e-12)
    sample = search.sample(0, 0.5)
    search.alpha.normal_(generator=torch.Generator().manual_seed(0))
    search._put()
    wide, narrow = group_of(run, 16), group_of(run, 12)
    for place, phi in gates_of(run.network.module, run.network.places):
        group = wide if len(phi) == 16 else narrow
        stays = sample["alive"][torch.from_numpy(group.variables)]
        assert 0 < stays.sum() < len(phi)
        assert phi.sum().item() == pytest.approx(int(stays.sum()), abs=1e-9), place.name
        assert (phi[~stays] == 0).all()
        own = search.alpha[torch.from_numpy(group.variables)]
        torch.testing.assert_close(phi[stays].detach(), stays.sum() * own[stays].softmax(0))


def test_parameters_follow_the_gradients_of_all_gates_of_their_channel() -> None:
    run, search = searching(rate=0.1)
    search.alpha.normal_(generator=torch.Generator().manual_seed(0))
    search._put()
    generator = torch.Generator().manual_seed(1)
    gates = [phi for _, phi in gates_of(run.network.module, run.network.places)]
    given = [torch.randn(phi.shape, generator=generator, dtype=phi.dtype) for phi in gates]
    for phi, gradient in zip(gates, given, strict=True):
        phi.grad = gradient
    sums = {16: given[0] + given[2], 12: given[1]}
    assert [len(phi) for phi in gates] == [16, 12, 16]
    before = search.alpha.clone()
    search._move(0.0)
    for width, total in sums.items():
        own = torch.from_numpy(group_of(run, width).variables)
        shares = before[own].softmax(0)
        wanted = width * shares * (total - (shares * total).sum())  # the softmax's derivative, by hand
        torch.testing.assert_close(before[own] - search.alpha[own], 0.1 * wanted)
    assert all(phi.grad is None for phi in gates)


def test_the_penalty_draws_parameters_to_zero_by_their_direction() -> None:
    run, search = searching(rate=0.1)
    search.alpha.normal_(generator=torch.Generator().manual_seed(0))
    before = search.alpha.clone()
    search._move(0.01)
    own = torch.from_numpy(group_of(run, 16).variables)
    wanted = 0.1 * 0.01 * before[own] / before[own].norm()
    torch.testing.assert_close(before[own] - search.alpha[own], wanted)


def test_a_sub_network_meets_the_budget_and_what_is_closed_stays_as_it_was() -> None:
    run = begin(
        "joint-search",
        seeded(Wide),
        settings={"networks": 1, "coarse": 0.0, "architecture": 0.0},
        recipe=PLAIN,
        flops=0.2,
    )
    phase = first(run, "weights")
    before = snapshot(phase.module)
    shut = {len(phi): (phi == 0).nonzero().flatten() for _, phi in gates_of(phase.module, run.network.places)}
    assert all(len(own) for own in shut.values())
    counts = np.array([group.width - len(shut[group.width]) for group in run.analysis.groups])
    share = run.analysis.cost(counts).macs / run.analysis.full.macs
    assert 0.2 - dearest(run) < share <= 0.2
    phase.train()
    after = snapshot(phase.module)
    moved = after["a.weight"] - before["a.weight"]
    assert (moved[shut[12]] == 0).all()
    assert (moved[:, shut[16]] == 0).all()
    assert (moved.abs().amax((1, 2, 3)) > 0).sum() == 12 - len(shut[12])
    assert all(torch.equal(after[name], before[name]) for name in before if name.endswith(".phi"))


def test_what_is_cut_computes_what_the_best_sub_network_did() -> None:
    run = begin("joint-search", scoring.build("resnet"), settings={"networks": 2, "finetune": 0.0})
    found: list[Tensor] = []
    cut = run.cut

    def watched(choose: Any, **options: Any) -> None:
        found.append(outputs_of(run.network.module))
        cut(choose, **options)

    run.cut = watched  # type: ignore[method-assign]
    slim = run.result
    torch.testing.assert_close(outputs(slim.module), found[0], rtol=0, atol=1e-9)


def test_the_policys_gradient_vanishes_in_the_mean_and_it_learns_the_best_threshold() -> None:
    _, search = searching()
    policy = search._policy
    assert sorted(policy.stems) == ["12", "16"]
    parameters = search._parameters()
    chances = policy(parameters)[0]
    score = [
        torch.autograd.grad(chances[action], policy.head[-1].bias, retain_graph=True)[0]  # type: ignore[arg-type]
        for action in range(len(THRESHOLDS))
    ]
    mean = sum(p * own for p, own in zip(chances.exp().detach(), score, strict=True))
    torch.testing.assert_close(mean, torch.zeros(len(THRESHOLDS)), rtol=0, atol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(300):
        with torch.no_grad():
            own = policy(parameters).exp().double().numpy()
        actions = [int(rng.choice(5, p=row / row.sum())) for row in own]
        reward = np.mean([abs(action - 3) for action in actions])  # the loss: least for the fourth
        search._loss = lambda reward=reward: float(reward)  # type: ignore[assignment]
        search.recall(search.learn(torch.tensor(actions)))
    assert (policy(parameters).argmax(1) == 3).all()
