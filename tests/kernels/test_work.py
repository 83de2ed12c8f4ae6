from __future__ import annotations

import pytest

from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.ops.gemm.work import work

pytestmark = pytest.mark.smoke


def test_blocks_are_tiles_times_splits_times_batch() -> None:
    problem = GemmProblem(M=100, N=200, K=4096, batch=3)
    found = work(problem, GemmConfig(BLOCK_M=32, BLOCK_N=64, BLOCK_K=64, SPLIT_K=4))
    assert (found.tiles_m, found.tiles_n) == (4, 4)
    assert found.tiles == 4 * 4 * 3
    assert found.blocks == 4 * 4 * 3 * 4
