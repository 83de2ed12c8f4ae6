"""What a model was when it was read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import onnx_ir as ir

from tilewright.tuning_db.errors import ModelError


@dataclass(frozen=True, slots=True)
class Source:
    """The file of a model, as it was when the model was read.

    Attributes:
        sha256: of the file.
        bytes: its size.
        digest: of the file and of all weights, those of its external data as well.
    """

    sha256: str
    bytes: int
    digest: str

    @classmethod
    def of(cls, path: Path, model: ir.Model) -> Self:
        """Of a file, and the model that was just read from it.

        Raises:
            ModelError: the file can't be read any more.
        """
        try:
            with path.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                size = stream.tell()
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror}") from None
        digest = hashlib.sha256(sha256.encode())
        for name, value in model.graph.initializers.items():
            digest.update(f"{name} ".encode())
            if value.const_value is not None:
                digest.update(value.const_value.tobytes())
        return cls(sha256, size, digest.hexdigest())
