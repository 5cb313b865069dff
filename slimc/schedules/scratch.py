"""Training from scratch: the pruned architecture with new random weights.

Source: Liu et al., "Rethinking the Value of Network Pruning" (ICLR 2019), section 3: Scratch-E trains for the same
epochs, Scratch-B for the same arithmetic, which is more epochs of a smaller network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import GraphModule

from slimc.errors import UsageError
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import schedule

_RESETS = ("reset_parameters", "_reset_parameters")


@schedule(
    "scratch",
    "cut by --scorer, then train the smaller network from new random weights",
    "Liu et al., ICLR 2019",
    ranks=True,
    mends=False,
)
def scratch(run: Run, *, same: str = "epochs") -> Iterator[Phase]:
    """One cut, new weights, training.

    same: "epochs" (Scratch-E), or "arithmetic" (Scratch-B: the epochs times the MACs of the whole network over those
    of the cut one, so that the run takes more epochs than it was given).
    """
    if same not in ("epochs", "arithmetic"):
        raise UsageError(f"--set same={same}: known are epochs and arithmetic")
    run.cut(run.chosen)
    run.event("draw", lambda: draw(run.network.module))
    if same == "arithmetic":
        run.extend(run.options.epochs / run.share)
    yield run.phase("finetune", run.left)


def draw(module: nn.Module) -> None:
    """New weights for every module, by its own `reset_parameters`; UsageError where a parameter has none.

    Parameters that do not train stay as they are.
    """
    drawn: set[int] = set()
    frozen = [
        (parameter, parameter.detach().clone()) for parameter in module.parameters() if not parameter.requires_grad
    ]
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        for name in _RESETS if any(parameter.requires_grad for parameter in own.values()) else ():
            reset = getattr(part, name, None)
            if callable(reset):
                reset()
                drawn.update(map(id, own.values()))
    with torch.no_grad():
        for parameter, before in frozen:
            parameter.copy_(before)
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in drawn]
    if missing and isinstance(module, GraphModule):
        raise UsageError(
            "--schedule scratch draws weights by the reset_parameters() of modules, and this network is trained as a "
            "graph, which has none (slimc inspect says why its class is not kept): take another schedule"
        )
    if missing:
        raise UsageError(
            f"--schedule scratch cannot draw {missing[0]} anew: its module has no reset_parameters(). Give the module "
            "that method, or take another schedule"
        )
