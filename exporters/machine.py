"""What this machine is: figures that a measurement needs beside it to mean anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Simd = Literal["AVX-512", "AVX2", "other"]

_CPUINFO = Path("/proc/cpuinfo")
_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "numpy")
_RUNTIMES = [name for name in _LIBRARIES if name.startswith("onnxruntime")]

# ONNX Runtime's convolution kernels work on blocks of as many channels as one vector register holds floats, and fall
# back to a slow path for widths that are no multiple of 4 (onnxruntime issue #14392); 8 suits most runtimes.
_ALIGNMENT: Mapping[Simd, int] = {"AVX-512": 16, "AVX2": 8, "other": 8}


@dataclass(frozen=True)
class Machine:
    """One machine at one moment; memory in bytes, load average over the last minute (None where unknown)."""

    cpu: str
    physical_cores: int
    logical_cores: int
    simd: Simd
    memory_bytes: int | None
    load_average: float | None
    platform: str
    versions: Mapping[str, str]
    providers: tuple[str, ...]


def onnxruntime_version() -> str | None:
    """The version of ONNX Runtime, whichever of its distributions is installed; None without it."""
    found = _versions()
    return next((found[name] for name in _RUNTIMES if name in found), None)


def describe() -> Machine:
    """Describe this machine as this process may use it: cores after affinity and container limits."""
    text = _cpuinfo()
    return Machine(
        cpu=cpu_model(text),
        physical_cores=physical_cores(text),
        logical_cores=logical_cores(),
        simd=simd_level(text),
        memory_bytes=_memory_bytes(),
        load_average=load_average(),
        platform=platform.platform(),
        versions=_versions(),
        providers=onnxruntime_providers(),
    )


def preferred_alignment(simd: Simd | None = None) -> int:
    """Return the number of channels that widths should be a multiple of, here or at the given SIMD level."""
    return _ALIGNMENT[simd or simd_level(_cpuinfo())]


def logical_cores() -> int:
    """Return how many hardware threads this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _container_quota()
    return max(1, min(allowed, int(quota))) if quota else allowed


def physical_cores(cpuinfo: str | None = None) -> int:
    """Return how many cores this process may use, two threads of one core counting once."""
    cores: set[tuple[str, str]] = set()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    for block in (_cpuinfo() if cpuinfo is None else cpuinfo).split("\n\n"):
        processor, core = _field(block, "processor"), _field(block, "core id")
        if processor is None or core is None or (allowed is not None and int(processor) not in allowed):
            continue
        cores.add((_field(block, "physical id") or "0", core))
    return min(len(cores), logical_cores()) if cores else logical_cores()


def cpu_model(cpuinfo: str) -> str:
    """Return the processor's name, from the text of /proc/cpuinfo or else from the platform."""
    return _field(cpuinfo, "model name") or platform.processor() or platform.machine() or "unknown"


def simd_level(cpuinfo: str) -> Simd:
    """Return the widest vector unit that ONNX Runtime would use, from the text of /proc/cpuinfo or else from torch."""
    flags = set((_field(cpuinfo, "flags") or "").split())
    if not flags:
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        flags = {"AVX512": {"avx512f"}, "AVX2": {"avx2"}}.get(capability, set())
    if "avx512f" in flags:
        return "AVX-512"
    return "AVX2" if "avx2" in flags else "other"


def load_average() -> float | None:
    """Return how many processes wanted a core over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def onnxruntime_providers() -> tuple[str, ...]:
    """Return the execution providers of the installed onnxruntime; none if it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())


def _cpuinfo() -> str:
    return _CPUINFO.read_text(errors="replace") if _CPUINFO.exists() else ""


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*: *(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _container_quota() -> float | None:
    """Return the cores that a container (cgroup v2) may use; None if there is no limit."""
    path = Path("/sys/fs/cgroup/cpu.max")
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else float(quota) / float(period)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
