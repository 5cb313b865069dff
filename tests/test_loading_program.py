"""Programs of torch.export: genuine ones load, and none of the ways in which such a file can run code works."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.errors import LoadError
from slimc.loading import load

Files = dict[str, bytes]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.conv(x))
        return {"pooled": y.mean((2, 3)), "flat": y.flatten(1)}


@pytest.fixture(scope="module")
def network() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def genuine(network: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("genuine") / "net.pt2"
    torch.export.save(torch.export.export(network, (torch.randn(1, 3, 9, 9),)), path)
    return path


@pytest.fixture(scope="module")
def dynamic(network: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dynamic") / "net.pt2"
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    torch.export.save(torch.export.export(network, (torch.randn(2, 3, 9, 11),), dynamic_shapes=(free,)), path)
    return path


def changed(source: Path, target: Path, change: Callable[[Files], None]) -> str:
    """A copy of an archive after ``change`` has edited its entries, by their names without the root folder."""
    with zipfile.ZipFile(source) as archive:
        files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"net/{name}", content)
    return str(target)


def edited(source: Path, target: Path, entry: str, edit: Callable[[Any], None]) -> str:
    def change(files: Files) -> None:
        value = json.loads(files[entry])
        edit(value)
        files[entry] = json.dumps(value).encode()

    return changed(source, target, change)


PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


def test_a_program_computes_what_the_model_computes(genuine: Path, network: Small) -> None:
    loaded = load(str(genuine))
    inputs = torch.randn(1, 3, 9, 9)
    expected, got = network(inputs), loaded.model(inputs)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert (loaded.name, loaded.input_shape) == ("net", (3, 9, 9))
    assert "torch.export" in loaded.origin


def test_a_program_is_known_by_its_content(genuine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.pt"
    copy.write_bytes(genuine.read_bytes())
    assert load(str(copy)).input_shape == (3, 9, 9)


def test_free_sizes_stay_free(dynamic: Path, network: Small) -> None:
    text = zipfile.ZipFile(dynamic).read("net/models/model.json").decode()
    assert "Symbol('" in text
    loaded = load(str(dynamic))
    inputs = torch.randn(5, 3, 13, 21)
    expected, got = network(inputs), loaded.model(inputs)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_programs_for_other_devices_are_read_for_the_cpu(genuine: Path, tmp_path: Path) -> None:
    def to_cuda(value: Any) -> None:
        if isinstance(value, dict) and set(value) == {"type", "index"}:
            value.update(type="cuda", index=0)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            to_cuda(part)

    loaded = load(edited(genuine, tmp_path / "net.pt2", PROGRAM, to_cuda))
    assert {tensor.device.type for tensor in loaded.model.parameters()} == {"cpu"}
    assert any("cuda" in note for note in loaded.notes)


class Attack:
    """Pickles as a call of ``os.system``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def first_size(program: Any) -> dict[str, Any]:
    """The first symbolic size in a description."""
    waiting = [program]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and "expr_str" in value:
            return value
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    raise AssertionError("no symbolic size")


def in_sample_inputs(files: Files, command: str) -> None:
    buffer = io.BytesIO()
    torch.save(((Attack(command),), {}), buffer)
    files["data/sample_inputs/model.pt"] = buffer.getvalue()


def in_a_size(files: Files, command: str) -> None:
    program = json.loads(files[PROGRAM])
    first_size(program)["expr_str"] = f"__import__('os').system({command!r})"
    files[PROGRAM] = json.dumps(program).encode()


def in_a_guard(files: Files, command: str) -> None:
    program = json.loads(files[PROGRAM])
    program["guards_code"] = [f"__import__('os').system({command!r}) == 0"]
    files[PROGRAM] = json.dumps(program).encode()


def in_a_name(files: Files, command: str) -> None:
    text = files[PROGRAM].decode()
    assert '"name": "x"' in text
    evil = json.dumps(f"x=__import__('os').system({command!r})")
    files[PROGRAM] = text.replace('"name": "x"', f'"name": {evil}').replace('"x": {', f"{evil}: {{").encode()


