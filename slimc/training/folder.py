"""The folder of a run: checkpoints that are whole or not there, a log, and a lock.

A checkpoint is one file; the manifest, written after it, names the files that are whole with their hashes. The last
two are kept, so that a run killed at any moment goes on from one of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from slimc.errors import OutputError, UsageError

_KEPT = 2
_ENTRY = {"number", "file", "sha256"}
_END = json.dumps({"event": "end"})
_MANIFEST, _LOG, _LOCK = "manifest.json", "log.jsonl", "lock"


class RunFolder:
    """Checkpoints of one run under one path.

    about: what the run is; a folder of another run is not gone on with.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, json.loads(json.dumps(about))

    @staticmethod
    def check_resumable(path: Path) -> None:
        """UsageError where nothing was ever begun."""
        if not (path / _LOG).exists() and not (path / _MANIFEST).exists():
            raise UsageError(f"{path} holds no run to go on with; leave --resume out to begin one")

    def start(self, resume: bool) -> dict[str, Any] | None:
        """The last whole checkpoint, or None for a run that begins.

        Raises UsageError where there is a run already and `resume` was not asked for, or where it is another run.
        """
        manifest = self._manifest()
        if manifest is None:
            if resume:
                self.check_resumable(self.path)
                if self._ended():
                    raise UsageError(f"the run in {self.path} has ended; leave --resume out to begin another one")
            self._create()
            (self.path / _LOG).unlink(missing_ok=True)
            return None
        if manifest["about"] != self.about:
            wrong = [key for key in self.about if manifest["about"].get(key) != self.about[key]]
            key = wrong[0] if wrong else "about"
            raise UsageError(
                f"{self.path} holds another run: its {key} is {manifest['about'].get(key)!r}, not "
                f"{self.about.get(key)!r}. Give the options of that run, or another folder"
            )
        if not resume:
            raise UsageError(f"{self.path} holds a run already: --resume goes on with it, or remove it")
        for entry in reversed(manifest["checkpoints"]):
            content = self._read(entry)
            if content is not None:
                state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
                return state
        raise OutputError(f"{self.path}: none of its checkpoints is whole any more; remove the folder to begin again")

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; on any failure the earlier ones are as they were."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getbuffer()
        manifest = self._manifest() or {"about": self.about, "checkpoints": []}
        number = 1 + max((entry["number"] for entry in manifest["checkpoints"]), default=0)
        name = f"checkpoint-{number:06d}.pt"
        try:
            _write(self.path / name, content)
            entry = {"number": number, "file": name, "sha256": hashlib.sha256(content).hexdigest()}
            kept = [*manifest["checkpoints"], entry][-_KEPT:]
            text = json.dumps({"about": self.about, "checkpoints": kept}, indent=1)
            _write(self.path / _MANIFEST, text.encode())
        except OSError as error:
            raise OutputError(f"{self.path}: the checkpoint cannot be written ({error.strerror or error})") from error
        names = {entry["file"] for entry in kept}
        for old in self.path.glob("checkpoint-*.pt"):
            if old.name not in names:
                old.unlink(missing_ok=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to log.jsonl."""
        with (self.path / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; UsageError where another process does. The lock goes with the process, however it ends."""
        import fcntl

        self._create()
        with (self.path / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{self.path} is in use by another slimc that is running now") from None
            try:
                yield
            finally:
                self._remove_if_empty()
                # Closing is not enough: workers of a DataLoader that live on have the file too.
                fcntl.flock(file, fcntl.LOCK_UN)

    def _remove_if_empty(self) -> None:
        """Leave no folder of a run that ended before anything was kept."""
        if [file.name for file in self.path.iterdir()] == [_LOCK]:
            (self.path / _LOCK).unlink()
            self.path.rmdir()

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Whether there is a run to go on with."""
        return (path / _MANIFEST).exists()

    @staticmethod
    def clear(path: Path) -> None:
        """Remove the checkpoints of a run whose result is safe; the log stays, and says that it has ended."""
        with (path / _LOG).open("a", encoding="utf-8") as log:
            log.write(_END + "\n")
        for file in (path / _MANIFEST, *path.glob("checkpoint-*.pt"), path / _LOCK):
            file.unlink(missing_ok=True)

    def _ended(self) -> bool:
        log = self.path / _LOG
        return log.exists() and log.read_text(encoding="utf-8").rstrip().endswith(_END)

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be created ({error.strerror})") from error

    def _manifest(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise OutputError(f"{self.path / _MANIFEST} cannot be read: {error}") from error
        fits = isinstance(found, dict) and isinstance(found.get("about"), dict)
        entries = found["checkpoints"] if fits and isinstance(found.get("checkpoints"), list) else [None]
        if not isinstance(found, dict) or not all(isinstance(own, dict) and own.keys() >= _ENTRY for own in entries):
            raise OutputError(f"{self.path / _MANIFEST} is not a manifest of slimc")
        return found

    def _read(self, entry: Mapping[str, Any]) -> bytes | None:
        try:
            content = (self.path / str(entry["file"])).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == entry["sha256"] else None


def _write(path: Path, content: bytes | memoryview) -> None:
    """A file that appears whole: written beside its place, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
