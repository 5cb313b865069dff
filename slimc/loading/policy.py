"""Which names a pickled model may use, and which of them loading may call.

A class that is only *named* runs no code of the file. So module classes may be named and filled with state, never
called; functions may be held as attributes (an activation, say), never called; what may be called is a short list.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.nn import functional

from slimc.errors import LoadError
from slimc.loading.scan import Call, Global, Made, Program, shortened

# Packages whose nn.Module subclasses may be named.
MODULE_PACKAGES = (
    "torch.nn",
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
    "transformers.models",
    "transformers.activations",
    "transformers.pytorch_utils",
)

# Plain classes that library models keep as attributes (found by saving those of torchvision and timm), and
# a few of Python's own.
_VALUE_CLASSES = frozenset(
    {
        "argparse.Namespace",
        "builtins.frozenset",
        "builtins.range",
        "builtins.slice",
        "functools.partial",
        "torch.nn.attention.SDPBackend",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.efficientnet.FusedMBConvConfig",
        "torchvision.models.efficientnet.MBConvConfig",
        "torchvision.models.googlenet.GoogLeNetOutputs",
        "torchvision.models.inception.InceptionOutputs",
        "timm.layers.format.Format",
        "transformers.generation.configuration_utils.GenerationConfig",
        "timm.models._features.FeatureInfo",
    }
)

# Functions that library models keep as attributes; they are held, not called.
_HELD_FUNCTIONS = frozenset({"torchvision.ops.boxes.box_iou", "torchvision.models.optical_flow.raft._pass_through_h"})

# Names that loading calls: with these arguments come tensors, containers and plain values, nothing else.
_REBUILD = frozenset(
    f"torch._utils.{name}"
    for name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_qtensor",
        "_rebuild_sparse_tensor",
        "_rebuild_meta_tensor_no_storage",
    )
)
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_TENSOR_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
# Plain values that training scripts keep beside the weights: dates, paths, numbers of numpy.
_BYTES = frozenset({"builtins.bytearray", "builtins.bytes"})
_NUMPY = frozenset({"numpy.dtype", "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"})
_NUMBER = re.compile(r"\('[biuf][1248]',\)")
_PLAIN = (
    _BYTES
    | _NUMPY
    | {f"datetime.{name}" for name in ("date", "datetime", "timedelta")}
    | {f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")}
)
_CALLED = (
    _REBUILD
    | _PLAIN
    | {f"builtins.{name}" for name in ("complex", "frozenset", "range", "set", "slice")}
    | {f"collections.{name}" for name in ("Counter", "OrderedDict")}
    | {f"torch.{name}" for name in ("Size", "device", "serialization._get_layout")}
    | {_FROM_TYPE, "_codecs.encode", "functools.partial"}
)

_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "numpy")
_QUANTIZED = "Quantized and quantization-aware modules are not supported: prune the float model, quantize afterwards."
_ADVICE = (
    ("torch.fx", "An fx.GraphModule rebuilds itself by running source text from the file. Save it with "
     "torch.export.save as .pt2, or save the original module."),
    ("torch.jit", "TorchScript is not supported. Save the original nn.Module."),
    ("torch._dynamo", "The model was wrapped by torch.compile. Save model._orig_mod instead."),
    ("torch.ao", _QUANTIZED),
    ("torch.nn.quantized", _QUANTIZED),
    ("torch.nn.qat", _QUANTIZED),
    ("torch.nn.intrinsic", _QUANTIZED),
    ("torch.nn.parallel.distributed", "Save model.module, without its DistributedDataParallel wrapper."),
    ("torch.nn.utils.weight_norm", "Call torch.nn.utils.remove_weight_norm on the layer before saving."),
    ("torch.nn.utils.spectral_norm", "Call torch.nn.utils.remove_spectral_norm on the layer before saving."),
    ("torch.nn.utils.prune", "Call torch.nn.utils.prune.remove on the layer before saving."),
    ("builtins.getattr", "A bound method is stored in the model: a hook, self.x = self.method, or "
     "self.x = torch.relu (use nn.ReLU or torch.nn.functional.relu). Change that, or save model.state_dict() and give "
     "the architecture with --arch."),
    ("numpy", "Save the tensors alone: torch.save(model.state_dict(), ...)."),
    ("__main__", "The class lives in the script that saved it. Move it into a module and save again, or save "
     "model.state_dict() and give --arch package.module:factory."),
)  # fmt: skip


def check(program: Program, unknown: Iterable[str], allow: Sequence[str], label: str) -> list[tuple[Any, str]]:
    """Resolve the names that torch does not allow by itself, and check every call.

    ``unknown`` are the names outside torch's own list. The result is what ``torch.serialization.safe_globals``
    takes. Packages in ``allow`` are imported, which runs their code: the user asked for that by naming them.
    """
    known = {str(name): name for name in program.globals}
    if strange := sorted(set(unknown) - known.keys()):
        raise LoadError(f"{label}: names {strange[0]!r} in a way that no saved model does. Not loaded.")
    # the name that says most about what to do is refused first
    ordered = sorted(unknown, key=lambda name: (_advice_rank(known[name]), name))
    resolved = {name: _resolve(known[name], allow, label) for name in ordered}
    for call in program.calls:
        _check_call(call, resolved, label)
    for held in program.built:
        if held not in resolved and held not in ("collections.OrderedDict", "functools.partial"):
            raise LoadError(f"{label}: sets the state of a {held}, which no saved model does. Not loaded.")
    found = [(value, name) for name, value in resolved.items()]
    if not _NUMPY.isdisjoint(resolved):  # torch asks for the class of each dtype
        found += [(type(kind), f"numpy.dtypes.{type(kind).__name__}") for kind in map(np.dtype, "?bhilqBHILQefd")]
    return found


def _resolve(named: Global, allow: Sequence[str], label: str) -> Any:
    name = str(named)
    if name in _VALUE_CLASSES | _PLAIN | _HELD_FUNCTIONS or _is_functional(named):
        return _lookup(named, label)
    if _advice(named):
        raise _refusal(named, label)
    if _inside(named.module, MODULE_PACKAGES):
        return _module_class(named, label)
    if _inside(named.module, allow):
        return _user_value(named, allow, label)
    raise _refusal(named, label)


def _is_functional(named: Global) -> bool:
    """Whether it is a public function of torch.nn.functional, of which some are written in C++."""
    if named.module not in ("torch.nn.functional", "torch._C._nn"):
        return False
    value = getattr(sys.modules[named.module], named.name, None)
    is_own = isinstance(value, types.FunctionType | types.BuiltinFunctionType) and value.__module__ == named.module
    return is_own and any(value is other for key, other in vars(functional).items() if not key.startswith("_"))


@contextlib.contextmanager
def project_on_path() -> Iterator[None]:
    """Let the current folder be imported from, after everything else, as long as a user's code is looked up."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _module_class(named: Global, label: str) -> type:
    value = _lookup(named, label)
    if not isinstance(value, type) or not _inside(value.__module__, MODULE_PACKAGES):
        raise _refusal(named, label)
    # models of transformers hold their configuration: plain values, filled in without a call
    configuration = any(str(base.__module__) == "transformers.configuration_utils" for base in value.__mro__)
    if not (issubclass(value, nn.Module) or configuration):
        raise _refusal(named, label)
    return value


