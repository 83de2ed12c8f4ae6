"""What a configuration of the fused RMSNorm means for the model: its work, and the default by prediction."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.kernels.ops.rmsnorm_cases import LLAMA
from tilewright.kernels import RmsNormConfig, RmsNormProblem, predict
from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.kernels.ops.rmsnorm.space import SPACE, whole
from tilewright.kernels.ops.rmsnorm.work import estimate, work
from tilewright.kernels.prediction import roofline_us


def test_work_is_what_the_blocks_read_and_write():
    problem = RmsNormProblem(M=37, N=1000, dtype="bf16", weight="fp32", residual="fp32", residual_out=True)
    for config in (RmsNormConfig(4, 1024), RmsNormConfig(4, 256), RmsNormConfig(1, 512, num_stages=3)):
        found = work(problem, config)
        walks = 1 if whole(problem, config) else 2
        assert found.blocks == math.prod(RMSNORM.launches(problem, config)[0].grid)
        assert found.iterations == walks * math.ceil(1000 / config.BLOCK_N)
        read = 37_000 * (2 + 4)
        assert found.load_bytes * found.iterations * found.blocks == pytest.approx(
            walks * read + found.blocks * 1000 * 4
        )
        assert found.panel_a.bytes * found.blocks == pytest.approx(walks * read)
        assert found.panel_b.bytes == 4000
        assert found.epilogue_bytes * found.blocks == pytest.approx(37_000 * (2 + 4))
        assert found.dots == ()


def test_the_default_is_near_the_best_by_prediction():
    for device, problem in itertools.product(
        CATALOGUE, (LLAMA, RmsNormProblem(65536, 128), RmsNormProblem(512, 16384))
    ):

        def time(config, problem=problem, device=device):
            return predict(work(problem, config), estimate(problem, config, device), device).time_us

        best = min(map(time, SPACE.configs(problem, device)))
        assert roofline_us(problem.flops(), problem.bytes_moved(), problem.unit, device) <= best
        assert time(RMSNORM.default(problem, device)) <= 1.25 * best, (device.board, str(problem))
