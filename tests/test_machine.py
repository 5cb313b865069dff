from __future__ import annotations

import importlib.metadata
import os
import sys

import pytest

from slimc.exporters import machine

TWO_CORES_FOUR_THREADS = "\n\n".join(
    f"processor\t: {thread}\nmodel name\t: Example 9000\nphysical id\t: 0\n"
    f"core id\t: {thread % 2}\nflags\t: fpu {{simd}}"
    for thread in range(4)
)


def allow(monkeypatch: pytest.MonkeyPatch, threads: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: threads, raising=False)
    monkeypatch.setattr(machine, "_container_quota", lambda: None)


def test_this_machine_has_a_name_cores_and_memory() -> None:
    found = machine.describe()
    assert found.cpu
    assert 1 <= found.physical_cores <= found.logical_cores <= (os.cpu_count() or 1)
    assert found.memory_bytes is None or found.memory_bytes > 2**28
    assert "CPUExecutionProvider" in found.providers
    assert {"python", "torch", "onnx", "onnxruntime", "numpy"} <= found.versions.keys()


def test_two_threads_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, {0, 1, 2, 3})
    assert machine.logical_cores() == 4
    assert machine.physical_cores(TWO_CORES_FOUR_THREADS) == 2


def test_only_cores_that_the_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, {1, 3})  # the two threads of core 1
    assert machine.logical_cores() == 2
    assert machine.physical_cores(TWO_CORES_FOUR_THREADS) == 1


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, set(range(64)))
    monkeypatch.setattr(machine, "_container_quota", lambda: 1.5)
    assert machine.logical_cores() == 1


@pytest.mark.parametrize(
    ("flags", "level", "alignment"),
    [("avx2 avx512f", "AVX-512", 16), ("avx avx2", "AVX2", 8), ("sse4_2", "other", 8)],
)
def test_the_alignment_follows_the_vector_unit(flags: str, level: machine.Simd, alignment: int) -> None:
    assert machine.simd_level(TWO_CORES_FOUR_THREADS.format(simd=flags)) == level
    assert machine.preferred_alignment(level) == alignment


def test_the_alignment_of_this_machine_is_that_of_its_vector_unit() -> None:
    assert machine.preferred_alignment() == machine.preferred_alignment(machine.describe().simd)


def test_the_cpu_is_named_from_cpuinfo() -> None:
    assert machine.cpu_model(TWO_CORES_FOUR_THREADS) == "Example 9000"
    assert machine.cpu_model("") != ""


def test_onnxruntime_has_a_version_under_any_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"):

        def version(asked: str, name: str = name) -> str:
            if asked != name:
                raise importlib.metadata.PackageNotFoundError
            return "9.9"

        monkeypatch.setattr("importlib.metadata.version", version)
        assert machine.onnxruntime_version() == "9.9"
    monkeypatch.setattr("importlib.metadata.version", lambda asked: version(asked, "none"))
    assert machine.onnxruntime_version() is None


def test_without_onnxruntime_there_are_no_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert machine.onnxruntime_providers() == ()
