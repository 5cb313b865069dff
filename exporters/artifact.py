"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slimc.errors import OutputError

WRITTEN = (
    "model.onnx", "model.onnx.data", "model.pt2", "model.safetensors", "plan.json", "report.json", "report.html",
)  # fmt: skip
"""What a result can hold: a folder of these alone may be replaced, any other one is the user's."""


@dataclass(frozen=True)
class Artifact:
    """One written file: where it is, its format ("onnx", "pt2", ...), its size in bytes and its SHA-256 in hex."""

    path: Path
    format: str
    bytes: int
    sha256: str


def describe(path: Path, format: str) -> Artifact:
    """Describe a file that is already on disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Artifact(path, format, path.stat().st_size, digest)


def check_writable(target: Path, overwrite: bool = False) -> None:
    """Raise OutputError unless `whole_folder(target, overwrite)` could succeed; call it before long work.

    Nothing is left on disk. A later call can still fail: the disk may fill up in the meantime.
    """
    target = _resolve(target)
    _check_replaceable(target, overwrite)
    folder = _nearest_folder(target)
    try:
        # Permission bits say little for root, on read-only mounts and on network drives: try it.
        with tempfile.TemporaryDirectory(prefix=_prefix(target), dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{target}: cannot write in {folder} ({error.strerror}). Choose another --out.") from error


@contextlib.contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` when the block ends without an error.

    On any error, KeyboardInterrupt included, the folder is removed and `target` stays as it was. An earlier
    slimc output is replaced if `overwrite`. Raises OutputError if `target` cannot be written or is not ours.
    """
    target = _resolve(target)
    check_writable(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_folder(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be created ({error.strerror}). Choose another --out.") from error
    try:
        yield temporary
        _flush(temporary)
        _check_replaceable(target, overwrite)  # again: someone may have made it while we worked
        _replace_folder(temporary, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path, with the name of `target`, in a temporary folder; its files move beside `target` on success.

    Companions written next to the yielded path (ONNX external data, say) move too, before the file that names
    them. Existing files are replaced. On any error nothing changes. Raises OutputError if it cannot be written.
    """
    target = _resolve(target)
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; the name of a file is needed")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_folder(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be created ({error.strerror})") from error
    try:
        yield temporary / target.name
        _flush(temporary)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == target.name):
            path.chmod(0o666 & ~_umask())  # safetensors makes its files private
            path.replace(target.parent / path.name)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _resolve(target: Path) -> Path:
    return Path(os.path.realpath(target))


def _nearest_folder(target: Path) -> Path:
    for folder in target.parents:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise OutputError(f"{target}: {folder} is a file, not a folder. Choose another --out.")
    return target.parent


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if os.path.ismount(target):
        raise OutputError(f"{target}: something is mounted there; choose a folder inside it as --out")
    if not target.is_dir():
        raise OutputError(f"{target}: is a file; --out names a folder")
    names = {path.name for path in target.iterdir()}
    if not names:
        return
    if strangers := sorted(names.difference(WRITTEN)):
        raise OutputError(
            f"{target}: holds what was not written by slimc ({', '.join(strangers[:3])}), so it is left alone. "
            "Choose another --out."
        )
    if not overwrite:
        raise OutputError(f"{target}: holds an earlier result. Pass --overwrite to replace it, or another --out.")


def _temporary_folder(target: Path) -> Path:
    # Beside the target: a rename is atomic only within one file system.
    folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private, but it is about to become the result
    return folder


def _prefix(target: Path) -> str:
    return f".{target.name}.slimc-"


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it but to set it
    os.umask(mask)
    return mask


def _flush(folder: Path) -> None:
    # Without this a power cut after the rename can leave the right names over empty files.
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _replace_folder(new: Path, target: Path) -> None:
    """Put `new` where `target` is; what was there ends up at `new`, to be removed by the caller."""
    if not target.exists() or not any(target.iterdir()):
        new.rename(target)
        return
    if _exchange(new, target):
        return
    aside = new.with_name(new.name + "-old")
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system has no such call (only Linux has)."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_cwd, exchange = -100, 2
    return bool(rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0)