def in_a_weight(files: Files, command: str) -> None:
    buffer = io.BytesIO()
    torch.save(Attack(command), buffer)
    weights = json.loads(files[WEIGHTS])
    payload = next(iter(weights["config"].values()))
    payload["use_pickle"] = True
    files[f"data/weights/{payload['path_name']}"] = buffer.getvalue()
    files[WEIGHTS] = json.dumps(weights).encode()


def run_without_protection(path: str) -> None:
    module = torch.export.load(path).module()
    module(torch.randn(2, 3, 9, 11))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "attack",
    [in_sample_inputs, in_a_size, in_a_guard, in_a_name, in_a_weight],
    ids=lambda f: f.__name__,
)
def test_code_in_a_program_does_not_run(attack: Callable[[Files, str], None], dynamic: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = changed(dynamic, tmp_path / "evil.pt2", lambda files: attack(files, f"touch {marker}"))
    if attack is in_a_guard:  # a guard is dropped, since slimc checks inputs itself
        load(path).model(torch.randn(2, 3, 9, 11))
    else:
        with pytest.raises(LoadError, match=r"evil\.pt2"):
            load(path)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        run_without_protection(path)
    assert marker.exists(), "the attack must be a real one"


def drop_keys(node: Any) -> None:
    node["config"] = []


@pytest.mark.parametrize(
    ("entry", "edit", "words"),
    [
        (WEIGHTS, drop_keys, "table of weights is malformed"),
        (
            WEIGHTS,
            lambda v: v["config"]["conv.weight"]["tensor_meta"]["sizes"][0].update(as_int=1 << 40),
            "claims more",
        ),
        (WEIGHTS, lambda v: v["config"]["conv.weight"]["tensor_meta"].update(sizes=3), "descriptions are malformed"),
        (WEIGHTS, lambda v: v["config"]["conv.weight"].update(path_name="custom_obj_0"), "no plain tensor"),
        (WEIGHTS, lambda v: v["config"].update({'a"b': v["config"]["conv.weight"]}), "no module path"),
        (
            PROGRAM,
            lambda v: v["graph_module"]["graph"]["nodes"][0].update(target="torch.os.system"),
            r"torch\.os\.system",
        ),
        (
            PROGRAM,
            lambda v: v["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.aten.from_file.default"),
            "from_file",
        ),
        (PROGRAM, lambda v: v["graph_module"]["signature"]["input_specs"].append({"custom_obj": {}}), "custom_obj"),
        (
            PROGRAM,
            lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(
                in_spec='[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'
            ),
            "nested in 'collections.defaultdict'",
        ),
        (PROGRAM, lambda v: v["graph_module"].pop("graph"), "cannot load the program"),
    ],
)
def test_changed_descriptions_are_refused_in_words(
    entry: str, edit: Callable[[Any], None], words: str, genuine: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=words):
        load(edited(genuine, tmp_path / "net.pt2", entry, edit))


@pytest.mark.parametrize(
    "name", ["data/aotinductor/model/kernel.so", "data/weights/code.py", "data/constants/opaque_obj_0", "model.pkl"]
)
def test_entries_that_can_hold_code_are_refused(name: str, genuine: Path, tmp_path: Path) -> None:
    path = changed(genuine, tmp_path / "net.pt2", lambda files: files.update({name: b"x"}))
    with pytest.raises(LoadError, match=name):
        load(path)


def void(_: object) -> None:
    """Make an expression with a value into an edit."""


def test_a_missing_entry_is_named(genuine: Path, tmp_path: Path) -> None:
    path = changed(genuine, tmp_path / "net.pt2", lambda files: void(files.pop(PROGRAM)))
    with pytest.raises(LoadError, match=r"models/model\.json is missing"):
        load(path)


def test_weights_that_are_not_finite_are_found_in_programs(genuine: Path, tmp_path: Path) -> None:
    def spoil(files: Files) -> None:
        table = json.loads(files[WEIGHTS])
        entry = f"data/weights/{table['config']['conv.bias']['path_name']}"
        files[entry] = b"\x00\x00\xc0\x7f" + files[entry][4:]

    with pytest.raises(LoadError, match=r"conv\.bias has 1 NaN"):
        load(changed(genuine, tmp_path / "net.pt2", spoil))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "s0.__class__",
        "(lambda: 1)()",
        "[s0 for s0 in (1,)]",
        "eval('1')",
        "Symbol('x); print(1)')",
        "Symbol('s0', positive=print(1))",
        "Pow(Integer(9), Integer(999999999))",
        "9**9**9",
        "S('1')",
        "'s0'",
        "s0 if s0 else 1",
        "f'{s0}'",
        "s0[0]",
        "(" * 5000 + "1" + ")" * 5000,
        "",
        "1;2",
        "os",
    ],
)
def test_sizes_that_are_more_than_arithmetic_are_refused(text: str, dynamic: Path, tmp_path: Path) -> None:
    path = edited(dynamic, tmp_path / "net.pt2", PROGRAM, lambda program: first_size(program).update(expr_str=text))
    with pytest.raises(LoadError, match="not an arithmetic expression"):
        load(path)


