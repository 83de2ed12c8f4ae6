"""What every op is held to: its kernel, on arrays that show every stray read and write, against its float64 reference.

A test makes a problem and says how the op is called on its arrays; `check` does the rest. Inputs come from
`Problem.inputs`, whose padding is NaN. Outputs lie inside guarded buffers and are NaN (integers: their smallest number)
before the call, so that an element left out shows as much as one too many.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.kernels.activations import ACTIVATIONS, activation_name
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.kernel import Kernel, Tolerance
from tilewright.kernels.problem import Problem

Array = np.ndarray[Any, Any]
Call = Callable[[Mapping[str, Array], dict[str, Array]], object]
"""Runs the op on the inputs, by argument name, and writes the results to the arrays, by name too."""

SIZES = (1, 15, 16, 17, 127, 128, 129)
"""Off by one around the smallest tile and the usual one."""

ACTIVATION_NAMES = tuple(
    activation_name({"clamp": "clamp:-0.5:1.25", "leaky_relu": "leaky_relu:0.3"}.get(word, word))
    for word in ACTIVATIONS
)
"""Every activation once, those with parameters with some that are no default."""

GUARD_BYTES = 256
SENTINEL = 0x5A


class Guarded:
    """An array of NaN inside a buffer whose every other byte must stay as it is."""

    def __init__(self, shape: tuple[int, ...], kind: str, *, gap: int = 0, offset: int = 0) -> None:
        """`gap` elements lie between rows, and the first element is `offset` elements past a 64-byte boundary."""
        numpy_dtype = np.dtype(dtype(kind).numpy)
        pitch = shape[-1] + gap
        size = math.prod(shape[:-1]) * pitch * numpy_dtype.itemsize
        self.buffer = np.full(size + 2 * GUARD_BYTES + 64, SENTINEL, np.uint8)
        start = GUARD_BYTES + -(self.buffer.ctypes.data + GUARD_BYTES) % 64 + offset * numpy_dtype.itemsize
        whole = self.buffer[start : start + size].view(numpy_dtype).reshape(*shape[:-1], pitch)
        self.array = whole[..., : shape[-1]]
        self.array[...] = np.iinfo(numpy_dtype).min if numpy_dtype.kind in "iu" else np.nan
        self._outside = self.buffer.copy()
        inside = self._outside[start : start + size].view(numpy_dtype).reshape(*shape[:-1], pitch)
        inside[..., : shape[-1]] = 0

    @classmethod
    def of(cls, problem: Problem, **layout: int) -> dict[str, Guarded]:
        """One for every output of a problem."""
        return {name: cls(output.shape, output.dtype, **layout) for name, output in problem.outputs().items()}

    def assert_intact(self) -> None:
        """Fails if a byte around the array has changed."""
        now = self.buffer.copy()
        first = self.array.ctypes.data - self.buffer.ctypes.data
        shadow = np.ndarray(self.array.shape, self.array.dtype, now.data, first, self.array.strides)
        shadow[...] = 0
        changed = np.flatnonzero(now != self._outside)
        assert not changed.size, f"{changed.size} bytes around the output were written, the first at {changed[0]}"


def assert_close(result: Array, expected: Array, tolerance: Tolerance) -> None:
    """Fails if an element is further from the reference than the tolerance, or infinite where the reference is not the
    same infinity; names the worst one."""
    assert result.shape == expected.shape
    wide = result.astype(np.float64)
    wrong = ~np.isfinite(wide) & (wide != expected)
    assert not wrong.any(), f"{np.count_nonzero(wrong)} of {wide.size} elements are not finite, or not written at all"
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.abs(wide - expected) / (tolerance.absolute + tolerance.relative * np.abs(expected))
    excess[wide == expected] = 0
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    at = tuple(int(index) for index in worst)
    assert excess[worst] <= 1, (
        f"{np.count_nonzero(excess > 1)} of {wide.size} elements are wrong; at {at} {wide[worst]} is "
        f"{excess[worst]:.3g} tolerances from {expected[worst]}"
    )


def check(
    kernel: Kernel[Any, Any], problem: Problem, call: Call, outs: Mapping[str, Guarded], *, seed: int = 0
) -> None:
    """Fails unless the call writes the reference's results to `outs`, nothing beside them, and no input."""
    arrays = problem.inputs(seed)
    before = {name: array.tobytes() for name, array in arrays.items()}
    expected = kernel.reference(problem, arrays)
    assert expected.keys() == outs.keys() == problem.outputs().keys()
    call(arrays, {name: out.array for name, out in outs.items()})
    for out in outs.values():
        out.assert_intact()
    assert {name: array.tobytes() for name, array in arrays.items()} == before, "an input was written"
    for name, out in outs.items():
        assert_close(out.array, expected[name], kernel.tolerance(problem)[name])


def covering(
    axes: Mapping[str, Sequence[Any]], strength: int, *, seed: int = 0, tries: int = 20
) -> Iterator[dict[str, Any]]:
    """Rows that take all values of any `strength` axes together at least once, as few as a greedy search finds."""
    draw = random.Random(seed)
    names = list(axes)
    missing = {
        tuple(zip(chosen, indices, strict=True))
        for chosen in itertools.combinations(names, strength)
        for indices in itertools.product(*(range(len(axes[name])) for name in chosen))
    }
    while missing:
        start = dict(draw.choice(sorted(missing)))
        rows = [{name: start.get(name, draw.randrange(len(axes[name]))) for name in names} for _ in range(tries)]
        best = max(rows, key=lambda row: len(missing.intersection(itertools.combinations(row.items(), strength))))
        missing.difference_update(itertools.combinations(best.items(), strength))
        yield {name: axes[name][index] for name, index in best.items()}


def pairwise(axes: Mapping[str, Sequence[Any]], *, seed: int = 0, tries: int = 20) -> Iterator[dict[str, Any]]:
    """Rows that take every pair of values of any two axes together at least once."""
    return covering(axes, 2, seed=seed, tries=tries)


def assert_every_pair(rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]) -> None:
    """Fails if a pair of values of two axes is in no row, or a value that is on no axis in one."""
    for one, other in itertools.combinations(axes, 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(axes[one], axes[other]))


def every_value(axes: Mapping[str, Sequence[Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """As many of the rows of `pairwise` as it takes for every value of every axis to occur."""
    seen: set[tuple[str, str]] = set()
    rows = []
    for row in pairwise(axes, seed=seed):
        values = {(name, str(value)) for name, value in row.items()}
        if not values <= seen:
            seen |= values
            rows.append(row)
    assert len(seen) == sum(map(len, axes.values()))
    return rows
