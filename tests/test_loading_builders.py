"""Models by name: built alike each time, without the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimc.errors import LoadError, UsageError
from slimc.loading import load
from slimc.loading.builders import build
from slimc.loading.suggest import matching_architectures

torchvision_models = pytest.importorskip("torchvision.models")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of torch.hub without any weights, so that no test depends on the machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return tmp_path / "hub" / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("squeezenet1_1", (3, 224, 224)),
        ("lraspp_mobilenet_v3_large", (3, 224, 224)),
        ("raft_small", None),
    ],
)
def test_torchvision_models_are_built_with_random_weights_that_are_said(
    name: str, shape: tuple[int, ...] | None
) -> None:
    loaded = load(f"torchvision:{name}")
    assert (loaded.name, loaded.input_shape, loaded.weights) == (name, shape, "random initialisation")
    assert any("weights are random" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("inception_v3", (3, 299, 299)), ("r3d_18", (3, 16, 112, 112)), ("s3d", (3, 16, 224, 224))],
)
def test_other_input_shapes_are_known(name: str, shape: tuple[int, ...]) -> None:
    from slimc.loading import builders

    with torch.device("meta"):
        options = {"init_weights": False} if name == "inception_v3" else {}
        model = torchvision_models.get_model(name, weights=None, **options)
    assert builders.torchvision_input(model) == shape


def test_two_builds_are_the_same_model() -> None:
    first, second = (load("torchvision:squeezenet1_1").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert float(first["features.0.weight"].std()) > 0


def test_weights_that_torch_has_downloaded_before_are_used(empty_cache: Path) -> None:
    weights = torchvision_models.SqueezeNet1_1_Weights.DEFAULT
    model = torchvision_models.squeezenet1_1(weights=None)
    empty_cache.mkdir(parents=True)
    torch.save(model.state_dict(), empty_cache / Path(weights.url).name)
    loaded = load("torchvision:squeezenet1_1")
    assert torch.equal(loaded.model.get_parameter("features.0.weight"), model.get_parameter("features.0.weight"))
    assert loaded.weights == "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert loaded.notes == ()


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(UsageError, match=r"no model 'resnet81'\. Did you mean .*resnet18"):
        load("torchvision:resnet81")


def test_quantized_models_name_the_float_one() -> None:
    with pytest.raises(UsageError, match="torchvision:mobilenet_v2"):
        load("torchvision:quantized_mobilenet_v2")


def test_an_architecture_beside_a_name_is_an_error() -> None:
    with pytest.raises(UsageError, match="--arch torchvision:resnet18 goes with a file"):
        load("torchvision:resnet50", arch="torchvision:resnet18")


def user_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "dingo_nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    return nn.Linear(2, 2)\n"
        "def broken():\n    raise RuntimeError('no width given')\n"
        "def wrong():\n    return 'net'\n"
        "class Zoo:\n    @staticmethod\n    def make():\n        return nn.Linear(3, 3)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(folder)


def test_a_factory_in_the_current_folder_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_module(tmp_path, monkeypatch)
    state = torch.get_rng_state()
    first, second = load("dingo_nets:build"), load("dingo_nets:build")
    assert torch.equal(first.model.get_parameter("weight"), second.model.get_parameter("weight"))
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.name, first.input_shape) == ("build", None)
    assert load("dingo_nets:Zoo.make").name == "make"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("dingo_nets:broken", r"dingo_nets\.py:6 with RuntimeError: no width given"),
        ("dingo_nets:wrong", "returned a str"),
        ("dingo_nets:bild", "Did you mean build"),
        ("dingo_nets:number", "is a int, not a function"),
        ("no_such_package:build", "Run from the folder"),
    ],
)
def test_factories_that_fail_say_where(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_module(tmp_path, monkeypatch)
    with pytest.raises((LoadError, UsageError), match=words):
        load(source)


def test_a_transformers_folder_that_is_missing_is_named() -> None:
    with pytest.raises((LoadError, UsageError), match=r"transformers|no such folder"):
        load("hf:/no/such/folder")


def test_timm_models_know_their_input() -> None:
    pytest.importorskip("timm")
    built = build("timm:test_resnet", pretrained=False)
    assert built.input_shape == (3, 160, 160)
    with pytest.raises(UsageError, match="Did you mean"):
        build("timm:resnett18")


@pytest.mark.parametrize("name", ["regnet_y_400mf", "vit_b_16", "mobilenet_v3_small"])
def test_architectures_are_found_by_names_and_shapes(name: str) -> None:
    with torch.no_grad():
        state = torchvision_models.get_model(name, weights=None).state_dict()
    found = [match for match, exact in matching_architectures(state) if exact]
    assert name in found
    assert len(found) <= 2
