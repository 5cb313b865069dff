"""Samples that are made up."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_recover import Block, noise, seeded
from torch import nn

import slimc
from slimc.errors import UsageError
from slimc.graph.capture import capture
from slimc.synthetic import dead_leaves, pink_noise, synthetic


def test_dead_leaves_have_mean_0_and_deviation_1_and_edges_and_flat_parts() -> None:
    pictures = dead_leaves(16, (3, 32, 32), np.random.default_rng(0))
    assert pictures.shape == (16, 3, 32, 32)
    torch.testing.assert_close(pictures.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(pictures.std(), torch.tensor(1.0), atol=1e-2, rtol=0)
    steps = pictures.diff(dim=3).abs()
    assert steps.max() > 10 * steps.median()


def test_pictures_are_fitted_to_the_statistics_of_batch_norms() -> None:
    model = seeded(Block)
    model.get_buffer("norm.running_mean").fill_(2.0)
    captured = capture(copy.deepcopy(model), noise(2, 3, 8, 8))
    found = synthetic(captured, 64, work=1e4)
    assert found is not None
    assert found.source.endswith("batch norms")
    plain = dead_leaves(64, (3, 8, 8), np.random.default_rng(0))
    with torch.no_grad():
        means = [model.get_submodule("first")(x).mean() for x in (plain, found.batches[0].example.args[0])]
    assert abs(means[1] - 2) < abs(means[0] - 2)


def test_tokens_are_drawn_from_the_table_that_looks_them_up() -> None:
    model = nn.Sequential(nn.Embedding(50, 6), nn.Flatten(), nn.Linear(24, 3)).eval()
    found = synthetic(capture(model, torch.randint(0, 2, (2, 4))), 40, work=1e3)
    assert found is not None
    tokens = torch.cat([batch.example.args[0] for batch in found.batches])
    assert tokens.shape == (40, 4)
    assert 20 < int(tokens.max()) < 50
    assert int(tokens.min()) >= 0


def test_pink_noise_has_the_same_amplitude_at_every_scale() -> None:
    pictures = pink_noise(32, (3, 32, 64), np.random.default_rng(0))
    assert pictures.shape == (32, 3, 32, 64)
    torch.testing.assert_close(pictures.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(pictures.std(), torch.tensor(1.0), atol=1e-2, rtol=0)
    amplitude = torch.fft.rfft(pictures, dim=3).abs().square().mean((0, 1, 2)).sqrt()
    slope = np.polyfit(np.log(np.arange(2, 32)), np.log(amplitude[2:32].numpy()), 1)[0]
    assert -1 < slope < -0.4  # along one axis, of a power that falls as 1/f^2 in both
    across = torch.corrcoef(pictures.transpose(0, 1).flatten(1))
    assert 0.6 < float(across[0, 1]) < 0.95


def test_uniform_tokens_are_all_equally_likely() -> None:
    model = nn.Sequential(nn.Embedding(50, 6), nn.Flatten(), nn.Linear(24, 3)).eval()
    captured = capture(model, torch.randint(0, 2, (2, 4)))
    counts = {}
    for kind in ("unigram", "uniform"):
        found = synthetic(captured, 64, work=1e3, kind=kind)
        assert found is not None
        (batch,) = found.batches
        counts[kind] = torch.bincount(batch.example.args[0].flatten(), minlength=50)
    assert int(counts["uniform"].max()) < 20  # 5 of each are expected
    assert int(counts["unigram"].max()) > 30


def test_a_kind_of_made_up_samples_is_chosen_by_name() -> None:
    model, x = seeded(Block), noise(2, 3, 8, 8)
    slim = slimc.compress(model, x, flops=0.6, round_to=1, data="synthetic:pink-noise", recover="reconstruct")
    assert slim.report.calibration is not None
    assert slim.report.calibration.source.startswith("synthetic pictures of pink noise")
    assert slim.plan.method["steps"] == 1  # as without data
    for text, message in (
        ("synthetic:uniform", "this model does not take tokens"),
        ("synthetic:brown", "brown is no kind of samples; known are dead-leaves, pink-noise, unigram, uniform"),
    ):
        with pytest.raises(UsageError, match=message):
            slimc.compress(model, x, flops=0.6, data=text)
    with pytest.raises(UsageError, match="scorer taylor needs data"):
        slimc.compress(model, x, flops=0.6, data="synthetic:pink-noise", scorer="taylor")


def test_nothing_is_made_up_for_other_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    assert synthetic(capture(model, noise(2, 6)), 8, work=1e3) is None
