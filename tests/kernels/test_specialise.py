"""What Triton leaves out of warp-specialised loops."""

from __future__ import annotations

import pytest

from tests.kernels.compiling import compiled, described
from tilewright.kernels import GemmConfig, GemmProblem
from tilewright.kernels.specialise import reuses_barriers


@pytest.mark.smoke
def test_of_every_stage_each_group_of_warps_ends_a_barrier_where_its_place_is_reused():
    problem = GemmProblem(M=4096, N=4096, K=512, b_layout="col")
    tile = GemmConfig(128, 128, 64, num_warps=4, num_stages=4, PERSISTENT=True, TMA=True)
    for arch, config, groups in (
        (90, GemmConfig(**{**tile.to_dict(), "WARP_SPECIALIZE": True}), 3),
        (90, tile, 0),
        (100, GemmConfig(**{**tile.to_dict(), "num_stages": 3, "WARP_SPECIALIZE": True}), 0),
    ):
        (reply,) = compiled(arch, [("gemm", problem, config)])
        wanted = groups * config.num_stages if reuses_barriers() else 0
        assert reply["instructions"]["ended barriers"] == wanted, described(reply)
