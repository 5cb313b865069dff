from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from torch import nn

from slimc.errors import LoadError, OutputError
from slimc.exporters.formats import safetensors as safetensors_format


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embed.weight


def test_a_state_dict_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half().state_dict()
    written = safetensors_format.export(state, tmp_path / "m.safetensors")
    loaded = safetensors_format.load(written.path)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    written = safetensors_format.export(Tied().state_dict(), tmp_path / "m.safetensors")
    loaded = safetensors_format.load(written.path)
    assert loaded["head.weight"] is loaded["embed.weight"]
    # 10·4 weights and 10 biases of 4 bytes; a second copy of the weights would add 160
    assert 200 <= written.bytes - int.from_bytes(written.path.read_bytes()[:8], "little") < 300


def test_the_file_loads_with_safetensors_alone(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    written = safetensors_format.export(model.state_dict(), tmp_path / "m.safetensors")
    assert not torch.equal(model.embed.weight, other.embed.weight)
    missing, unexpected = load_model(other, written.path)
    assert not missing
    assert not unexpected
    assert torch.equal(model.embed.weight, other.embed.weight)


def test_views_are_stored_by_value_and_left_alone(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"rows": base[:2], "columns": base[:, 1:3], "turned": base.t(), "empty": base[:0], "none": base[:, :0]}
    loaded = safetensors_format.load(safetensors_format.export(state, tmp_path / "m.safetensors").path)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].is_contiguous()
    assert not state["turned"].is_contiguous()


def test_a_tensor_without_values_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"conv\.weight"):
        safetensors_format.export({"conv.weight": torch.empty(2, device="meta")}, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"garbage that is no header", b"\xff" * 64])
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(LoadError, match="not a readable safetensors file"):
        safetensors_format.load(tmp_path / "m.safetensors")
