"""Several processes that train one network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimc.graph.example import Example
from slimc.samples import Batch
from slimc.training import workers

HOME = """
import torch
from torch import nn

class Net(nn.Module):
    # No batch norm: its statistics would be those of half a batch, and the numbers would not be comparable.
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

def feeds():
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (270,), generator=g)
    inputs = torch.randn(270, 6, generator=g)
    inputs[torch.arange(270), labels] += 3
    # Batches of 15, which two processes cannot share evenly.
    batches = list(zip(inputs.split(15), labels.split(15)))
    return batches[:14], batches[14:]
"""
SCRIPT = """
import sys
import torch
import slimc
from mine import Net, feeds

if torch.distributed.is_torchelastic_launched():
    torch.distributed.init_process_group("gloo")
train, val = feeds()
run = slimc.schedule(
    "tick-tock", Net(), torch.zeros(2, 6), flops=0.5, epochs=6, data=train, val=val, round_to=1, recover="none",
    recipe=slimc.Recipe(precision="float32"))
slim = run.result
if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
    slim.save(sys.argv[1])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""
HEADED = """
import torch
import slimc
from mine import Net, feeds

torch.distributed.init_process_group("gloo")
train, val = feeds()
run = slimc.schedule(
    "dcp", Net(), torch.zeros(2, 6), flops=0.5, epochs=4, data=train, val=val, round_to=1, recover="none")
for phase in run:
    phase.train()
    own = dict(phase.module.named_parameters())
    assert any("auxiliary_head" in name for name in own) == (phase.name == "heads")
    for name, tensor in own.items():
        first = tensor.detach().clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(first, tensor), name
assert run.result.report.verification.passed
torch.distributed.destroy_process_group()  # else its threads may outlive the process
"""


def test_one_process_has_everything() -> None:
    batch = Batch(Example.of(torch.arange(5.0)[:, None]), torch.arange(5))
    assert workers.count() == 1
    assert workers.share(batch) is batch
    assert workers.weight(batch) == 1.0
    assert workers.total([1.0, 2.0]) == [1.0, 2.0]
    assert workers.from_first(lambda: 3) == 3


def started(home: Path, *options: str, processes: int = 1) -> str:
    """Run Python, or `torchrun`, in a folder; gives what it said."""
    path = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *options], cwd=home, capture_output=True, text=True,
        check=False, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_make_the_plan_and_the_weights_that_one_makes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(textwrap.dedent(HOME))
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    started(tmp_path, "script.py", "one")
    started(tmp_path, "script.py", "two", processes=2)
    one, two = (json.loads((tmp_path / name / "plan.json").read_text()) for name in ("one", "two"))
    assert one["kept"] == two["kept"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["accuracy"]["after"] == pytest.approx(reports[1]["accuracy"]["after"], abs=1e-6)


def test_two_processes_have_the_same_auxiliary_heads_and_make_the_same_cut(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(textwrap.dedent(HOME))
    (tmp_path / "script.py").write_text(textwrap.dedent(HEADED))
    started(tmp_path, "script.py", processes=2)


def test_the_command_line_trains_with_two_processes_and_the_first_one_speaks(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(textwrap.dedent(HOME))
    told = started(
        tmp_path, "-m", "slimc", "compress", "mine:Net", "--input", "2x6", "--flops", "0.5", "--epochs", "2",
        "--data", "mine:feeds", "--no-latency", "--out", "out", processes=2,
    )  # fmt: skip
    assert told.count("proving") == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["training"]["epochs"] == 2