def _user_value(named: Global, allow: Sequence[str], label: str) -> Any:
    with project_on_path():  # only for what the user named: a file must not choose what is imported from there
        value = _lookup(named, label)
    defined_here = _inside(str(getattr(value, "__module__", "")), allow)
    if not defined_here or not isinstance(value, type | types.FunctionType):
        raise _refusal(named, label)
    return value


def _lookup(named: Global, label: str) -> Any:
    try:
        module = importlib.import_module(named.module)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"{label}: needs {named}, and Python finds no module {error.name!r}. "
            "Install the package (in a version like the one that saved the file), or run from the folder that holds it."
        ) from error
    except Exception as error:  # user packages can fail in any way
        raise LoadError(f"{label}: needs {named}, and importing {named.module} fails with {error!r}.") from error
    if not hasattr(module, named.name):
        raise LoadError(
            f"{label}: needs {named}, which the installed {named.module.partition('.')[0]} does not have. "
            "Install the version that saved the file, or save model.state_dict() and give --arch."
        )
    return getattr(module, named.name)


def _check_call(call: Call, resolved: dict[str, Any], label: str) -> None:
    name = str(call.function)
    value = resolved.get(name)
    if any(isinstance(part, Made) and part.by == "builtins.range" for part in call.arguments):
        raise LoadError(f"{label}: gives a range to {name}, which could be endless. Not loaded.")
    if call.new:
        if not isinstance(value, type) or (issubclass(value, nn.Module) and call.arguments):
            raise LoadError(f"{label}: creates a {name} in a way that no saved model does. Not loaded.")
        return
    if isinstance(value, type) and issubclass(value, enum.Enum) and len(call.arguments) == 1:
        return
    if name not in _CALLED:
        raise LoadError(
            f"{label}: the file calls {name} while loading. Saved models name classes and fill them, they never call "
            "them, so the file was made by hand or by an object's own __reduce__. "
            "Save model.state_dict() from a source that you trust and give the architecture with --arch."
        )
    if name == "functools.partial":
        _check_partial(call, resolved, label)
    is_strange = name in _BYTES and not all(isinstance(part, str | Made) for part in call.arguments)  # a length
    if is_strange or (name == "numpy.dtype" and not _NUMBER.fullmatch(str(call.arguments[:1]))):
        raise LoadError(f"{label}: makes {name} of {shortened(call.arguments)}, which no saved model does. Not loaded.")
    if name == _FROM_TYPE and not _rebuilds_plain_tensor(call.arguments):
        raise LoadError(
            f"{label}: holds a tensor of a special class ({shortened(call.arguments[1:2])}). Save plain tensors."
        )


