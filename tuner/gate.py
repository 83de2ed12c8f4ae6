"""The correctness gate: what a configuration has to pass before its time counts.

It is NumPy alone; the arrays may come from a GPU or from the interpreter.

Each output array lies between two guard zones, and everything, zones and padding between rows too, is filled with one
byte before a run (but for an array that the op overwrites, which is put there as it was): `OutputLayout` is that, and
`verdict` what two such runs, with different bytes, have to say:

1. nothing outside the array was written;
2. every element was written: an element left alone holds another poison in each run;
3. both runs gave the same bits;
4. no NaN anywhere that the reference doesn't have;
5. the elements are within the kernel's tolerance of the reference in float64, and their rounding errors do not all
   point the same way.

Large results are held against the reference in part, over a grid of rows and columns that meets every tile; 1 to 4 are
always checked in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from tilewright.kernels.kernel import Kernel, Tolerance
from tilewright.kernels.problem import Problem

Array = np.ndarray[Any, Any]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

FULL_FLOPS = 2**34
FULL_INPUTS = 2**26
FULL_RESULTS = 2**22
"""A problem within all three is checked in full: its float64 reference takes at most about a second on two cores and
half a GB, once per problem; the comparison 0.1 s per configuration."""

MIN_GUARD, MAX_GUARD = 64 << 10, 16 << 20
GUARD_ROWS = 256
"""A guard zone takes a whole row of the largest tiles: what a kernel writes whose mask over rows is missing."""

BIAS = 0.1
"""Mean signed rounding error over the tolerance's relative part. Cutting off instead of rounding gives 0.36, a factor
wrong by 0.03 % in fp16 0.3; right results stay below 0.02 plus 0.3/√n."""

CHUNK = 1 << 18


@runtime_checkable
class Divisible(Protocol):
    """A problem whose result can be computed in part."""

    def part(
        self, arrays: Mapping[str, Array], random: np.random.Generator
    ) -> tuple[Problem, dict[str, Array], dict[str, tuple[Array, ...]]]:
        """A problem that computes a part of the result, its inputs, and which part: of every output by name, the
        indices along each dimension."""


@dataclass(frozen=True)
class Expected:
    """The reference's result for one output, or a part of it."""

    shape: tuple[int, ...]  # of the whole result
    values: Array  # float64
    index: tuple[Array, ...] | None = None  # of `values` along each dimension of the result; None: they are all there


def expect(kernel: Kernel[Any, Any], problem: Problem, arrays: Mapping[str, Array], seed: int) -> dict[str, Expected]:
    """What a kernel should compute from these inputs, by output: all of it where that is affordable, else what `seed`
    picks."""
    outputs = problem.outputs()
    if isinstance(problem, Divisible) and (
        problem.flops() > FULL_FLOPS
        or sum(array.size for array in arrays.values()) > FULL_INPUTS
        or sum(math.prod(output.shape) for output in outputs.values()) > FULL_RESULTS
    ):
        part, chosen, index = problem.part(arrays, np.random.default_rng(seed))
        values = kernel.reference(part, chosen)
        return {name: Expected(outputs[name].shape, values[name], index[name]) for name in outputs}
    values = kernel.reference(problem, arrays)
    return {name: Expected(outputs[name].shape, values[name]) for name in outputs}


