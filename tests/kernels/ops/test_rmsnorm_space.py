"""The fused RMSNorm's configurations: what fits, what is worth trying, and the ragged problem of each."""

from __future__ import annotations

import pytest

from tests.kernels.ops.rmsnorm_cases import LLAMA, conforms
from tilewright.kernels import RmsNormConfig, RmsNormProblem, resolve_device
from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.kernels.ops.rmsnorm.space import AXES, SPACE, elements, fits, ragged, useful, whole

A100 = resolve_device("a100")


@pytest.mark.parametrize(
    ("config", "problem", "reason"),
    [
        (RmsNormConfig(1, 4096, 4, 2), LLAMA, "more than 1 stage changes nothing"),
        (RmsNormConfig(1, 8192, 8), LLAMA, "mostly padding"),
        (RmsNormConfig(8, 1024, 8), RmsNormProblem(M=4, N=2048), "a block of 8 over a size of 4 is mostly padding"),
        (RmsNormConfig(1, 128, 1), LLAMA, "in pieces of less than 256"),
        (RmsNormConfig(64, 512, 16), LLAMA, "leave some of 108 SMs without any of 4096"),
        (RmsNormConfig(1, 256, 4), LLAMA, "half of 4 warps would do"),
        (RmsNormConfig(1, 1024, 2), RmsNormProblem(M=16, N=8192), "2 warps, alone on their SM, leave some of its 4"),
        (RmsNormConfig(1, 4096, 1), LLAMA, "leave none of its 255 registers"),
        (RmsNormConfig(1, 2048, 8, 4), LLAMA, "num_stages=4 is more than the tiles of a row"),
    ],
    ids=str,
)
def test_what_can_not_be_the_best(config, problem, reason):
    assert fits(problem, config, A100) is None
    assert reason in useful(problem, config, A100)


def test_copies_are_held_to_shared_memory():
    problem = RmsNormProblem(M=4096, N=65536, dtype="fp32", weight="fp32", residual="fp32")
    config = RmsNormConfig(1, 8192, 16, 4)
    assert "294912 B of shared memory are over the 166912 B" in fits(problem, config, A100)
    assert fits(problem, config, resolve_device("t4")) is None  # nothing is copied there
    assert fits(problem, RmsNormConfig(1, 4096, 16, 4), A100) is None


@pytest.mark.parametrize("device", CATALOGUE, ids=lambda device: device.board)
def test_a_space_is_of_tens_to_hundreds_and_has_the_default(device):
    for problem in (LLAMA, RmsNormProblem(1, 4096), RmsNormProblem(262144, 128), RmsNormProblem(64, 65536)):
        configs = SPACE.configs(problem, device)
        coarse = SPACE.configs(problem, device, coarse=True)
        assert 10 < len(configs) < 500
        assert 2 < len(coarse) <= 60
        assert SPACE.config is RmsNormConfig
        assert RMSNORM.default(problem, device) in configs


@pytest.mark.parametrize("n", [1, 15, 16, 100, 4096, 4097, 70_000])
@pytest.mark.parametrize("config", [RmsNormConfig(1, 64), RmsNormConfig(16, 1024, 8), RmsNormConfig(4, 16)], ids=str)
def test_a_ragged_problem_runs_the_same_code_and_ends_within_a_tile(n, config):
    problem = RmsNormProblem(M=4096, N=n, weight="fp16")
    other = ragged(problem, config)
    assert (other.N % 16 == 0) == (n % 16 == 0)
    assert whole(other, config) == whole(problem, config)
    assert config.BLOCK_M == 1 or other.M % config.BLOCK_M
    assert config.BLOCK_N == 16 or n == 1 or other.N % config.BLOCK_N
    assert other.M * other.N <= 3 * 32 * 1024
    conforms(other, config)


def test_elements_are_counted_by_thread():
    assert elements(RmsNormConfig(2, 1024, 4)) == 16
    assert all(value & (value - 1) == 0 for name in ("BLOCK_M", "BLOCK_N", "num_warps") for value in AXES[name])