def _check_partial(call: Call, resolved: dict[str, Any], label: str) -> None:
    """Refuse calls, prepared by the file, of the functions and plain classes of packages that the user allowed."""
    function = call.arguments[0] if call.arguments else None
    if not isinstance(function, Global) or str(function) in _VALUE_CLASSES or _is_functional(function):
        return
    value = resolved.get(str(function))
    is_layer = isinstance(value, type) and issubclass(value, nn.Module)
    if value is not None and not is_layer:
        raise LoadError(
            f"{label}: holds a functools.partial of {function}, so that the file would say what it is called with. "
            "Make it a method or a small function, or save model.state_dict() and give the architecture with --arch."
        )


def _rebuilds_plain_tensor(arguments: tuple[Any, ...]) -> bool:
    return len(arguments) == 4 and str(arguments[0]) in _REBUILD and str(arguments[1]) in _TENSOR_TYPES


def _advice(named: Global) -> str:
    rank = _advice_rank(named)
    return _ADVICE[rank][1] if rank < len(_ADVICE) else ""


def _advice_rank(named: Global) -> int:
    return next((i for i, (prefix, _) in enumerate(_ADVICE) if _inside(str(named), (prefix,))), len(_ADVICE))


def _refusal(named: Global, label: str) -> LoadError:
    package = named.module.partition(".")[0]
    text = _advice(named)
    if not text and package not in _LIBRARIES and package not in sys.stdlib_module_names:
        text = f"If {package} is code of yours or code that you trust, add --allow {package} (it will be imported). "
    text = text or "Do not use the file if you do not know where it comes from. "
    if not _advice(named):
        text += "From a source that you trust, save model.state_dict() and give the architecture with --arch."
    return LoadError(f"{label}: the file names {named}, which is not a class that a model may be made of. {text}")


def _inside(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
