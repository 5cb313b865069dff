"""Zip archives as PyTorch writes them: checked first, then read from a copy that holds only what was checked."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from slimc.errors import LoadError

# pickle streams and JSON descriptions: large models stay far below this, and both are parsed in Python
_MAX_DESCRIPTION_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Archive:
    """An opened archive whose directory was checked; contents are checked (CRC) as they are read.

    ``entries`` is keyed by the name below the root folder: ``data.pkl``, ``data/0``, ``models/model.json``.
    """

    label: str
    zip: zipfile.ZipFile
    entries: Mapping[str, zipfile.ZipInfo]

    def size(self, name: str) -> int:
        """Bytes of one entry."""
        return self.entries[name].file_size

    def read(self, name: str) -> bytes:
        """Read one small entry, such as a pickle stream or a JSON description."""
        if self.size(name) > _MAX_DESCRIPTION_BYTES:
            raise LoadError(
                f"{self.label}: entry {name} has {self.size(name)} bytes; a description of a model has at most "
                f"{_MAX_DESCRIPTION_BYTES}. Save the model alone, without logs or data."
            )
        return self._read_checked(name)

    def repack(self, names: Iterable[str], replaced: Mapping[str, bytes]) -> io.BytesIO:
        """Copy the named entries into a new archive in memory, with some contents replaced.

        torch reads the copy and not the file. So the bytes that were checked are the bytes that are used, even if
        the file changes meanwhile or its directory means something else to torch's zip reader than to Python's.
        """
        copy = io.BytesIO()
        with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
            for name in names:
                content = replaced[name] if name in replaced else self._read_checked(name)
                target.writestr(f"archive/{name}", content)
        copy.seek(0)
        return copy

    def _read_checked(self, name: str) -> bytes:
        # zipfile compares the CRC at the end of each read; torch.load does not look at it
        try:
            return self.zip.read(self.entries[name])
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise LoadError(
                f"{self.label}: the bytes of entry {name} are damaged ({error}). Copy or download the file again."
            ) from error


def open_archive(source: Path | BinaryIO, label: str) -> Archive:
    """Open a zip archive and refuse what PyTorch never writes: compression, encryption, duplicates, overlaps."""
    try:
        opened = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise LoadError(
            f"{label}: the file starts like a PyTorch file but its end is missing or damaged ({error}). "
            "Copy or download it again."
        ) from error
    infos = [info for info in opened.infolist() if not info.is_dir()]
    if not infos:
        raise LoadError(f"{label}: the archive is empty. Save the model again.")
    entries = _below_root(infos, label)
    if any(name == "constants.pkl" or name.startswith("code/") for name in entries):
        raise LoadError(
            f"{label}: a TorchScript archive. TorchScript cannot be pruned: save the original nn.Module "
            "(torch.save(model, ...)) or its state_dict with --arch."
        )
    _check_directory(infos, _length(opened), label)
    return Archive(label, opened, entries)


def _length(opened: zipfile.ZipFile) -> int:
    stream = opened.fp
    assert stream is not None
    stream.seek(0, io.SEEK_END)
    return stream.tell()


def _check_directory(infos: list[zipfile.ZipInfo], length: int, label: str) -> None:
    seen: set[str] = set()
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
            raise LoadError(
                f"{label}: entry {info.filename} is compressed ({info.compress_size} bytes become {info.file_size}). "
                "torch.save never compresses, so the file was changed after saving. Save the model again."
            )
        if info.compress_size != info.file_size:
            raise LoadError(
                f"{label}: entry {info.filename} has {info.compress_size} bytes and claims {info.file_size}. "
                "Not loaded; copy or download the file again."
            )
        if info.flag_bits & 0x1:
            raise LoadError(f"{label}: entry {info.filename} is encrypted. Save the model again without a password.")
        if info.filename in seen:
            raise LoadError(f"{label}: entry {info.filename} appears twice, so its content is ambiguous; not loaded.")
        seen.add(info.filename)
    total = sum(info.file_size for info in infos)
    if total > length:
        raise LoadError(
            f"{label}: its entries claim {total} bytes and the file has {length}. "
            "The file is damaged or made to exhaust memory; not loaded."
        )


def _below_root(infos: list[zipfile.ZipInfo], label: str) -> dict[str, zipfile.ZipInfo]:
    roots = {info.filename.partition("/")[0] if "/" in info.filename else "" for info in infos}
    if roots == {""} or "" in roots:
        return {info.filename: info for info in infos}  # torch.export before 2.8 wrote no root folder
    if len(roots) > 1:
        shown = ", ".join(sorted(roots)[:3])
        raise LoadError(
            f"{label}: a zip archive with several folders ({shown}), not a PyTorch file. Give the model file inside it."
        )
    return {info.filename.partition("/")[2]: info for info in infos}
