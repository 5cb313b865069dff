"""Files of weights alone, with and without the architecture they belong to."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from slimc.errors import LoadError, UsageError
from slimc.loading import load, load_state_dict_file

torchvision_models = pytest.importorskip("torchvision.models")

ARCH = "torchvision:squeezenet1_1"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    network: nn.Module = torchvision_models.squeezenet1_1(weights=None)
    return network


def written(state: dict[str, Tensor], folder: Path, name: str = "weights.pt") -> str:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    theirs, ours = got.state_dict(), expected.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.safetensors"])
def test_weights_fill_the_named_architecture(name: str, model: nn.Module, tmp_path: Path) -> None:
    loaded = load(written(model.state_dict(), tmp_path, name), arch=ARCH)
    assert_same(loaded.model, model)
    assert (loaded.name, loaded.input_shape, loaded.weights, loaded.notes) == ("weights", (3, 224, 224), "file", ())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model."])
def test_prefixes_of_wrappers_are_stripped_and_said(prefix: str, model: nn.Module, tmp_path: Path) -> None:
    state = {prefix + name: value for name, value in model.state_dict().items()}
    loaded = load(written(state, tmp_path), arch=ARCH)
    assert_same(loaded.model, model)
    assert all(any(f"'{part}.'" in note for note in loaded.notes) for part in prefix.split(".") if part)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "ema"])
def test_checkpoints_give_the_weights_inside(key: str, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 9, key: model.state_dict(), "lr": 0.1}, path)
    loaded = load(str(path), arch=ARCH)
    assert_same(loaded.model, model)
    assert any(f"'{key}'" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["half.pt", "half.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_single_precision(
    name: str, dtype: torch.dtype, model: nn.Module, tmp_path: Path
) -> None:
    state = {key: value.to(dtype) for key, value in model.state_dict().items()}
    path = written(state, tmp_path, name)
    loaded = load(path, arch=ARCH)
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
    assert f"converted {len(state)} half-precision tensors to float32" in loaded.notes
    read = load_state_dict_file(path)
    assert all(torch.equal(read[key], state[key].float()) for key in state)


def test_without_an_architecture_the_matching_one_is_named(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds weights only\. Add .*--arch torchvision:squeezenet1_1.*52 tensors all"):
        load(written(model.state_dict(), tmp_path))


def test_without_an_architecture_unknown_weights_say_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds weights only\. Say which.*package\.module:factory"):
        load(written({"weight": torch.ones(2, 2)}, tmp_path))


def test_another_number_of_classes_is_taken_from_the_file(tmp_path: Path) -> None:
    small = torchvision_models.squeezenet1_1(weights=None, num_classes=10)
    loaded = load(written(small.state_dict(), tmp_path), arch=ARCH)
    assert_same(loaded.model, small)
    assert any("num_classes=10" in note for note in loaded.notes)


def test_the_wrong_architecture_shows_the_first_differences_and_the_right_one(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(LoadError) as caught:
        load(written(model.state_dict(), tmp_path), arch="torchvision:mobilenet_v3_small")
    lines = str(caught.value).splitlines()
    assert "do not fit torchvision:mobilenet_v3_small" in lines[0]
    assert lines[1] == "  features.0.0.weight: file has none, mobilenet_v3_small [16, 3, 3, 3]"
    assert len(lines) == 8
    assert lines[6].strip().startswith("and ")
    assert "--arch torchvision:squeezenet1_1" in lines[7]


def test_narrower_weights_are_said_to_be_pruned(model: nn.Module, tmp_path: Path) -> None:
    narrow = {name: value[: max(1, len(value) // 2)] for name, value in model.state_dict().items()}
    with pytest.raises(LoadError, match=r"features\.0\.weight: file \[32, 3, 3, 3\], .*\[64, 3, 3, 3\][\s\S]*pruned"):
        load(written({name: value.clone() for name, value in narrow.items()}, tmp_path), arch=ARCH)


def test_one_narrower_layer_is_no_other_head(model: nn.Module, tmp_path: Path) -> None:
    state = {**model.state_dict(), "features.0.weight": model.state_dict()["features.0.weight"][:32].clone()}
    with pytest.raises(LoadError) as caught:
        load(written(state, tmp_path), arch=ARCH)
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == ["  features.0.weight: file [32, 3, 3, 3], squeezenet1_1 [64, 3, 3, 3]"]
    assert "--arch torchvision:squeezenet1_1" not in lines[-1]


def test_whole_numbers_are_no_weights(model: nn.Module, tmp_path: Path) -> None:
    name = "features.0.weight"
    state = {**model.state_dict(), name: torch.ones_like(model.state_dict()[name], dtype=torch.int8)}
    with pytest.raises(LoadError, match=r"features\.0\.weight is int8 .*quantised"):
        load(written(state, tmp_path), arch=ARCH)


def test_values_beside_the_weights_are_left_out(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({**model.state_dict(), "epoch": 3}, path)
    loaded = load(str(path), arch=ARCH)
    assert_same(loaded.model, model)
    assert "left out 'epoch', which is no tensor" in loaded.notes


def test_what_a_trainer_keeps_beside_the_model_is_left_out(model: nn.Module, tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    loaded = load(written({**state, "criterion.weight": torch.ones(3)}, tmp_path), arch=ARCH)
    assert_same(loaded.model, model)
    assert any("'model.'" in note and "criterion.weight" in note for note in loaded.notes)


def test_counters_that_old_files_lack_are_not_missed(tmp_path: Path) -> None:
    network = torchvision_models.shufflenet_v2_x0_5(weights=None)
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    assert len(state) < len(network.state_dict())
    assert_same(load(written(state, tmp_path), arch="torchvision:shufflenet_v2_x0_5").model, network)


def test_values_that_are_not_finite_are_refused(model: nn.Module, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["classifier.1.bias"][2] = float("nan")
    with pytest.raises(LoadError, match=r"classifier\.1\.bias has 1 NaN"):
        load(written(state, tmp_path, "nan.safetensors"), arch=ARCH)


def cut(content: bytes) -> bytes:
    return content[:-10]


def long_header(content: bytes) -> bytes:
    return (1 << 40).to_bytes(8, "little") + content[8:]


def broken_header(content: bytes) -> bytes:
    return content[:9] + b"\xff" + content[10:]


@pytest.mark.parametrize("damage", [cut, broken_header])
def test_damaged_safetensors_are_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(8)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LoadError, match=r"weights\.safetensors: .*again"):
        load_state_dict_file(path)


def test_a_safetensors_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(8)}, path)
    path.write_bytes(long_header(path.read_bytes()))
    with pytest.raises(LoadError, match="truncated"):
        load_state_dict_file(path)


@pytest.mark.parametrize("arch", ["resnet18", "squeeze net", "torchvision:"])
def test_an_architecture_that_is_none_says_the_forms(arch: str, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torchvision:resnet50"):
        load(written(model.state_dict(), tmp_path), arch=arch)


@pytest.fixture
def own_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], nn.Module]:
    """Makes a module of the user's own, `Net` with these lines in its constructor, that can be imported."""

    def make(module: str, lines: str) -> nn.Module:
        head = "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        (tmp_path / f"{module}.py").write_text(f"{head}        {lines}\n")
        monkeypatch.syspath_prepend(tmp_path)
        network: nn.Module = importlib.import_module(module).Net()
        return network

    return make


