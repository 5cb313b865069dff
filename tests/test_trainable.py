"""The graph as a module: for classes that cannot take new sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc

WIDTH = 12


class HardCoded(nn.Module):
    """A size in forward() that no attribute can change, with batch norm and two kinds of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH, momentum=0.3)
        self.spatial = nn.Dropout2d(0.4)
        self.second = nn.Conv2d(WIDTH, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spatial(torch.relu(self.norm(self.first(x))))
        x = x.view(x.shape[0], WIDTH, -1).view(x.shape[0], WIDTH, x.shape[2], x.shape[3])
        out: Tensor = self.head(self.dropout(self.second(x).mean((2, 3))))
        return out


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = noise(4, 3, 8, 8)


def original() -> HardCoded:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HardCoded()


def compressed(model: nn.Module, **options: Any) -> slimc.Compressed:
    slim = slimc.compress(model, X, **{"flops": 0.6, "round_to": 1, "recover": "none", **options})
    assert slim.module is slim.graph
    return slim


@pytest.fixture
def whole() -> nn.Module:
    """The graph of the whole model, so that it can be compared with the original."""
    analysis = slimc.inspect(original(), X)
    import numpy as np

    from slimc.graph.resize import Cut
    from slimc.rewrite import rewrite
    from slimc.trainable import trainable

    nothing = Cut(analysis.types, np.ones(analysis.types.solution.variables, np.bool_))
    return trainable(rewrite(analysis.types, nothing).module)


def test_train_and_eval_mean_what_they_mean_for_the_original(whole: nn.Module) -> None:
    model = original()
    for training in (True, False, True):
        model.train(training)
        whole.train(training)
        results = []
        for module in (model, whole):
            torch.manual_seed(3)
            results.append(module(X))
        torch.testing.assert_close(results[0], results[1])
        for name in ("norm.running_mean", "norm.running_var"):
            torch.testing.assert_close(whole.get_buffer(name), model.get_buffer(name))
    assert not torch.equal(model.get_buffer("norm.running_mean"), torch.zeros(WIDTH))


def test_training_mode_is_random_and_evaluation_is_not(whole: nn.Module) -> None:
    with torch.no_grad():
        whole.train()
        assert not torch.equal(whole(X), whole(X))
        whole.eval()
        assert torch.equal(whole(X), whole(X))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_callers_model_is_that_of_the_result(training: bool) -> None:
    slim = compressed(original().train(training))
    assert slim.module.training == training
    with torch.no_grad():
        assert torch.equal(slim.module(X), slim.module(X)) == (not training)


def test_the_graph_trains_and_exports_what_it_learned() -> None:
    slim = compressed(original().eval())
    model = slim.module.train()
    before = copy.deepcopy(slim.state_dict())
    y = torch.arange(4)
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    moved = {name for name, t in slim.state_dict().items() if not torch.equal(t, before[name])}
    assert {"first.weight", "norm.running_mean", "head.bias"} <= moved
    exported = slim.program.module()  # while the graph is in training mode
    assert model.training
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(X), model(X))
        assert torch.equal(exported(X), exported(X))


@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_a_graph_are_re_estimated_too(training: bool) -> None:
    slim = compressed(original().train(training))
    slim.recover("bn", [X + 2])
    hidden = nn.functional.conv2d(
        X + 2, slim.module.get_parameter("first.weight"), slim.module.get_parameter("first.bias"), padding=1
    )
    torch.testing.assert_close(slim.module.get_buffer("norm.running_mean"), hidden.mean((0, 2, 3)))
    torch.testing.assert_close(slim.module.get_buffer("norm.running_var"), hidden.var((0, 2, 3)))


def test_a_graph_without_modes_is_left_as_it_is() -> None:
    class NoModes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.relu(self.first(x)).view(-1, 8))
            return out

    slim = slimc.compress(NoModes(), noise(4, 6), params=0.6, round_to=1, recover="none")
    assert slim.module is slim.graph
    assert not any(node.op == "call_module" for node in slim.graph.graph.nodes)
