from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slimc import building, cli, describe
from slimc.__main__ import guarded
from slimc.errors import VerificationError
from slimc.exporters import machine

FACTORIES = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

def other():
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))

def single():
    return nn.Linear(6, 3)

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        import pathlib, time
        pathlib.Path("started").touch()
        time.sleep(60)
        return self.body(x)

def batches():
    return [torch.randn(16, 6) + 2, torch.randn(16, 6) + 2]
"""
MODEL = "tiny_factories:mlp"
INPUT = ("--input", "4x6")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a package, model files and data."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny_factories.py").write_text(FACTORIES)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    torch.save(model, folder / "model.pt")
    torch.save(model.state_dict(), folder / "weights.pt")
    nn.init.constant_(model.get_parameter("0.bias"), float("nan"))
    torch.save(model, folder / "nan.pt")
    (folder / "text.pt").write_text("not a model")
    (folder / "corrupt.pt").write_bytes((folder / "model.pt").read_bytes()[:700])
    (folder / "broken.json").write_text('{"kept": ')
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years of work")
    np.savez(folder / "data.npz", x=np.random.default_rng(0).normal(size=(32, 6)))
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder as the working directory; it is checked that a command leaves nothing behind in it."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])
    handler = signal.getsignal(signal.SIGTERM)
    before = everything(home)
    yield home
    signal.signal(signal.SIGTERM, handler)
    assert everything(home) == before


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def slimc(*arguments: str) -> int:
    return guarded(lambda: cli.app(list(arguments)))


@pytest.fixture(scope="module")
def result(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One real run of the installed command."""
    out = tmp_path_factory.mktemp("results") / "deep" / "slim"
    command = ["compress", MODEL, "--params", "0.5", *INPUT, "--no-latency", "--json", "--out", str(out)]
    command += ["--data", "tiny_factories:batches", "--round-to", "1"]
    return out, run(home, *command)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slimc", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


# -- what works ---------------------------------------------------------------------------------------


