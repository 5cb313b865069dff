"""Gates: where they sit, how they start, what they score, and that they leave no trace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scoring
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import slimc
from slimc.graph.infer import attribute
from slimc.schedules.tick_tock import scored
from slimc.training import gates, lifts
from slimc.training.gates import Place, gate_of
from slimc.training.network import Network
from slimc.training.recipe import Recipe
from slimc.training.run import Run

NETS = ("resnet", "mobilenet", "densenet", "vit")


class Chain(nn.Module):
    """Convolutions and linear layers without a norm; every channel has one reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.c, self.fc = nn.Linear(5, 7), nn.Linear(7, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3))
        out: Tensor = self.fc(torch.relu(self.c(x)))
        return out


class Twins(nn.Module):
    """Two writers of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.two, self.norm_two = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stream = torch.relu(self.norm_one(self.one(x)) + self.norm_two(self.two(x)))
        out: Tensor = self.fc(stream.mean((2, 3)))
        return out


def seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


def network(model: nn.Module) -> Network:
    return Network(slimc.inspect(model, scoring.pictures(2)))


def place(net: Network, name: str) -> Place:
    return next(own for own in net.places if own.name == name)


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(module).eval()(scoring.pictures(6, seed=7))
    return found


def descend(module: nn.Module, steps: int = 3, rate: float = 0.05) -> None:
    """A few steps in training mode, so that weights, gates and statistics are no longer those at the start."""
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    module.train()
    for x, y in scoring.labelled(steps):
        optimiser.zero_grad()
        scoring.eager_loss(module, x, y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    module.eval()


def ticking(model: nn.Module) -> Run:
    """A run of gates in plain arithmetic."""
    data = scoring.labelled()
    run: Run = slimc.schedule(
        "tick-tock", model, data[0][0], flops=0.5, epochs=2, data=data, recover="none", round_to=1,
        recipe=Recipe(optimiser="sgd", precision="float32"),
    )  # fmt: skip
    return run


def theta(run: Run) -> dict[str, Tensor]:
    """What a Tick sums up over the batches, with nothing moved in between."""
    run.gate()
    tick = scored(run, 1.0)
    module = tick.module.train()
    assert tick.hooks.before_step is not None
    for x, y in scoring.labelled():
        module.zero_grad()
        scoring.eager_loss(module, x, y).backward()  # type: ignore[no-untyped-call]
        tick.hooks.before_step()
    return tick.tally


# -- how they start and how they end ------------------------------------------------------------------


def test_a_gate_starts_as_gamma_and_beta_is_divided_by_it() -> None:
    model = scoring.build("resnet")
    with torch.no_grad():
        attribute(model, "bn1.weight")[0], attribute(model, "bn1.bias")[0] = 2.0, 1.0
    net = network(model)
    before = outputs(net.module)
    net.gate()
    norm = net.module.get_submodule("bn1.parametrizations")
    assert gate_of(net.module, place(net, "bn1.weight"))[0] == 2.0
    assert attribute(norm, "bias.original")[0] == 0.5
    assert torch.equal(attribute(norm, "weight.original"), torch.ones(4).double())
    assert not attribute(norm, "weight.original").requires_grad
    torch.testing.assert_close(outputs(net.module), before, rtol=0, atol=1e-12)
    assert net.clipped == {}


def test_a_gate_without_a_norm_starts_as_the_norm_of_its_rows() -> None:
    net = network(seeded(Chain))
    before, rows = outputs(net.module), attribute(net.module, "a.weight").detach().flatten(1).norm(dim=1)
    net.gate()
    torch.testing.assert_close(gate_of(net.module, place(net, "a.weight")).detach(), rows)
    own = attribute(net.module, "a.parametrizations.weight.original").flatten(1).norm(dim=1)
    torch.testing.assert_close(own.detach(), torch.ones(6).double())
    torch.testing.assert_close(outputs(net.module), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_merging_gives_what_the_gated_network_gave(name: str) -> None:
    net = Network(scoring.analysed(name))
    start = outputs(net.module)
    net.gate()
    torch.testing.assert_close(outputs(net.module), start, rtol=0, atol=1e-10)
    descend(net.module)
    gated = outputs(net.module)
    net.merge()
    torch.testing.assert_close(outputs(net.module), gated, rtol=0, atol=1e-6)
    assert (gated - start).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETS)
def test_merging_leaves_no_trace(name: str) -> None:
    net = Network(scoring.analysed(name))
    tensors = {key: value.clone() for key, value in net.module.state_dict().items()}
    classes = {key: type(part) for key, part in net.module.named_modules()}
    trained = {key: parameter.requires_grad for key, parameter in net.module.named_parameters()}
    net.gate()
    assert any(map(parametrize.is_parametrized, net.module.modules()))
    net.merge()
    assert not any(map(parametrize.is_parametrized, net.module.modules()))
    assert {key: type(part) for key, part in net.module.named_modules()} == classes
    assert {key: parameter.requires_grad for key, parameter in net.module.named_parameters()} == trained
    after = net.module.state_dict()
    assert list(after) == list(tensors)
    assert all((after[key] - value).abs().max() < 1e-6 for key, value in tensors.items())


def test_what_was_frozen_is_frozen_after_the_gates() -> None:
    model = scoring.build("resnet")
    model.get_submodule("bn1").requires_grad_(False)
    attribute(model, "stem.weight").requires_grad_(False)
    net = network(model)
    net.gate()
    net.merge()
    flags = {name for name, parameter in net.module.named_parameters() if not parameter.requires_grad}
    assert flags == {"bn1.weight", "bn1.bias", "stem.weight"}


def test_the_callers_model_is_not_gated() -> None:
    model = scoring.build("resnet")
    before = copy.deepcopy(model.state_dict())
    net = network(model)
    net.gate()
    descend(net.module)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(map(parametrize.is_parametrized, model.modules()))


@pytest.mark.parametrize(
    ("gamma", "beta", "moved"),
    [
        (0.01, 1.0, 0.9),  # beta / gamma is 100; limited to 10 it is worth 0.1
        (-0.01, 1.0, 0.9),
        (0.0, 0.7, 0.7),  # a closed gate has no beta to give back
    ],
)
def test_a_beta_that_had_to_be_limited_is_reported(gamma: float, beta: float, moved: float) -> None:
    model = scoring.build("resnet")
    with torch.no_grad():
        attribute(model, "bn1.weight")[2], attribute(model, "bn1.bias")[2] = gamma, beta
    net = network(model)
    net.gate()
    assert net.clipped == {"bn1.weight": pytest.approx(moved)}
    assert attribute(net.module, "bn1.parametrizations.bias.original").abs().max() <= gates.CLIP
    net.merge()
    assert abs(attribute(net.module, "bn1.bias")[2].item()) == pytest.approx(beta - moved)


# -- where they sit -----------------------------------------------------------------------------------


def test_gates_sit_after_batch_norms_and_else_on_the_layers_themselves() -> None:
    found = {own.name: own for own in Network(scoring.analysed("resnet")).places}
    assert set(found) == {"bn0.weight", "bn1.weight", "bn2.weight"}
    assert all(own.norm and [axis for _, axis in own.tensors] == [0, 0] for own in found.values())
    chain = {own.name: own for own in network(seeded(Chain)).places}
    assert {name: own.tensors for name, own in chain.items()} == {
        "a.weight": (("a.weight", 0), ("a.bias", 0)),
        "b.weight": (("b.weight", 0),),
        "c.weight": (("c.weight", 0), ("c.bias", 0)),
    }
    assert not any(own.norm for own in chain.values())


def test_rows_of_a_transposed_convolution_lie_along_its_second_axis() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ReLU(), nn.Conv2d(6, 4, 1)).double().eval()
    net = network(model)
    assert place(net, "0.weight").tensors == (("0.weight", 1), ("0.bias", 0))
    before = outputs(net.module)
    net.gate()
    torch.testing.assert_close(outputs(net.module), before, rtol=0, atol=1e-12)
    with torch.no_grad():
        gate_of(net.module, place(net, "0.weight"))[1] = 0.0
    net.merge()
    assert not attribute(net.module, "0.weight")[:, 1].any()
    assert not attribute(net.module, "0.bias")[1]


def test_tied_weights_have_no_gate() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight, self.last = self.one.weight, nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.two(torch.relu(self.one(torch.relu(self.first(x))))))
            out: Tensor = self.last(x)
            return out

    net = Network(slimc.inspect(Tied(), torch.randn(2, 5)))
    assert [own.name for own in net.places] == ["first.weight"]


# -- what they score ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet"])
def test_theta_is_gamma_times_its_gradient_plus_beta_times_its_own(name: str) -> None:
    model = scoring.build(name)
    found = theta(ticking(model))
    plain = copy.deepcopy(model).train()
    wanted = {own: torch.zeros_like(value) for own, value in found.items()}
    for x, y in scoring.labelled():
        plain.zero_grad()
        scoring.eager_loss(plain, x, y).backward()  # type: ignore[no-untyped-call]
        for own in wanted:
            gamma, beta = attribute(plain, own), attribute(plain, own.replace("weight", "bias"))
            if isinstance(plain.get_submodule(own.rpartition(".")[0]), nn.BatchNorm2d):
                wanted[own] += (gamma * gamma.grad + beta * beta.grad).abs().detach()
    norms = [own for own, value in wanted.items() if value.any()]
    assert len(norms) >= 3
    for own in norms:
        torch.testing.assert_close(found[own], wanted[own], rtol=1e-9, atol=1e-14)


def test_theta_without_norms_is_what_the_reader_sums_up() -> None:
    model = seeded(Chain)
    found = theta(ticking(model))
    plain = copy.deepcopy(model).train()
    readers = {"a": "b.weight", "b": "c.weight", "c": "fc.weight"}
    wanted = {name: torch.zeros(attribute(model, f"{name}.weight").shape[0]).double() for name in readers}
    for x, y in scoring.labelled():
        plain.zero_grad()
        scoring.eager_loss(plain, x, y).backward()  # type: ignore[no-untyped-call]
        for name, reader in readers.items():
            weight = attribute(plain, reader)
            wanted[name] += (weight * weight.grad).transpose(0, 1).flatten(1).sum(1).abs().detach()
    for name, value in wanted.items():
        assert value.max() > 1e-6
        torch.testing.assert_close(found[f"{name}.weight"], value, rtol=1e-9, atol=1e-14)


def test_a_closed_gate_scores_nothing_and_its_filter_can_go() -> None:
    run = ticking(scoring.build("resnet"))
    run.gate()
    net = run.network
    closed = place(net, "bn1.weight")
    with torch.no_grad():
        gate_of(net.module, closed)[1] = 0.0
    found = theta(run)["bn1.weight"]
    assert found[1] == 0.0
    assert found[[0, 2, 3]].min() > 0
    before = outputs(net.module)
    variables = lifts.factors(net, closed)[:, 0]
    alive = net.alive.copy()
    alive[variables[1]] = False
    net.cut(alive)
    torch.testing.assert_close(outputs(net.module), before, rtol=0, atol=1e-12)
    assert attribute(net.module, "a.weight").shape[0] == 3
    alive[variables[2]] = False
    net.cut(alive)
    assert (outputs(net.module) - before).abs().max() > 1e-4


def test_two_members_that_are_alike_score_twice_what_one_does() -> None:
    model = seeded(Twins)
    with torch.no_grad():
        attribute(model, "two.weight").copy_(attribute(model, "one.weight"))
    run = ticking(model)
    found = theta(run)
    torch.testing.assert_close(found["norm_one.weight"], found["norm_two.weight"])
    total = lifts.summed(run.network, run.network.places, found)
    (group,) = run.analysis.groups
    np.testing.assert_allclose(total[group.variables], 2 * found["norm_one.weight"].numpy())
    assert total[group.variables].min() > 0


def test_a_coupled_group_scores_the_sum_over_its_members() -> None:
    run = ticking(scoring.build("resnet"))
    found = theta(run)
    net = run.network
    total = lifts.summed(net, net.places, found)
    stream = lifts.factors(net, place(net, "bn0.weight"))[:, 0]
    assert np.array_equal(stream, lifts.factors(net, place(net, "bn2.weight"))[:, 0])
    np.testing.assert_allclose(total[stream], (found["bn0.weight"] + found["bn2.weight"]).numpy())
    inner = lifts.factors(net, place(net, "bn1.weight"))[:, 0]
    np.testing.assert_allclose(total[inner], found["bn1.weight"].numpy())
    counts = lifts.members(net, net.places)
    assert {g.width: counts[g.number] for g in run.analysis.groups} == {6: 2, 4: 1}


def test_the_gradient_of_a_gate_is_the_sum_over_what_it_multiplies() -> None:
    gate = gates.Gate(nn.Parameter(torch.tensor([2.0, -1.0])), axis=1, rank=3)
    original = torch.arange(12.0).reshape(2, 2, 3)
    gated = gate(original)
    assert torch.equal(gated[:, 0], 2 * original[:, 0])
    assert torch.equal(gated[:, 1], -original[:, 1])
    gated.sum().backward()
    # channel 0: 0+1+2+6+7+8; channel 1: 3+4+5+9+10+11
    assert gate.phi.grad is not None
    assert gate.phi.grad.tolist() == [24.0, 42.0]
