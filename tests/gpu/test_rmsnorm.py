"""`rmsnorm` on a GPU against float64: data types, lengths of rows, residuals, quantised results, storage."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.conforming import conforms, skip_unless
from tests.kernels.conformance import pairwise
from tilewright.kernels import RmsNormProblem
from tilewright.kernels.device import Device
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM

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
