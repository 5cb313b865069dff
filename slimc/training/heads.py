"""Auxiliary heads: classifiers of values inside a network, trained along with it and taken off without a trace.

Source: Zhuang et al., "Discrimination-aware Channel Pruning for Deep Neural Networks" (NeurIPS 2018): batch norm, ReLU,
average over places, linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from slimc.errors import UsageError
from slimc.losses import first_output
from slimc.onednn import Guard
from slimc.samples import Batch
from slimc.scores import Loss

_NAME = "auxiliary_head"


class Head(nn.Module):
    """Class scores, [N, classes], from a value with its channels at `axis`; the rest of its axes are places."""

    def __init__(self, axis: int, width: int, classes: int) -> None:
        super().__init__()
        self._axis = axis
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, classes)

    def forward(self, value: Tensor) -> Tensor:
        """Average over places what is above zero after the norm."""
        channels = value.movedim(self._axis, 1).reshape(len(value), self.norm.num_features, -1)
        if channels.numel() == self.norm.num_features:  # one value has no variance: a last batch of one sample
            norm = self.norm
            channels = functional.batch_norm(
                channels, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        else:
            channels = self.norm(channels)
        found: Tensor = self.linear(torch.relu(channels).mean(2))
        return found


class Heads:
    """Heads on values inside a module, part of it until they are taken off.

    places: paths of modules in order of depth, each with the axis of its output's channels and how many there are.
    Weights are the same each time.
    """

    def __init__(self, module: nn.Module, places: Sequence[tuple[str, int, int]], classes: int) -> None:
        self._owner = module
        self._values: list[Tensor] = []
        self._inner = inner = [module.get_submodule(path) for path, _, _ in places]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            heads = [Head(axis, width, classes) for _, axis, width in places]
        like = next(module.parameters())
        self._hooks = []
        for part, head in zip(inner, heads, strict=True):
            # Of the layer itself: a container would run what is added to it.
            part.add_module(_NAME, head.to(like))
            self._hooks.append(part.register_forward_hook(self._catch(head)))
        self._hooks.append(module.register_forward_pre_hook(lambda *_: self._values.clear()))
        self._hooks.append(module.register_forward_hook(self._tie))

    def _catch(self, head: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # A copy, since the operators behind may write into it.
            self._values.append(head(output.clone()))

        return hook

    def _tie(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Outputs as they are, but with the heads in their graph.

        DistributedDataParallel exchanges gradients of no parameter that it cannot reach from the outputs.
        """
        if len(self._values) < len(self._inner):
            raise UsageError("the network does not call a module that has an auxiliary head; take fewer heads")
        nothing = torch.stack([0 * value.float().sum() for value in self._values]).sum()
        return pytree.tree_map_only(Tensor, lambda t: t + nothing.to(t) if t.is_floating_point() else t, outputs)

    def losses(self, targets: Any, loss: Loss) -> list[Tensor]:
        """Of each head for the batch that has just gone through the network."""
        if isinstance(targets, Tensor) and any(len(value) != len(targets) for value in self._values):
            raise UsageError("an auxiliary head sees a value whose first axis is not that of samples; take fewer heads")
        return [loss(value.float() if value.dtype.itemsize < 4 else value, targets) for value in self._values]

    def gradients(self, batches: Iterable[Batch], names: Iterable[str], loss: Loss) -> dict[str, Tensor]:
        """Of each parameter, the mean gradient of the loss of the first head behind it, or of the network's own.

        The network must be in eval mode, so that norms stand still.
        """
        named = dict(self._owner.named_parameters())
        chosen = {name: named[name] for name in names}
        frozen = [parameter for parameter in chosen.values() if not parameter.requires_grad]
        for parameter in frozen:  # what a channel matters does not hang on what trains
            parameter.requires_grad_(True)
        total = {name: torch.zeros_like(parameter) for name, parameter in chosen.items()}
        count = 0
        for batch in batches:
            with Guard():
                outputs = batch.example.run(self._owner)
            losses = [*self.losses(batch.targets, loss), loss(first_output(outputs), batch.targets)]
            count += batch.count
            left = dict(chosen)
            for value in losses:
                if not left:
                    break
                found = torch.autograd.grad(value, list(left.values()), retain_graph=True, allow_unused=True)
                for name, gradient in zip(list(left), found, strict=True):
                    if gradient is not None:
                        total[name] += gradient * batch.count
                        del left[name]
        for parameter in frozen:
            parameter.requires_grad_(False)
        return {name: gradient / count for name, gradient in total.items()}

    def close(self) -> None:
        """Take the heads off."""
        for hook in self._hooks:
            hook.remove()
        for part in self._inner:
            delattr(part, _NAME)
