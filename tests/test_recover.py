"""Recovery without labels: reconstruction, distillation, what undoes a step, made-up samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc import recover
from slimc.errors import UsageError
from slimc.graph.example import Example
from slimc.graph.resize import Cut
from slimc.recovery.reconstruct import WIDEST, reconstruct
from slimc.regression import Moments, scaled
from slimc.rewrite import rewrite
from slimc.samples import Batch, Samples, collect
from slimc.scorers.obs import Part, eliminate


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- reconstruction -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block whose shortcut comes first, so that the branch answers for its error."""

    def __init__(self, inputs: int = 3, width: int = 8) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(inputs, width, 1)
        self.first, self.norm = nn.Conv2d(inputs, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.last = nn.Conv2d(12, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.second(torch.relu(self.norm(self.first(x)))))
        out: Tensor = self.head(torch.relu(self.shortcut(x) + y).mean((2, 3)))
        return out


def seeded(make: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def task(model: nn.Module, x: Tensor, data: Tensor, flops: float = 0.5) -> recover.Task:
    analysis = slimc.inspect(model, x)
    plan = slimc.compress(model, x, flops=flops, round_to=1, scorer="random", recover="none").plan
    cut = Cut(analysis.types, plan.alive(analysis.types))
    rewritten = rewrite(analysis.types, cut)
    found = collect(torch.split(data, 16), analysis.captured.example)
    return recover.Task(analysis.captured.module, rewritten.module.eval(), rewritten.twins, analysis.types, cut, found)


def test_reconstruction_brings_the_outputs_nearer_on_samples_that_it_did_not_see() -> None:
    work = task(seeded(Block), noise(2, 3, 8, 8), noise(128, 3, 8, 8, seed=1))
    judge = recover.Judge(work.original, collect([noise(64, 3, 8, 8, seed=2)], work.types.captured.example))
    before = judge.verdict(work.slim).distance
    said = reconstruct(work)
    assert judge.verdict(work.slim).distance < 0.25 * before
    assert "of 4 layers fitted" in said
    assert "128 samples" in said


def test_a_layer_of_more_inputs_than_fit_in_memory_squared_is_fitted_on_its_few_rows() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16 * 16, 10))

    def pictures(count: int, seed: int) -> Tensor:
        return nn.functional.interpolate(noise(count, 1, 4, 4, seed=seed), 16, mode="bilinear")

    work = task(seeded(make), pictures(2, 0), pictures(128, 1))
    assert work.slim.get_parameter("3.weight").shape[1] > WIDEST
    judge = recover.Judge(work.original, collect([pictures(64, 2)], work.types.captured.example))
    before = judge.verdict(work.slim).distance
    assert "1 of 2 layers fitted" in reconstruct(work)  # nothing is missing of the first one's input
    assert judge.verdict(work.slim).distance < 0.5 * before


@pytest.mark.parametrize(("name", "least"), [("bias", 0.95), ("scale", 0.8)])
def test_the_cheaper_forms_bring_the_outputs_nearer_too(name: str, least: float) -> None:
    work = task(seeded(Block), noise(2, 3, 8, 8), noise(128, 3, 8, 8, seed=1) + 0.5)
    judge = recover.Judge(work.original, collect([noise(64, 3, 8, 8, seed=2) + 0.5], work.types.captured.example))
    before = judge.verdict(work.slim).distance
    weights = {key: tensor.clone() for key, tensor in work.slim.state_dict().items()}
    said = recover.find(name).run(work)
    assert judge.verdict(work.slim).distance < least * before
    assert "of 4 layers fitted" in said
    assert ("of them pad" in said) is (name == "bias")
    if name == "bias":
        changed = [key for key, tensor in work.slim.state_dict().items() if not torch.equal(tensor, weights[key])]
        assert changed
        assert all(work.slim.state_dict()[key].dim() == 1 for key in changed)


