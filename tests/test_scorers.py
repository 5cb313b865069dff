"""What holds for every scorer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring import CLASSES, NETS, analysed, assert_same, build, labelled, pictures, run, score, subject_of
from torch import Tensor, nn

import slimc
from slimc import scores
from slimc.errors import UsageError
from slimc.samples import collect

METHODS = scores.methods()
LABELS = sorted(name for name, method in METHODS.items() if method.needs == "labels")
DATA = sorted(name for name, method in METHODS.items() if method.needs != "weights")
EXACT = [name for name in DATA if name != "obs"]  # obs draws probes and rows, and its slow part is not the batches
SPARSE = {"apoz", "bn-scale"}
"""Scorers that say nothing of some groups."""


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_scorer_scores_every_kind_of_network(name: str, net: str) -> None:
    if (name, net) == ("bn-scale", "vit"):
        with pytest.raises(UsageError, match=r"bn-scale needs batch norms.*patch.weight"):
            run(name, net)
        return
    analysis, before = analysed(net), torch.get_rng_state()
    state = {key: tensor.clone() for key, tensor in analysis.captured.module.state_dict().items()}
    found = run(name, net)
    assert [own.shape for own in found] == [(group.width,) for group in analysis.groups]
    whole = scores.unscored(found)
    assert not whole or name in SPARSE
    assert len(whole) < len(found)
    assert all(np.isfinite(own).all() and (own >= 0).all() for i, own in enumerate(found) if i not in whole)
    assert any(np.ptp(own) > 0 for i, own in enumerate(found) if i not in whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in analysis.captured.module.state_dict().items())
    assert all(parameter.grad is None for parameter in analysis.captured.module.parameters())


@pytest.mark.parametrize("net", ["mobilenet", "vit"])
@pytest.mark.parametrize("name", EXACT)
def test_samples_that_are_there_twice_change_no_score(name: str, net: str) -> None:
    data = labelled()
    once = run(name, net, data)
    inside = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in data]
    assert_same(run(name, net, [*data, *data]), once)
    assert_same(run(name, net, inside), once)


@pytest.mark.parametrize("name", DATA)
def test_what_the_batches_hold_matters(name: str) -> None:
    first, other = (run(name, "resnet", labelled(seed=seed)) for seed in (1, 20))
    assert not all(np.allclose(a, b, rtol=1e-6) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", LABELS)
def test_parts_that_fit_in_memory_give_the_whole_batchs_score(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(name, "vit")
    monkeypatch.setattr("slimc.passes.ACTIVATION_LIMIT", 1)
    assert_same(run(name, "vit"), whole)


@pytest.mark.parametrize("name", EXACT)
def test_progress_is_told_after_each_batch(name: str) -> None:
    told: list[tuple[int, int]] = []
    run(name, "resnet", tick=lambda done, of: told.append((done, of)))
    assert told[:3] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", DATA)
def test_gradients_work_where_the_caller_has_switched_them_off(name: str) -> None:
    with torch.no_grad():
        off = run(name, "resnet")
    assert_same(off, run(name, "resnet"))


@pytest.mark.parametrize("name", LABELS)
def test_without_data_a_scorer_that_needs_labels_is_refused_before_anything_slow(name: str) -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model ran")

    with pytest.raises(UsageError, match=rf"--scorer {name} needs data"):
        slimc.compress(Slow(), pictures(1), flops=0.5, scorer=name)


# -- labels and losses --------------------------------------------------------------------------------


def refused(name: str, labels: object, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        run(name, "resnet", [labelled(1)[0], (pictures(4), labels)])


@pytest.mark.parametrize("name", LABELS)
def test_wrong_labels_are_refused_with_value_range_and_batch(name: str) -> None:
    refused(name, torch.tensor([0, 1, 7, 2]), rf"batch 2 of the data holds the label 7.*0 to {CLASSES - 1}")
    refused(name, torch.tensor([0, -1, 1, 2]), r"batch 2 of the data holds the label -1")
    refused(name, torch.rand(4), r"labels of batch 2 of the data are float32.*give loss=")
    refused(name, torch.zeros(4, 3).long(), r"labels of batch 2 .*shape \[4, 3\].*\[4\].*give loss=")
    with pytest.raises(UsageError, match="batch 2 of the data has no labels"):
        run(name, "resnet", [labelled(1)[0], (pictures(4),)])


@pytest.mark.parametrize("name", LABELS)
def test_a_gradient_of_zero_everywhere_ranks_nothing_and_says_so(name: str) -> None:
    with pytest.raises(UsageError, match="gradient of the loss is zero everywhere"):
        run(name, "resnet", loss=lambda outputs, _: (outputs * 0).sum())


def test_a_users_loss_takes_float_labels_and_its_faults_are_named() -> None:
    data = [(pictures(4), torch.rand(4, CLASSES, dtype=torch.float64))]

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)

    assert all(np.isfinite(own).all() for own in run("taylor", "resnet", data, loss=squares))
    with pytest.raises(UsageError, match=r"loss= returned \[4, 5\]; wanted a floating-point scalar"):
        run("taylor", "resnet", data, loss=lambda outputs, _: outputs)
    with pytest.raises(UsageError, match=r"the loss of batch 1 is nan"):
        run("taylor", "resnet", data, loss=lambda outputs, _: outputs.mean() * float("nan"))


def test_labels_of_pixels_are_taken() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1)).double()
    labels = torch.randint(CLASSES, (2, 8, 8))
    assert score("fisher", model, [(pictures(2), labels)])["0.weight"].shape == (4,)
    with pytest.raises(UsageError, match=r"shape \[2\].*\[2, 8, 8\]"):
        score("fisher", model, [(pictures(2), labels[:, 0, 0])])


# -- normalisation and the compiler -------------------------------------------------------------------


def test_normalisations() -> None:
    own = [np.array([1.0, 3.0]), np.array([np.nan, np.nan]), np.zeros(2)]
    wanted: dict[str, list[float]] = {
        "mean": [0.5, 1.5],
        "max": [1 / 3, 1],
        "l2": [10**-0.5, 3 * 10**-0.5],
        "none": [1, 3],
    }
    for how, numbers in wanted.items():
        first, second, _ = scores.normalise(own, how)
        np.testing.assert_allclose(first, numbers)
        assert (second == 1).all()
    assert scores.unscored(own) == [1]
    with pytest.raises(UsageError, match="--normalise median: known are auto, mean, max, l2, none, cost"):
        scores.normalise(own, "median")


def test_groups_without_a_score_stay_whole_and_are_named() -> None:
    model = build("vit").float()
    slim = slimc.compress(model, pictures(2).float(), params=0.9, scorer="apoz", round_to=1, recover="none",
                          data=[x.float() for x, _ in labelled()])  # fmt: skip
    rows = {row.name: row for row in slim.report.groups}
    assert rows["up.weight"].kept < rows["up.weight"].width
    assert all(row.kept == row.width for name, row in rows.items() if name != "up.weight")
    assert any("apoz says nothing" in warning and "patch.weight" in warning for warning in slim.report.warnings)


def test_a_compression_scores_on_labelled_data() -> None:
    data = [(x.float(), y) for x, y in labelled()]
    slim = slimc.compress(build("resnet").float(), data[0][0], flops=0.6, scorer="taylor", round_to=1, recover="none",
                          data=data, normalise="max")  # fmt: skip
    assert slim.report.macs.after <= 0.6 * slim.report.macs.before
    assert slim.report.method is not None
    assert slim.report.method.scorer == "taylor"


def test_a_fixed_batch_size_is_met() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x.reshape(2, 6))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    analysis = slimc.inspect(Fixed().double(), torch.randn(2, 2, 3).double())
    assert analysis.captured.dynamic_shapes is None
    x, y = torch.randn(8, 2, 3).double(), torch.randint(CLASSES, (8,))
    samples = collect([(x, y)], analysis.captured.example, batch=2)
    subject = scores.Subject(analysis.types, analysis.grouping, "l2", 0, samples=samples)
    found = scores.find("fisher").score(subject)[0]
    open_batch = nn.Sequential(nn.Flatten(), *analysis.model.children())
    open_batch.insert(2, nn.ReLU())
    np.testing.assert_allclose(found, score("fisher", open_batch, [(x, y)])["1.weight"], rtol=1e-9)
    with pytest.raises(UsageError, match="need a batch of 1"):
        scores.find("obd").score(subject)


def test_the_subject_tells_scorers_nothing_of_the_callers_model() -> None:
    model = build("resnet")
    model.train()
    x, y = labelled(1)[0]
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    analysis = slimc.inspect(model, x)
    scores.find("taylor-sum").score(subject_of(analysis, [(x, y)]))
    assert model.training
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True) if p.grad is not None)
