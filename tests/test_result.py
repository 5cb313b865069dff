from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import slimc
from slimc.errors import LoadError, OutputError, ParityError, PlanError

FILES = {"model.onnx", "model.pt2", "model.safetensors", "plan.json", "report.json", "report.html"}


class Net(nn.Module):
    """Convolution, batch norm, and a tied pair of linear layers."""

    def __init__(self, hard_coded: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 4)
        self.hard_coded = hard_coded

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        if self.hard_coded:
            x = x.view(-1, 4, 2).relu().view(-1, 8)
        out: Tensor = self.head(torch.relu(self.two(torch.relu(self.one(x)))))
        return out


def net(**options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(**options).eval()
        nn.init.uniform_(model.get_buffer("bn.running_mean"))
        nn.init.uniform_(model.get_buffer("bn.running_var"), 0.5, 2)
    return model


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def compressed(model: nn.Module) -> slimc.Compressed:
    return slimc.compress(model, X, flops=0.5, round_to=1, recover="none")


@pytest.fixture(scope="module")
def slim() -> slimc.Compressed:
    return compressed(net())


@pytest.fixture(scope="module")
def saved(slim: slimc.Compressed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slim.save(tmp_path_factory.mktemp("out") / "net-slim")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves without the ONNX file, whose export takes most of the time."""
    monkeypatch.setattr(slimc.Compressed, "_export_onnx", lambda _self, _program, path: path.write_bytes(b"onnx"))


# -- what is written ----------------------------------------------------------------------------------


def test_every_file_of_the_interface_is_there_and_no_other(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    assert list(saved.parent.iterdir()) == [saved]


def test_the_report_names_the_files_with_their_sizes(saved: Path, slim: slimc.Compressed) -> None:
    report = json.loads((saved / "report.json").read_text())
    assert report == json.loads(json.dumps(slim.report.to_dict()))
    for file in report["files"]:
        assert (saved / file["name"]).stat().st_size == file["bytes"]
    assert {file["name"] for file in report["files"]} == FILES - {"report.json", "report.html"}
    assert report["onnx"]["max_relative_error"] < 1e-4
    assert report["onnx"]["dynamic_batch"] is True
    assert report["seconds"].keys() >= {"capture", "infer", "score", "plan", "rewrite", "verify", "export"}
    assert report["latency"] is None
    assert report["accuracy"] is None


def test_the_page_needs_no_network(saved: Path) -> None:
    page = (saved / "report.html").read_text()
    assert "src=" not in page.replace('src="data:', "")
    assert "http-equiv" not in page
    assert "@import" not in page


def test_the_users_class_comes_back_bit_for_bit(saved: Path, slim: slimc.Compressed) -> None:
    fresh = Net()
    before = {name: t.clone() for name, t in fresh.state_dict().items()}
    loaded = slimc.load(saved, fresh)
    assert type(loaded) is Net
    assert loaded.state_dict().keys() == slim.module.state_dict().keys()
    assert all(torch.equal(t, slim.module.state_dict()[n]) for n, t in loaded.state_dict().items())
    assert repr(loaded) == repr(slim.module)
    assert loaded.two.weight is loaded.one.weight
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(loaded(X), slim.module(X))
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())
    assert fresh.conv.out_channels == 8


def test_the_program_needs_torch_alone_and_takes_any_batch(saved: Path, slim: slimc.Compressed, tmp_path: Path) -> None:
    x = torch.randn(5, 3, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        f"module = torch.export.load({str(saved / 'model.pt2')!r}).module()\n"
        f"torch.save(module(torch.load({str(tmp_path / 'x.pt')!r})), {str(tmp_path / 'y.pt')!r})\n"
        "assert not any(name.partition('.')[0] == 'slimc' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), slim.module(x))


def test_the_weights_have_the_names_of_the_users_class(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        names = set(file.keys())
    own = set(Net().state_dict())
    # Of tied names one may stand for both.
    assert names <= own
    assert own - names <= {"one.weight", "two.weight"}


def test_the_onnx_file_agrees_and_has_no_batch_norm_left(saved: Path, slim: slimc.Compressed) -> None:
    operators = [node.op_type for node in onnx.load(saved / "model.onnx").graph.node]
    assert "Conv" in operators
    assert "BatchNormalization" not in operators
    session = onnxruntime.InferenceSession(str(saved / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        x = torch.randn(batch, 3, 8, 8)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, slim.module(x).numpy(), rtol=1e-4, atol=1e-5)


def test_an_onnx_file_alone_can_be_written(slim: slimc.Compressed, tmp_path: Path) -> None:
    file = slim.export_onnx(tmp_path / "deep" / "er.onnx")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er.onnx"] == [file.path]


# -- training afterwards ------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("hard_coded", [False, True])
def test_what_was_trained_after_the_cut_is_what_is_saved(hard_coded: bool, tmp_path: Path) -> None:
    slim = compressed(net(hard_coded=hard_coded))
    assert isinstance(slim.module, Net) != hard_coded
    cut = {name: t.clone() for name, t in slim.state_dict().items()}
    slim.module.train()
    optimiser = torch.optim.SGD(slim.module.parameters(), 0.1)
    slim.module(X).square().sum().backward()
    optimiser.step()
    folder = slim.save(tmp_path / "trained")
    assert slim.module.training
    with safe_open(folder / "model.safetensors", "pt") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    own = slim.module.state_dict()
    # The graph does not count batches.
    assert written.keys() - own.keys() <= ({"bn.num_batches_tracked"} if hard_coded else set())
    assert all(torch.equal(t, own[name]) for name, t in written.items() if name in own)
    assert not torch.equal(written["conv.weight"], cut["conv.weight"])
    assert not torch.equal(written["bn.running_mean"], cut["bn.running_mean"])
    slim.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(folder / "model.pt2").module()(X), slim.module(X))
    purpose = next(file.purpose for file in slim.report.files or () if file.name == "model.safetensors")
    assert ("slimc.load" in purpose) != hard_coded


@pytest.mark.usefixtures("quick")
def test_a_module_that_was_moved_or_given_other_weights_is_followed(slim: slimc.Compressed) -> None:
    slim = compressed(net())
    other = {name: t + 1 if t.is_floating_point() else t for name, t in slim.module.state_dict().items()}
    slim.module.load_state_dict(other, assign=True)  # new tensors, which the graph does not share
    assert all(torch.equal(t, other[name]) for name, t in slim.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(slim.program.module()(X), slim.module(X))


def test_moving_the_module_to_another_device_leaves_the_graph_where_it_is() -> None:
    slim = compressed(net())
    before = slim.module.get_parameter("conv.weight").clone()
    slim.module.get_parameter("conv.weight").data.add_(1)
    assert torch.equal(slim.graph.get_parameter("conv.weight"), before + 1)  # one memory so far
    slim.module.to("meta")
    assert {tensor.device.type for tensor in slim.graph.state_dict().values()} == {"cpu"}
    assert torch.isfinite(slim.graph(X)).all()


# -- whole or nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["replaced", "resized", "converted"])
def test_a_module_whose_layers_were_changed_is_not_saved_as_what_was_proven(change: str, tmp_path: Path) -> None:
    slim = compressed(net())
    module: Any = slim.module
    if change == "converted":
        module.half()
    else:
        module.head = nn.Sequential(module.head) if change == "replaced" else nn.Linear(module.head.in_features, 7)
    with pytest.raises(OutputError, match=r"of slim\.module (is gone|is \[)"):
        slim.save(tmp_path / "out", onnx=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.complex64])
def test_outputs_that_cannot_be_compared_are_sent_to_do_without_onnx(kind: torch.dtype, tmp_path: Path) -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).to(kind)

    slim = slimc.compress(Odd().eval(), X, flops=0.5, round_to=1, recover="none")
    with pytest.raises(OutputError, match=r"an input or output is (bfloat16|complex64).*--no-onnx"):
        slim.save(tmp_path / "out")


def test_a_report_tells_only_of_files_that_were_saved_with_it(tmp_path: Path) -> None:
    slim = compressed(net())
    slim.export_onnx(tmp_path / "alone.onnx")
    assert slim.report.onnx is not None
    slim.save(tmp_path / "out", onnx=False)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["onnx"] is None


def test_a_model_with_a_table_of_one_row_is_measured(tmp_path: Path) -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.kinds, self.fc = nn.Embedding(9, 8), nn.Embedding(1, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, words: Tensor, kinds: Tensor) -> Tensor:
            out: Tensor = self.head(torch.relu(self.fc(self.words(words) + self.kinds(kinds))).mean(1))
            return out

    words = torch.randint(9, (2, 5))
    slim = slimc.compress(Typed().eval(), (words, torch.zeros_like(words)), params=0.8, round_to=1, recover="none")
    slim.save(tmp_path / "out", latency=True, budget_seconds=0.3)
    assert slim.report.latency is not None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [RuntimeError("disk on fire"), KeyboardInterrupt(), OSError(28, "No space left")])
@pytest.mark.parametrize("stage", ["export", "write_json", "write_html"])
def test_a_failure_in_the_middle_leaves_nothing(
    slim: slimc.Compressed, stage: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    place = {
        "export": "slimc.exporters.formats.safetensors.export",
        "write_json": "slimc.report.Report.write_json",
        "write_html": "slimc.result.write_html",
    }
    monkeypatch.setattr(place[stage], fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        slim.save(tmp_path / "deep" / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "deep" / "out").exists()


@pytest.mark.usefixtures("quick")
def test_a_failed_overwrite_leaves_the_earlier_result(
    slim: slimc.Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = slim.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimc.result.write_html", fail)
    with pytest.raises(KeyboardInterrupt):
        slim.save(folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_that_differs_from_the_module_is_not_left(
    slim: slimc.Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def differs(*_: Any) -> None:
        raise ParityError("differs")

    monkeypatch.setattr(slimc.Compressed, "_parity", differs)
    monkeypatch.setattr("slimc.exporters.formats.onnx.export", _writes_a_model)
    with pytest.raises(ParityError):
        slim.export_onnx(tmp_path / "model.onnx")
    with pytest.raises(ParityError):
        slim.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_good_file_outlives_one_that_differs(
    slim: slimc.Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slim.export_onnx(tmp_path / "model.onnx")
    good = (tmp_path / "model.onnx").read_bytes()

    def differs(*_: Any) -> None:
        raise ParityError("differs")

    monkeypatch.setattr(slimc.Compressed, "_parity", differs)
    with pytest.raises(ParityError):
        slim.export_onnx(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == good


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_precision_is_sent_to_float32(kind: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(kind).eval()
    found = slimc.compress(model, torch.randn(2, 3, 8, 8).to(kind), flops=0.5, round_to=1, recover="none")
    with pytest.raises(OutputError, match=r"float32 \(model\.float\(\)\)"):
        found.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _writes_a_model(_program: object, path: Path, _names: object) -> Any:
    from types import SimpleNamespace

    path.write_bytes(b"wrong")
    return SimpleNamespace(batched=(True,), opset=18, dynamic_batch=True, unfolded=())


@pytest.mark.usefixtures("quick")
def test_an_earlier_result_is_replaced_only_when_that_is_asked_for(slim: slimc.Compressed, tmp_path: Path) -> None:
    folder = slim.save(tmp_path / "out")
    with pytest.raises(OutputError, match="overwrite"):
        slim.save(folder)
    (folder / "plan.json").write_text("{}")
    slim.save(folder, overwrite=True)
    assert json.loads((folder / "plan.json").read_text())["kept"]


@pytest.mark.usefixtures("quick")
def test_a_folder_of_the_users_is_never_replaced(slim: slimc.Compressed, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            slim.save(tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


# -- loading ------------------------------------------------------------------------------------------


def test_loading_refuses_what_does_not_fit(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no plan\.json"):
        slimc.load(tmp_path, Net())
    with pytest.raises(PlanError, match="fits only the architecture"):
        slimc.load(saved, nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"": {"forward": 3}}, "no size 'forward'"),
        ({"": {"training": 3}}, "no size 'training'"),
        ({"": {"new": 3}}, "no size 'new'"),
        ({"no.such": {"out_channels": 3}}, "no.such has no size"),
        ({"head": {"out_features": -5}}, "no size 'out_features'"),
        ({"head": {"out_features": 10**30}}, "no size 'out_features'"),
    ],
)
def test_attributes_that_are_no_sizes_are_refused(
    attributes: dict[str, Any], said: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(saved, folder)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"attributes": attributes}))
    with pytest.raises(PlanError) as refused:
        slimc.load(folder, net())
    assert said in str(refused.value)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{")
    for path in (tmp_path / "report.json", str(tmp_path / "none.json")):
        with pytest.raises(LoadError, match="cannot be read as a report"):
            slimc.Report.read_json(path)


@pytest.mark.usefixtures("quick")
def test_a_class_that_cannot_take_the_sizes_is_sent_to_the_program(tmp_path: Path) -> None:
    folder = compressed(net(hard_coded=True)).save(tmp_path / "out")
    with pytest.raises(PlanError, match=r"Net cannot take the sizes of this plan \(.*torch\.export\.load"):
        slimc.load(folder, Net(hard_coded=True))


def test_names_that_files_cannot_hold_are_replaced(tmp_path: Path) -> None:
    class Nameless(Net):
        def forward(self, x: Tensor) -> Any:
            return {"": super().forward(x)}

    slim = slimc.compress(Nameless().eval(), X, flops=0.5, round_to=1, recover="none", name="not utf-8: \udcff")
    slim.save(tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert [value.name for value in session.get_outputs()] == ["output"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["model"] == "not utf-8: ?"
