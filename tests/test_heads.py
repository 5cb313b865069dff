"""Auxiliary heads, and the schedule `dcp` that trains with them."""

from __future__ import annotations

import numpy as np
import pytest
import scoring
import torch
from scheduled import Plain, Wide, begin, first, seeded, snapshot, steps
from torch import Tensor, nn

import slimc
from slimc.errors import UsageError
from slimc.graph.example import Example
from slimc.losses import cross_entropy
from slimc.samples import batch_of
from slimc.schedules.dcp import discriminating
from slimc.training.heads import Heads

PLACES = [("bn0", 1, 16), ("bn1", 1, 12)]


def headed() -> tuple[nn.Module, Heads]:
    module = seeded(Wide)
    return module, Heads(module, PLACES, scoring.CLASSES)


def losses(module: nn.Module, heads: Heads) -> list[Tensor]:
    """Of each head in order of depth, then of the network's own."""
    x, y = scoring.labelled(1)[0]
    found = module(x)
    return [*heads.losses(y, cross_entropy), cross_entropy(found, y)]


def test_the_loss_of_a_head_reaches_the_layers_before_it_alone() -> None:
    module, heads = headed()
    before = [{"stem", "bn0"}, {"stem", "bn0", "a", "bn1"}, {"stem", "bn0", "a", "bn1", "b", "bn2", "fc"}]
    named = dict(module.named_parameters())
    for number, (value, layers) in enumerate(zip(losses(module, heads), before, strict=True)):
        found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
        moved = {name for name, gradient in zip(named, found, strict=True) if gradient is not None and gradient.any()}
        own = f"{PLACES[number][0]}.auxiliary_head." if number < len(PLACES) else "none"
        plain = {name for name in named if name.partition(".")[0] in layers and "auxiliary_head" not in name}
        assert moved == plain | {name for name in named if name.startswith(own)}


def test_outputs_with_heads_are_those_without_and_nothing_is_left_of_them() -> None:
    module = seeded(Wide).eval()
    x = scoring.pictures(3)
    plain, names = module(x), set(module.state_dict())
    heads = Heads(module, PLACES, scoring.CLASSES)
    found = module.eval()(x)
    assert torch.equal(found, plain)
    # DistributedDataParallel exchanges the gradients of what outputs hang on.
    reached = torch.autograd.grad(found.sum(), list(module.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in reached)
    assert set(module.state_dict()) > names
    heads.close()
    assert set(module.state_dict()) == names
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_layer_is_judged_by_the_first_head_behind_it() -> None:
    module, heads = headed()
    module.eval()
    named = dict(module.named_parameters())
    near, far, own = losses(module, heads)
    judges = {"stem.weight": near, "a.weight": far, "b.weight": own, "fc.weight": own}
    x, y = scoring.labelled(1)[0]
    found = heads.gradients([batch_of((x, y), Example.of(x))], judges, cross_entropy)
    for name, judge in judges.items():
        wanted = torch.autograd.grad(judge, [named[name]], retain_graph=True)[0]
        assert wanted.any()
        torch.testing.assert_close(found[name], wanted)


def test_heads_choose_and_the_result_has_none() -> None:
    model = seeded(Plain)
    run = begin("dcp", model, settings={"heads": 1, "warmup": 0.5})
    phase = first(run, "heads")
    heads = run.network.heads
    assert heads is not None
    assert phase.epochs == 1
    before = snapshot(phase.module)
    phase.train()
    assert all(not torch.equal(value, before[name]) for name, value in snapshot(phase.module).items())
    chosen, plain = discriminating(run), run.score("dcp")
    assert any(not np.allclose(chosen[g.variables], plain[g.variables]) for g in run.analysis.groups)
    slim = run.result
    assert run.network.heads is None
    assert slim.module.state_dict().keys() == model.state_dict().keys()


def test_heads_are_spread_over_depth_and_never_more_than_there_are_groups() -> None:
    for count, places in ((1, ["bn2"]), (2, ["bn1", "bn2"]), (9, ["bn1", "bn2"])):
        run = begin("dcp", seeded(Plain), settings={"heads": count})
        first(run, "heads")
        state = run.network.state()
        assert isinstance(state["heads"], list)
        assert [path for path, _, _ in state["heads"]] == places


def test_ones_own_loop_must_add_the_losses_of_heads() -> None:
    run = begin("dcp", seeded(Plain))
    phase = first(run, "heads")
    steps(phase, 3)
    phase.done()
    with pytest.raises(UsageError, match=r"phase\.extra"):
        next(run)


def test_dcp_names_the_outputs_that_it_takes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).double()
    x = scoring.pictures(2)
    with pytest.raises(UsageError, match=r"\[N, classes\]"):
        next(slimc.schedule("dcp", model, x, flops=0.5, epochs=1, data=None, round_to=1))


class Functional(nn.Module):
    """Its layers are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, 192) / 14), nn.Parameter(torch.randn(5, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.flatten(1) @ self.a.T) @ self.b.T


def test_dcp_says_where_it_finds_no_place_for_heads() -> None:
    with pytest.raises(UsageError, match="puts heads behind convolutions"):
        next(begin("dcp", seeded(Functional)))


class Attention(nn.Module):
    """torch's own encoder, whose attention never calls its output layer, nor any layer where nothing is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.block, self.fc = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, scoring.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.block(self.first(x.flatten(2).transpose(1, 2))).mean(1))
        return out


@pytest.mark.parametrize("model", [scoring.build("vit"), seeded(Attention)], ids=["vit", "encoder"])
def test_dcp_runs_on_attention(model: nn.Module) -> None:
    run = begin("dcp", model, flops=0.7, epochs=2, val=scoring.labelled(1))
    assert first(run, "heads").metrics["accuracy"] is not None
    assert run.result.report.verification.passed