def poisons(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Two bytes that fill an array with what no kernel means to write: NaN for floats (in the second, where a type has
    no NaN of four equal bytes, its largest numbers), the extremes for integers."""
    return (0x80, 0x7F) if dtype.kind in "iu" else (0xFF, 0x7F)


@dataclass(frozen=True)
class OutputLayout:
    """An output array in a buffer of bytes: guard zone, array, guard zone."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pitch: int  # elements from one row to the next
    guard: int  # bytes of each zone; the array begins after the first one, and off a 16-byte boundary if that is

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: np.dtype[Any], *, pitch: int = 0, aligned: bool = True) -> OutputLayout:
        """A layout with guard zones of a fitting size. `pitch` 0: rows follow each other without a gap."""
        pitch = pitch or shape[-1]
        row = pitch * dtype.itemsize
        guard = min(MAX_GUARD, max(MIN_GUARD, GUARD_ROWS * row)) // 256 * 256
        return cls(shape, dtype, pitch, guard if aligned else guard + dtype.itemsize)

    @property
    def rows(self) -> int:
        """Rows of all matrices together."""
        return math.prod(self.shape[:-1])

    @property
    def body(self) -> int:
        """Bytes from the first element to behind the last one, and its row's padding."""
        return self.rows * self.pitch * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of the whole buffer."""
        return 2 * self.guard + self.body

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the array, in elements."""
        steps = [1]
        for length in (self.pitch, *reversed(self.shape[1:-1])):
            steps.append(steps[-1] * length)
        return tuple(reversed(steps[: len(self.shape)]))

    def array(self, buffer: Bytes) -> Array:
        """The array in a buffer."""
        padded = buffer[self.guard : self.guard + self.body].view(self.dtype).reshape(*self.shape[:-1], self.pitch)
        return padded[..., : self.shape[-1]]

    def array_rows(self, buffer: Bytes) -> Array:
        """The rows of all its matrices, in two dimensions."""
        padded = buffer[self.guard : self.guard + self.body].view(self.dtype).reshape(self.rows, self.pitch)
        return padded[:, : self.shape[-1]]

    def allocate(self, byte: int) -> Bytes:
        """A poisoned buffer in host memory, aligned as on a GPU."""
        memory = np.empty(self.nbytes + 256, np.uint8)
        start = -memory.ctypes.data % 256
        buffer = memory[start : start + self.nbytes]
        buffer.fill(byte)
        return buffer

    def holding(self, array: Array, byte: int) -> Bytes:
        """A buffer as `allocate` makes it, with the array in its place: what an op is given to overwrite.

        Raises:
            ValueError: the array is of another shape or type.
        """
        if (array.shape, array.dtype) != (self.shape, self.dtype):
            raise ValueError(f"{array.dtype} of {array.shape} can't be overwritten by {self.dtype} of {self.shape}")
        buffer = self.allocate(byte)
        self.array(buffer)[...] = array
        return buffer

    def trespass(self, buffer: Bytes, byte: int) -> str | None:
        """None, or what was written outside the array."""
        before = buffer[: self.guard] != byte
        after = buffer[self.guard + self.body :] != byte
        rows = buffer[self.guard : self.guard + self.body].reshape(self.rows, self.pitch * self.dtype.itemsize)
        padding = rows[:, self.shape[-1] * self.dtype.itemsize :] != byte
        for zone, where in ((before, "before the output"), (after, "behind the output"), (padding, "between its rows")):
            if zone.any():
                found = np.argwhere(zone)
                place = {
                    "before the output": f"{self.guard - int(found[-1][0])} bytes ahead of it",
                    "behind the output": f"{int(found[0][0])} bytes after its end",
                    "between its rows": f"in row {int(found[0][0])}",
                }[where]
                return f"{len(found)} bytes {where} were overwritten, the nearest {place}"
        return None


def check(run: Callable[[Array], None], layout: OutputLayout, expected: Expected, tolerance: Tolerance) -> str | None:
    """The whole gate for what runs on host arrays, as the interpreter does: `run` gets the array to write to."""
    buffers = [layout.allocate(byte) for byte in poisons(layout.dtype)]
    for buffer in buffers:
        run(layout.array(buffer))
    return verdict(layout, buffers[0], buffers[1], expected, tolerance)


def verdict(layout: OutputLayout, first: Bytes, second: Bytes, expected: Expected, tolerance: Tolerance) -> str | None:
    """None, or in one line why the results of two runs into buffers poisoned with `poisons` are not accepted."""
    bytes_used = poisons(layout.dtype)
    for buffer, byte in zip((first, second), bytes_used, strict=True):
        trespass = layout.trespass(buffer, byte)
        if trespass is not None:
            return trespass
    one, other = layout.array(first), layout.array(second)
    fault = _differences(one, other, bytes_used)
    if fault is None and expected.index is not None:
        fault = _stray_nan(layout, first, expected)
    if fault is None:
        result = one if expected.index is None else one[np.ix_(*expected.index)]
        fault = compare(result, expected.values, tolerance, expected.index)
    return fault


