"""What a user asks of a run, and what a run says of each of its phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .recipe import Recipe


@dataclass
class Point:
    """One phase as it ended: where the network is and how good it is.

    epochs: trained so far, in all phases. flops: the share of the MACs that is left. accuracy: of the validation
    data, None where it was not measured. loss: the mean training loss of its last epoch.
    """

    phase: str
    epochs: float
    flops: float
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Options:
    """What a user asks of a run.

    limits: metric to the largest value allowed. mend: recovery steps after every cut; none as the method was
    published. ignored: groups that stay whole.
    """

    limits: Mapping[str, float]
    epochs: float
    recipe: Recipe
    scorer: str
    round_to: int
    may_relax: bool
    mend: tuple[str, ...]
    ignored: tuple[int, ...] = ()
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
