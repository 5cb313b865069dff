"""Weights as a .safetensors file: no code in it, so any program may read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from slimc.errors import LoadError, OutputError
from slimc.exporters.artifact import Artifact, describe, whole_file


def export(state: Mapping[str, Tensor], path: Path) -> Artifact:
    """Write a state dict; tensors that are one tensor under several names (tied weights) are stored once.

    The metadata maps every other name to the stored one, the convention of `safetensors.torch.load_model`.
    Tensors that overlap without being the same are stored separately. The tensors passed in are not changed.
    """
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            raise OutputError(f"{name}: has no values (it is on the meta device), so it cannot be saved")
        first = seen.setdefault(_identity(tensor), name) if tensor.numel() else name
        if first != name:
            metadata[name] = first
            continue
        # A clone, since a view would keep its whole storage and safetensors refuses shared storage.
        stored[name] = tensor.detach().cpu().clone().contiguous()
    with whole_file(path) as temporary:
        save_file(stored, temporary, metadata)
    return describe(path, "safetensors")


def load(path: Path) -> dict[str, Tensor]:
    """Read a state dict onto the CPU; tied weights come back as one tensor under each of their names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path}: is not a readable safetensors file ({error}). Copy or download it again.") from error
    for name, first in metadata.items():
        if name not in tensors and first in tensors:
            tensors[name] = tensors[first]
    return tensors


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors exactly if they are the same view of the same storage."""
    storage = tensor.untyped_storage()
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return (tensor.device, storage.data_ptr(), *view)
