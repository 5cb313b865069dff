"""What a user asks of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .recipe import Recipe


@dataclass(frozen=True)
class Options:
    """What a user asks of a run.

    limits: metric to the largest value allowed. mend: recovery steps after every cut; none as the method was
    published. ignored: groups that stay whole. as_graph: whether the graph is trained instead of the user's
    class.
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
    as_graph: bool = False
