"""What GPU tests hold results with, rehearsed without one: host memory in CuPy's place, the interpreter for the GPU.

Not marked `gpu`: it runs everywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.gpu import conforming
from tests.gpu.conforming import conforms, to_gpu
from tilewright.kernels import AttentionProblem, Conv2dProblem, GemmConfig, GemmProblem, RmsNormProblem
from tilewright.kernels.registry import find_kernel

pytestmark = pytest.mark.smoke


class Pointer(NamedTuple):
    """`cupy.cuda.MemoryPointer`."""

    memory: np.ndarray[Any, Any]
    offset: int

    def __add__(self, nbytes: object) -> Pointer:
        assert isinstance(nbytes, int)
        return Pointer(self.memory, self.offset + nbytes)


class Memory(np.ndarray):
    """What `cupy.empty` gives of bytes, at a boundary as the pool's is."""

    @property
    def data(self) -> Any:
        return Pointer(self.view(np.ndarray), 0)

    def set(self, values: np.ndarray[Any, Any]) -> None:
        assert (values.shape, values.dtype) == (self.shape, self.dtype)
        self[...] = values


class HostCupy:
    """The parts of CuPy that `conforming` uses."""

    @staticmethod
    def empty(nbytes: int, dtype: Any) -> Memory:
        raw = np.full(nbytes + 512, 0x7F, dtype)
        return raw[-raw.ctypes.data % 512 :][:nbytes].view(Memory)

    @staticmethod
    def ndarray(shape: tuple[int, ...], dtype: str, memptr: Pointer, strides: tuple[int, ...]) -> Any:
        placed = np.ndarray(shape, dtype, memptr.memory.data, memptr.offset, strides)
        return placed.view(Memory) if dtype == "u1" and len(shape) == 1 else placed

    @staticmethod
    def asnumpy(array: Any) -> Any:
        return np.array(array)


PROBLEMS = [
    GemmProblem(M=17, N=33, K=40, batch=2, strided=True, b_layout="col", residual="fp16", aligned=False),
    GemmProblem(M=9, N=32, K=64, groups=2, b_dtype="int4", b_scale="group", group_size=32),
    Conv2dProblem(N=1, H=5, W=6, C=7, K=9, R=3, S=3, pad_top=1, w_layout="kcrs", aligned=False, alpha=True),
    AttentionProblem(3, 4, 5, 32, 32, Hkv=2, page_size=16, kv_lens=True, strided=True, lse=True),
    RmsNormProblem(M=3, N=40, weight="fp16", residual="fp32", residual_out=True, out_dtype="int8", row_scale=True),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.op)
def test_right_calls_conform(problem: Any) -> None:
    conforms(HostCupy, find_kernel(problem.op), problem)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.op)
def test_arrays_lie_there_as_they_lie_here(problem: Any) -> None:
    for array in problem.inputs(0).values():
        moved = to_gpu(HostCupy, array)
        assert (moved.shape, moved.dtype, moved.strides) == (array.shape, array.dtype, array.strides)
        assert moved.ctypes.data % 16 == array.ctypes.data % 16
        assert moved.tobytes() == array.tobytes()


def beside(outs: dict[str, Any]) -> None:
    """Changes the byte before the output."""
    (ctypes.c_uint8 * 1).from_address(outs["out"].ctypes.data - 1)[0] ^= 1


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a wrong element": (lambda outs: outs["out"].__setitem__((0, 0, 0), 77), "elements .* are off"),
    "an element left out": (lambda outs: outs["out"].__setitem__((0, 0, 0), np.nan), "are off"),
    "a byte beside the output": (beside, "bytes around the output were written"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_calls_do_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, message = FAULTS[name]
    right = conforming.call

    def wrong(problem: Any, arrays: Any, outs: Any, config: Any) -> Any:
        results = right(problem, arrays, outs, config)
        if outs:
            spoil(outs)
        return results

    monkeypatch.setattr(conforming, "call", wrong)
    with pytest.raises(AssertionError, match=message):
        conforms(HostCupy, find_kernel("gemm"), GemmProblem(M=9, N=16, K=16), GemmConfig(16, 16, 16))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda count, arrays, results: results["out"].__setitem__((0, 0, 0), -0.0 if count % 2 else 0.0), "differs"),
        (lambda count, arrays, results: arrays["a"].__setitem__((0, 0, 0), 3), "wrote to a"),
    ],
)
def test_calls_that_differ_or_write_to_an_input_do_not(
    spoil: Callable[..., None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = conforming.call, []
    problem = GemmProblem(M=9, N=16, K=16)

    def wrong(problem: Any, arrays: Any, outs: Any, config: Any) -> Any:
        results = right(problem, arrays, outs, config)
        calls.append(outs)
        if len(calls) == 3 or (outs is None and message == "differs"):
            spoil(len(calls), arrays, results)
        return results

    inputs = problem.inputs(0)
    inputs["a"][0, 0] = 0  # a first row of zeros, of either sign
    monkeypatch.setattr(conforming, "call", wrong)
    monkeypatch.setattr(GemmProblem, "inputs", lambda self, seed: {name: each.copy() for name, each in inputs.items()})
    with pytest.raises(AssertionError, match=message):
        conforms(HostCupy, find_kernel("gemm"), problem, GemmConfig(16, 16, 16))