def test_tied_weights_that_are_stored_once_are_found_under_each_name(
    own_net: Callable[[str, str], nn.Module], tmp_path: Path
) -> None:
    model = own_net("tied_net", "self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4); self.b.weight = self.a.weight")
    save_model(model, str(tmp_path / "tied.safetensors"))
    assert_same(load(str(tmp_path / "tied.safetensors"), arch="tied_net:Net").model, model)


def test_an_attribute_that_is_called_as_a_wrapper_keeps_its_name(
    own_net: Callable[[str, str], nn.Module], tmp_path: Path
) -> None:
    model = own_net("wrapped_net", "self.module = nn.Linear(4, 4)")
    assert_same(load(written(model.state_dict(), tmp_path), arch="wrapped_net:Net").model, model)


def test_averaged_weights_are_read_without_their_counter(model: nn.Module, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for value in (averaged.state_dict(), {"model_ema": averaged.state_dict()}):
        torch.save(value, tmp_path / "averaged.pt")
        assert_same(load(str(tmp_path / "averaged.pt"), arch=ARCH).model, model)


def test_what_torchvision_sets_beside_its_weights_is_said(tmp_path: Path) -> None:
    state = torchvision_models.googlenet(weights=None, init_weights=False).state_dict()
    loaded = load(written(state, tmp_path), arch="torchvision:googlenet")
    assert any("transform_input=False" in note for note in loaded.notes)
