"""What kind of file something is, told by its first bytes and not by its name."""

from __future__ import annotations

import difflib
import enum
from pathlib import Path

from slimc.errors import LoadError

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save wrote first before version 1.6


class Kind(enum.Enum):
    """The formats that are told apart; zip covers torch.save, torch.export and TorchScript."""

    ZIP = "zip"
    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    LEGACY = "legacy"


def kind_of(path: Path) -> Kind:
    """Tell the format of a model file, or say why it is none."""
    _check_present(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(1024)
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror}).") from error
    if not head:
        raise LoadError(f"{path}: the file is empty. Copy or save it again.")
    _check_real(path, head)
    if head.startswith(b"PK\x03\x04"):
        return Kind.ZIP
    if head[:1] == b"\x80" and (_LEGACY_MAGIC in head[:20] or path.suffix in (".pt", ".pth", ".pkl", ".bin")):
        return Kind.LEGACY
    if head[8:9] == b"{" and (path.suffix == ".safetensors" or int.from_bytes(head[:8], "little") < 1 << 30):
        return Kind.SAFETENSORS
    if path.suffix == ".onnx":
        return Kind.ONNX
    raise LoadError(_foreign(path, head))


def _check_present(path: Path) -> None:
    if path.is_dir():
        raise LoadError(
            f"{path}: a folder, not a model file. Give the file inside it, or hf:{path} for a transformers folder."
        )
    if path.exists():
        return
    folder = path.parent
    siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        raise LoadError(f"{path}: no such file. Did you mean {folder / close[0]}?")
    if path.suffix == "":
        raise LoadError(
            f"{path}: no such file. A model by name is torchvision:{path.name}, timm:{path.name} or "
            "package.module:factory."
        )
    raise LoadError(f"{path}: no such file. Check the path; relative paths start at {Path.cwd()}.")


def _check_real(path: Path, head: bytes) -> None:
    """Refuse what stands in for a model, whatever its name says."""
    if head.startswith(b"version https://git-lfs"):
        raise LoadError(f"{path}: a Git LFS pointer, not the model itself. Run: git lfs pull")
    if head.lstrip()[:20].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise LoadError(
            f"{path}: a web page, not a model: the download link needs a login or has moved. Download it again."
        )


def _foreign(path: Path, head: bytes) -> str:
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < 1024 else "ignore")
    except UnicodeDecodeError:
        text = ""
    if text and all(letter.isprintable() or letter in "\r\n\t" for letter in text):
        return (
            f"{path}: a text file ({text.strip()[:40]!r}...), not a model. Give a .pt, .pth, .pt2 or .safetensors file."
        )
    return (
        f"{path}: neither a PyTorch nor a safetensors file (it starts with {head[:8].hex(' ')}). "
        "It is damaged or of another format; save it with torch.save(model, ...) or torch.export.save."
    )
