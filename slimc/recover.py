"""Recovery: what can be done to the kept weights after the cut, by the names that users type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .data import examples
from .recovery import bn
from .result import Compressed


def _bn(slim: Compressed, data: Iterable[Any]) -> str:
    if not bn.has_batch_norm(slim.graph):
        return "the model has no batch norm with running statistics; nothing was changed"
    samples = bn.reestimate(slim.graph, examples(data, slim.analysis.captured.example))
    return f"batch-norm statistics re-estimated on {samples} samples"


STEPS: dict[str, Callable[[Compressed, Iterable[Any]], str]] = {"bn": _bn}
"""Each step changes the compressed model in place and says in one line what it did."""
