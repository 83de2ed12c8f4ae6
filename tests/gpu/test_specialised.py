"""Warp-specialised loops, launched hundreds of times: each launch gives the bits of the first, and those are right.

Their one known fault, which Triton up to 3.7 has and `kernels/specialise.py` cures, showed in the first tile of up to
every tenth block of a launch among hundreds.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from tests.gpu.conforming import on_host, to_gpu
from tests.kernels.calls import call
from tilewright.kernels.device import Device
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.registry import find_kernel
from tilewright.tuner.gate import compare

pytestmark = pytest.mark.gpu

LAUNCHES = 300
CONFIGS = 5  # of each problem, drawn from its space

PROBLEMS = {
    "few steps": GemmProblem(8192, 1024, 512, dtype="bf16"),
    "int8 and gelu": GemmProblem(
        4096, 4096, 1024, dtype="int8", b_layout="col", a_scale="tensor", b_scale="column", bias="fp16",
        out_dtype="fp16", activation="gelu_tanh",
    ),
    "fp8": GemmProblem(4096, 4096, 1024, dtype="fp8e4m3", b_layout="col", out_dtype="bf16"),
    "attention": AttentionProblem(2, 16, 4096, 4096, 128, dtype="bf16"),
}  # fmt: skip


def specialised(problem: Any, board: Device, index: int) -> Any:
    """One configuration of the problem's space: the default first, if it is one, then some drawn at random."""
    kernel = find_kernel(problem.op)
    # How tiles are grouped changes no machine code.
    found = [config for config in kernel.space.configs(problem, board) if config.WARP_SPECIALIZE]
    distinct = list(dict.fromkeys(replace(config, **dict.fromkeys(_GROUPS & _names(config), 1)) for config in found))
    random.Random(str(problem)).shuffle(distinct)
    default = kernel.default(problem, board)
    return ([default] * default.WARP_SPECIALIZE + distinct)[index]


_GROUPS = {"GROUP_M", "GROUP_H"}


def _names(config: Any) -> set[str]:
    return set(config.to_dict())


@pytest.mark.parametrize("index", range(CONFIGS))
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_launch_gives_the_same_bits_and_they_are_right(cupy: Any, board: Device, name: str, index: int) -> None:
    problem = PROBLEMS[name]
    kernel = find_kernel(problem.op)
    if board.arch // 10 != 9 or kernel.supported(problem, board) is not None:
        pytest.skip(f"{board.sm} has no warp-specialised loops")
    config = specialised(problem, board, index)
    moved = {each: to_gpu(cupy, array) for each, array in problem.inputs(0).items()}
    (first,) = call(problem, moved, None, config).values()
    (plain,) = call(problem, moved, None, replace(kernel.default(problem, board), **_PLAIN[problem.op])).values()
    bits = f"u{first.dtype.itemsize}"
    out = first.copy()
    others = cupy.zeros((), cupy.int64)
    for _ in range(LAUNCHES):
        out.fill(0)
        call(problem, moved, {"out": out}, config)
        others += (out.view(bits) != first.view(bits)).any()
    assert int(others) == 0, f"{int(others)} of {LAUNCHES} launches gave other bits with {config}"
    tolerance = kernel.tolerance(problem)["out"]
    reason = compare(on_host(cupy, first), on_host(cupy, plain).astype("float64"), tolerance)
    assert reason is None, f"{config}: {reason}"


_PLAIN: dict[str, dict[str, Any]] = {
    "gemm": {"WARP_SPECIALIZE": False, "num_warps": 8},
    "attention": {
        "BLOCK_N": 64,
        "WARP_SPECIALIZE": False,
        "PERSISTENT": False,
        "TMA": False,
        "num_warps": 8,
        "num_stages": 2,
    },
}
"""What makes of a default one that does without."""
