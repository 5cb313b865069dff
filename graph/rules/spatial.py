"""Operators that work on space or time alone: pooling and interpolation. Channels pass through."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from slimc.graph.infer import Inference, hint
from slimc.graph.rule import Value, infers, operator_name


@infers("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@infers("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
@infers("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool2d_with_indices")
@infers("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d")
@infers("upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
@infers("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "lp_pool2d")
@infers("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "grid_sampler")
def window(walk: Inference, node: Node) -> Value:
    """[N, C, space...] -> [N, C, other space...]; an axis that changes size, or that is space, stays whole."""
    axes = walk.axes(node.args[0])
    rank = len(axes)
    lead = rank - _space(node, rank)
    for axis in axes[lead:]:
        walk.freeze(node, axis, "space and time axes are resampled whole", "structure")
    if operator_name(node) == "grid_sampler":
        for axis in walk.axes(node.args[1]):
            walk.freeze(node, axis, "a grid of places is read whole", "structure")
    value = node.meta["val"]
    results = [value] if isinstance(value, Tensor) else list(value)
    shaped = tuple((*axes[:lead], *walk.frozen([hint(size) for size in item.shape[lead:]])) for item in results)
    return shaped[0] if isinstance(value, Tensor) else shaped


def _space(node: Node, rank: int) -> int:
    """How many trailing axes are space: read from the operator's name (1d, 2d, 3d)."""
    name = str(node.target).split(".")[1]
    for count in (1, 2, 3):
        if f"{count}d" in name:
            return count
    return rank - 2
