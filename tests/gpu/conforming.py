"""A problem through its op's public function on the GPU: arrays that lie there as they lie here, guarded outputs, and
results held against the reference, twice the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.kernels.calls import call, outs_for
from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.tuner.gate import compare

Array = np.ndarray[Any, Any]


def to_gpu(cupy: Any, array: Array) -> Any:
    """A copy in device memory with the same strides, the same place within 16 bytes, and what lies between its
    elements."""
    reach = sum((length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True))
    bits = array.view(f"u{array.itemsize}")  # as_strided knows no fp8
    whole = np.lib.stride_tricks.as_strided(bits, (reach // bits.itemsize + 1,), (bits.itemsize,))
    start = array.ctypes.data % 16
    memory = cupy.empty(start + whole.nbytes, np.uint8)
    memory[start:].set(np.ascontiguousarray(whole).view(np.uint8))
    return _placed(cupy, memory, start, array)


def _placed(cupy: Any, memory: Any, start: int, like: Array) -> Any:
    """An array like that one which begins so many bytes into the memory. CuPy knows bf16 and fp8 as bytes at the
    least."""
    placed = cupy.ndarray(like.shape, f"u{like.itemsize}", memory.data + start, strides=like.strides)
    return placed.view(like.dtype)


def on_host(cupy: Any, array: Any) -> Array:
    """A CuPy array's copy in host memory."""
    return np.asarray(cupy.asnumpy(array.view(f"u{array.dtype.itemsize}")).view(array.dtype))


def skip_unless(kernel: Kernel[Any, Any], problem: Any, board: Device, config: Any = None) -> None:
    """Skips what the board, or a configuration on it, can't do."""
    reason = kernel.supported(problem, board)
    if reason is None and config is not None:
        reason = kernel.space.fits(problem, config, board)
    if reason is not None:
        pytest.skip(reason)


def fault(kernel: Kernel[Any, Any], problem: Any, expected: Mapping[str, Array], results: Mapping[str, Array]) -> str:
    """How results are off, or nothing."""
    tolerance = kernel.tolerance(problem)
    assert results.keys() == expected.keys()
    found = {
        name: compare(np.asarray(results[name]).reshape(wanted.shape), wanted, tolerance[name])
        for name, wanted in expected.items()
    }
    return "; ".join(f"{name}: {reason}" for name, reason in found.items() if reason is not None)


def conforms(cupy: Any, kernel: Kernel[Any, Any], problem: Any, config: Any = None, seed: int = 0) -> None:
    """Fails unless the public call writes the reference's results, to `out` and nothing beside it, and to new arrays;
    the same bits each time; and no input."""
    arrays = problem.inputs(seed)
    expected = kernel.reference(problem, arrays)
    moved = {name: to_gpu(cupy, array) for name, array in arrays.items()}
    guarded = outs_for(problem)
    buffers = {name: to_gpu(cupy, each.buffer) for name, each in guarded.items()}
    outs = {
        name: _placed(cupy, buffers[name], each.array.ctypes.data - each.buffer.ctypes.data, each.array)
        for name, each in guarded.items()
    }
    call(problem, moved, outs, config)
    for name, each in guarded.items():
        each.buffer[...] = cupy.asnumpy(buffers[name])
        each.assert_intact()
    reason = fault(kernel, problem, expected, {name: each.array for name, each in guarded.items()})
    assert not reason, reason
    first, second = (
        {name: on_host(cupy, result) for name, result in call(problem, moved, None, config).items()} for _ in range(2)
    )
    reason = fault(kernel, problem, expected, first)
    assert not reason, reason
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), f"{name} differs between two calls"
    for name, array in arrays.items():
        assert on_host(cupy, moved[name]).tobytes() == array.tobytes(), f"the call wrote to {name}"
