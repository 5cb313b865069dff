"""Files made to run code, to exhaust memory or to mislead: each is refused, and nothing in it runs."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from slimc.errors import LoadError
from slimc.loading import load, load_state_dict_file


class Attack:
    """Pickles as a call of ``os.system``."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Reduced:
    """Pickles as any call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> str:
    """A copy of an archive with other contents and right checksums."""
    copy = path.with_name(f"changed-{path.name}")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w", compression) as target:
        for info in source.infolist():
            target.writestr(info.filename, change(info.filename, source.read(info)))
    return str(copy)


def with_pickle(tmp_path: Path, stream: bytes) -> str:
    path = tmp_path / "base.pt"
    torch.save(nn.Linear(2, 2), path)
    return rewritten(path, lambda name, content: stream if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("where", ["alone", "attribute", "checkpoint", "state_dict"])
def test_a_call_of_os_system_does_not_run(where: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    model = nn.Linear(2, 2)
    model.extra = Attack(marker)  # type: ignore[assignment]
    value = {
        "alone": Attack(marker),
        "attribute": model,
        "checkpoint": {"model": nn.Linear(2, 2), "args": Attack(marker)},
        "state_dict": {**nn.Linear(2, 2).state_dict(), "x": Attack(marker)},
    }[where]
    torch.save(value, path)
    for read in (load, load_state_dict_file):
        with pytest.raises(LoadError, match=r"posix\.system|os\.system|nt\.system"):
            read(str(path))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the attack must be a real one"


def test_allowing_a_package_does_not_let_the_file_call_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(Reduced(shutil.copyfile, ("a", "b")), path)
    with pytest.raises(LoadError, match=r"shutil\.copyfile"):
        load(str(path))
    make_grid = pytest.importorskip("torchvision.utils").make_grid
    torch.save(Reduced(make_grid, (torch.ones(2),)), path)
    with pytest.raises(LoadError, match=r"calls torchvision\.utils\.make_grid while loading"):
        load(str(path), allow=["torchvision"])


def test_a_graph_module_is_refused_as_it_executes_text(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    traced = fx.symbolic_trace(nn.ReLU())
    body = {**traced.__dict__, "_code": f"import os\nos.system('touch {marker}')\ndef forward(self, x): return x"}
    torch.save(Reduced(fx.graph_module.reduce_graph_module, (body, "")), path)
    with pytest.raises(LoadError, match=r"torch\.fx.*source text"):
        load(str(path))
    torch.save(traced, path)
    with pytest.raises(LoadError, match=r"torch\.fx.*source text"):
        load(str(path))
    assert not marker.exists()


def test_a_module_that_the_file_constructs_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(Reduced(nn.Linear, (60000, 20000)), path)
    start = time.monotonic()
    with pytest.raises(LoadError, match=r"calls torch\.nn\.modules\.linear\.Linear"):
        load(str(path))
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize("maker", [torch.Tensor, torch.FloatTensor])
def test_a_tensor_that_the_file_allocates_is_refused(maker: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": Reduced(maker, (1 << 40,))}, path)
    with pytest.raises(LoadError, match="calls torch"):
        load_state_dict_file(path)


def test_a_constructor_behind_a_rebuild_function_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    rebuild = torch._tensor._rebuild_from_type_v2
    torch.save(Reduced(rebuild, (nn.Linear, torch.Tensor, (60000, 20000), {})), path)
    with pytest.raises(LoadError, match="special class"):
        load(str(path))


def evil_forward(inputs: torch.Tensor) -> torch.Tensor:
    raise AssertionError("code from the file ran")


@pytest.mark.parametrize("name", ["forward", "_call_impl", "train", "_conv_forward"])
def test_an_attribute_that_replaces_a_method_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    inner = nn.Conv2d(3, 4, 1)
    inner.__dict__[name] = torch.nn.functional.relu
    torch.save(nn.Sequential(inner), path)
    with pytest.raises(LoadError, match=rf"0 \(Conv2d\).*'{name}' replaces the method"):
        load(str(path))


@pytest.mark.parametrize("table", ["_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks"])
def test_hooks_are_refused(table: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = nn.Sequential(nn.Linear(2, 2))
    getattr(model[0], table)[1] = torch.nn.functional.relu
    torch.save(model, path)
    with pytest.raises(LoadError, match=rf"0 \(Linear\): holds hooks \({table}\)"):
        load(str(path))


@pytest.mark.parametrize(("key", "value"), [("_forward_hooks", 3), ("training", "yes"), (7, 7)])
def test_tables_of_another_kind_are_refused(key: Any, value: object, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__dict__[key] = value
    torch.save(model, path)
    with pytest.raises(LoadError, match=rf"0 \(Linear\): its entry {key!r} is a"):
        load(str(path))


def test_hooks_of_a_module_hidden_in_a_list_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    hidden = nn.Linear(2, 2)
    hidden._forward_pre_hooks[1] = torch.nn.functional.relu
    model = nn.Linear(2, 2)
    model.others = {"deep": [(hidden,)]}  # type: ignore[assignment]
    torch.save(model, path)
    with pytest.raises(LoadError, match=r"others\.deep\.0\.0 \(Linear\): holds hooks"):
        load(str(path))


def test_a_module_that_contains_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = nn.Sequential(nn.Linear(2, 2))
    model._modules["1"] = model
    torch.save(model, path)
    with pytest.raises(LoadError, match="contains itself"):
        load(str(path))


def test_children_repeated_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = nn.Sequential(nn.ReLU())
    for _ in range(40):
        model = nn.Sequential(model, model)
    torch.save(model, path)
    with pytest.raises(LoadError, match="repeats its children"):
        load(str(path))


def test_a_child_that_is_no_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = nn.Sequential(nn.ReLU())
    model._modules["1"] = torch.nn.functional.relu  # type: ignore[assignment]
    torch.save(model, path)
    with pytest.raises(LoadError, match="entry '1' of _modules is a function"):
        load(str(path))


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(1 << 20)}, path)
    bomb = rewritten(path, lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert os.path.getsize(bomb) * 100 < os.path.getsize(path)
    with pytest.raises(LoadError, match="is compressed"):
        load(bomb)


def test_duplicate_entries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("model/data.pkl", b"other")
    with pytest.raises(LoadError, match="appears twice"):
        load(str(path))


@pytest.mark.parametrize("whole", [True, False])
def test_a_few_bytes_shown_as_terabytes_are_refused(whole: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    huge = torch.ones(1).as_strided((1 << 20, 1 << 20), (0, 0))
    model = nn.Linear(2, 2)
    model.register_buffer("huge", huge)
    torch.save(model if whole else {"weight": huge}, path)
    for read in (load, load_state_dict_file):
        with pytest.raises(LoadError, match=r"shape \[1048576, 1048576\].*1 elements"):
            read(str(path))


def test_a_storage_that_is_shorter_than_claimed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(64)}, path)
    short = rewritten(path, lambda name, content: content[:16] if name.endswith("data/0") else content)
    with pytest.raises(LoadError, match=r"data/0 holds 16 bytes.*claims 256"):
        load(short)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(64, 64), path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("model/data/0")
    content[info.header_offset + 400] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=False)  # torch itself does not notice
    with pytest.raises(LoadError, match=r"data/0 are damaged.*again"):
        load(str(path))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_newer_pickle_protocols_are_explained(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": b"bytes", "w": torch.ones(1)}, path, pickle_protocol=protocol)
    with pytest.raises(LoadError, match=rf"pickle protocol {protocol}"):
        load(str(path))


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02cos\nsystem\nU\x04echoq\x00\x85R.",
        b"\x80\x02cos.path\nos\n.",
        b"\x80\x02ctorch\nos.system\n.",
        b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00idos\nsystem\n.",
        b"\x80\x02X\x06\x00\x00\x00systemi",
        b"\x80\x02(ios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02\x85.",
        b"\x80\x02h\x05.",
        b"\x80\x02RRRR.",
        b"\x80\x02}}b.",
        b"",
        b"\x80",
        b"\x80\x02N",
        b"\x80\x02(U\x07storage.",
        pickle.dumps({"a": 1}, 0),
    ],
)
def test_malformed_streams_are_refused_in_words(stream: bytes, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"changed-base\.pt: "):
        load(with_pickle(tmp_path, stream))


def test_names_inside_library_packages_that_are_no_modules_are_refused(tmp_path: Path) -> None:
    for name in (
        "torch.nn.init kaiming_uniform_",
        "torchvision.models get_model",
        "torch.nn.parallel.scatter_gather gather",
    ):
        module, attribute = name.split()
        with pytest.raises(LoadError, match="is not a class that a model may be made of"):
            load(with_pickle(tmp_path, f"\x80\x02c{module}\n{attribute}\n.".encode("latin-1")))


def test_a_second_state_for_the_same_object_is_refused(tmp_path: Path) -> None:
    # the first BUILD could put a function in place of __setstate__, which the second would call
    stream = b"\x80\x02ctorch.nn.modules.linear\nIdentity\n)\x81}b}b."
    with pytest.raises(LoadError, match="sets the state"):
        load(with_pickle(tmp_path, stream))


def test_allow_lists_of_other_libraries_are_neither_used_nor_lost(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(Reduced(shutil.copyfile, ("a", "b")), path)
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.add_safe_globals([shutil.copyfile])
        with pytest.raises(LoadError, match=r"shutil\.copyfile"):
            load(str(path))
        assert shutil.copyfile in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_a_folder_that_is_named_like_a_library_is_not_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "transformers" / "models"
    folder.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "net.py").write_text(
        "import pathlib, torch\npathlib.Path('marker').touch()\nclass Net(torch.nn.Linear): pass\n"
    )
    file = with_pickle(tmp_path, b"\x80\x02ctransformers.models.net\nNet\n)\x81.")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(LoadError, match="transformers"):
        load(file)
    assert not (tmp_path / "marker").exists()


def test_an_allowed_function_is_not_called_with_what_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "allowed_helpers.py").write_text(
        "import os\ndef shell(command, x):\n    os.system(command)\n    return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shell = importlib.import_module("allowed_helpers").shell
    layer: Any = nn.TransformerEncoderLayer(8, 2, 16)
    layer.activation = shell
    torch.save(layer, tmp_path / "held.pt")
    held: Any = load(str(tmp_path / "held.pt"), allow=["allowed_helpers"]).model
    assert held.activation is shell
    layer.activation = functools.partial(shell, "echo")
    torch.save(layer, tmp_path / "partial.pt")
    with pytest.raises(LoadError, match=r"partial of allowed_helpers\.shell"):
        load(str(tmp_path / "partial.pt"), allow=["allowed_helpers"])
    layer.activation = functools.partial(nn.functional.gelu, approximate="tanh")
    torch.save(layer, tmp_path / "known.pt")
    known: Any = load(str(tmp_path / "known.pt")).model
    assert known.activation.keywords == {"approximate": "tanh"}


@pytest.mark.parametrize("kind", [set, frozenset, Counter, torch.Size])
def test_a_few_bytes_that_stand_for_a_long_range_are_refused(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": nn.Linear(2, 2), "x": Reduced(kind, (Reduced(range, (2, 5)),))}, path)
    with pytest.raises(LoadError, match="range"):
        load(str(path))


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_number_that_stands_for_as_many_bytes_is_refused(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": nn.Linear(2, 2), "x": Reduced(kind, (5,))}, path)
    with pytest.raises(LoadError, match=rf"builtins\.{kind.__name__}"):
        load(str(path))


def test_messages_stay_short_where_a_file_shares_parts(tmp_path: Path) -> None:
    doubled = b"X\x01\x00\x00\x00a" + b"q\x01h\x01\x86" * 18
    with pytest.raises(LoadError) as refused:
        load(with_pickle(tmp_path, b"\x80\x02" + doubled + b"Q."))
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize("version", [None, b"abc"])
def test_an_archive_with_a_damaged_version_is_refused_in_words(version: bytes | None, tmp_path: Path) -> None:
    path, copy = tmp_path / "model.pt", tmp_path / "other.pt"
    torch.save(nn.Linear(2, 2), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("/version"):
                if version is None:
                    continue
                content = version
            target.writestr(info.filename, content)
    with pytest.raises(LoadError, match="torch cannot read it"):
        load(str(copy))


def test_a_name_that_torch_reads_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="in a way that no saved model does"):
        load(with_pickle(tmp_path, b"\x80\x02ctorch.nn.modules.linea\\x72\nIdentity\n)\x81."))


def test_a_bare_module_hidden_in_a_list_is_refused(tmp_path: Path) -> None:
    model: Any = nn.Identity()
    model.others = [nn.Identity.__new__(nn.Identity)]
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"others\.0 .*has no table _modules"):
        load(str(tmp_path / "model.pt"))


def test_a_storage_of_no_known_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    copy = rewritten(path, lambda name, content: content.replace(b"FloatStorage", b"FloatTensor"))
    with pytest.raises(LoadError, match=r"said to be a torch\.FloatTensor"):
        load(copy)
