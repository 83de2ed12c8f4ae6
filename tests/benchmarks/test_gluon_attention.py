"""The attention in Gluon: simulated on NumPy under many schedules, and compiled."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks import gluon_attention
from benchmarks.gluon import ATTENTION_CONFIGS, label
from benchmarks.gluon_attention import MULTIPLYING_REGISTERS, GluonAttentionConfig
from tests.benchmarks.gluon_simulator import DeadlockError, Descriptor, changed, simulate
from tests.benchmarks.test_gluon_gemm import tile_of
from tilewright.kernels.devices import resolve_device
from tilewright.tuning_db.env import compiling_environment

ROOT = Path(__file__).parent.parent.parent
SEEDS = 8
ROWS, DIM = 4, 8


class Case(NamedTuple):
    """A small attention, and how it is cut up."""

    heads: int
    shared_by: int
    queries: int
    keys: int
    causal: bool
    block_n: int = 4
    stages: int = 2
    programs: int = 3


def distance(module: ModuleType, case: Case, seed: int) -> float:
    """Of the kernel's result from the float64 one, as a part of the largest element; NaN where something was not
    written."""
    draw = np.random.default_rng(seed)
    heads, queries, keys = case.heads, case.queries, case.keys
    q = draw.standard_normal((heads, queries, DIM)).astype(np.float16)
    k, v = (draw.standard_normal((heads // case.shared_by, keys, DIM)).astype(np.float16) for _ in range(2))
    out = np.full(q.shape, np.nan, np.float16)
    arguments = (
        *(Descriptor(x, (1, rows, DIM)) for x, rows in ((q, ROWS), (k, case.block_n), (v, case.block_n), (out, ROWS))),
        *(heads, case.shared_by, queries, keys, math.log2(math.e) / math.sqrt(DIM), case.stages, 2, case.causal),
    )
    simulate(module, "gluon_attention_kernel", arguments, case.programs, seed, tile_of=tile_of, ROWS=ROWS)
    expected = np.zeros(q.shape)
    for head in range(heads):
        for query in range(queries):
            seen = slice(max(query + keys - queries + 1, 0) if case.causal else keys)
            if seen.stop:
                scores = k[head // case.shared_by, seen].astype(float) @ q[head, query].astype(float) / math.sqrt(DIM)
                weights = np.exp(scores - scores.max())
                expected[head, query] = weights @ v[head // case.shared_by, seen].astype(float) / weights.sum()
    return float(np.abs(out - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 2, 19, 19, True, block_n=8),  # more tiles than programs, and ragged ones
        Case(4, 1, 16, 16, True, block_n=8),
        Case(4, 4, 16, 24, False, stages=3),
        Case(2, 1, 19, 37, False),
        Case(2, 1, 5, 30, True, block_n=16),  # the last query stands at the last key
        Case(2, 1, 9, 5, True, programs=1),  # the first queries see none
        Case(2, 1, 30, 3, True),  # whole tiles that see none
        Case(1, 1, 1, 1, False, programs=1),
    ],
    ids=str,
)
def test_the_result_is_right_whoever_goes_first(case: Case) -> None:
    for seed in range(SEEDS):
        assert distance(gluon_attention, case, seed) < 1e-3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mbarrier.wait(k_empty.index(stage), phase)", "pass"),
        ("mbarrier.wait(v_empty.index(stage), phase)", "pass"),
        ("mbarrier.wait(q_empty.index(group), q_phase)", "pass"),
        ("mbarrier.wait(q_full.index(group), q_phase)", "pass"),
        ("mbarrier.init(k_empty.index(stage), count=2)", "mbarrier.init(k_empty.index(stage), count=1)"),
        ("mbarrier.init(v_empty.index(stage), count=2)", "mbarrier.init(v_empty.index(stage), count=1)"),
        ("phase = 1  #", "phase = 0  #"),
        ("    mbarrier.wait(k_full.index(k_stage), k_phase)\n    scores", "    scores"),
        ("    mbarrier.wait(v_full.index(v_stage), v_phase)\n    sums", "    sums"),
        ("scores = warpgroup_mma_wait(1, deps=(scores,))", "pass"),
        ("my_turn)\n    sums, p = warpgroup_mma_wait(0, deps=(sums, p))", "my_turn)"),
        ("tma.store_wait(0)  # what was written from here before has been read", "pass"),
        ("mbarrier.wait(turns.index(group), my_turn ^ 1)", "pass"),
        ("head // shared_by, key, 0], v_full", "head // shared_by, key + 1, 0], v_full"),
        ("allowed = gl.zeros([ROWS], gl.int32, ROW) + (keys - 1)", "allowed = gl.zeros([ROWS], gl.int32, ROW) + keys"),
    ],
)
def test_a_defect_of_the_protocol_is_seen(tmp_path: Path, old: str, new: str) -> None:
    module = changed(gluon_attention, old, new, tmp_path)

    def fails(seed: int) -> bool:
        try:
            return any(
                not distance(module, Case(4, 2, 27, 37, causal, programs=2), seed) < 1e-3 for causal in (False, True)
            )
        except (DeadlockError, AssertionError):
            return True

    assert any(fails(seed) for seed in range(SEEDS))


def test_one_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="STAGES=1 must be 2 or more"):
        GluonAttentionConfig(STAGES=1)
    with pytest.raises(DeadlockError):
        distance(gluon_attention, Case(2, 1, 19, 37, False, stages=1), seed=0)


JOBS = [
    pytest.param(
        {"op": "attention", "kind": kind, "dim": dim, "causal": causal, "config": asdict(config)},
        id=f"{kind}-{dim}-{'causal' if causal else 'all'}-{label(config)}",
        marks=() if place == 0 and (kind == "bf16") == causal == (dim == 128) else pytest.mark.slow,
    )
    for dim in (64, 128)
    for place, config in enumerate(ATTENTION_CONFIGS)
    for kind in ("bf16", "fp16")
    for causal in (False, True)
    if config.shared_bytes(dim) <= resolve_device("h200").shared_per_block
]


@pytest.mark.parametrize("job", JOBS)
def test_it_compiles_for_sm_90_and_softmax_runs_beside_products(job: dict[str, object]) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gluon_compile", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["resources"]["spill_bytes"] == 0
    config, dim = GluonAttentionConfig(**job["config"]), int(str(job["dim"]))  # type: ignore[arg-type]
    needed = found["resources"]["shared_bytes"]
    assert config.shared_bytes(dim) <= needed <= resolve_device("h200").shared_per_block
    assert re.search(rf"setmaxnreg\.inc\S* \s*{MULTIPLYING_REGISTERS.value};", found["ptx"])
    # Two groups, each with a loop of masked blocks and one of whole ones.
    assert [exponentials > 8 for exponentials in beside_products(found["sass"])] == [True] * 4


def beside_products(sass: str) -> list[int]:
    """Exponentials between a wait for all products but the last, and the next wait for all, one after the other."""
    steps = re.findall(r"MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]", sass)
    starts = [place for place, step in enumerate(steps) if step.endswith("0x1")]
    waits = [place for place, step in enumerate(steps) if step.endswith("0x0")]
    return [min(place for place in waits if place > start) - start - 1 for start in starts]


def test_exponentials_are_counted() -> None:
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x"
    sass = f"MUFU.EX2 R1\n{wait}1 ;\nMUFU.EX2 R2\nMUFU.EX2 R3\n{wait}0 ;\n{wait}1 ;\n{wait}0 ;\nMUFU.EX2 R4"
    assert beside_products(sass) == [2, 0]
