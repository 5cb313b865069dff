"""Models in files: whole modules, checkpoints, and files that are no models."""

from __future__ import annotations

import datetime
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slimc.errors import LoadError, UsageError
from slimc.loading import load, load_state_dict_file

torchvision_models = pytest.importorskip("torchvision.models")


def plain_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


def saved(value: object, folder: Path, name: str = "model.pt", **options: Any) -> str:
    path = folder / name
    torch.save(value, path, **options)
    return str(path)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_a_pickled_model_loads_bit_equal(name: str, tmp_path: Path) -> None:
    model = torchvision_models.get_model(name, weights=None)
    loaded = load(saved(model, tmp_path, "net.pt"))
    assert type(loaded.model) is type(model)
    expected, got = model.state_dict(), loaded.model.state_dict()
    assert list(expected) == list(got)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert (loaded.name, loaded.input_shape, loaded.weights) == ("net", (3, 224, 224), "file")


def test_a_pickled_vision_transformer_computes_the_same(tmp_path: Path) -> None:
    model = torchvision_models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    ).eval()
    nn.init.normal_(model.heads.head.weight)  # zeros when new
    loaded = load(saved(model, tmp_path))
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.model(inputs), model(inputs))
    assert loaded.input_shape == (3, 32, 32)
    assert model(inputs).abs().max() > 0


def test_the_mode_stays_as_it_was_saved(tmp_path: Path) -> None:
    assert load(saved(plain_network().eval(), tmp_path, "a.pt")).model.training is False
    assert load(saved(plain_network().train(), tmp_path, "b.pt")).model.training is True


@pytest.mark.parametrize("name", ["gelu", "selu", "tanh", "hardsigmoid", "logsigmoid", "silu"])
def test_functions_held_as_activations_load(name: str, tmp_path: Path) -> None:
    function = getattr(torch.nn.functional, name)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=function)
    assert load(saved(layer, tmp_path)).model.activation is function


@pytest.mark.parametrize(
    "value",
    [
        Namespace(out=Path("runs/1")), datetime.datetime(2026, 11, 30), datetime.timedelta(3), b"", b"abc",
        bytearray(b"xy"), np.float64(0.93), np.int32(4), np.bool_(True), range(3),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_plain_values_beside_the_weights_are_no_hindrance(value: object, tmp_path: Path) -> None:
    model = plain_network()
    loaded = load(saved({"model": model, "best": value}, tmp_path))
    assert torch.equal(loaded.model.get_parameter("0.weight"), model.get_parameter("0.weight"))


def test_the_input_of_a_pickled_video_network_is_that_of_its_kind(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = torchvision_models.video.s3d(weights=None)
    loaded = load(saved(nn.DataParallel(model.to_empty(device="cpu").apply(_zeroed)), tmp_path))
    assert loaded.input_shape == (3, 16, 224, 224)


def _zeroed(module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data.zero_()


def test_wrappers_for_several_devices_are_taken_off(tmp_path: Path) -> None:
    loaded = load(saved(nn.DataParallel(plain_network()), tmp_path))
    assert isinstance(loaded.model, nn.Sequential)
    assert "DataParallel" in " ".join(loaded.notes)


def test_a_half_precision_model_becomes_single_precision_and_says_so(tmp_path: Path) -> None:
    loaded = load(saved(plain_network().half(), tmp_path))
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {torch.float32}
    assert any("half-precision" in note for note in loaded.notes)


def test_only_a_model_in_double_precision_throughout_becomes_single_precision(tmp_path: Path) -> None:
    loaded = load(saved(plain_network().double(), tmp_path))
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {torch.float32}
    assert any("double-precision" in note for note in loaded.notes)
    mixed = plain_network()
    mixed[0].double()
    loaded = load(saved(mixed, tmp_path))
    assert loaded.model.get_parameter("0.weight").dtype == torch.float64
    assert not any("precision" in note for note in loaded.notes)


@pytest.mark.parametrize("key", ["model", "ema", "net"])
def test_a_checkpoint_gives_the_module_inside(key: str, tmp_path: Path) -> None:
    model = plain_network()
    loaded = load(saved({"epoch": 3, "model": None, key: model, "optimizer": {"lr": 0.1}}, tmp_path))
    assert torch.equal(loaded.model.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert any(f"'{key}'" in note for note in loaded.notes)


def test_a_checkpoint_without_a_model_names_its_keys(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"'epoch', 'optimizer'.*state_dict"):
        load(saved({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path))


def test_something_else_than_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="holds a list, not a model"):
        load(saved([1, 2], tmp_path))


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "2 NaN"), (float("inf"), "2 infinite")])
def test_weights_that_are_not_finite_are_named_and_counted(value: float, words: str, tmp_path: Path) -> None:
    model = plain_network()
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0, 0, :2] = value
    with pytest.raises(LoadError, match=rf"0\.weight has .*{words}"):
        load(saved(model, tmp_path))


def test_infinite_buffers_are_found_too(tmp_path: Path) -> None:
    model = plain_network()
    model.get_buffer("1.running_var")[3] = float("inf")
    with pytest.raises(LoadError, match=r"1\.running_var has .*1 infinite"):
        load(saved(model, tmp_path))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(3).to_sparse(), "is sparse"),
        (torch.ones(3, dtype=torch.complex64), "is complex"),
        (torch.ones(3, device="meta"), "is on the meta device and has no values"),
    ],
)
def test_tensors_of_special_kinds_are_refused_by_name(tensor: torch.Tensor, words: str, tmp_path: Path) -> None:
    model = plain_network()
    model.register_buffer("special", tensor)
    with pytest.raises(LoadError, match=rf"special {words}"):
        load(saved(model, tmp_path))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_refused_by_name(tmp_path: Path) -> None:
    model = plain_network()
    model.register_buffer("special", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    with pytest.raises(LoadError, match="special is quantized"):
        load(saved(model, tmp_path))


def test_random_numbers_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    path = saved(plain_network(), tmp_path)
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.rand(3), random.random()
    torch.manual_seed(7)
    random.seed(7)
    load(path)
    load("torchvision:squeezenet1_1")
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def save_with_user_package(folder: Path) -> str:
    package = folder / "wombat_nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(
        "import enum\nfrom torch import nn\n"
        "class Size(enum.Enum):\n    SMALL = 1\n"
        "class Options:\n    width = 2\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n        self.layer = nn.Linear(2, 2)\n"
        "        self.size, self.options = Size.SMALL, Options()\n        self.options.width = 3\n"
        "    def forward(self, x):\n        return self.layer(x)\n"
        "def build():\n    return Net()\n"
        "def broken():\n    raise RuntimeError('no weights here')\n"
    )
    script = "import torch, wombat_nets.nets as n; torch.save(n.Net(), 'net.pt')"
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    return str(folder / "net.pt")


