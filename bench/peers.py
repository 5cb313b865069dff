"""What is timed: slimc's stages and Torch-Pruning's, each on a fresh copy of the same model."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import slimc
from slimc.graph.resize import Cut
from slimc.rewrite import rewrite

SHARE = 0.5


@dataclass(frozen=True)
class SlimcSeconds:
    """Seconds of one compression, by stage.

    slice: the part of `rewrite` that makes the new graph and its tensors; the rest checks every shape and makes the
    user's own class smaller and runs it. `whole` is all of `slimc.compress`, proof included.
    """

    capture: float
    infer: float
    score: float
    plan: float
    rewrite: float
    verify: float
    slice: float
    whole: float

    @property
    def cut(self) -> float:
        """Inference, scores, plan and slicing: from a captured model to the smaller graph."""
        return self.infer + self.score + self.plan + self.slice

    @property
    def cut_to_class(self) -> float:
        """Further to the user's own class, checked: what the pipeline calls infer to rewrite."""
        return self.infer + self.score + self.plan + self.rewrite

    @property
    def cut_and_capture(self) -> float:
        """From the bare module to the smaller graph."""
        return self.cut + self.capture

    @property
    def unproven(self) -> float:
        """All that `slimc.compress` does but the proof: hashing the weights and writing plan and report too."""
        return self.whole - self.verify


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
    """Cut a model to a share of its FLOPs, any width allowed."""
    gc.collect()
    start = time.perf_counter()
    slim = slimc.compress(model, inputs, flops=share, round_to=1, recover="none")
    whole = time.perf_counter() - start
    found = slim.report.seconds
    stages = {name: found[name] or 0.0 for name in ("capture", "infer", "score", "plan", "rewrite", "verify")}
    return SlimcSeconds(**stages, slice=_slice_seconds(slim), whole=whole)


def _slice_seconds(slim: slimc.Compressed) -> float:
    """Make the same graph again, alone."""
    types = slim.analysis.types
    cut = Cut(types, slim.plan.alive(types))
    gc.collect()
    start = time.perf_counter()
    rewrite(types, cut)
    return time.perf_counter() - start


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
