"""A sub-package that is missing from the list in pyproject.toml is dropped from the wheel without a word."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# where each folder of the tree is installed
INSTALLED = {"slimc": "slimc", "graph": "slimc/graph", "exporters": "slimc/exporters"}
LINKS = ("slimc/graph", "slimc/exporters")


def tree_files() -> dict[str, Path]:
    """Every file that belongs in the wheel, by its place there."""
    found = {}
    for folder, place in INSTALLED.items():
        for path in sorted((ROOT / folder).rglob("*")):
            inside = path.relative_to(ROOT)
            through_link = inside.as_posix().startswith(LINKS)
            if path.is_file() and not through_link and "__pycache__" not in inside.parts:
                found[f"{place}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return found


def copy_tree(target: Path, links: str) -> Path:
    """The tree as git gives it to a user; without support for links, git writes a file that holds the target."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in INSTALLED:
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=ignored)
    for link in LINKS:
        assert (target / link).is_symlink()
        if links != "kept":
            (target / link).unlink()
        if links == "text files":
            (target / link).write_text(f"../{Path(link).name}", encoding="utf-8")
    return target


def call_backend(tree: Path, hook: str) -> Path:
    """What `python -m build --no-isolation` calls; no network."""
    code = f"from setuptools import build_meta; print('built', build_meta.{hook}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tree / "dist" / done.stdout.rpartition("built ")[2].strip()


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def check_wheel(wheel: Path) -> None:
    names = wheel_files(wheel)
    version = re.escape(wheel.name.split("-")[1])
    assert {re.sub(version, "", name.split("/")[0]) for name in names} == {"slimc", "slimc-.dist-info"}
    shipped = {name for name in names if name.startswith("slimc/")}
    missing, unexpected = sorted(tree_files().keys() - shipped), sorted(shipped - tree_files().keys())
    assert not missing, f"not in the wheel, add to packages or package-data in pyproject.toml: {missing}"
    assert not unexpected


def test_the_tree_holds_what_the_other_tests_look_for() -> None:
    files = tree_files()
    assert {"slimc/py.typed", "slimc/report/report.html", "slimc/report/style.css", "slimc/errors.py"} <= files.keys()
    assert {"slimc/graph/__init__.py", "slimc/exporters/__init__.py"} <= files.keys()
    assert files["slimc/graph/__init__.py"] == ROOT / "graph" / "__init__.py"


def test_every_folder_with_modules_is_a_listed_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    present = {name.rpartition("/")[0].replace("/", ".") for name in tree_files() if name.endswith(".py")}
    assert sorted(listed) == sorted(present), "the list of packages in pyproject.toml and the folders differ"
    unmarked = [package for package in present if f"{package.replace('.', '/')}/__init__.py" not in tree_files()]
    assert not unmarked, f"without __init__.py: {unmarked}"


@pytest.mark.parametrize("links", ["kept", "absent", "text files"])
def test_the_wheel_holds_the_whole_tree_under_slimc(tmp_path: Path, links: str) -> None:
    check_wheel(call_backend(copy_tree(tmp_path / "tree", links), "build_wheel"))


def test_a_wheel_built_from_the_source_archive_is_the_same(tmp_path: Path) -> None:
    archive = call_backend(copy_tree(tmp_path / "tree", "kept"), "build_sdist")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    check_wheel(call_backend(tree, "build_wheel"))


def test_versions_that_tests_run_with_are_within_the_declared_ranges() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    checked = 0
    for requirement in map(packaging.Requirement, declared):
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
            checked += 1
    assert checked >= 15
