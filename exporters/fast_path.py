"""Which convolutions ONNX Runtime runs on its fast CPU path, read from the graph that it optimised.

The fast path (the NCHWc layout, channels in blocks of 8 or 16) needs input channels that are a multiple of 4, or
fewer than a block. A convolution that misses it takes 1.3 to 6 times as long, which can eat the whole gain of a
cut. No timing is needed to see it: the optimised graph puts the fast ones into a domain of their own.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FAST_DOMAIN = "com.microsoft.nchwc"
_CONVOLUTIONS = ("Conv", "FusedConv")


@dataclass(frozen=True)
class FastPath:
    """Convolutions of one file: how many there are, and the names (of their weights) of those off the fast path."""

    convolutions: int
    slow: tuple[str, ...]


def inspect(path: Path, onnxruntime: Any) -> FastPath:
    """Optimise the file as ONNX Runtime does for this CPU and see where its convolutions went."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="slimc-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(optimised)
        # Weights go to a file that is never read: only the nodes matter, and protobuf ends at 2 GB.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(str(optimised), load_external_data=False).graph
    found = [node for node in graph.node if node.op_type in _CONVOLUTIONS]
    slow = tuple(node.input[1] or node.name for node in found if node.domain != _FAST_DOMAIN)
    return FastPath(len(found), slow)


def lost(before: FastPath | None, after: FastPath | None) -> tuple[str, ...]:
    """Return the names of convolutions that are slow in `after` and were not in `before`."""
    if before is None or after is None or not after.convolutions or not before.convolutions:
        return ()
    if len(after.slow) / after.convolutions <= len(before.slow) / before.convolutions:
        return ()
    return tuple(name for name in after.slow if name not in before.slow)