def test_scalars_are_those_of_thinet_for_orthogonal_inputs() -> None:
    # y = x1 w1 + x2 w2 with orthogonal columns: what is missing of each column is found by itself.
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]])
    matrix = torch.tensor([[[2.0, 3.0]]]).double()
    wanted = x.double() @ torch.diag(torch.tensor([1.5, 0.5]).double()) @ matrix.transpose(1, 2)
    moments = Moments(1, 2, 1, torch.device("cpu"))
    moments.add(x, wanted - x.double() @ matrix.transpose(1, 2))
    fit = scaled(moments, matrix, 1, torch.ones(1, 1).double(), 1e-9, offset=False)
    assert fit.change is not None
    torch.testing.assert_close(fit.change[0, :, 0] / matrix[0, 0], torch.tensor([0.5, -0.5]).double())


def test_scalars_are_shared_by_the_positions_of_a_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 500, 6, generator=generator)  # two channels of three positions
    matrix = torch.randn(1, 4, 6, generator=generator).double()
    factors = torch.tensor([1.25, 0.75]).double().repeat_interleave(3)
    moments = Moments(1, 6, 4, torch.device("cpu"))
    moments.add(x, x.double() @ ((factors - 1) * matrix).transpose(1, 2))
    fit = scaled(moments, matrix, 3, torch.ones(1, 4).double(), 1e-9, offset=False)
    assert fit.change is not None
    torch.testing.assert_close(fit.change, ((factors - 1) * matrix).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_channel_that_another_repeats_is_made_up_for_exactly() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 3))
    with torch.no_grad():
        model[0].weight[3] = 2 * model[0].weight[1]  # type: ignore[index, operator]
    data = noise(48, 3, 9, 9, seed=1)
    slim = slimc.compress(
        model.eval(),
        data[:2],
        flops=0.8,
        round_to=1,
        scorer="obs",
        recover="reconstruct",
        data=list(torch.split(data, 16)),
    )
    assert set(slim.plan.kept["0.weight"][0]) in ({0, 1, 2}, {0, 2, 3})
    other = noise(4, 3, 9, 9, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(slim.module(other), model(other), rtol=1e-2, atol=1e-2)


def test_the_original_and_the_samples_are_left_as_they_are() -> None:
    model, data = seeded(Block), noise(64, 3, 8, 8, seed=1)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    pictures = data.clone()
    slimc.compress(
        model, data[:2], flops=0.5, round_to=1, data=list(torch.split(data, 16)), recover="reconstruct,bn,distill"
    )
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert torch.equal(data, pictures)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_step_that_moves_the_outputs_away_is_undone_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(work: recover.Task) -> str:
        with torch.no_grad():
            for parameter in work.slim.parameters():
                parameter.mul_(3)
        return "spoilt"

    recover.steps()
    monkeypatch.setitem(recover.REGISTRY.entries, "spoil", recover.Step("spoil", "", "", spoil))
    data = list(torch.split(noise(32, 3, 8, 8, seed=1), 16))
    options: dict[str, Any] = {"flops": 0.5, "round_to": 1, "data": data, "scorer": "magnitude"}
    plain = slimc.compress(seeded(Block), data[0], recover="none", **options)
    slim = slimc.compress(seeded(Block), data[0], recover="spoil", **options)
    assert slim.report.recovery is not None
    (step,) = slim.report.recovery
    assert not step.kept
    assert step.before is not None
    assert step.after is not None
    assert step.after > step.before
    wanted = plain.module.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in slim.module.state_dict().items())


@pytest.mark.parametrize(
    ("rises", "kept"),
    [
        ([0.1, 0.1, 0.1, 0.2], True),  # falls
        ([0.2, 0.2, 0.2, 0.9], True),  # one of four is the whole rise: 0.15 on average, standard error 0.15
        ([0.3, 0.3, 0.2, 0.4], False),  # rises nearly everywhere
        ([0.3], True),  # one sample tells nothing of chance
    ],
)
def test_a_step_is_undone_where_classes_go_astray_by_more_than_chance(rises: list[float], kept: bool) -> None:
    after = torch.tensor(rises)
    before = torch.tensor([0.2, 0.2, 0.2, 0.3])[: len(after)]
    fitted = recover.Verdict(0.1, after, None)
    assert fitted.no_worse(recover.Verdict(0.2, before, None)) is kept
    assert not fitted.no_worse(recover.Verdict(0.05, before, None))  # the outputs as a whole are further off


