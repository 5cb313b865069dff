"""Recovery: what can be done to the kept weights after the cut, by the names that users type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .data import examples
from .recovery import bn
from .result import Compressed


def _bn(slim: Compressed, data: Iterable[Any]) -> str:
    if not bn.has_batch_norm(slim.graph):
        return "the model has no batch norm with running statistics; nothing was changed"
    samples = bn.reestimate(slim.graph, examples(data, slim.analysis.captured.example))
    return f"batch-norm statistics re-estimated on {samples} samples"


@dataclass(frozen=True)
class Step:
    """One way of fitting the kept weights again: changes the compressed model in place and says what it did."""

    run: Callable[[Compressed, Iterable[Any]], str]
    summary: str
    source: str


STEPS: dict[str, Step] = {
    "bn": Step(
        _bn, "re-estimate batch-norm statistics on unlabelled samples", "Li et al., EagleEye, ECCV 2020, section 3.3"
    ),
}
