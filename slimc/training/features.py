"""Values inside: what the last layer of each channel group gives, in the network that is trained and in the original.

Source: Romero et al., "FitNets" (ICLR 2015), equation 3, without the regressor, since the kept channels are known by
number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from slimc.errors import UsageError

from .gates import places
from .network import Network


class Features:
    """Draws values inside a network to the original's at the kept channels, while it is open.

    Raises UsageError for networks that are graphs, and others that have no modules which give these values.
    """

    def __init__(self, network: Network) -> None:
        self._caught: dict[tuple[bool, str], Tensor] = {}
        self._kept: dict[str, tuple[int, Tensor]] = {}
        self._hooks: list[Any] = []
        if isinstance(network.module, GraphModule):
            raise UsageError("features= needs the user's own class, and this network is a graph; leave it at 0")
        teacher, cut = network.analysis.model, network.cut_so_far
        self._device = next(teacher.parameters()).device
        for path, (norm, axis) in last_places(network).items():
            rank = channel_axis(teacher, path, norm)
            for trained, owner in ((False, teacher), (True, network.module)):
                module = owner.get_submodule(path)
                self._hooks.append(module.register_forward_hook(self._catch(trained, path)))
            self._kept[path] = rank, cut.indices(axis)
        if not self._kept:
            raise UsageError("features= finds no layer that gives channels; leave it at 0")

    def _catch(self, trained: bool, path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # A copy, since the operators behind may write into it.
            self._caught[trained, path] = output.clone() if trained else output.detach().clone()

        return hook

    def loss(self) -> Tensor:
        """The mean over groups of the squared error as a share of the original's variance; forgets the values.

        Over those whose layers have run in both networks: stochastic depth leaves some out.
        """
        found = []
        for path, (axis, index) in self._kept.items():
            if (True, path) not in self._caught or (False, path) not in self._caught:
                continue
            goal = self._caught[False, path].index_select(axis, index.to(self._caught[False, path].device)).float()
            error = functional.mse_loss(self._caught[True, path].float(), goal)
            found.append(error / goal.var(correction=0).clamp_min(1e-12))
        self._caught.clear()
        return torch.stack(found).mean() if found else torch.zeros((), device=self._device)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def gives_a_value(module: nn.Module) -> bool:
    """Whether a forward hook sees what the layer gives; modules of graphs and of torch's attention are never called."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, kinds) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def last_places(network: Network) -> dict[str, tuple[bool, Any]]:
    """For each group the layer that writes it last, with whether it is a norm, and its channels; in order of depth.

    Parameters of other modules are passed over: what these give need not be the channels.
    """
    last: dict[int, tuple[str, bool, Any]] = {}
    numbers = network.analysis.grouping.group_of
    for place in places(network.analysis.types):
        if not gives_a_value(network.analysis.model.get_submodule(place.name.rpartition(".")[0])):
            continue
        rows = network.analysis.types.solution.factors(place.axis)
        for number in set(numbers[rows[rows >= 0]].tolist()):
            last.pop(number, None)  # to the end, so that the order is that of last writers
            last[number] = place.name.rpartition(".")[0], place.norm, place.axis
    return {path: (norm, axis) for path, norm, axis in last.values()}


def channel_axis(owner: nn.Module, path: str, norm: bool) -> int:
    """Which axis of what the module gives holds its channels."""
    return 1 if norm or isinstance(owner.get_submodule(path), nn.modules.conv._ConvNd) else -1
