"""Arrays in `.npy` and `.npz` files that come from elsewhere: read in parts, never unpickled, refused in one line.

An array that lies in its file as it is, in an `.npy` or in an `.npz` that is not compressed, is mapped into memory; a
compressed one is read whole, up to `LARGEST_MEMBER`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from tilewright.tuning_db.errors import ModelError
from tilewright.tuning_db.text import one_line

Array = np.ndarray[Any, Any]

LARGEST_MEMBER = 2 << 30
"""Bytes of a compressed array: a small file can claim any size."""

MOST_MEMBERS = 10_000

LOCAL_HEADER = 30
"""Bytes of a zip file's local header before the name and the extra field, whose lengths are its last two numbers."""


@dataclass(slots=True)
class ArrayFile:
    """An array in a file: its shape and dtype, and a way to its elements."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _open: Callable[[], Array] = field(repr=False)
    _array: Array | None = field(default=None, repr=False)

    def array(self) -> Array:
        """The whole array, mapped where it can be.

        Raises:
            ModelError: the file can't be read.
        """
        if self._array is None:
            self._array = self._open()
        return self._array


def open_npy(path: Path) -> ArrayFile:
    """The array of an `.npy` file.

    Raises:
        ModelError: it can't be read, or is not a valid one.
    """
    with _refused(path), path.open("rb") as stream:
        shape, dtype, order = _header(stream)
        offset = stream.tell()
        _check_size(shape, dtype, path.stat().st_size - offset)
    return ArrayFile(shape, dtype, lambda: _mapped(path, offset, shape, dtype, order))


def open_npz(path: Path) -> dict[str, ArrayFile]:
    """The arrays of an `.npz` file by name.

    Raises:
        ModelError: it can't be read, or is not a valid one.
    """
    arrays = {}
    with _refused(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MOST_MEMBERS:
            raise ValueError(f"it has {len(members)} members, more than {MOST_MEMBERS}")
        for member in members:
            if not member.filename.endswith(".npy"):
                raise ValueError(f"its member {member.filename!r} is no .npy file")
            arrays[member.filename.removesuffix(".npy")] = _member(path, archive, member)
    return arrays


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> ArrayFile:
    with archive.open(member) as stream:
        shape, dtype, order = _header(stream)
        offset = stream.tell()
    _check_size(shape, dtype, member.file_size - offset)
    if member.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as raw:
            raw.seek(member.header_offset + LOCAL_HEADER - 4)
            lengths = np.frombuffer(raw.read(4), "<u2")
        begin = member.header_offset + LOCAL_HEADER + int(lengths.sum(dtype=np.int64)) + offset
        return ArrayFile(shape, dtype, lambda: _mapped(path, begin, shape, dtype, order))
    if member.file_size > LARGEST_MEMBER:
        raise ValueError(
            f"its compressed {member.filename!r} has {member.file_size} bytes, over {LARGEST_MEMBER}: use numpy.savez"
        )
    return ArrayFile(shape, dtype, lambda: _unpacked(path, member, offset, shape, dtype, order))


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], str]:
    """Shape, dtype and order of the array that a stream goes on with."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"its array has format {version[0]}.{version[1]}")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled")
    if any(length < 0 for length in shape):
        raise ValueError(f"its array has shape {shape}")
    return shape, dtype, "F" if fortran else "C"


def _check_size(shape: tuple[int, ...], dtype: np.dtype[Any], available: int) -> None:
    wanted = dtype.itemsize
    for length in shape:
        wanted *= length
    if wanted > available:
        raise ValueError(f"it ends after {available} of the {wanted} bytes of an array {dtype} {shape}")


def _mapped(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], order: str) -> Array:
    if 0 in shape:
        return np.empty(shape, dtype)
    with _refused(path):
        return np.memmap(path, dtype, "r", offset, shape, "F" if order == "F" else "C")


def _unpacked(
    path: Path, member: zipfile.ZipInfo, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], order: str
) -> Array:
    with _refused(path), zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        content = stream.read(member.file_size)[offset:]
        _check_size(shape, dtype, len(content))
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(content, dtype, count).reshape(shape, order="F" if order == "F" else "C")


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """What goes wrong with a file, in one line."""
    try:
        yield
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"calibration data {path} can't be read ({error.strerror or error})") from None
    except (
        ValueError,
        EOFError,
        SyntaxError,
        RuntimeError,
        NotImplementedError,
        OverflowError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        words = one_line(error) or "it is truncated"
        raise ModelError(f"calibration data {path} is no file of arrays, or damaged: {words}") from None
