"""A process for measuring only: a module's answer to one question, both JSON. So: no torch in here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import slimc
from slimc.errors import InternalError, UsageError
from slimc.exporters.session import NotMeasurable, Request

_START_SECONDS = 600.0  # TensorRT may compile for minutes before the first run
_CHILD = "import runpy, sys; sys.path.append(sys.argv[1]); runpy.run_module(sys.argv[2], run_name='__main__')"


def ask(module: str, request: Request) -> Any:
    """What the module answers in a fresh process, which ends with us, also on KeyboardInterrupt.

    Raises UsageError, NotMeasurable.
    """
    # -P and a path put last: what happens to lie in the working directory must not be imported.
    command = [sys.executable, "-P", "-c", _CHILD, str(Path(slimc.__path__[0]).parent), module]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(request)),
            capture_output=True,
            text=True,
            timeout=_START_SECONDS + 3 * request.budget_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NotMeasurable(f"the measuring process did not end within {error.timeout:.0f} s") from error
    if done.returncode < 0:
        raise NotMeasurable(f"the measuring process was killed by signal {-done.returncode} (9: likely out of memory)")
    if done.returncode:
        raise InternalError(f"the measuring process failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise UsageError(answer["error"])
    if "skipped" in answer:
        raise NotMeasurable(answer["skipped"])
    return answer["outcome"]


def answer(function: Callable[[Request], Any]) -> None:
    """Answer one question: the child's side."""
    # Native libraries may print: standard output is kept for the answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = Request(**json.load(sys.stdin))
    try:
        result: dict[str, object] = {"outcome": function(request)}
    except NotMeasurable as error:
        result = {"skipped": str(error)}
    except UsageError as error:
        result = {"error": str(error)}
    json.dump(result, out)
    out.close()