def test_a_users_package_loads_only_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_with_user_package(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=r"wombat_nets\.nets\.\w+.*--allow wombat_nets"):
        load(path)
    assert "wombat_nets" not in sys.modules
    before = list(sys.path)
    loaded = load(path, allow=["wombat_nets"])
    kept: Any = loaded.model
    assert kept.options.width == 3
    assert kept.size.name == "SMALL"
    assert sys.path == before


def test_a_class_from_a_script_says_where_it_belongs(tmp_path: Path) -> None:
    script = "import torch\nclass N(torch.nn.Linear): pass\ntorch.save(N(2, 2), 'net.pt')"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with pytest.raises(LoadError, match=r"__main__\.N.*lives in the script.*--arch"):
        load(str(tmp_path / "net.pt"))


@pytest.mark.parametrize("package", ["os", "subprocess.Popen", "not a name", ""])
def test_packages_that_no_model_is_made_of_cannot_be_allowed(package: str) -> None:
    with pytest.raises(UsageError, match="--allow"):
        load("net.pt", allow=[package])


def test_files_that_are_no_models_say_what_they_are(tmp_path: Path) -> None:
    def refuses(name: str, content: bytes, words: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(LoadError, match=words) as caught:
            load(str(path))
        assert str(path) in str(caught.value)

    refuses("empty.pt", b"", "is empty")
    refuses("notes.pt", b"dear diary, " * 200, "a text file")
    refuses("pointer.pt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")
    refuses("page.pth", b"<!DOCTYPE html><html>", "a web page")
    refuses("pointer.onnx", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")
    refuses("page.onnx", b"<!DOCTYPE html><html>", "a web page")
    refuses("noise.pt", bytes(range(255, 0, -1)) * 9, "neither a PyTorch")
    refuses("net.onnx", b"\x08\x07\x12\x07pytorch\x1a", "not a readable ONNX file")
    whole = Path(saved(plain_network(), tmp_path)).read_bytes()
    refuses("cut.pt", whole[: len(whole) // 2], "Copy or download it again")
    refuses("cut2.pt", whole[:-3], "Copy or download")


def test_missing_files_and_folders_say_what_to_give(tmp_path: Path) -> None:
    saved(plain_network(), tmp_path, "resnet.pt")
    with pytest.raises(LoadError, match=r"Did you mean .*resnet\.pt"):
        load(str(tmp_path / "resent.pt"))
    with pytest.raises(LoadError, match="torchvision:resnet18"):
        load("resnet18")
    with pytest.raises(LoadError, match="a folder"):
        load(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = str(tmp_path / "script.pt")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)  # type: ignore[no-untyped-call]
    with pytest.raises(LoadError, match=r"TorchScript.*original nn\.Module"):
        load(path)


def test_files_of_old_torch_need_the_unsafe_option(tmp_path: Path) -> None:
    path = saved(plain_network(), tmp_path, _use_new_zipfile_serialization=False)
    with pytest.raises(LoadError, match=r"before 1\.6.*--unsafe-pickle"):
        load(path)
    loaded = load(path, unsafe_pickle=True)
    assert isinstance(loaded.model, nn.Sequential)
    assert any("--unsafe-pickle" in note for note in loaded.notes)


def test_weights_of_a_whole_model_can_be_read_alone(tmp_path: Path) -> None:
    model = plain_network()
    state = load_state_dict_file(saved(model, tmp_path))
    assert list(state) == list(model.state_dict())


def test_a_model_that_is_not_initialised_yet_is_left_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_net.py").write_text("from torch import nn\ndef build():\n    return nn.LazyLinear(3)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load("lazy_net:build").model, nn.LazyLinear)


def test_masks_of_minus_infinity_are_no_damage(tmp_path: Path) -> None:
    model = plain_network()
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    model.register_buffer("limit", torch.tensor(torch.inf))
    load(saved(model, tmp_path))
