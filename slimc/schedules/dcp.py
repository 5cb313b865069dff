"""Discrimination-aware channel pruning: auxiliary heads are trained inside the network, and help to choose channels.

Source: Zhuang et al., "Discrimination-aware Channel Pruning for Deep Neural Networks" (NeurIPS 2018), algorithms 1 and
2: heads behind P layers (batch norm, ReLU, average pooling, linear layer) are trained together with the network on the
sum of all cross entropies (equation 3); then each layer takes the input channels with the largest gradient norm of
L = L_M + lambda L_S (equation 6), L_M the squared error of its outputs and L_S the cross entropy of the head behind it;
then fine-tuning. Ours: channels are ranked by the scorer `dcp`, which takes L_S linear around the trained network and
leaves picked weights as they are, in one pass for all layers where the paper goes stage by stage; the budget is one for
the whole network instead of a rate for each layer, and coupled channels go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimc import scores
from slimc.activations import watch
from slimc.errors import UsageError
from slimc.graph.stateless import modes_kept
from slimc.losses import loss_of, output_shape
from slimc.readings import Sampling
from slimc.scorers.dcp import picked
from slimc.scores import Scores, Subject
from slimc.training.aside import aside
from slimc.training.features import channel_axis, gives_a_value, last_places
from slimc.training.loop import Hooks
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule


@schedule(
    "dcp",
    "auxiliary heads are trained inside the network, and their losses help to choose",
    "Zhuang et al., NeurIPS 2018",
)
def dcp(run: Run, *, heads: int = 3, warmup: float = 0.3) -> Iterator[Phase]:
    """Train with `heads` auxiliary heads for that share (`warmup`) of the epochs, cut once, fine-tune.

    Raises UsageError for outputs that are not [N, classes], and where a loop of the user's leaves `phase.extra` out.
    """
    demand(1, heads=heads)
    demand(0, 1, warmup=warmup)
    shape = output_shape(run.analysis.types)
    if len(shape) != 2:
        raise UsageError(f"--schedule dcp needs outputs of shape [N, classes], and these are {list(shape)}")
    if run.loss is not None:
        _check_returned(run)
    _ = run.samples  # refuses at once where there is no data to score on
    run.event("heads", lambda: run.network.add_heads(_spread(run, heads), shape[1]))
    steps = torch.zeros((), dtype=torch.int64)

    def extra(targets: Any) -> Tensor:
        assert run.network.heads is not None
        steps.add_(1)
        return torch.stack(run.network.heads.losses(targets, lambda own, wanted: _loss(run, own, wanted))).sum()

    phase = run.phase("heads", warmup * run.options.epochs, hooks=Hooks(extra=extra), tally={"steps": steps})
    yield phase
    if phase.epochs and not steps:
        raise UsageError("the heads of --schedule dcp were not trained: add phase.extra(targets) to your loss")
    found = run.event("score", lambda: torch.from_numpy(discriminating(run)))
    run.event("plain", run.network.drop_heads)
    run.cut(lambda: run.selection.choose(found.numpy()))
    yield run.phase("finetune", run.left)


def _check_returned(run: Run) -> None:
    """UsageError where a loss of the user's takes something else than heads give."""
    model = run.analysis.model
    with aside(model):
        outputs = run.analysis.captured.example.run(model)
    if not isinstance(outputs, Tensor):
        raise UsageError(
            "--schedule dcp's heads give a tensor [N, classes], and loss= takes what the model returns, a "
            f"{type(outputs).__name__}: let the model return its class scores alone, or take another schedule"
        )


def _loss(run: Run, own: Tensor, targets: Any) -> Tensor:
    if run.loss is not None:
        return run.loss(own, targets)
    return functional.cross_entropy(own, targets.long(), label_smoothing=run.options.recipe.smoothing)


def _spread(run: Run, count: int) -> list[list[Any]]:
    """Values of groups at even distances; the network's own head is behind the last segment."""
    module = run.network.module
    known = [item for item in last_places(run.network).items() if gives_a_value(module.get_submodule(item[0]))]
    if not known:
        raise UsageError(
            "--schedule dcp puts heads behind convolutions, linear layers and batch norms that are modules, and this "
            "network has none with channels to cut"
        )
    chosen = sorted({(place + 1) * len(known) // (count + 1) for place in range(count)} & set(range(len(known))))
    cut = run.network.cut_so_far
    return [
        [path, channel_axis(module, path, norm), cut.shape((axis,))[0]]
        for path, (norm, axis) in (known[place] for place in chosen)
    ]


def discriminating(run: Run) -> Scores:
    """The scorer's numbers with the gradient of the first head behind each layer."""
    heads, module = run.network.heads, run.network.module
    assert heads is not None

    def score(subject: Subject) -> list[Scores]:
        sampling, loss = Sampling(subject, "dcp"), loss_of(subject)
        watch(subject, sampling.places)
        assert subject.samples is not None
        with modes_kept(module, training=False):
            gradients = heads.gradients(subject.samples.batches, sampling.parameters, loss)
        return picked(subject, sampling.readings(), gradients)

    return run.score(replace(scores.find("dcp"), score=score))
