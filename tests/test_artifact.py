from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from slimc.errors import OutputError
from slimc.exporters import artifact
from slimc.exporters.artifact import check_writable, describe, whole_file, whole_folder


def earlier_result(target: Path, marker: str = "report.json") -> Path:
    target.mkdir()
    (target / marker).write_text("old")
    return target


def test_a_folder_appears_whole_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as folder:
        (folder / "plan.json").write_text("new")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["plan.json"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_and_the_old_result_stays_when_the_block_fails(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = earlier_result(tmp_path / "out")

    def fail() -> None:
        with whole_folder(target, overwrite=True) as folder:
            (folder / "report.json").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "report.json").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_an_earlier_result_is_replaced_as_a_whole(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(artifact, "_exchange", lambda first, second: False)
    target = earlier_result(tmp_path / "out")
    (target / "model.onnx").write_text("old model")
    with whole_folder(target, overwrite=True) as folder:
        (folder / "report.json").write_text("new")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"report.json": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_puts_the_old_result_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_exchange", lambda first, second: False)
    target = earlier_result(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, other: Path) -> Path:
        if Path(other) == target and not self.name.endswith("-old"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="No space left"), whole_folder(target, overwrite=True) as folder:
        (folder / "report.json").write_text("new")
    assert (target / "report.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("marker", ["report.json", "plan.json"])
def test_an_earlier_result_is_kept_unless_overwriting_is_asked_for(tmp_path: Path, marker: str) -> None:
    target = earlier_result(tmp_path / "out", marker)
    with pytest.raises(OutputError, match="--overwrite"):
        check_writable(target)
    check_writable(target, overwrite=True)


def test_a_folder_that_slimc_did_not_write_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not written by slimc"), whole_folder(tmp_path, overwrite=True):
        pytest.fail("must refuse before any work is done")
    assert (tmp_path / "thesis.tex").exists()


def test_an_earlier_result_with_a_file_of_the_users_in_it_is_not_replaced(tmp_path: Path) -> None:
    target = earlier_result(tmp_path / "out")
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"not written by slimc \(thesis\.tex\)"):
        check_writable(target, overwrite=True)


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "plan.json").touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    with whole_folder(empty) as folder:
        (folder / "plan.json").touch()
    assert (empty / "plan.json").exists()


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    real = earlier_result(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    with whole_folder(link, overwrite=True) as folder:
        (folder / "report.json").write_text("new")
    assert link.is_symlink()
    assert (real / "report.json").read_text() == "new"


def test_what_cannot_be_written_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="is a file; --out names a folder"):
        check_writable(tmp_path / "file")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        check_writable(tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "out")


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_as_readable_as_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    with whole_folder(tmp_path / "out") as folder, whole_file(folder / "file") as path:
        path.touch(mode=0o600)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "out" / "file").stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode


def test_a_file_moves_in_with_its_companions_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    target.write_text("old")

    def fail() -> None:
        with whole_file(target) as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m.onnx": "old"}
    with whole_file(target) as path:
        path.write_text("new")
        path.with_name("m.onnx.data").write_text("weights")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m.onnx": "new", "m.onnx.data": "weights"}


def test_an_artifact_tells_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    found = describe(tmp_path / "file", "onnx")
    assert (found.bytes, found.format) == (3, "onnx")
    assert found.sha256 == hashlib.sha256(b"abc").hexdigest()
