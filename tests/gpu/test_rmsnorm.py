"""`rmsnorm` on a GPU against float64: data types, lengths of rows, residuals, quantised results, storage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.gpu.conforming import conforms, on_host, skip_unless
from tests.kernels.conformance import pairwise
from tilewright.kernels import RmsNormProblem, rmsnorm
from tilewright.kernels.device import Device
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.tuner.gate import compare

pytestmark = pytest.mark.gpu

RESULTS: dict[str, dict[str, Any]] = {
    "same": {},
    "fp32": {"out_dtype": "fp32"},
    "int8": {"out_dtype": "int8", "out_scale": True},
    "fp8e4m3": {"out_dtype": "fp8e4m3", "out_scale": True},
    "int8, rows": {"out_dtype": "int8", "row_scale": True},
    "fp8e4m3, rows": {"out_dtype": "fp8e4m3", "row_scale": True},
}
AXES = {
    "M": (1, 3, 257),
    "N": (1, 15, 16, 17, 129, 4096, 8193, 20000),
    "dtype": ("fp16", "bf16", "fp32"),
    "weight": (None, "fp16", "bf16", "fp32"),
    "residual": (None, "fp16", "bf16", "fp32"),
    "residual_out": (False, True),
    "result": tuple(RESULTS),
    "memory": ("dense", "strided", "unaligned", "strided unaligned"),
}


def problem_of(row: dict[str, Any]) -> RmsNormProblem:
    return RmsNormProblem(
        **{name: row[name] for name in ("M", "N", "dtype", "weight", "residual")},
        residual_out=row["residual_out"] and row["residual"] is not None,
        strided="strided" in row["memory"],
        aligned="unaligned" not in row["memory"],
        **RESULTS[row["result"]],
    )


PROBLEMS = list(dict.fromkeys(problem_of(row) for row in pairwise(AXES)))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_equals_the_reference(cupy: Any, board: Device, problem: RmsNormProblem) -> None:
    skip_unless(RMSNORM, problem, board)
    conforms(cupy, RMSNORM, problem)


def test_offsets_beyond_31_bits(cupy: Any, board: Device) -> None:
    """Rows at both ends, and beside the edges of 2^31 elements, are random, all others 1."""
    rows, columns = 70_000, 32_768  # 2.29 G elements, 4.6 GB, and as many of the result
    if board.memory_gib < 16:
        pytest.skip(f"{board.board} has {board.memory_gib} GiB of memory; this takes 10")
    chosen = (0, 1, 65_535, 65_536, 65_537, rows - 1)
    x = cupy.ones((rows, columns), np.float16)
    own = np.random.default_rng(0).standard_normal((len(chosen), columns), np.float32).astype(np.float16)
    for row, values in zip(chosen, own, strict=True):
        x[row].set(values)
    out = rmsnorm(x)
    exact = own.astype(float)
    wanted = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-6)
    tolerance = RMSNORM.tolerance(RmsNormProblem(M=len(chosen), N=columns, dtype="fp16"))["out"]
    found = np.stack([on_host(cupy, out[row]) for row in chosen])
    del x, out
    cupy.get_default_memory_pool().free_all_blocks()
    assert compare(found, wanted, tolerance) is None