def compare(result: Array, wanted: Array, tolerance: Tolerance, index: tuple[Array, ...] | None = None) -> str | None:
    """None, or in one line how a result is off: how many elements are, and the worst of them.

    `index` says where the compared part lies in the whole result.
    |result - wanted| <= absolute + relative * |wanted|. NaN is right only where NaN is wanted, infinity only where it
    is wanted, or where the number wanted is past what the type holds. A type without infinity may saturate instead.
    """
    if result.shape != wanted.shape:
        return f"the result is {result.shape}, wanted {wanted.shape}"
    got_all, wanted_all = np.ascontiguousarray(result).reshape(-1), np.ascontiguousarray(wanted).reshape(-1)
    largest = _largest(result.dtype)
    bad, worst, worst_at = 0, 0.0, 0
    signed, rounded = 0.0, 0
    # In chunks that stay in the processor's cache: five times as fast as whole arrays.
    for start in range(0, got_all.size, CHUNK):
        got = got_all[start : start + CHUNK].astype(np.float64)
        want = wanted_all[start : start + CHUNK]
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            allowed = tolerance.absolute + tolerance.relative * np.abs(want)
            error = got - want
            ratio = np.abs(error) / allowed
        ratio[np.isnan(ratio)] = np.inf
        ratio[(got == want) | (np.isnan(got) & np.isnan(want))] = 0.0
        past = np.abs(want) + allowed >= largest
        if past.any():
            right = (np.sign(got) == np.sign(want)) & (np.abs(got) >= largest * (1 - tolerance.relative))
            # An infinity is wanted exactly, of types that have one.
            right &= ~np.isinf(want) | np.isinf(got) | (not _has_infinity(result.dtype))
            ratio[past & right] = 0.0
        bad += int(np.count_nonzero(ratio > 1))
        at = int(np.argmax(ratio))
        if ratio[at] > worst:
            worst, worst_at = float(ratio[at]), start + at
        # Where rounding to the result's type is most of what is allowed, errors are even-handed.
        rounding = (tolerance.relative * np.abs(want) > tolerance.absolute) & (ratio <= 1) & ~past
        signed += float(np.sum(error[rounding] / (tolerance.relative * want[rounding])))
        rounded += int(np.count_nonzero(rounding))
    if bad:
        place = np.unravel_index(worst_at, wanted.shape)
        if index is not None:
            place = tuple(along[at] for along, at in zip(index, place, strict=True))
        where = tuple(int(at) for at in place)
        got_one, want_one = float(got_all[worst_at]), float(wanted_all[worst_at])
        size = f"{worst:.3g} times the tolerance" if math.isfinite(worst) else "beyond any tolerance"
        return (
            f"{bad} of {wanted.size} elements ({bad / wanted.size:.2%}) are off, worst at {where}: "
            f"got {got_one:.6g}, wanted {want_one:.6g}, {size}"
        )
    if rounded and abs(signed / rounded) > BIAS + 2 / math.sqrt(rounded):
        direction = "large" if signed > 0 else "small"
        return (
            f"results are within tolerance but too {direction} on the whole: by {abs(signed / rounded):.2f} of the "
            f"relative tolerance on average, where {BIAS:g} is the most that rounding explains"
        )
    return None


def _differences(one: Array, other: Array, poison: tuple[int, int]) -> str | None:
    """None, or that elements were left unwritten, or differ between the runs."""
    bits = np.dtype(f"u{one.dtype.itemsize}")
    one_bits, other_bits = one.view(bits), other.view(bits)
    if np.array_equal(one_bits, other_bits):
        return None
    patterns = [np.frombuffer(bytes([byte]) * bits.itemsize, bits)[0] for byte in poison]
    unwritten = (one_bits == patterns[0]) & (other_bits == patterns[1])
    different = one_bits != other_bits
    places, what = (unwritten, "were never written") if unwritten.any() else (different, "differ between two runs")
    count, at = int(np.count_nonzero(places)), np.unravel_index(int(np.argmax(places)), places.shape)
    values = "" if unwritten.any() else f": {float(one[at]):.9g} and {float(other[at]):.9g}"
    place = tuple(int(position) for position in at)
    return f"{count} of {one.size} elements ({count / one.size:.2%}) {what}, first at {place}{values}"


def _stray_nan(layout: OutputLayout, buffer: Bytes, expected: Expected) -> str | None:
    """None, or that there is a NaN somewhere in the whole result, of which the known part should have none."""
    if layout.dtype.kind in "iu" or np.isnan(expected.values).any():
        return None
    rows = layout.array_rows(buffer)
    step = max(1, CHUNK // layout.shape[-1])
    for start in range(0, layout.rows, step):
        places = np.isnan(rows[start : start + step])
        if places.any():
            row, column = np.unravel_index(int(np.argmax(places)), places.shape)
            at = (*np.unravel_index(start + int(row), layout.shape[:-1]), column)
            return f"the result is NaN at {tuple(int(position) for position in at)}, among others perhaps"
    return None


def _largest(dtype: np.dtype[Any]) -> float:
    return float(np.iinfo(dtype).max if dtype.kind in "iu" else ml_dtypes.finfo(dtype).max)


def _has_infinity(dtype: np.dtype[Any]) -> bool:
    return dtype.kind not in "iu" and bool(np.isinf(np.array(np.inf).astype(dtype).astype(np.float64)))
