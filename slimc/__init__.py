"""slimc: a structured-pruning compiler for deployable PyTorch models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler import Compressed as Compressed
    from .compiler import apply as apply
    from .compiler import compress as compress
    from .compiler import inspect as inspect
    from .detector import DenseDetector as DenseDetector
    from .errors import SlimcError as SlimcError
    from .plan import Plan as Plan
    from .report import Report as Report
    from .saved import load as load
    from .training.api import schedule as schedule
    from .training.recipe import Recipe as Recipe

__version__ = "0.1.0"

# Where each public name lives. Resolved on first use, so that `import slimc` (and `slimc --help`)
# does not pay for torch.
_PUBLIC = {
    "compress": "slimc.compiler",
    "inspect": "slimc.compiler",
    "apply": "slimc.compiler",
    "load": "slimc.saved",
    "schedule": "slimc.training.api",
    "DenseDetector": "slimc.detector",
    "Recipe": "slimc.training.recipe",
    "Compressed": "slimc.compiler",
    "Plan": "slimc.plan",
    "Report": "slimc.report",
    "SlimcError": "slimc.errors",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'slimc' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
