"""The program: `slimc`, or `python -m slimc`."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from slimc.errors import SlimcError

_NO_MEMORY = "can't allocate memory"
"""How torch says it, as a RuntimeError."""


def _command() -> None:
    from slimc.cli import app  # takes half a second, in which an interrupt should end as it does later

    app()


def main() -> NoReturn:
    """Run the command line; errors become one message and an exit code."""
    # Threads that wait must sleep: with other programs on the cores, OpenMP's spinning was measured to make a proof
    # of mobilenet_v2 take 116 s instead of 1.4 s. Read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # `torch.load` of a dependency must not unpickle either, unless the user says so.
    if "--unsafe-pickle" not in sys.argv:
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    if not os.environ.get("SLIMC_DEBUG"):
        # torch's remarks about itself; what users should know is in the report.
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
    if "--json" in sys.argv and sys.stdout is not None and sys.stderr is not None:
        # Libraries print on the process's own stdout (HiGHS does); the result stands there alone.
        sys.stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding)
        os.dup2(sys.stderr.fileno(), 1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 has no arrows
    sys.exit(guarded(_command))


def _terminated(number: int, frame: Any) -> None:
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(number, frame)
    else:
        raise KeyboardInterrupt


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; its errors become one message, and the exit code that is given back."""
    # A terminated run cleans up like an interrupted one, also where interrupts are ignored (behind nohup or &).
    signal.signal(signal.SIGTERM, _terminated)
    try:
        command()
    except SlimcError as error:
        print(f"slimc: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit) as end:
        # Typer makes an exit with this code of an interrupt.
        code = 130 if isinstance(end, KeyboardInterrupt) else end.code if isinstance(end.code, int) else 1
        if code == 130:
            again = "A result appears whole or not at all; run the same command again to start over."
            print(f"slimc: interrupted. {again}", file=sys.stderr)
        return code
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error):
            smaller = "Give a smaller example with --input, smaller batches to train with (--batch-size)"
            print(f"slimc: out of memory. {smaller}, or run on a larger machine.", file=sys.stderr)
            return 2
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            print(f"slimc: {error.strerror} ({error.filename or 'where standard output goes'}).", file=sys.stderr)
            return 2
        if os.environ.get("SLIMC_DEBUG"):
            raise
        print(
            f"slimc: internal error: {type(error).__name__}: {error}\n"
            "This is a fault of slimc. SLIMC_DEBUG=1 shows where; please report it with the model.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    main()
