"""Everything slimc raises on purpose.

SlimcError                  exit code 2 unless a subclass says otherwise
├── UsageError              an option or argument that makes no sense
├── LoadError               a file or name that is not a model we can read safely
├── CaptureError            the model cannot be turned into a graph
├── PlanError               a plan that does not fit the model
├── OutputError             a result that cannot be written
├── UnreachableTarget  (3)  no cut meets the budget; names the smallest that can
├── VerificationError  (4)  the rewritten model differs from the masked original
├── Interrupted      (130)  a training run was stopped, and is kept to be gone on with
├── ParityError        (4)  an exported file differs from the model it came from
└── InternalError      (1)  slimc broke one of its own rules: a bug of ours, please report
"""

from __future__ import annotations

from typing import ClassVar

_LONGEST = 300


def first_line(error: BaseException) -> str:
    """How a foreign error's message begins, for a sentence of ours; its class where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:_LONGEST]


class SlimcError(Exception):
    """A condition that the caller can understand; the message says what, where and what to do."""

    exit_code: ClassVar[int] = 2


class UsageError(SlimcError):
    """An option or argument makes no sense."""


class LoadError(SlimcError):
    """A file or name is not a model that can be read safely."""


class CaptureError(SlimcError):
    """A model cannot be turned into a graph."""


class PlanError(SlimcError):
    """A plan does not fit the model."""


class OutputError(SlimcError):
    """A result cannot be written."""


class UnreachableTarget(SlimcError):
    """No cut meets the budget."""

    exit_code = 3


class VerificationError(SlimcError):
    """The rewritten model does not compute what the masked original computes."""

    exit_code = 4


class ParityError(SlimcError):
    """An exported file does not compute what the model it came from computes."""

    exit_code = 4


class Interrupted(SlimcError):
    """A run was stopped on the user's wish after a whole step; the message says how to go on."""

    exit_code = 130


class InternalError(SlimcError):
    """slimc broke one of its own rules."""

    exit_code = 1
