"""Rotary embedding: pairs of numbers of each head turned by angles that grow with the place in the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.reading.contrib.writer import UnsupportedError, Writer

Array = np.ndarray[Any, Any]

LARGEST_TABLE = 1 << 25
"""Cosines that become a constant of their own, as of 131072 places in heads of 256: more are gathered at every run."""


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosines and sines for (B, H, S, D) or (B, S, H, D), of so many numbers of each head: values that broadcast, as
    wide as what is turned, or for `interleaved` half as wide."""

    cos: str
    sin: str
    width: int
    interleaved: bool

    def turn(self, write: Writer, x: str, shape: tuple[int, ...]) -> str:
        """x of a shape of four dimensions, the first `width` of the last one turned: of each pair (a, b), that stand
        side by side (`interleaved`) or half a width apart, a · cos - b · sin and b · cos + a · sin."""
        if self.width == shape[3]:
            return self._turned(write, x, shape)
        sizes = write.integers(self.width, shape[3] - self.width)
        turned, rest = write("Split", x, sizes, outputs=2, axis=-1)
        return str(write("Concat", self._turned(write, turned, (*shape[:3], self.width)), rest, axis=-1))

    def _turned(self, write: Writer, x: str, shape: tuple[int, ...]) -> str:
        half = self.width // 2
        if not self.interleaved:
            first, second = (
                write("Slice", x, write.integers(start), write.integers(start + half), write.integers(3))
                for start in (0, half)
            )
            other = write("Concat", write("Neg", second), first, axis=-1)
            return str(write("Add", write("Mul", x, self.cos), write("Mul", other, self.sin)))
        pairs = write("Reshape", x, write.integers(*shape[:3], half, 2))
        first, second = (
            write("Squeeze", part, write.integers(4))
            for part in write("Split", pairs, outputs=2, axis=4, num_outputs=2)
        )
        turned = (
            write("Sub", write("Mul", first, self.cos), write("Mul", second, self.sin)),
            write("Add", write("Mul", second, self.cos), write("Mul", first, self.sin)),
        )
        joined = write("Concat", *(write("Unsqueeze", each, write.integers(4)) for each in turned), axis=4)
        return str(write("Reshape", joined, write.integers(*shape)))


def caches(write: Writer, cos: str, sin: str, least: int) -> int:
    """The width of what is turned by two caches.

    Raises:
        UnsupportedError: they have not both the same shape (M, width / 2), M being `least` or more.
    """
    shapes = write.shape(cos), write.shape(sin)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise UnsupportedError(f"its caches of cosines and sines have the shapes {shapes[0]} and {shapes[1]}")
    if shapes[0][0] < least:
        raise UnsupportedError(f"its caches of cosines and sines have {shapes[0][0]} rows, of which it needs {least}")
    return 2 * shapes[0][1]


def angles(
    write: Writer, cos: str, sin: str, positions: Array | str, *, interleaved: bool, heads_axis: int = 1
) -> Angles:
    """The rows of two caches at positions (B or 1, S): constants, or a value's name."""
    width = write.shape(cos)[1] * 2
    made = []
    for cache in (cos, sin):
        if isinstance(positions, str):
            rows = write("Gather", cache, positions)
        else:
            table = write.constant_or_none(cache)
            if table is not None and positions.size * width <= LARGEST_TABLE:
                picked = table[positions]
                whole = np.expand_dims(picked if interleaved else np.concatenate([picked] * 2, -1), heads_axis)
                made.append(write.shared(whole, f"{cache}_at_{'_'.join(map(str, positions[0, [0, -1]]))}"))
                continue
            rows = write("Gather", cache, write.array(positions.astype(np.int64)))
        if not interleaved:
            rows = write("Concat", rows, rows, axis=-1)
        made.append(write("Unsqueeze", rows, write.integers(heads_axis)))
    return Angles(made[0], made[1], width, interleaved)


def rotary_embedding(write: Writer) -> list[str]:
    """`RotaryEmbedding` of (B, S, H·D) or (B, H, S, D), at positions (B, S), or from one on."""
    x, cos, sin = write.input(0), write.input(2), write.input(3)
    shape = write.shape(x)
    if len(shape) not in (3, 4) or 0 in shape:
        raise UnsupportedError(f"its input has the shape {shape}")
    if write.attribute("is_packed_batching", 0):
        raise UnsupportedError("its sequences are packed (is_packed_batching)")
    transposed = len(shape) == 4
    batch, length = shape[0], shape[2 if transposed else 1]
    width = caches(write, cos, sin, 1)
    whole, heads = _heads(write, shape, width)
    positions = _positions(write, batch, length, write.shape(cos)[0])
    turned = angles(
        write, cos, sin, positions,
        interleaved=bool(write.attribute("interleaved", 0)), heads_axis=1 if transposed else 2,
    )  # fmt: skip
    if transposed:
        return [turned.turn(write, x, shape)]
    apart = (batch, length, heads, whole)
    made = turned.turn(write, write("Reshape", x, write.integers(*apart)), apart)
    return [write("Reshape", made, write.integers(*shape))]


def _heads(write: Writer, shape: tuple[int, ...], width: int) -> tuple[int, int]:
    """The size of a head, and how many there are."""
    heads, part = int(write.attribute("num_heads", 0)), int(write.attribute("rotary_embedding_dim", 0))
    if len(shape) == 4:
        whole, count = shape[3], shape[1]
    elif part:
        if heads < 1 or shape[2] % heads:
            raise UnsupportedError(f"its input of shape {shape} has no {heads} heads (num_heads)")
        whole, count = shape[2] // heads, heads
    else:
        whole, count = width, shape[2] // width
    if (
        (part or whole) != width
        or width > whole
        or whole * count != (shape[1] * shape[3] if len(shape) == 4 else shape[2])
    ):
        raise UnsupportedError(
            f"its input of shape {shape}, its caches for {width} numbers of each head, rotary_embedding_dim={part} and "
            f"num_heads={heads} don't go together"
        )
    return whole, count


def consecutive(write: Writer, name: str, length: int) -> Array | str:
    """(1, S): so many positions from the first number of a value on."""
    known = write.constant_or_none(name)
    if known is not None:
        return known.reshape(-1)[:1, None] + np.arange(length)
    first = write("Reshape", name, write.integers(-1))
    if write.shape(name) not in ((), (1,)):
        first = write("Slice", first, write.integers(0), write.integers(1))
    return str(write("Add", write("Unsqueeze", first, write.integers(0)), write.array(np.arange(length)[None])))


def _positions(write: Writer, batch: int, length: int, rows: int) -> Array | str:
    name = write.input(1)
    shape = write.shape(name)
    if write.dtype(name) != ir.DataType.INT64:
        raise UnsupportedError(f"its positions are of type {write.dtype(name)}")
    if shape in ((), (1,)):
        places = consecutive(write, name, length)
    elif shape == (batch, length):
        known = write.constant_or_none(name)
        places = name if known is None else known
    else:
        raise UnsupportedError(f"its positions have the shape {shape}, neither (1) nor {(batch, length)}")
    if not isinstance(places, str) and (places.min() < 0 or places.max() >= rows):
        raise UnsupportedError(f"its positions, up to {places.max()}, are not all in its caches of {rows} rows")
    return places
