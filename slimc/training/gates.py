"""Gates: one multiplier per channel where channels come into being, trained like any parameter.

A gate sits on the parameters that make a channel: weight and bias of the batch norm, else rows of the convolution or
linear layer and their bias. It is a `torch.nn.utils.parametrize` parametrization, so that the model itself is not
changed and the gate can be multiplied in again without a trace.

Sources: You et al., "Gate Decorator" (NeurIPS 2019), equation 7 for batch norms (the gate starts as gamma, beta is
divided by it) and appendix B for layers without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils import parametrize

from slimc.graph.infer import Types, attribute
from slimc.graph.rule import arguments, operator_name
from slimc.graph.terms import Terms
from slimc.roles import CONVOLUTIONS, Site, writers

CLIP = 10.0
"""Beta divided by a gate near zero is limited to this, as in the authors' code; it changes the function a little."""
_CLOSED = 1e-8


@dataclass(frozen=True)
class Place:
    """Where a gate sits.

    tensors: the parameters that it multiplies, each with the axis that holds the channels; the weight first.
    norm: whether it is a batch norm, whose weight becomes the gate.
    identity: the gate starts as 1, and multiplies what is there.
    axis: the channels of the first tensor in the whole network.
    """

    tensors: tuple[tuple[str, int], ...]
    norm: bool
    axis: Terms
    identity: bool = False

    @property
    def name(self) -> str:
        """The weight that it multiplies."""
        return self.tensors[0][0]


class Gate(nn.Module):
    """A parametrization: the tensor times phi along one axis.

    trains: whether the tensor did before it was gated, and does again afterwards.
    """

    def __init__(self, phi: nn.Parameter, axis: int, rank: int, trains: bool = True) -> None:
        super().__init__()
        self.phi, self.trains = phi, trains
        self.shape = [-1 if position == axis else 1 for position in range(rank)]

    def forward(self, original: Tensor) -> Tensor:
        """The gated tensor."""
        return original * self.phi.reshape(self.shape)


def places(types: Types, *, after_norms: bool = True) -> tuple[Place, ...]:
    """Every place where a gate can sit: writers whose rows are parameters of their own.

    Without `after_norms` these are the convolutions and linear layers themselves.
    """
    found: list[Place] = []
    taken: set[str] = set(types.aliases)  # a tensor with two names makes two kinds of channels at once
    for site in writers(types, after_norms=after_norms):
        place = _place(types, site)
        if place is None or any(name in taken for name, _ in place.tensors):
            continue
        taken.update(name for name, _ in place.tensors)
        found.append(place)
    return tuple(found)


def trained(types: Types, found: tuple[Place, ...]) -> tuple[Place, ...]:
    """The places of channels that no frozen parameter makes: a gate there would change it after all."""
    rows = {place.name: types.solution.factors(place.axis) for place in found}
    frozen = [
        rows[place.name] for place in found if not all(types.weights[name].requires_grad for name, _ in place.tensors)
    ]
    still = np.concatenate([own.ravel() for own in frozen]) if frozen else np.empty(0)
    return tuple(place for place in found if not np.isin(rows[place.name], still[still >= 0]).any())


def _place(types: Types, site: Site) -> Place | None:
    name = operator_name(site.node)
    if site.operand is not None or name not in ("batch_norm", "linear", *CONVOLUTIONS):
        return None
    call = arguments(site.node)
    row = 1 if "transpose" in name else 0
    tensors = []
    for argument, axis in (("weight", row), ("bias", 0)):
        node = call.get(argument)
        if node is None and argument == "bias":
            continue
        if not isinstance(node, Node) or node.op != "get_attr" or str(node.target) not in types.tensors:
            return None
        terms = types.tensors[str(node.target)][axis]
        # The rows must be the channels, one to one: groups of a transposed convolution, for instance, are not.
        if not np.array_equal(types.solution.factors(terms), types.solution.factors(_channels(types, site))):
            return None
        tensors.append((str(node.target), axis))
    return Place(tuple(tensors), name == "batch_norm", types.tensors[tensors[0][0]][tensors[0][1]])


def _channels(types: Types, site: Site) -> Terms:
    axes: tuple[Terms, ...] = types.values[site.node]
    return axes[site.axis]


def compactors(found: tuple[Place, ...]) -> tuple[Place, ...]:
    """The same places with gates that start as 1 behind the norms (the diagonal of ResRep's compactors)."""
    return tuple(replace(place, norm=False, identity=True) for place in found)


