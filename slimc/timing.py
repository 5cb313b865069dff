"""Where the time of a model's call goes: what operators took, shared out among the products that costs are made of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from .exporters import machine
from .exporters.operators import PRODUCTS, Operator
from .graph.cost import Times
from .graph.infer import Product, Types

_LONGEST_START = 0.02
"""Milliseconds: an operator that does next to nothing was measured to take 8 to 13 microseconds."""


def threads_of_a_call() -> int:
    """Threads to measure a model with: torch's number, but not more than the cores that this process may use."""
    return min(torch.get_num_threads(), machine.physical_cores())


def shared_out(types: Types, operators: Sequence[Operator], total: float) -> Times:
    """Milliseconds of each product, of the rest, and of what is fixed, `total` together.

    A product and an operator that ran are one where they have as many multiply-accumulates and write as many numbers;
    those that are alike in this share their times. The time of products that ran but are not recognised, in fused
    attention for one, goes to those left over, in step with their multiply-accumulates. Fixed is what each operator
    takes however little it does: as long as the shortest one, up to a hundredth of a millisecond or two.
    """
    captured = types.captured
    calls = captured.batch if captured.dynamic_shapes is not None else 1  # a free batch is measured with one sample
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, product in enumerate(types.macs):
        alike[round(product.macs / calls), round(_written(types, product) / calls)].append(position)
    whole = np.array([product.macs for product in types.macs])
    found, left = np.zeros(len(whole)), np.ones(len(whole), np.bool_)
    loose = rest = 0.0
    start = min((operator.ms for operator in operators), default=0.0)
    start = min(start, _LONGEST_START)
    for operator in operators:
        work = operator.ms - start
        own = alike.get((operator.macs, operator.outputs), []) if operator.macs is not None else []
        if own:
            found[own] += work / len(own)
            left[own] = False
        elif operator.kind in PRODUCTS:
            loose += work
        else:
            rest += work
    if whole[left].sum() > 0:
        found[left] = (loose or float(not found.any())) * whole[left] / whole[left].sum()
    else:
        rest += loose
    fixed = start * len(operators)
    scale = total / (found.sum() + rest + fixed)
    return Times(found * scale, rest * scale, fixed * scale)


def _written(types: Types, product: Product) -> int:
    """How many numbers the operator writes, for the example batch; 0 where it has several results."""
    value = types.values[product.node]
    return math.prod(map(len, value)) if value and all(isinstance(axis, np.ndarray) for axis in value) else 0
