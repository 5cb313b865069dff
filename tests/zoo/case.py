"""Small hand-written models, each with the channel groups that it must have, worked out by hand.

A group is written as its width and the places that it shrinks, for example `"8: conv.o bn.* fc.i"`:

    name.o   the output channels of a layer: axis 0 of its weight (axis 1 if transposed) and its bias
    name.i   its input channels: axis 1 of its weight (axis 0 if transposed)
    name.*   axis 0 of every parameter and floating-point buffer of a module (batch norm, layer norm, PReLU)
    name:2   axis 2 of the tensor `name`

A `~` before the width marks a group that is not exact: a norm takes its statistics over its channels.
The models are found by `CASES`; a bug fix starts with one more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from laws import Signature
from torch import Tensor, nn

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    inputs: what it runs on. groups: expected groups, in the notation above.
    own_class: whether the user's class comes back smaller (False: sizes are written into its forward).
    frozen_by: operators that must be named as the reason why something is left alone.
    inferred_again: False where the cut leaves an operator behind that freezes what it reads.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    groups: tuple[str, ...]
    own_class: bool = True
    frozen_by: tuple[str, ...] = ()
    inferred_again: bool = True

    def build(self) -> tuple[nn.Module, Any]:
        """The model and its inputs, the same at every call, with weights that show every mistake."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.model()
            scatter_weights(model)
            return model.eval(), self.inputs()

    def expected(self, model: nn.Module) -> list[Signature]:
        """The expected groups as the laws compare them."""
        return sorted((_signature(text, model) for text in self.groups), key=lambda s: (s[0], sorted(s[2])))


def case(*groups: str, inputs: Callable[[], Any] | None = None, **more: Any) -> Callable[[type], type]:
    """Register a model class, by its name, with its expected groups."""

    def register(model: type) -> type:
        assert model.__name__ not in CASES
        CASES[model.__name__] = Case(model.__name__, model, inputs or image, groups, **more)
        return model

    return register


def image() -> Tensor:
    """Two pictures of 3 channels, 8 x 8."""
    return torch.randn(2, 3, 8, 8)


def features(*shape: int) -> Callable[[], Tensor]:
    """A batch of two of some shape."""
    return lambda: torch.randn(2, *shape)


def words(count: int, length: int) -> Callable[[], Tensor]:
    """A batch of two sequences of word numbers."""
    return lambda: torch.arange(2 * length).reshape(2, length) % count


def scatter_weights(model: nn.Module) -> None:
    """Give every vector and statistic its own values: ones and zeros would hide swapped channels."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() <= 1 and "index" not in name:
            tensor.data.uniform_(0.5, 1.5)


def _signature(text: str, model: nn.Module) -> Signature:
    size, _, places = text.partition(":")
    found: set[tuple[str, int]] = set()
    for token in places.split():
        found.update(_places(token, model))
    return int(size.lstrip("~")), not size.startswith("~"), frozenset(found)


def _places(token: str, model: nn.Module) -> set[tuple[str, int]]:
    if ":" in token:
        name, axis = token.split(":")
        return {(name, int(axis))}
    path, _, kind = token.rpartition(".")
    module = model.get_submodule(path)
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if kind == "*":
        return {(f"{path}.{name}", 0) for name, tensor in own.items() if tensor.dim()}
    transposed = "Transpose" in type(module).__name__
    if kind == "i":
        return {(f"{path}.weight", 0 if transposed else 1)}
    bias = {(f"{path}.bias", 0)} if getattr(module, "bias", None) is not None else set()
    return {(f"{path}.weight", 1 if transposed else 0), *bias}


def conv(i: int, o: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    """A convolution that keeps the picture's size."""
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, **more)
