"""Imports point down: cli, then the compiler, then plan, rewrite, verify and report, then graph and exporters."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"slimc": "slimc", "graph": "slimc.graph", "exporters": "slimc.exporters"}
LINKS = (ROOT / "slimc" / "graph", ROOT / "slimc" / "exporters")
CONSOLE = {
    "slimc.cli",
    "slimc.commands",
    "slimc.console",
    "slimc.options",
}  # the only modules that know the command-line libraries
HELP_SECONDS = 0.5


def modules() -> dict[str, Path]:
    """Every module of the package, by its installed name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(link in path.parents for link in LINKS):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """The full names that a module imports, anywhere in it, `from a import b` as 'a.b'.

    Since slimc loads its public names on first use, `slimc.compress` after `import slimc` counts as an import too.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "slimc":
            yield from [] if node.attr.startswith("__") else [f"slimc.{node.attr}"]


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offences(modules_within: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of slimc, by modules of one package, that are outside of what is allowed."""
    return [
        f"{name} imports {imported}"
        for name, path in modules().items()
        if is_within(name, modules_within)
        for imported in imports(name, path)
        if is_within(imported, "slimc")
        and imported != "slimc"
        and not any(is_within(imported, package) for package in allowed)
    ]


def test_the_modules_are_found() -> None:
    found = modules()
    assert {"slimc", "slimc.errors", "slimc.graph", "slimc.exporters", "slimc.report.model"} <= found.keys()
    assert set(imports("slimc.report.html", found["slimc.report.html"])) >= {"slimc.report.format", "jinja2.DictLoader"}


def test_relative_and_lazy_imports_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    text = "from . import a\nfrom .b import c\nfrom ..d import e\nimport slimc\nslimc.f()\nslimc.__path__\n"
    path.write_text(text, encoding="utf-8")
    found = set(imports("slimc.graph.module", path))
    assert found == {"slimc.graph.a", "slimc.graph.b.c", "slimc.d.e", "slimc", "slimc.f"}


@pytest.mark.parametrize("package", ["slimc.graph", "slimc.exporters"])
def test_the_lower_packages_import_only_themselves_and_errors(package: str) -> None:
    assert offences(package, (package, "slimc.errors")) == []


def test_errors_import_nothing_of_slimc() -> None:
    assert offences("slimc.errors", ("slimc.errors",)) == []


def test_the_report_knows_nothing_of_how_a_model_became_small() -> None:
    assert offences("slimc.report", ("slimc.report", "slimc.errors")) == []


def test_only_the_console_knows_the_command_line_libraries() -> None:
    users = {
        name
        for name, path in modules().items()
        for imported in imports(name, path)
        if imported.split(".")[0] in {"typer", "click", "rich"}
    }
    assert users <= CONSOLE


def test_nothing_imports_the_command_line() -> None:
    users = {
        name
        for name, path in modules().items()
        for imported in imports(name, path)
        if any(is_within(imported, console) for console in CONSOLE)
    }
    assert users <= CONSOLE | {"slimc.__main__"}


def test_the_package_does_not_use_the_libraries_it_is_compared_with() -> None:
    users = [name for name, path in modules().items() for i in imports(name, path) if is_within(i, "torch_pruning")]
    assert users == []


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_importing_slimc_does_not_import_torch() -> None:
    done = run_python("import sys, slimc, slimc.errors; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_help_does_not_import_torch() -> None:
    code = """
import runpy, sys
sys.argv = ["slimc", "--help"]
try:
    runpy.run_module("slimc", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print("torch imported:", "torch" in sys.modules)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout
    assert done.stdout.strip().endswith("torch imported: False")


def test_help_answers_at_once() -> None:
    best = float("inf")
    for _ in range(8):  # two processes on one core's threads stretch processor time too: now and then three in a row
        started = seconds_of_children()
        done = subprocess.run([sys.executable, "-m", "slimc", "--help"], cwd=ROOT, capture_output=True, check=False)
        best = min(best, seconds_of_children() - started)
        assert done.returncode == 0, done.stderr.decode()
        if best < HELP_SECONDS:
            break
    assert best < HELP_SECONDS


def seconds_of_children() -> float:
    """Processor time, which other programs on the machine do not stretch as they do the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("folder", ["graph", "exporters"])
def test_the_folders_at_the_root_are_refused_as_top_level_packages(folder: str) -> None:
    done = run_python(f"import {folder}")
    assert done.returncode != 0
    assert f"import this package as slimc.{folder}" in done.stderr


def test_no_file_names_a_place_on_a_developers_machine() -> None:
    places = "|".join(("home", "Users", "root", "work", "mnt"))
    pattern = re.compile(rf"(?<![\w.~}})/-])/(?:{places})/\w|[A-Z]:\\Users")
    seen = 0
    for path in project_texts():
        seen += 1
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if pattern.search(line)
        ]
        assert found == []
    assert seen > 20


def project_texts() -> Iterator[Path]:
    suffixes = {".py", ".md", ".toml", ".txt", ".html", ".css", ".json", ".yml", ".yaml", ""}
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in suffixes)
    for folder in ("slimc", "graph", "exporters", "tests", "bench", "docs", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            hidden = "__pycache__" in path.parts or any(link in path.parents for link in LINKS)
            if path.is_file() and path.suffix in suffixes and not hidden:
                yield path
