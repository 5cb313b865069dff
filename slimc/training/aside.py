"""A run of a module that is only to show what it gives, or whether it runs at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from slimc.graph.stateless import buffers_kept, modes_kept
from slimc.random_state import kept_random_state


@contextmanager
def aside(module: nn.Module, training: bool = False) -> Iterator[None]:
    """Runs in the block, in eval or training mode and without gradients, leave no trace in the module or elsewhere."""
    with torch.no_grad(), modes_kept(module, training=training), buffers_kept(module), kept_random_state():
        yield
