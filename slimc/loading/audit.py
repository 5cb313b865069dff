"""What is checked once a model is in memory: that it holds only what a model holds, and finite numbers."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slimc.errors import LoadError

# A module reached along more paths than this would take forever to walk (train() visits each path).
_MAX_PATHS = 100_000


# What torch itself keeps in every module, by kind: containers, and the mode.
_KINDS = {
    key: kind for key, value in vars(nn.Module()).items() for kind in (dict, set, bool) if isinstance(value, kind)
}


def check_structure(model: nn.Module, label: str) -> None:
    """Refuse what a file can hide in a module's state: hooks, replaced methods, loops, odd children.

    Such entries would run, or send the run astray, at the first forward; saved models do not need them.
    """
    _check_tree(model, label)
    for path, module in _modules_anywhere(model, label):
        where = f"{label}: {path or 'the model'} ({type(module).__name__})"
        for key, value in vars(module).items():
            _check_attribute(type(module), key, value, where)


def _check_attribute(owner: type, key: str, value: Any, where: str) -> None:
    if not isinstance(key, str) or not isinstance(value, _KINDS.get(key, object)):
        raise LoadError(f"{where}: its entry {key!r} is a {type(value).__name__}. The file is damaged; save it again.")
    if "_hooks" in key and isinstance(value, dict) and len(value) > 0:
        raise LoadError(f"{where}: holds hooks ({key}). Remove them (handle.remove()) before saving.")
    if key == "_compiled_call_impl" and value is not None:
        raise LoadError(f"{where}: holds a compiled call. Save the model before model.compile().")
    kind = inspect.getattr_static(owner, key, None)
    if isinstance(kind, types.FunctionType | classmethod | staticmethod):
        raise LoadError(
            f"{where}: its attribute {key!r} replaces the method of that name. Put the change into a subclass, or save "
            "model.state_dict() and give the architecture with --arch."
        )


def _check_tree(model: nn.Module, label: str) -> None:
    """Refuse modules that contain themselves, children that are no modules, and children reached too many times."""
    paths: dict[int, int] = {}
    open_: set[int] = set()

    def count(module: nn.Module, path: str) -> int:
        if id(module) in paths:
            return paths[id(module)]
        if id(module) in open_:
            raise LoadError(f"{label}: module {path} contains itself. Not loaded.")
        open_.add(id(module))
        total = 1
        for name, child in _children(module, path, label):
            total += count(child, f"{path}.{name}" if path else name)
            if total > _MAX_PATHS:
                raise LoadError(f"{label}: {path or 'the model'} repeats its children over {_MAX_PATHS} times.")
        open_.discard(id(module))
        paths[id(module)] = total
        return total

    try:
        count(model, "")
    except RecursionError as error:
        raise LoadError(f"{label}: its modules are nested too deeply to walk. Not loaded.") from error


def _children(module: nn.Module, path: str, label: str) -> Iterator[tuple[str, nn.Module]]:
    state = vars(module)
    tables = {"_modules": nn.Module, "_parameters": torch.Tensor, "_buffers": torch.Tensor}
    for table, wanted in tables.items():
        entries = state.get(table)
        where = f"{label}: {path or 'the model'} ({type(module).__name__})"
        if not isinstance(entries, dict):
            raise LoadError(f"{where}: has no table {table}; the file is damaged or made by hand. Save it again.")
        for name, value in entries.items():
            if not isinstance(name, str) or not (value is None or isinstance(value, wanted)):
                raise LoadError(
                    f"{where}: entry {name!r} of {table} is a {type(value).__name__}. Save the model again."
                )
    for name, child in state["_modules"].items():
        if child is not None:
            yield name, child


def _modules_anywhere(model: nn.Module, label: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module that can be reached, also through lists, dictionaries, partials and plain objects."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", model)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen or isinstance(value, str | bytes | int | float | torch.Tensor | type(None)):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            list(_children(value, path, label))  # its tables are what they should be
            yield path, value
        for key, part in _parts(value):
            waiting.append((f"{path}.{key}" if path else key, part))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        tables = ("_modules", "_parameters", "_buffers")
        yield from ((key, part) for key, part in vars(value).items() if key not in tables)
        yield from vars(value)["_modules"].items()
        return
    if isinstance(value, dict):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((str(index), part) for index, part in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    if not isinstance(value, type | types.FunctionType | types.ModuleType):
        yield from getattr(value, "__dict__", {}).items()


def check_values(model: nn.Module, label: str) -> None:
    """Refuse quantized, sparse, complex and absent tensors, and NaN or infinity in parameters and buffers."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.sparse")):
            raise LoadError(
                f"{label}: {path or 'the model'} is a quantized {type(module).__name__}. "
                "Prune the float model and quantize the result."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_lazy(tensor):
            check_kind(name, tensor, label)
            # Masks hold minus infinity, and a single number may be a limit that never binds.
            _check_finite(name, tensor, label, is_mask=not isinstance(tensor, nn.Parameter))


def check_kind(name: str, tensor: torch.Tensor, label: str) -> None:
    """Refuse tensors whose numbers cannot be read, compared and cut like plain ones."""
    is_wrapper: bool = is_traceable_wrapper_subclass(tensor)
    if tensor.is_quantized:
        seen, advice = f"is quantized ({tensor.dtype})", "Give the float model and quantize the result."
    elif tensor.layout != torch.strided:
        seen, advice = f"is sparse ({tensor.layout})", "Convert it with .to_dense() before saving."
    elif tensor.is_complex():
        seen, advice = f"is complex ({tensor.dtype})", "Complex weights are not supported."
    elif tensor.is_meta:
        seen, advice = "is on the meta device and has no values", "Load real weights before saving."
    elif is_wrapper:
        seen, advice = f"is a {type(tensor).__name__}", "Save plain tensors (full_tensor() or dequantize() first)."
    elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size() and not _is_broadcast(tensor):
        seen, advice = f"claims shape {list(tensor.shape)} over fewer bytes", "Save it after .contiguous()."
    else:
        return
    raise LoadError(f"{label}: {name} {seen}. {advice}")


def _is_broadcast(tensor: torch.Tensor) -> bool:
    # honest code expands small buffers; files are stopped earlier, by what they claim
    return 0 in tensor.stride() and tensor.numel() <= 1 << 20


def _check_finite(name: str, tensor: torch.Tensor, label: str, is_mask: bool) -> None:
    """is_mask: minus infinity is a number, and alone either is."""
    if not tensor.is_floating_point():
        return
    wrong = ~torch.isfinite(tensor)
    if is_mask:
        wrong &= torch.isnan(tensor) if tensor.numel() == 1 else tensor != -torch.inf
    bad = int(wrong.sum())
    if bad:
        nan = int(torch.isnan(tensor).sum())
        raise LoadError(
            f"{label}: {name} has {nan} NaN and {bad - nan} infinite values of {tensor.numel()}. "
            "The training diverged or the file is damaged: give an earlier checkpoint."
        )