def test_names_that_are_no_identifiers_are_read(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({"a/b": nn.Linear(4, 8), "c d": nn.Linear(8, 3)})

        def forward(self, x: dict[str, Tensor]) -> dict[Any, Tensor]:
            h = self.blocks["a/b"](x["k-1"])
            return {"0": self.blocks["c d"](h), 0: h, "a-b": h.sum()}

    example = {"k-1": torch.randn(2, 4)}
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(Named().eval(), (example,)), path)
    found = load(str(path)).model(example)
    assert list(found) == ["0", 0, "a-b"]


def test_arguments_by_name_are_identifiers(genuine: Path, tmp_path: Path) -> None:
    spec = (
        '[1, {"type": "builtins.tuple", "context": "null", "children_spec": ['
        '{"type": "builtins.tuple", "context": "null", "children_spec": []}, '
        '{"type": "builtins.dict", "context": "[\\"x): pass\\"]", "children_spec": []}]}]'
    )
    edit = lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=spec)  # noqa: E731
    with pytest.raises(LoadError, match="would become source text"):
        load(edited(genuine, tmp_path / "net.pt2", PROGRAM, edit))


def test_a_program_of_one_batch_size_says_which(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    model, example = nn.Linear(4, 3).eval(), torch.randn(1, 4)
    torch.export.save(torch.export.export(model, (example,)), path)
    loaded = load(str(path))
    assert (loaded.batch, loaded.input_shape) == (1, (4,))
    open_ = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(model, (torch.randn(2, 4),), dynamic_shapes=(open_,)), path)
    assert load(str(path)).batch is None


@pytest.mark.parametrize("value", [None, "0"])
def test_loading_leaves_the_environment_as_it_was(
    value: str | None, genuine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    load(str(genuine))
    assert os.environ.get(name) == value


def test_a_program_of_training_is_refused(tmp_path: Path) -> None:
    for part in (nn.BatchNorm1d(4), nn.Dropout()):
        model = nn.Sequential(nn.Linear(4, 4), part).train()
        torch.export.save(torch.export.export(model, (torch.randn(2, 4),)), tmp_path / "net.pt2")
        with pytest.raises(LoadError, match=r"net\.pt2: .*training mode.*model\.eval\(\)"):
            load(str(tmp_path / "net.pt2"))


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.mark.parametrize(("model", "inputs"), [
    (Two(), (torch.randn(2, 4), torch.randn(2, 4))), (nn.Embedding(9, 4), (torch.zeros(2, 3, dtype=torch.int64),)),
])  # fmt: skip
def test_inputs_that_no_shape_describes_are_asked_for(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    torch.export.save(torch.export.export(model, inputs), tmp_path / "net.pt2")
    assert load(str(tmp_path / "net.pt2")).input_shape is None


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            h = torch.relu(self.a(x))
        result: torch.Tensor = self.a(h)
        return result


def test_a_program_with_regions_says_how_they_are_taken_apart(tmp_path: Path) -> None:
    program = torch.export.export(Frozen().eval(), (torch.randn(2, 4),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(LoadError, match=r"run_decompositions\(\{\}\)"):
        load(str(tmp_path / "net.pt2"))
    torch.export.save(program.run_decompositions({}), tmp_path / "plain.pt2")
    assert load(str(tmp_path / "plain.pt2")).input_shape == (4,)