def test_what_libraries_print_does_not_stand_beside_json(home: Path) -> None:
    (home / "noisy.py").write_text(
        "import ctypes\nfrom torch import nn\n\n\ndef make():\n"
        "    ctypes.CDLL(None).printf(b'a library speaks\\n')\n    print('so does a function')\n"
        "    return nn.Linear(2, 3)\n"
    )
    done = run(home, "inspect", "noisy:make", "--input", "1x2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "a library speaks" in done.stderr
    assert "so does a function" in done.stderr


def test_json_is_one_document_on_stdout_and_the_report(result: tuple[Path, Any]) -> None:
    out, done = result
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["model"] == MODEL
    assert printed["targets"]["params"]["got"] <= printed["targets"]["params"]["asked"] == 0.5
    assert [step["method"] for step in printed["recovery"]] == ["reconstruct", "bn", "distill"]
    assert printed["calibration"]["fitted"] + printed["calibration"]["judged"] == 32
    assert any(step["kept"] and step["after"] < step["before"] for step in printed["recovery"])


def test_progress_goes_to_stderr_and_no_warning_of_a_library_does(result: tuple[Path, Any]) -> None:
    _, done = result
    assert "proving that removal equals masking" in done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


def test_apply_makes_the_same_cut_in_other_weights(
    result: tuple[Path, Any], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_onnx(monkeypatch)
    code = slimc(
        "apply",
        "model.pt",
        str(result[0] / "plan.json"),
        *INPUT,
        "--no-latency",
        "--quiet",
        "--out",
        str(tmp_path / "o"),
    )
    assert code == 0
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (result[0], tmp_path / "o")]
    assert plans[0]["kept"] == plans[1]["kept"]
    assert plans[0]["source_sha256"] != plans[1]["source_sha256"]


def _without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its export takes most of the time and is tested elsewhere."""
    monkeypatch.setattr("slimc.result.Compressed._export_onnx", lambda _self, _program, path: path.write_bytes(b"-"))


def test_quiet_prints_nothing(
    here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_onnx(monkeypatch)
    code = slimc("compress", "model.pt", "--flops=-50%", *INPUT, "-q", "--no-latency", "--out", str(tmp_path / "out"))
    printed = capfd.readouterr()
    assert (code, printed.out, printed.err) == (0, "", "")
    assert (tmp_path / "out" / "plan.json").exists()


def test_the_first_line_says_the_target_both_ways_and_the_last_where_to_look(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_onnx(monkeypatch)
    out = tmp_path / "out"
    assert slimc("compress", "model.pt", "--params=0.5", *INPUT, "--no-latency", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    # 6 x 16 + 16 + 2 x 16 + 16 x 3 + 3 = 195
    assert printed.splitlines()[0] == "params: 195 → at most 97.5 (keep 50%, cut 50%)"
    assert "report.html" in "".join(printed.split())  # a narrow terminal folds long paths
    assert "proven: removal equals masking" in printed


def test_methods_lists_every_scorer_and_recovery(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slimc("methods", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"magnitude", "random", "one-shot", "bn"} <= {row["name"] for row in listed}
    assert slimc("methods") == 0
    table = capsys.readouterr().out
    assert all(row["name"] in table for row in listed)


def test_inspect_answers_as_a_table_as_json_and_as_a_graph(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slimc("inspect", MODEL, *INPUT, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert [g["width"] for g in data["groups"]] == [16]
    assert data["params"] == 195
    assert slimc("inspect", MODEL, *INPUT) == 0
    assert "195" in capsys.readouterr().out
    assert slimc("inspect", MODEL, *INPUT, "--dot") == 0
    dot = capsys.readouterr().out
    assert dot.startswith("graph slimc {")
    assert dot.rstrip().endswith("}")
    assert dot.count(" -- ") == len(data["groups"][0]["members"])
    assert slimc("inspect", MODEL, *INPUT, "--types") == 0
    assert "g0 = 16 exact at least 1" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["compress"], ["inspect"], ["apply"], ["latency"], ["demo"], ["methods"]])
def test_every_command_explains_itself_without_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom slimc import cli\nfrom slimc.__main__ import guarded\n"
        f"code = guarded(lambda: cli.app({[*command, '--help']}))\n"
        "sys.exit(code or 7 * ('torch' in sys.modules))"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert time.perf_counter() - started < 5  # an import of torch alone takes longer than help; see test_imports


# -- what does not ------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_no_fault_of_slimc(home: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "slimc", "methods"]
        done = subprocess.run(command, cwd=home, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("slimc: No space left on device")


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "missing file": (["compress", "nothing.pt", "--flops=0.5", *INPUT], 2, "nothing.pt: no such file"),
    "text file": (["compress", "text.pt", "--flops=0.5", *INPUT], 2, "text.pt"),
    "corrupt file": (["compress", "corrupt.pt", "--flops=0.5", *INPUT], 2, "corrupt.pt"),
    "foreign class": (["compress", "foreign.pt", "--flops=0.5", *INPUT], 2, "foreign.pt"),
    "NaN weights": (["compress", "nan.pt", "--flops=0.5", *INPUT], 2, "NaN"),
    "weights alone": (["compress", "weights.pt", "--flops=0.5", *INPUT], 2, "--arch"),
    "wrong arch": (["compress", "weights.pt", "--arch=tiny_factories:other", "--flops=0.5", *INPUT], 2, "weights.pt"),
    "no such factory": (["compress", "tiny_factories:none", "--flops=0.5", *INPUT], 2, "tiny_factories:none"),
    "no target": (["compress", "model.pt", *INPUT], 2, "no target"),
    "target 0": (["compress", "model.pt", "--flops=0", *INPUT], 2, "--flops 0"),
    "target 1.5": (["compress", "model.pt", "--flops=1.5", *INPUT], 2, "Did you mean 1.5%?"),
    "target banana": (["compress", "model.pt", "--params=banana", *INPUT], 2, "--params banana"),
    "unreachable": (["compress", "model.pt", "--params=0.0001", *INPUT], 3, "smallest that can be reached"),
    "nothing to prune": (["compress", "tiny_factories:single", "--flops=0.5", *INPUT], 3, "No channel"),
    "out below a file": (["compress", "model.pt", "--flops=0.5", *INPUT, "--out", "text.pt/out"], 2, "is a file"),
    "out is a file": (["compress", "model.pt", "--flops=0.5", *INPUT, "--out", "text.pt"], 2, "text.pt"),
    "out is the user's": (["compress", "model.pt", "--flops=0.5", *INPUT, "--out", "mine"], 2, "mine"),
    "even with --overwrite": (
        ["compress", "model.pt", "--flops=0.5", *INPUT, "--out", "mine", "--overwrite"], 2, "mine",
    ),
    "unknown scorer": (["compress", "model.pt", "--flops=0.5", *INPUT, "--scorer=magic"], 2, "no scorer 'magic'"),
    "unknown recovery": (["compress", "model.pt", "--flops=0.5", *INPUT, "--recover=bad"], 2, "no recovery step 'bad'"),
    "recovery without data": (["compress", "model.pt", "--flops=0.5", *INPUT, "--recover=bn"], 2, "needs --data"),
    "unknown data": (["compress", "model.pt", "--flops=0.5", *INPUT, "--data=pictures"], 2, "--data pictures"),
    "missing data": (["compress", "model.pt", "--flops=0.5", *INPUT, "--data=npz:none.npz"], 2, "none.npz"),
    "unknown pattern": (["compress", "model.pt", "--flops=0.5", *INPUT, "--ignore=layer9"], 2, "--ignore layer9"),
    "rounding to 0": (["compress", "model.pt", "--flops=0.5", *INPUT, "--round-to=0"], 2, "--round-to 0"),
    "rounding to x": (["compress", "model.pt", "--flops=0.5", *INPUT, "--round-to=x"], 2, "--round-to x"),
    "no input": (["compress", "model.pt", "--flops=0.5"], 2, "--input"),
    "no shape": (["compress", "model.pt", "--flops=0.5", "--input=3y4"], 2, "--input 3y4"),
    "wrong shape": (["compress", "model.pt", "--flops=0.5", "--input=4x7"], 2, "(4, 7)"),
    "missing plan": (["apply", "model.pt", "none.json", *INPUT], 2, "none.json"),
    "broken plan": (["apply", "model.pt", "broken.json", *INPUT], 2, "broken.json is no JSON"),
    "data and a graph": (["inspect", "model.pt", *INPUT, "--json", "--dot"], 2, "--json is a summary as data"),
    "a graph and types": (["inspect", "model.pt", *INPUT, "--dot", "--types"], 2, "two ways of showing"),
    "data that nothing reads": (
        ["apply", "model.pt", "none.json", *INPUT, "--data=npz:data.npz"], 2, "give --recover auto too",
    ),
    "digits in one cut": (["compress", "model.pt", "--flops=0.5", *INPUT, "--data=digits"], 2, "give --epochs too"),
    "a rate of nothing": (["compress", "model.pt", "--flops=0.5", *INPUT, "--rate=0"], 2, "--rate is for training"),
    "an unset variable": (["compress", "model.pt", "--flops=0.5", *INPUT, "--data="], 2, "--data : wanted npz:FILE"),
    "a demo of nothing": (["demo", "--flops=banana", "--out=new"], 2, "--flops banana"),
    "inspecting nothing": (["inspect", "nothing.pt"], 2, "nothing.pt"),
    "measuring nothing": (["latency", "nothing.onnx"], 2, "nothing.onnx"),
}  # fmt: skip


class Foreign(nn.Module):
    """Of a package that nobody allowed."""


@pytest.mark.parametrize("case", REFUSED)
def test_bad_usage_ends_with_its_code_and_one_message(
    case: str, home: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, said = REFUSED[case]
    assert slimc(*arguments, "--quiet") == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("slimc: ") == 1
    assert printed.err.startswith("slimc: ")
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert "internal error" not in printed.err
    # `here` checks that nothing is left behind


@pytest.fixture(scope="module", autouse=True)
def foreign(home: Path) -> None:
    torch.save(Foreign(), home / "foreign.pt")


def test_several_processes_without_training_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert slimc("compress", "model.pt", "--flops=0.5", *INPUT) == 2
    assert "several processes are for training" in capsys.readouterr().err


def test_a_missing_onnxruntime_is_found_out_before_anything_slow(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert slimc("compress", "nothing.pt", "--flops=0.5", *INPUT) == 2
    assert "pip install onnxruntime" in (said := capsys.readouterr().err)
    assert "--no-onnx" in said
    assert slimc("compress", "nothing.pt", "--flops=0.5", *INPUT, "--no-onnx") == 2
    assert "nothing.pt" in capsys.readouterr().err


def test_the_version_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slimc("--version") == 0
    assert capsys.readouterr().out.startswith(f"slimc {describe.versions()['slimc']}, torch {torch.__version__}")


def test_data_that_nothing_looks_at_is_remarked_on(here: Path, tmp_path: Path) -> None:
    command = ["compress", "model.pt", "--params=0.5", *INPUT, "--recover=none", "--scorer=magnitude", "--no-onnx"]
    assert slimc(*command, "--data=npz:data.npz", "--no-latency", "--out", str(tmp_path / "o"), "--quiet") == 0
    warnings = json.loads((tmp_path / "o" / "report.json").read_text())["warnings"]
    assert any(text.startswith("data was given and not looked at") for text in warnings)


def test_an_unknown_option_is_refused_by_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slimc("compress", "model.pt", "--flop", "0.5") == 2
    assert "--flop" in capsys.readouterr().err


def test_a_folder_with_an_earlier_result_needs_overwrite(
    result: tuple[Path, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in result[0].iterdir()}
    assert slimc("compress", MODEL, "--flops=0.5", *INPUT, "--out", str(result[0])) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in result[0].iterdir()} == before


def _raising(error: BaseException) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (VerificationError("the first node that differs is conv2d_3"), 4, "conv2d_3"),
        (KeyboardInterrupt(), 130, "interrupted. A result appears whole or not at all"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory"),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError"),
    ],
)
def test_a_run_that_fails_late_leaves_nothing_and_says_what_happened(
    error: BaseException,
    code: int,
    said: str,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLIMC_DEBUG", raising=False)
    monkeypatch.setattr(building, "verify", _raising(error))
    assert slimc("compress", "model.pt", "--flops=0.5", *INPUT, "-q", "--out", str(tmp_path / "out")) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("slimc: ") == 1
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_130_and_writes_nothing(
    number: signal.Signals, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny_factories.py").write_text(FACTORIES)
    before = everything(tmp_path)
    command = ["compress", "tiny_factories:Slow", "--flops=0.5", *INPUT, "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slimc", *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert (tmp_path / "started").exists(), err
    assert process.returncode == 130, err
    assert "slimc: interrupted. A result appears whole or not at all" in err
    assert "Traceback" not in err
    assert out == ""
    assert everything(tmp_path) - before == {"started"}


def test_a_seed_that_no_generator_takes_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("-1", str(2**64)):
        assert slimc("compress", "model.pt", "--flops=0.5", *INPUT, f"--seed={seed}") == 2
        assert "--seed" in capsys.readouterr().err


def test_a_provider_that_cannot_measure_is_no_success(
    result: tuple[Path, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(next(result[0].rglob("model.onnx")))
    assert slimc("latency", model, "--provider=foo", "--budget=0.1") == 2
    assert "no provider 'foo'; known are cpu, cuda, tensorrt" in capsys.readouterr().err
    if "CUDAExecutionProvider" not in machine.onnxruntime_providers():
        assert slimc("latency", model, "--provider=cuda", "--budget=0.1") == 2
        assert "has no CUDAExecutionProvider" in capsys.readouterr().err
    assert slimc("latency", model, "--provider=CPU", "--budget=0.1", "--json") == 0


def test_a_terminal_without_utf_8_gets_what_it_can_show(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "slimc", "inspect", MODEL, *INPUT], cwd=home, capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_model_that_torch_cannot_export_gives_the_other_files(home: Path, tmp_path: Path) -> None:
    (home / "pooled.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Conv3d(2, 24, 3, padding=1), nn.ReLU(), "
        "nn.Conv3d(24, 8, 3), nn.AdaptiveAvgPool3d((1, 2, 2)), nn.Flatten(), nn.Linear(32, 3)).eval()\n"
    )
    command = ["compress", "pooled:make", "--input", "1x2x6x8x8", "--params", "0.6", "--recover", "none"]
    out = tmp_path / "slim"
    refused = run(home, *command, "--out", str(out))
    assert refused.returncode == 2, refused.stderr
    assert "--no-onnx" in refused.stderr
    assert not out.exists()
    done = run(home, *command, "--no-onnx", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["onnx"] is None
    assert report["latency"] is None
    assert {file.name for file in out.iterdir()} == {
        "model.pt2", "model.safetensors", "plan.json", "report.json", "report.html",
    }  # fmt: skip
