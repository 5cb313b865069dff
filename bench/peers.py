"""What is timed: slimc's stages and Torch-Pruning's, each on a fresh copy of the same model."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimc import eager, planner, scores
from slimc.analysis import Analysis, Stages, analyse
from slimc.graph.resize import Cut
from slimc.rewrite import Rewritten, rewrite, shapes_agree

SHARE = 0.5


@dataclass(frozen=True)
class SlimcSeconds:
    """Seconds of one compression, by stage.

    infer: with groups and costs; slice: the new graph with its tensors; shapes: every shape of it against the
    prediction; own: the user's own class made smaller, and run against the graph.
    """

    capture: float
    infer: float
    score: float
    plan: float
    slice: float
    shapes: float
    own: float

    @property
    def cut(self) -> float:
        """From a captured model to the smaller graph."""
        return self.infer + self.score + self.plan + self.slice

    @property
    def cut_to_class(self) -> float:
        """From a captured model to the user's own class, checked: all that slimc's pipeline does but the proof."""
        return self.cut + self.shapes + self.own

    @property
    def cut_and_capture(self) -> float:
        """From the bare module to the smaller graph."""
        return self.cut + self.capture

    @property
    def all(self) -> float:
        """From the bare module to the user's own class."""
        return self.cut_to_class + self.capture


@dataclass(frozen=True)
class PeerSeconds:
    """Seconds of Torch-Pruning: making the pruner, which builds the dependency graph, and one step."""

    build: float
    step: float

    @property
    def cut(self) -> float:
        """From the bare module to the pruned one."""
        return self.build + self.step


def slimc_seconds(model: nn.Module, inputs: Tensor, share: float = SHARE) -> SlimcSeconds:
    """Cut a model to a share of its FLOPs, any width allowed: the pipeline of `slimc.compress` up to the proof."""
    gc.collect()
    stages = Stages(None)
    analysis = analyse(model, inputs, stages)
    cut, rewritten = cut_of(analysis, stages, share)
    with stages.stage("shapes"):
        wrong = shapes_agree(analysis.types, cut, rewritten)
    with stages.stage("own"):
        eager.build(analysis.model, analysis.types, cut, rewritten, analysis.captured.example)
    assert wrong is None, wrong
    return SlimcSeconds(**stages.seconds)


def cut_of(analysis: Analysis, stages: Stages, share: float = SHARE) -> tuple[Cut, Rewritten]:
    """From an analysed model to the smaller graph, each stage timed."""
    method = scores.find("magnitude")
    with stages.stage("score"):
        ranked = scores.normalise(method.score(scores.Subject(analysis.types, analysis.grouping, "l2", 0)))
    with stages.stage("plan"):
        limits = {"flops": share * analysis.macs}
        choice = planner.plan(analysis.grouping, analysis.cost, ranked, limits, round_to=1, may_relax=False)
        alive = np.ones(analysis.types.solution.variables, np.bool_)
        for group, kept in zip(analysis.groups, choice.kept, strict=True):
            alive[group.variables] = False
            alive[group.variables[kept]] = True
        cut = Cut(analysis.types, alive)
    with stages.stage("slice"):
        return cut, rewrite(analysis.types, cut)


def peer_seconds(model: nn.Module, inputs: Tensor, head: str | None, ratio: float = SHARE) -> PeerSeconds:
    """Prune a copy with Torch-Pruning: global magnitude, L2, the classifier's outputs kept."""
    import torch_pruning

    ours = copy.deepcopy(model)
    for parameter in ours.parameters():
        parameter.requires_grad_(True)  # its graph comes from autograd
    ignored = [ours.get_submodule(head)] if head else []
    options = _vision_transformer_options(ours)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        pruner = torch_pruning.pruner.MagnitudePruner(
            ours, inputs, importance, global_pruning=True, pruning_ratio=ratio, ignored_layers=ignored, **options
        )
        built = time.perf_counter()
        pruner.step()
        end = time.perf_counter()
    _repair(ours)
    ours.eval()
    with torch.no_grad():
        ours(inputs)  # a pruned model that does not run would make the comparison void
    return PeerSeconds(built - start, end - built)


def _vision_transformer_options(model: nn.Module) -> dict[str, Any]:
    """What Torch-Pruning's own example and test give for torchvision's ViT: bare parameters, and whole heads."""
    from torchvision.models import VisionTransformer

    if not isinstance(model, VisionTransformer):
        return {}
    bare: list[tuple[Any, int]] = [(model.class_token, 2), (model.encoder.pos_embedding, 2)]
    return {"unwrapped_parameters": bare, "round_to": model.encoder.layers[0].num_heads}


def _repair(model: nn.Module) -> None:
    """The attribute that its example sets by hand after pruning, since the model's forward checks it."""
    from torchvision.models import VisionTransformer

    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels


def head_of(model: nn.Module) -> str:
    """The path of the last linear or convolution layer, whose outputs are the model's."""
    layers: list[str] = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return layers[-1]
