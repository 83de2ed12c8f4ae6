"""Arrays out of files, and files that are none."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from tilewright.tuner.model.calibration import arrays
from tilewright.tuner.model.calibration.arrays import open_npy, open_npz
from tilewright.tuning_db.errors import ModelError

NUMBERS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize("array", [NUMBERS, NUMBERS.T, np.float64(3.5), np.zeros((0, 4), np.int8), NUMBERS > 5])
def test_what_was_written_is_read(array: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a"
    np.save(path.with_suffix(".npy"), array)
    np.savez(path.with_suffix(".npz"), first=NUMBERS, second=array)
    np.savez_compressed(tmp_path / "b.npz", first=NUMBERS, second=array)
    for read in (
        open_npy(path.with_suffix(".npy")),
        open_npz(path.with_suffix(".npz"))["second"],
        open_npz(tmp_path / "b.npz")["second"],
    ):
        assert (read.shape, read.dtype) == (np.shape(array), np.asarray(array).dtype)
        np.testing.assert_array_equal(read.array(), array)


def test_what_is_not_compressed_is_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", NUMBERS)
    np.savez(tmp_path / "a.npz", x=NUMBERS)
    for read in (open_npy(tmp_path / "a.npy"), open_npz(tmp_path / "a.npz")["x"]):
        assert isinstance(read.array(), np.memmap)
        assert not read.array().flags.writeable


def read_all(path: Path) -> list[np.ndarray]:
    files = open_npz(path).values() if path.suffix == ".npz" else [open_npy(path)]
    return [each.array() for each in files]


def refused(path: Path, content: bytes, words: str) -> None:
    """Has the file refused, when it is opened or when its arrays are read."""
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_archives_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    refused(path, b"", r"is no file of arrays, or damaged: .*zip")
    refused(path, b"PK\x03\x04 and no more", "is no file of arrays, or damaged")
    np.savez_compressed(path, x=np.random.default_rng(0).random(500))
    whole = path.read_bytes()
    refused(path, whole[: len(whole) // 2], "is no file of arrays, or damaged")
    refused(path, whole[:300] + bytes(50) + whole[350:], "is no file of arrays, or damaged")
    np.savez(path, x=np.array([{"x": 1}, None], dtype=object))
    refused(path, path.read_bytes(), "holds Python objects, which are not unpickled")
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("notes.txt", "hello")
    refused(path, path.read_bytes(), r"member 'notes\.txt' is no \.npy file")
    with pytest.raises(ModelError, match=r"none\.npz can't be read \(No such file"):
        open_npz(tmp_path / "none.npz")


def test_single_arrays_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((1, 3, 4), np.float32))
    whole = path.read_bytes()
    refused(path, whole[:-1], "ends after 47 of the 48 bytes")
    refused(path, whole[:40], "is no file of arrays, or damaged")
    refused(path, b"", "is no file of arrays, or damaged")
    refused(path, whole.replace(b"(1, 3, 4)", b"(1,-3,-4)"), r"shape \(1, -3, -4\)")
    refused(path, whole.replace(b"(1, 3, 4)", b"(1<<9, 4)"), "is no file of arrays, or damaged")
    refused(path, whole.replace(b"\x93NUMPY\x01", b"\x93NUMPY\x07"), "is no file of arrays, or damaged")
    np.save(path, np.array([{"x": 1}, None], dtype=object))
    refused(path, path.read_bytes(), "holds Python objects")
    with pytest.raises(ModelError, match=r"none\.npy can't be read \(No such file"):
        open_npy(tmp_path / "none.npy")


def test_a_compressed_array_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "LARGEST_MEMBER", 1000)
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1200, np.float32))
    with pytest.raises(ModelError, match=r"compressed 'x\.npy' has 4928 bytes, over 1000: use numpy\.savez"):
        open_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x=np.zeros(1200, np.float32))
    assert open_npz(tmp_path / "a.npz")["x"].shape == (1200,)


def test_an_archive_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MOST_MEMBERS", 1)
    np.savez(tmp_path / "a.npz", x=NUMBERS, y=NUMBERS)
    with pytest.raises(ModelError, match="has 2 members, more than 1"):
        open_npz(tmp_path / "a.npz")
