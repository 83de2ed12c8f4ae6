"""The GEMM in Gluon: simulated on NumPy under many schedules, and compiled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks import gluon_gemm
from benchmarks.gluon import GEMM_CONFIGS, label
from benchmarks.gluon_gemm import MULTIPLYING_REGISTERS, GluonGemmConfig
from tests.benchmarks.gluon_simulator import DeadlockError, Descriptor, Pointer, changed, simulate
from tilewright.kernels.activations import activation
from tilewright.kernels.devices import resolve_device
from tilewright.tuning_db.env import compiling_environment

ROOT = Path(__file__).parent.parent.parent

WAYS = [
    pytest.param(stages, pieces, cooperative, id=f"{stages}-{pieces}-{'cooperative' if cooperative else 'ping-pong'}")
    for stages in (2, 3)
    for pieces in (1, 2)
    for cooperative in (False, True)
]
SEEDS = 8


def tile_of(pid: int, tiles_m: int, tiles_n: int, group_m: int) -> tuple[int, int]:
    """Row and column of the pid-th tile: groups of so many rows, each column by column."""
    groups = [range(first, min(first + group_m, tiles_m)) for first in range(0, tiles_m, group_m)]
    return [(row, column) for rows in groups for column in range(tiles_n) for row in rows][pid]


def small(stages: int, pieces: int, cooperative: bool) -> GluonGemmConfig:
    return GluonGemmConfig(16, 16, 8, stages, GROUP_M=2, PIECES=pieces, COOPERATIVE=cooperative)


def distance(
    module: ModuleType,
    config: GluonGemmConfig,
    m: int,
    n: int,
    k: int,
    programs: int,
    seed: int,
    act: str = "gelu_tanh",
) -> float:
    """Of the kernel's result from the float64 one, as a part of the largest element; NaN where something was not
    written. Without an activation there is no bias either."""
    draw = np.random.default_rng(seed)
    a, b, bias = (draw.standard_normal(shape).astype(np.float16) for shape in ((m, k), (n, k), (n,)))
    out = np.full((m, n), np.nan, np.float16)
    arguments = (
        Descriptor(a, (config.rows, config.BLOCK_K)),
        Descriptor(b, (config.BLOCK_N, config.BLOCK_K)),
        Descriptor(out, (config.BLOCK_M, config.BLOCK_N // config.PIECES)),
        None if act == "none" else Pointer(bias),
        *(m, n, k, config.BLOCK_N, config.STAGES, config.GROUP_M, config.COOPERATIVE, act),
    )
    activate = lambda x, name: activation(name)(x)  # noqa: E731
    simulate(module, "gluon_gemm_kernel", arguments, programs, seed, activate=activate, tile_of=tile_of)
    sums = a.astype(float) @ b.astype(float).T + (0 if act == "none" else bias)
    expected = activation(act)(sums)
    return float(np.abs(out - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("stages", "pieces", "cooperative"), WAYS)
def test_the_result_is_right_whoever_goes_first(stages: int, pieces: int, cooperative: bool) -> None:
    config = small(stages, pieces, cooperative)
    for seed in range(SEEDS):
        assert distance(gluon_gemm, config, 70, 40, 36, 3, seed) < 1e-3  # more tiles than programs, and ragged ones


@pytest.mark.parametrize(("m", "n", "k", "programs"), [(16, 16, 8, 1), (40, 16, 8, 2), (16, 24, 100, 5), (33, 1, 1, 1)])
@pytest.mark.parametrize("cooperative", [False, True])
def test_few_tiles_and_few_blocks(m: int, n: int, k: int, programs: int, cooperative: bool) -> None:
    for seed in range(SEEDS):
        assert distance(gluon_gemm, small(3, 1, cooperative), m, n, k, programs, seed, "none") < 1e-3


@pytest.mark.parametrize(
    ("old", "new", "cooperative"),
    [
        ("mbarrier.wait(turns.index(group), my_turn)", "pass", False),
        ("mbarrier.arrive(empty.index(before), pred=block > 0)", "mbarrier.arrive(empty.index(stage))", True),
        (
            "total = warpgroup_mma_wait(0, deps=(total,))\n        mbarrier.arrive(empty.index(before))",
            "mbarrier.arrive(empty.index(before))\n        total = warpgroup_mma_wait(0, deps=(total,))",
            False,
        ),
        ("mbarrier.wait(empty.index(stage), phase)", "pass", True),
        ("mbarrier.wait(full.index(stage), phase)", "pass", True),
        ("tma.store_wait(0)  # what was written from here before has been read", "pass", True),
        ("phase = 1  #", "phase = 0  #", True),
        ("count=2 if COOPERATIVE else 1", "count=1", True),
        ("used += TURNS * blocks", "used += blocks", False),
    ],
)
def test_a_defect_of_the_protocol_is_seen(tmp_path: Path, old: str, new: str, cooperative: bool) -> None:
    module, config = changed(gluon_gemm, old, new, tmp_path), small(2, 2, cooperative)

    def fails(seed: int) -> bool:
        try:
            return not distance(module, config, 70, 40, 36, 3, seed) < 1e-3
        except (DeadlockError, AssertionError):
            return True

    assert any(fails(seed) for seed in range(SEEDS))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=label(config), marks=() if place in (0, 4) else pytest.mark.slow)
        for place, config in enumerate(GEMM_CONFIGS)
    ],
)
@pytest.mark.parametrize(("kind", "act"), [("bf16", "gelu_tanh"), pytest.param("fp16", "none", marks=pytest.mark.slow)])
def test_it_compiles_for_sm_90(config: GluonGemmConfig, kind: str, act: str) -> None:
    job = {"op": "gemm", "kind": kind, "bias": act != "none", "activation": act, "config": asdict(config)}
    command = [sys.executable, "-m", "tests.benchmarks.gluon_compile", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["resources"]["spill_bytes"] == 0
    assert config.shared_bytes() <= found["resources"]["shared_bytes"] <= resolve_device("h200").shared_per_block
    assert f"wgmma.mma_async.sync.aligned.m64n{config.BLOCK_N}k16" in found["ptx"]
    assert re.search(rf"setmaxnreg\.inc\S* \s*{MULTIPLYING_REGISTERS.value};", found["ptx"])
    assert "cp.async.bulk.tensor.2d.global.shared::cta" in found["ptx"]
    assert found["num_warps"] == 12  # two groups of four, and one for the warp that copies
