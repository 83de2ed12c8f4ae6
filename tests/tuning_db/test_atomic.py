from __future__ import annotations

import errno
from pathlib import Path
from typing import BinaryIO

import pytest

from tilewright.tuning_db import UsageError, atomic
from tilewright.tuning_db.atomic import whole_file


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with whole_file(path) as stream:
        stream.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    assert list(tmp_path.iterdir()) == [path]


def interrupted(path: Path) -> None:
    with whole_file(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt


def test_what_fails_leaves_all_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for before in (None, b"the old one"):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(KeyboardInterrupt):
            interrupted(path)
        assert (path.read_bytes() if path.exists() else None) == before
        assert list(tmp_path.iterdir()) == ([path] if before else [])


def test_a_full_disk_is_told_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        pytest.raises(UsageError, match=r"out\.jsonl can't be written \(No space left on device\): free some space"),
        whole_file(path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_full_device_is_told_too() -> None:
    with (
        pytest.raises(UsageError, match=r"/dev/full can't be written \(No space left on device\)"),
        whole_file(Path("/dev/full")) as stream,
    ):
        stream.write(b"some")


def test_permissions_stay(tmp_path: Path) -> None:
    path, plain = tmp_path / "out", tmp_path / "plain"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with whole_file(path) as stream:
        stream.write(b"new")
    assert path.stat().st_mode & 0o777 == 0o640
    plain.write_bytes(b"")
    with whole_file(tmp_path / "other"):
        pass
    assert (tmp_path / "other").stat().st_mode == plain.stat().st_mode


def test_a_link_stays_and_a_device_is_written_to(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)
    with whole_file(link) as stream:
        stream.write(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    nothing = Path("/dev/null").stat()
    with whole_file(Path("/dev/null")) as stream:
        stream.write(b"gone")
    assert Path("/dev/null").stat().st_ino == nothing.st_ino


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder: name a file in it"), whole_file(tmp_path):
        pass
    with (
        pytest.raises(UsageError, match=r"absent/out can't be written \(No such file"),
        whole_file(tmp_path / "absent/out"),
    ):
        pass


def test_what_a_killed_writer_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    for name in (".a.pack.0123abcd.part", ".b.pack.0123abcd.part", ".a.pack.notes.part"):
        (tmp_path / name).write_bytes(b"half")
    with whole_file(path) as first:
        first.write(b"first")
        with whole_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        ".a.pack.notes.part",
        ".b.pack.0123abcd.part",
        "a.pack",
    ]


def test_a_file_that_another_removes_before_it_is_locked_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []

    def flock(stream: BinaryIO, operation: int) -> None:
        if not removed:
            removed.append(stream.name)
            Path(stream.name).unlink()

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with whole_file(tmp_path / "a.pack") as stream:
        stream.write(b"whole")
    assert removed
    assert [each.name for each in tmp_path.iterdir()] == ["a.pack"]
