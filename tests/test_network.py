"""The network of a run: cuts in a row, what follows them, and the network as data."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import scoring
import torch
from scheduled import PLAIN
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import slimc
from slimc.analysis import Analysis
from slimc.graph.infer import attribute
from slimc.graph.rule import operator_name
from slimc.training import lifts
from slimc.training.gates import gates_of
from slimc.training.loop import Loop
from slimc.training.network import Alive, Network
from slimc.training.stream import Stream

NETS = tuple(scoring.NETS)
REMEMBERING = dataclasses.replace(PLAIN, rate=0.05, momentum=0.9)


class Literal(nn.Module):
    """Its class cannot shrink: a size stands in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.fc = nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4 * 4, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.b(torch.relu(self.norm(self.a(x))))), 2)
        out: Tensor = self.fc(x.reshape(x.shape[0], 16))
        return out


def literal() -> Analysis:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return slimc.inspect(Literal().double().eval(), scoring.pictures(4))


def fewer(analysis: Analysis, seed: int, alive: Alive | None = None) -> Alive:
    """About two thirds of what is left of every group."""
    left = np.ones(analysis.types.solution.variables, np.bool_) if alive is None else alive.copy()
    rng = np.random.default_rng(seed)
    for group in analysis.groups:
        own = group.variables[left[group.variables]]
        count = min(max(1, len(own) // 3), len(own) - max(1, group.floor))
        left[rng.choice(own, max(0, count), replace=False)] = False
    return left


def outputs(module: nn.Module, count: int = 4) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(module).eval()(scoring.pictures(count, seed=7))
    return found


def train(net: Network, steps: int = 3, **more: Any) -> Loop:
    """A few steps, with what the optimiser remembered before."""
    data = scoring.labelled()
    stream = Stream(data, net.analysis.captured.example, 0)
    loop = Loop(net.module, stream, steps, REMEMBERING, memory=net.optimiser, **more)
    for _ in range(steps):
        loop.step()
    loop.finish()
    net.optimiser = loop.memory()
    return loop


def same(one: nn.Module, two: nn.Module) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# -- cuts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_two_cuts_in_a_row_are_one_cut_of_both(name: str) -> None:
    analysis = scoring.analysed(name)
    first = fewer(analysis, 0)
    second = fewer(analysis, 1, first)
    assert second.sum() < first.sum() < len(first)
    twice, once = Network(analysis), Network(analysis)
    twice.cut(first)
    middle = outputs(twice.module)
    twice.cut(second)
    once.cut(second)
    assert same(twice.module, once.module)
    assert torch.equal(outputs(twice.module), outputs(once.module))
    assert twice.costs == once.costs
    assert (middle - outputs(twice.module)).abs().max() > 1e-6


def test_weights_are_the_surviving_rows_and_columns() -> None:
    analysis = scoring.analysed("resnet")
    net, whole = Network(analysis), scoring.build("resnet")
    groups = {group.width: group.variables for group in analysis.groups}  # the stream has 6, the branch 4
    alive = net.alive.copy()
    alive[groups[6][[1, 3]]] = alive[groups[4][[0]]] = False
    net.cut(alive)
    stream, inner = [0, 2, 4, 5], [1, 2, 3]
    assert torch.equal(attribute(net.module, "a.weight"), attribute(whole, "a.weight")[inner][:, stream])
    assert torch.equal(attribute(net.module, "b.weight"), attribute(whole, "b.weight")[stream][:, inner])
    assert torch.equal(attribute(net.module, "bn2.running_var"), attribute(whole, "bn2.running_var")[stream])
    assert torch.equal(attribute(net.module, "fc.weight"), attribute(whole, "fc.weight")[:, stream])
    assert net.widths.tolist() == [len(stream) if group.width == 6 else len(inner) for group in analysis.groups]


def test_a_cut_of_nothing_changes_nothing() -> None:
    net = Network(scoring.analysed("resnet"))
    module = net.module
    net.cut(np.ones_like(net.alive))
    assert net.module is module


def test_channels_that_are_gone_do_not_come_back() -> None:
    analysis = scoring.analysed("resnet")
    net = Network(analysis)
    first, other = fewer(analysis, 0), fewer(analysis, 5)
    net.cut(first)
    net.cut(other)
    assert np.array_equal(net.alive, first & other)


@pytest.mark.parametrize("name", NETS)
def test_the_analysis_and_its_weights_stay_whole(name: str) -> None:
    analysis = scoring.analysed(name)
    before = {key: value.clone() for key, value in analysis.types.weights.items()}
    net = Network(analysis)
    net.gate()
    train(net)
    net.cut(fewer(analysis, 0))
    train(net)
    assert all(torch.equal(value, before[key]) for key, value in analysis.types.weights.items())


def test_modes_and_what_was_frozen_stay() -> None:
    model = scoring.build("resnet").train()
    model.get_submodule("bn1").eval()
    attribute(model, "stem.weight").requires_grad_(False)
    analysis = slimc.inspect(model, scoring.pictures(2))
    net = Network(analysis)
    assert {name for name, part in net.module.named_modules() if not part.training} == {"bn1"}
    net.cut(fewer(analysis, 0))
    assert {name for name, part in net.module.named_modules() if not part.training} == {"bn1"}
    assert {name for name, p in net.module.named_parameters() if not p.requires_grad} == {"stem.weight"}


# -- what follows a cut -------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_the_optimisers_memory_follows_the_surviving_indices(gated: bool) -> None:
    analysis = scoring.analysed("resnet")
    net = Network(analysis)
    if gated:
        net.gate()
    train(net)
    old = {name: own["momentum_buffer"].clone() for name, own in net.optimiser.items()}
    groups = {group.width: group.variables for group in analysis.groups}
    alive = net.alive.copy()
    alive[groups[6][[1, 3]]] = alive[groups[4][[0]]] = False
    net.cut(alive)
    stream, inner = [0, 2, 4, 5], [1, 2, 3]
    now = {name: own["momentum_buffer"] for name, own in net.optimiser.items()}
    norm = "bn1.parametrizations.weight.0.phi" if gated else "bn1.weight"
    assert torch.equal(now["a.weight"], old["a.weight"][inner][:, stream])
    assert torch.equal(now["fc.weight"], old["fc.weight"][:, stream])
    assert torch.equal(now["fc.bias"], old["fc.bias"])
    assert torch.equal(now[norm], old[norm][inner])
    named = dict(net.module.named_parameters())
    assert {name: value.shape for name, value in now.items()} == {name: named[name].shape for name in now}
    loop = Loop(
        net.module, Stream(scoring.labelled(), analysis.captured.example, 0), 1, REMEMBERING, memory=net.optimiser
    )  # fmt: skip
    assert torch.equal(loop.optimiser.state[named["a.weight"]]["momentum_buffer"], now["a.weight"])


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet"])
def test_gates_survive_a_cut_and_what_is_left_computes_the_same(name: str) -> None:
    analysis = scoring.analysed(name)
    net = Network(analysis)
    net.gate()
    train(net)
    alive = fewer(analysis, 0)
    masked = copy.deepcopy(net.module)
    with torch.no_grad():
        for place, phi in gates_of(masked, net.places):
            phi[~lifts.living(net, place, alive)] = 0.0
    kept = {
        place.name: phi.detach()[lifts.living(net, place, alive)] for place, phi in gates_of(net.module, net.places)
    }
    wanted = outputs(masked)  # before the cut: parametrised copies share their class with what is taken apart there
    assert (wanted - outputs(net.module)).abs().max() > 1e-4
    net.cut(alive)
    assert net.gated
    for place, phi in gates_of(net.module, net.places):
        assert torch.equal(phi, kept[place.name])
        assert phi.requires_grad
    assert any((value - 1).abs().max() > 1e-3 for value in kept.values())
    torch.testing.assert_close(outputs(net.module), wanted, rtol=0, atol=1e-10)
    train(net)
    gated = outputs(net.module)
    net.merge()
    torch.testing.assert_close(outputs(net.module), gated, rtol=0, atol=1e-10)


def test_a_gate_that_has_closed_can_open_again_after_a_cut() -> None:
    analysis = scoring.analysed("resnet")
    net = Network(analysis)
    net.gate()
    train(net)
    place, phi = next((place, phi) for place, phi in gates_of(net.module, net.places) if place.name == "bn1.weight")
    beta = attribute(net.module, "bn1.parametrizations.bias.original").detach().clone()
    with torch.no_grad():
        phi[2] = 0.0
    alive = net.alive.copy()
    alive[lifts.factors(net, place)[0]] = False
    net.cut(alive)
    # Its beta is not lost with it: divided by zero it would be.
    assert torch.equal(attribute(net.module, "bn1.parametrizations.bias.original")[1], beta[2])


# -- types --------------------------------------------------------------------------------------------


class Shapes(Interpreter):
    """Runs a graph and notes the shape of every tensor."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape)
        return value


@pytest.mark.parametrize("name", NETS)
def test_types_of_the_cut_network_have_the_sizes_of_its_tensors(name: str) -> None:
    analysis = scoring.analysed(name)
    net = Network(analysis)
    net.cut(fewer(analysis, 0))
    net.cut(fewer(analysis, 1, net.alive))
    train(net)
    types, grouping = net.typed()
    assert [group.width for group in grouping.groups] == net.widths.tolist()
    for key, axes in types.tensors.items():
        assert tuple(map(len, axes)) == tuple(types.weights[key].shape)
        assert torch.equal(types.weights[key], net.tensors()[key])
    shapes = Shapes(net.graph)
    example = analysis.captured.example
    with torch.no_grad():
        shapes.run(*example.tensors())
    compared = smaller = 0
    twins = {twin: node for node, twin in net.rewritten.twins.items()}
    for node, shape in shapes.found.items():
        axes = types.values[node]
        if axes is None or node.op != "call_function" or operator_name(node) == "sym_size":
            continue
        assert tuple(map(len, axes)) == shape, node
        compared += 1
        smaller += shape != tuple(twins[node].meta["val"].shape)
    assert compared > 8
    assert smaller > 5


# -- networks that come back as a graph ---------------------------------------------------------------


def test_a_network_that_comes_back_as_a_graph_is_cut_twice_and_trained() -> None:
    analysis = literal()
    net, once = Network(analysis), Network(analysis)
    first = fewer(analysis, 0)
    second = fewer(analysis, 1, first)
    net.cut(first)
    net.cut(second)
    once.cut(second)
    assert isinstance(net.module, GraphModule)
    assert torch.equal(outputs(net.module), outputs(once.module))

    before = {name: p.detach().clone() for name, p in net.module.named_parameters()}
    statistics = attribute(net.module, "norm.running_mean").clone()
    train(net)
    assert all(not torch.equal(p, before[name]) for name, p in net.module.named_parameters())
    assert not torch.equal(attribute(net.module, "norm.running_mean"), statistics)

    third = fewer(analysis, 2, second)
    groups = {group.members[0].tensor: group.variables for group in analysis.groups}
    inner = np.flatnonzero(third[groups["a.weight"]][second[groups["a.weight"]]])
    trained = attribute(net.module, "a.weight").detach().clone()
    net.cut(third)
    assert 0 < len(inner) < len(trained)
    assert torch.equal(attribute(net.module, "a.weight"), trained[torch.from_numpy(inner)])
    train(net)


def test_a_graph_goes_on_training_in_training_mode() -> None:
    net = Network(literal())
    train(net)
    assert isinstance(net.module, Literal)
    net.cut(fewer(net.analysis, 0))
    assert isinstance(net.module, GraphModule)
    assert all(part.training for part in net.module.modules())
    statistics = attribute(net.module, "norm.running_mean").clone()
    train(net)
    assert (attribute(net.module, "norm.running_mean") - statistics).abs().min() > 1e-6


def test_gates_on_a_graph_survive_cuts_and_merge_without_a_trace() -> None:
    analysis = literal()
    net = Network(analysis)
    net.cut(fewer(analysis, 0))
    names, start = list(net.module.state_dict()), outputs(net.module)
    net.gate()
    torch.testing.assert_close(outputs(net.module), start, rtol=0, atol=1e-12)
    train(net)
    net.cut(fewer(analysis, 1, net.alive))
    train(net)
    gated = outputs(net.module)
    net.merge()
    torch.testing.assert_close(outputs(net.module), gated, rtol=0, atol=1e-12)
    assert list(net.module.state_dict()) == names
    assert (gated - start).abs().max() > 1e-3


# -- as data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["resnet", "densenet", "literal"])
def test_a_network_goes_on_from_its_state_as_if_nothing_had_been(name: str, gated: bool) -> None:
    analysis = literal() if name == "literal" else scoring.analysed(name)
    net = Network(analysis)
    if gated:
        net.gate()
    train(net)
    net.cut(fewer(analysis, 0))
    train(net)
    file = io.BytesIO()
    torch.save(net.state(), file)
    file.seek(0)
    other = Network(analysis)
    other.load(torch.load(file, weights_only=True))
    assert other.gated == gated
    assert np.array_equal(other.alive, net.alive)
    assert same(other.module, net.module)
    assert other.optimiser.keys() == net.optimiser.keys() != set()
    before = outputs(net.module)
    for own in (net, other):
        train(own)
        own.cut(fewer(analysis, 1, own.alive))
        own.merge()
    assert same(other.module, net.module)
    assert (outputs(net.module) - before).abs().max() > 1e-3


def test_a_network_comes_back_in_the_memory_layout_that_it_had() -> None:
    net = Network(scoring.analysed("resnet"))
    net.module.to(memory_format=torch.channels_last)
    other = Network(net.analysis)
    other.load(net.state())
    weight = attribute(other.module, "a.weight")
    assert weight.stride() == attribute(net.module, "a.weight").stride()
    assert not weight.is_contiguous()
    assert attribute(other.graph, "a.weight") is weight


def test_a_saved_state_does_not_change_with_the_network() -> None:
    net = Network(scoring.analysed("resnet"))
    train(net)
    state = net.state()
    saved = copy.deepcopy(state)
    train(net)
    net.cut(fewer(net.analysis, 0))
    one, two = Network(net.analysis), Network(net.analysis)
    one.load(state)
    two.load(saved)
    assert same(one.module, two.module)
    assert bool(one.alive.all())


def test_tensors_that_were_kept_are_put_back_at_what_is_left() -> None:
    analysis = scoring.analysed("resnet")
    net, plain = Network(analysis), Network(analysis)
    kept, before = {name: tensor.clone() for name, tensor in net.tensors().items()}, net.cut_so_far
    net.gate()
    train(net)
    alive = fewer(analysis, 0)
    net.cut(alive)
    net.put(net.sliced(kept, before))
    plain.cut(alive)
    assert net.gated
    assert net.optimiser == {}
    torch.testing.assert_close(outputs(net.module), outputs(plain.module), rtol=0, atol=1e-12)
    net.merge()
    left, right = net.tensors(), plain.tensors()
    assert all((left[name] - right[name]).abs().max() < 1e-12 for name in left)
