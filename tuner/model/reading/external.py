"""External data: the bytes of tensors in files beside an ONNX file, mapped into memory.

The format is that of `TensorProto.external_data` (onnx.proto: location, offset, length). A location is a path below the
model's folder, however links turn, to a regular file; it is opened once, looked at through the open file, and mapped
read-only, so that nothing that happens to the path later matters.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import onnx

from tilewright.tuner.model.messages import quoted
from tilewright.tuning_db.errors import ModelError


class ExternalFiles:
    """The data files of one model, each opened when a tensor first names it. Not for several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._maps: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    def bytes_of(self, tensor: onnx.TensorProto, expected: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The `expected` bytes of an external tensor, as a read-only view of its mapped file.

        Raises:
            ModelError: the location is no file below the folder, or the file has no such bytes.
        """
        what = f"tensor {quoted(tensor.name)}"
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        offset = _number(entries, "offset", what) or 0
        length = _number(entries, "length", what)
        content = self._map(location, what)
        if length is None:
            # What the format means by a missing length is the rest of the file; some writers leave it out for all.
            length = expected if len(content) - offset >= expected else max(0, len(content) - offset)
        if length != expected:
            raise ModelError(
                f"{what} has {length} bytes of external data in {quoted(location)}, but its dims "
                f"{list(tensor.dims)} and type need {expected}"
            )
        if offset + length > len(content):
            raise ModelError(
                f"{what} is at bytes {offset} to {offset + length} of {quoted(location)}, which has {len(content)}: "
                f"the file is truncated or another model's"
            )
        return content[offset : offset + length]

    def _map(self, location: str, what: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if location not in self._maps:
            self._maps[location] = self._open(location, what)
        return self._maps[location]

    def _open(self, location: str, what: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        where = f"the external data {quoted(location)} of {what}"
        if not location or "\0" in location:
            raise ModelError(f"{where} names no file")
        if Path(location).is_absolute() or PureWindowsPath(location).anchor:
            raise ModelError(f"{where} is an absolute path: only files below the model's folder are read")
        try:
            path = (self.folder / location).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "a loop of links"
            raise ModelError(f"{where} can't be opened ({reason}): put the file into {self.folder}") from None
        if not path.is_relative_to(self.folder):
            raise ModelError(
                f"{where} is outside the model's folder: only files below {self.folder} are read, copy it there"
            )
        try:
            # Non-blocking: opening a pipe would wait for its writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"{where} can't be opened ({error.strerror})") from None
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise ModelError(f"{where} is not a regular file")
            if state.st_size == 0:
                return np.empty(0, np.uint8)
            return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            raise ModelError(f"{where} can't be mapped ({error.strerror})") from None
        finally:
            os.close(descriptor)


def _number(entries: dict[str, str], key: str, what: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    # At most 19 digits: int() of a text of millions takes minutes.
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise ModelError(f"{what} has external data whose {key} is {quoted(text)}: it must be a number of bytes")
    return int(text)
