"""`slimc.load`: what a saved folder gives to a class of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import PlanError


def test_tensors_of_the_file_that_the_class_lacks_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    wide = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    slimc.compress(wide, torch.randn(2, 3), params=0.9, ignore=["4"], recover="none", round_to=1).save(folder)
    shorter = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(PlanError, match=r"holds 4\.bias, which Sequential does not have"):
        slimc.load(folder, shorter)


def test_what_modules_save_beside_their_tensors_is_no_hindrance(tmp_path: Path) -> None:
    class Counted(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: object) -> None:
            raise AssertionError("not asked for")

    def make() -> nn.Sequential:
        return nn.Sequential(Counted(3, 8), nn.ReLU(), nn.Linear(8, 2))

    slim = slimc.compress(make(), torch.randn(2, 3), params=0.7, recover="none", round_to=1)
    folder = slim.save(tmp_path / "out")
    x = torch.randn(2, 3)
    torch.testing.assert_close(slimc.load(folder, make())(x), slim.module(x))


def test_what_is_loaded_is_of_one_precision_and_has_values(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
            self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x) * self.get_buffer("scale"))
            return out

    x = torch.randn(2, 6)
    slim = slimc.compress(Scaled(), x, params=0.6, round_to=1, recover="none")
    folder = slim.save(tmp_path / "out", onnx=False)
    torch.testing.assert_close(slimc.load(folder, Scaled().double())(x), slim.module(x))
    with torch.device("meta"):
        empty = Scaled()
    with pytest.raises(PlanError, match="scale is saved nowhere and has no values"):
        slimc.load(folder, empty)