def test_the_same_seed_gives_the_same_weights() -> None:
    data = list(torch.split(noise(64, 3, 8, 8, seed=1), 16))
    one, two = (slimc.compress(seeded(Block), data[0], flops=0.5, round_to=1, data=data).module for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


# -- obs ----------------------------------------------------------------------------------------------


def test_elimination_scores_are_what_refitting_leaves() -> None:
    x, w = noise(300, 4).double(), noise(3, 4, seed=1).double()
    x[:, 3] = x[:, 1] + 0.1 * x[:, 3]  # 1 and 3 can stand in for each other
    second = x.T @ x / len(x)
    scores = eliminate([Part(torch.linalg.inv(second), w.T @ w, 1)], 4)
    order = np.argsort(scores, kind="stable")
    y = x @ w.T
    errors = []
    for count in (1, 2):
        left = np.sort(order[count:])
        refitted = torch.linalg.lstsq(x[:, left], y).solution
        errors.append(float((y - x[:, left] @ refitted).square().sum() / len(x)))
    np.testing.assert_allclose(np.cumsum(np.sort(scores))[:2], errors, rtol=1e-6)
    assert order[0] in (1, 3)


# -- samples ------------------------------------------------------------------------------------------


def test_a_split_sets_aside_a_share_of_every_batch_or_whole_batches() -> None:
    batches = tuple(Batch(Example((noise(10, 2, seed=i),), {})) for i in range(5))
    fit, judged = Samples(batches, "here").split(0.2)
    assert [b.count for b in fit.batches] == [8] * 5
    assert [b.count for b in judged.batches] == [2] * 5
    fit, judged = Samples(batches, "here", whole=True).split(0.2)
    assert [b.count for b in (*fit.batches, *judged.batches)] == [10] * 5
    assert len(judged.batches) == 1
    with pytest.raises(UsageError, match="gave 1 batch"):
        Samples(batches[:1], "here", whole=True).split(0.2)


class Literal(nn.Module):
    """Its forward holds a size, so that the result is the graph, in which a module says whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.last = nn.Dropout(0.1), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 4, 4] to [N, 4]."""
        return self.last(self.drop(torch.relu(self.norm(self.first(x))).reshape(-1, 8 * 16)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["reconstruct", "bias", "scale", "bn"])
def test_a_graph_with_modules_in_it_is_fitted_like_any_other(name: str) -> None:
    model, data = seeded(Literal), noise(96, 3, 4, 4, seed=1)
    model.norm.momentum = None  # type: ignore[union-attr]
    model.train()(data)  # a norm that knows the data
    model.eval()
    slim = slimc.compress(model, data[:2], params=0.6, round_to=1, scorer="random", recover="none")
    assert slim.module is slim.graph
    assert any(node.op == "call_module" for node in slim.graph.graph.nodes)
    with torch.no_grad():
        if name == "bn":  # statistics that have gone astray
            next(b for n, b in slim.graph.named_buffers() if n.endswith("running_mean")).add_(1)
        before = float((slim.module.eval()(data) - model(data)).square().mean())
    slim.recover(name, list(torch.split(data, 32)))
    with torch.no_grad():
        after = float((slim.module(data) - model(data)).square().mean())
    assert slim.report.recovery
    assert after < before


def test_few_samples_are_joined_by_made_up_ones_that_nothing_is_judged_by() -> None:
    data = noise(32, 3, 8, 8, seed=1)
    options: dict[str, Any] = {"flops": 0.6, "round_to": 1, "recover": "reconstruct"}
    slim = slimc.compress(seeded(Block), data[:2], data=[data], **options)
    again = slimc.apply(seeded(Block), slim.plan, data[:2], data=[data], recover="reconstruct")
    few = slim.report.calibration
    many = slimc.compress(seeded(Block), data[:2], data=[noise(256, 3, 8, 8, seed=1)], **options).report.calibration
    assert few is not None
    assert many is not None
    some = slimc.compress(seeded(Block), data[:2], data=[noise(200, 3, 8, 8, seed=1)], **options).report.calibration
    assert some is not None
    assert (few.judged, few.fitted) == (6, 26 + 104 + 256)
    assert few.source.startswith("26 samples of --data and 104 variants of them and 256 synthetic pictures")
    assert (some.judged, some.fitted, some.source) == (40, 160 + 640, "160 samples of --data and 640 variants of them")
    assert (many.judged, many.fitted, many.source) == (51, 205, "--data")
    assert again.report.calibration == few


class Mixer(nn.Module):
    """A layer across tokens and one across channels, so that both axes of its values are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.across, self.back = nn.Linear(6, 12), nn.Linear(9, 16), nn.Linear(16, 9)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).mT
        return self.head(self.back(torch.relu(self.across(x))).mT.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["reconstruct", "bias", "scale"])
def test_layers_are_fitted_where_other_axes_than_their_own_are_cut(name: str) -> None:
    data = noise(96, 9, 6, seed=1)
    model = seeded(Mixer)
    slim = slimc.compress(model, data[:2], flops=0.5, round_to=1, scorer="magnitude", recover="none")
    with torch.no_grad():
        before = float((slim.module.eval()(data) - model(data)).square().mean())
        slim.recover(name, list(torch.split(data, 40)))
        after = float((slim.module(data) - model(data)).square().mean())
    assert after < before


def test_outputs_that_are_matrices_of_samples_are_judged_in_batches_of_any_size() -> None:
    class Similarities(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.relu(self.a(x)))
            return x @ x.T

    data = noise(84, 6, seed=1)
    slim = slimc.compress(seeded(Similarities), data[:2], flops=0.6, round_to=1, data=list(torch.split(data, 32)))
    assert slim.report.recovery is not None
    assert slim.report.recovery[0].kept


def test_half_precision_is_ranked_and_distilled_in_float32() -> None:
    data = noise(160, 3, 8, 8, seed=1)
    wide = slimc.compress(seeded(Block), data[:2], flops=0.6, round_to=1, data=[data], recover="distill", scorer="obs")
    half = data.bfloat16()
    model = seeded(Block).bfloat16()
    slim = slimc.compress(model, half[:2], flops=0.6, round_to=1, data=[half], recover="distill", scorer="obs")
    assert slim.report.recovery is not None
    (step,) = slim.report.recovery
    assert step.kept
    orders = []
    for own in (wide, slim):
        assert own.plan.scores is not None
        found = [np.array(scores) for scores in own.plan.scores.values() if scores is not None]
        orders.append(np.concatenate(found).argsort().argsort())
    assert np.corrcoef(orders[0], orders[1])[0, 1] > 0.95
    tiny = seeded(Block).half()
    plain = slimc.compress(tiny, data[:2].half(), flops=0.6, round_to=1, scorer="magnitude", recover="none")
    before = {name: tensor.clone() for name, tensor in plain.module.state_dict().items()}
    plain.recover("distill", [data.half()])
    assert plain.report.recovery is not None
    assert "left out" in plain.report.recovery[-1].detail
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.module.state_dict().items())


def test_a_step_that_ends_in_an_error_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(work: recover.Task) -> str:
        with torch.no_grad():
            next(work.slim.parameters()).zero_()
        raise RuntimeError("broken off")

    recover.steps()
    monkeypatch.setitem(recover.REGISTRY.entries, "break", recover.Step("break", "", "", break_off))
    data = noise(32, 3, 8, 8, seed=1)
    slim = slimc.compress(seeded(Block), data[:2], flops=0.6, round_to=1, scorer="magnitude", recover="none")
    before = {name: tensor.clone() for name, tensor in slim.module.state_dict().items()}
    with pytest.raises(RuntimeError, match="broken off"):
        slim.recover("break", [data])
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.module.state_dict().items())


class Attending(nn.Module):
    """Attention whose heads lie along one axis with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return out


class Deciding(nn.Module):
    """Gives whole numbers only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x).argmax(1)
        return out


@pytest.mark.parametrize(("make", "shape"), [(Attending, (5, 16)), (Deciding, (6,))])
def test_distillation_leaves_out_what_cannot_be_compared(make: Any, shape: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"params": 0.6, "round_to": 1, "scorer": "magnitude", "recover": "distill"}
    with torch.no_grad():
        slim = slimc.compress(seeded(make), noise(2, *shape), data=[noise(48, *shape, seed=1)], **options)
    (step,) = slim.report.recovery or ()
    assert "epochs of distillation" in step.detail
