"""What every op is held to: its kernel, on arrays that show every stray read and write, against its float64 reference.

A test makes a problem and says how the op is called on its arrays; `check` does the rest. Inputs come from
`Problem.inputs`, whose padding is NaN. The output lies inside a guarded buffer and is NaN before the call, so that an
element left out shows as much as one too many.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.kernels.dtypes import dtype
from tilewright.kernels.kernel import Kernel, Tolerance
from tilewright.kernels.problem import Problem

Array = np.ndarray[Any, Any]
Call = Callable[[Mapping[str, Array], Array], object]
"""Runs the op on the inputs, by argument name, and writes the result to the array."""

SIZES = (1, 15, 16, 17, 127, 128, 129)
"""Off by one around the smallest tile and the usual one."""

GUARD_BYTES = 256
SENTINEL = 0x5A


class Guarded:
    """An array of NaN inside a buffer whose every other byte must stay as it is."""

    def __init__(self, shape: tuple[int, ...], kind: str, *, gap: int = 0, offset: int = 0) -> None:
        """`gap` elements lie between rows, and the first element is `offset` elements past a 64-byte boundary."""
        numpy_dtype = np.dtype(dtype(kind).numpy)
        pitch = shape[-1] + gap
        size = math.prod(shape[:-1]) * pitch * numpy_dtype.itemsize
        self._buffer = np.full(size + 2 * GUARD_BYTES + 64, SENTINEL, np.uint8)
        start = GUARD_BYTES + -(self._buffer.ctypes.data + GUARD_BYTES) % 64 + offset * numpy_dtype.itemsize
        whole = self._buffer[start : start + size].view(numpy_dtype).reshape(*shape[:-1], pitch)
        self.array = whole[..., : shape[-1]]
        self.array[...] = np.nan
        self._outside = self._buffer.copy()
        inside = self._outside[start : start + size].view(numpy_dtype).reshape(*shape[:-1], pitch)
        inside[..., : shape[-1]] = 0

    def assert_intact(self) -> None:
        """Fails if a byte around the array has changed."""
        now = self._buffer.copy()
        first = self.array.ctypes.data - self._buffer.ctypes.data
        shadow = np.ndarray(self.array.shape, self.array.dtype, now.data, first, self.array.strides)
        shadow[...] = 0
        changed = np.flatnonzero(now != self._outside)
        assert not changed.size, f"{changed.size} bytes around the output were written, the first at {changed[0]}"


def assert_close(result: Array, expected: Array, tolerance: Tolerance) -> None:
    """Fails if an element is further from the reference than the tolerance; names the worst one."""
    assert result.shape == expected.shape
    wide = result.astype(np.float64)
    finite = np.isfinite(wide)
    assert finite.all(), f"{np.count_nonzero(~finite)} of {wide.size} elements are not finite, or not written at all"
    excess = np.abs(wide - expected) / (tolerance.absolute + tolerance.relative * np.abs(expected))
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    at = tuple(int(index) for index in worst)
    assert excess[worst] <= 1, (
        f"{np.count_nonzero(excess > 1)} of {wide.size} elements are wrong; at {at} {wide[worst]} is "
        f"{excess[worst]:.3g} tolerances from {expected[worst]}"
    )


def check(kernel: Kernel[Any, Any], problem: Problem, call: Call, out: Guarded, *, seed: int = 0) -> None:
    """Fails unless the call writes the reference's result to `out`, nothing beside it, and no input."""
    arrays = problem.inputs(seed)
    before = {name: array.tobytes() for name, array in arrays.items()}
    expected = kernel.reference(problem, arrays)
    call(arrays, out.array)
    out.assert_intact()
    assert {name: array.tobytes() for name, array in arrays.items()} == before, "an input was written"
    assert_close(out.array, expected, kernel.tolerance(problem))


def pairwise(axes: Mapping[str, Sequence[Any]], *, seed: int = 0, tries: int = 20) -> Iterator[dict[str, Any]]:
    """Rows that take every pair of values of any two axes together at least once, as few as a greedy search finds."""
    draw = random.Random(seed)
    names = list(axes)
    missing = {
        ((one, i), (other, j))
        for one, other in itertools.combinations(names, 2)
        for i in range(len(axes[one]))
        for j in range(len(axes[other]))
    }
    while missing:
        start = dict(draw.choice(sorted(missing)))
        rows = [{name: start.get(name, draw.randrange(len(axes[name]))) for name in names} for _ in range(tries)]
        best = max(rows, key=lambda row: len(missing.intersection(itertools.combinations(row.items(), 2))))
        missing.difference_update(itertools.combinations(best.items(), 2))
        yield {name: axes[name][index] for name, index in best.items()}