def attach(
    module: nn.Module, found: tuple[Place, ...], carried: Mapping[str, tuple[Tensor, ...]] | None = None
) -> dict[str, float]:
    """Put a gate at every place; the function stays the same.

    carried: gates and gated tensors that were taken off before (`detach`), to go on with. Gives, for each batch norm
    whose beta had to be limited to `CLIP`, by how much its outputs may have moved.
    """
    clipped: dict[str, float] = {}
    for place in found:
        owners = [(*held_at(module, name), axis) for name, axis in place.tensors]
        tensors = [getattr(owner, last) for owner, last, _ in owners]
        before = None if carried is None else carried.get(place.name)
        phi = _seed(place, tensors[0]) if before is None else before[0]
        with torch.no_grad():
            for number, (tensor, (_, _, axis)) in enumerate(zip(tensors, owners, strict=True)):
                shape = [-1 if position == axis else 1 for position in range(tensor.dim())]
                open_ = phi.abs().reshape(shape) > _CLOSED
                shut = torch.zeros_like(tensor) if before is None else before[1 + number]
                if place.norm and number == 0 and before is None:
                    shut = torch.ones_like(tensor)
                own = torch.where(open_, tensor / torch.where(open_, phi.reshape(shape), 1.0), shut)
                if place.norm and number == 1:
                    limited = own.clamp(-CLIP, CLIP)
                    # Beneath a closed gate all of beta is lost, unless it was closed before.
                    lost = torch.where(open_, (limited - own) * phi, tensor if before is None else 0.0)
                    moved = float(lost.abs().max()) if lost.numel() else 0.0
                    if moved > 0:
                        clipped[place.name] = moved
                    own = limited
                # A parameter of its own: the graph of the same network goes on holding the old one.
                setattr(owners[number][0], owners[number][1], nn.Parameter(own, requires_grad=tensor.requires_grad))
        gate = nn.Parameter(phi.detach().clone())
        for owner, last, axis in owners:
            own = getattr(owner, last)
            added = Gate(gate, axis, own.dim(), own.requires_grad)
            parametrize.register_parametrization(owner, last, added, unsafe=True)
            if place.norm and (owner, last) == owners[0][:2]:
                # Gamma stays 1: the gate has taken its place.
                attribute(owner, f"parametrizations.{last}.original").requires_grad_(False)
    return clipped


def _seed(place: Place, weight: Tensor) -> Tensor:
    """A batch norm's gamma; a layer's row norms, which are to its rows what gamma is to normalised channels; or 1."""
    if place.identity:
        return weight.new_ones(weight.shape[place.tensors[0][1]])
    if place.norm:
        return weight.detach().clone()
    axis = place.tensors[0][1]
    norms = weight.detach().transpose(0, axis).flatten(1).norm(dim=1)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def detach(module: nn.Module, found: tuple[Place, ...]) -> dict[str, tuple[Tensor, ...]]:
    """Multiply every gate into its tensors and take it off; gives what `attach` needs to go on with it."""
    carried = {}
    for place in found:
        parts = [gate_of(module, place).detach().clone()]
        for name, _ in place.tensors:
            owner, last = held_at(module, name)
            parts.append(attribute(owner, f"parametrizations.{last}.original").detach().clone())
            trains: bool = attribute(owner, f"parametrizations.{last}.0").trains
            parametrize.remove_parametrizations(owner, last, leave_parametrized=True)
            getattr(owner, last).requires_grad_(trains)
        carried[place.name] = tuple(parts)
    return carried


def gate_of(module: nn.Module, place: Place) -> nn.Parameter:
    """The gate at a place."""
    owner, last = held_at(module, place.name)
    gate: nn.Parameter = attribute(owner, f"parametrizations.{last}.0.phi")
    return gate


def gates_of(module: nn.Module, found: tuple[Place, ...]) -> Iterator[tuple[Place, nn.Parameter]]:
    """All gates with their places."""
    return ((place, gate_of(module, place)) for place in found)


def plain_name(name: str) -> tuple[str, bool]:
    """The tensor's name without a parametrization, and whether the parameter is the gate itself."""
    if "parametrizations." not in name:
        return name, False
    owner, _, rest = name.partition("parametrizations.")
    return owner + rest.split(".")[0], rest.endswith(".phi")


def held_at(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's name in it."""
    path, _, last = name.rpartition(".")
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        module = child if child is not None else getattr(module, part)
    return module, last
