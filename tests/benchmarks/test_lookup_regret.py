"""The regret of answers from elsewhere, on landscapes small enough to know the answer."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.lookup_regret import (
    Space,
    differences,
    left_out,
    load,
    main,
    measured_in,
    other_board,
    put,
    records_of,
    whole_table,
)
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import record_key
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuning_db.env import SHIPPED

RTX3090, A10 = resolve_device("rtx3090"), resolve_device("a10")
PROBLEM = GemmProblem(M=128, N=4096, K=4096)
CONFIGS = [config.to_json() for config in GEMM.space.configs(PROBLEM, RTX3090)[:12]]


def landscape(best: int, problem: GemmProblem = PROBLEM, device: object = RTX3090, least: float = 100.0) -> list:
    """Twelve configurations, the best of which is the given one; each further from it is 10 % slower."""
    times = [(config, least * (1 + 0.1 * abs(at - best))) for at, config in enumerate(CONFIGS)]
    return list(records_of(record_key(GEMM, problem, device), times))


def run(folder: Path, *arguments: str) -> dict:
    replays = Path(__file__).parents[2] / "benchmarks" / "replay"
    spaces = [f"--space={replays}/convolution__RTX_{name}.npz" for name in ("Titan", "2080_Ti")]
    figures = folder / "figures.json"
    options = [*spaces, "--seeds=1", "--trials=20", f"--db={folder}", f"--json={figures}", *arguments]
    done = CliRunner().invoke(main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return {"output": " ".join(done.output.split()), **json.loads(figures.read_text())}


def test_near_shapes_and_boards_are_asked_without_the_problem_itself(tmp_path: Path) -> None:
    near, further = replace(PROBLEM, M=256), replace(PROBLEM, M=2048)
    put(tmp_path, [*landscape(3), *landscape(5, near), *landscape(0, further), *landscape(7, device=A10)])
    figures = run(tmp_path)
    of = figures["near shape"]["gemm"]
    # 128 and 256 answer each other, 2 configurations off; 2048 is answered by 256, 5 off. a10 has one problem alone.
    assert (of["asked"], of["answers"], of["unanswered"], of["not_timed"]) == (4, 3, 1, 0)
    assert of["mean"] == pytest.approx((0.2 + 0.2 + 0.5) / 3)
    assert of["to 1"] == pytest.approx({"answers": 2, "mean": 0.2, "p50": 0.2, "p95": 0.2})
    assert of["to 4"] == pytest.approx({"answers": 1, "mean": 0.5, "p50": 0.5, "p95": 0.5})
    # By board: 128 has it on the other one, 4 off, and the other from 128; the rest are near it: 2 and 7 off.
    of = figures["other board of the arch"]["gemm"]
    assert (of["asked"], of["answers"]) == (4, 4)
    assert of["mean"] == pytest.approx((0.4 + 0.4 + 0.2 + 0.7) / 4)


def test_what_failed_gives_way_and_what_was_not_tried_is_counted(tmp_path: Path) -> None:
    near = replace(PROBLEM, M=256)
    failed = list(records_of(record_key(GEMM, near, RTX3090), [(CONFIGS[3], np.inf)]))
    others = [record for record in landscape(5, near) if record.config != CONFIGS[3]]
    fewer = [record for record in landscape(3) if record.config not in CONFIGS[5:7]]
    put(tmp_path, [*fewer, *others, *failed])
    of = run(tmp_path)["near shape"]["gemm"]
    assert (of["asked"], of["answers"], of["not_timed"]) == (2, 1, 1)  # configuration 5 was not tried on 128
    assert of["mean"] == pytest.approx(0.3)  # 3 fails on 256; 2 is as good as 4 on 128 and came first


def test_times_of_one_configuration_under_two_keys_are_compared(tmp_path: Path) -> None:
    key = record_key(GEMM, PROBLEM, RTX3090)
    older, oldest = replace(key, kernel_hash="older"), replace(key, kernel_hash="oldest")
    lacking = json.loads(CONFIGS[0])
    del lacking["PAIRS"]  # a field that a later revision added
    measured = [(key, CONFIGS[0], 110.0), (older, json.dumps(lacking), 100.0), (oldest, CONFIGS[0], 104.5)]
    measured += [(key, CONFIGS[1], 5.0), (older, CONFIGS[1], np.inf), (older, CONFIGS[2], 7.0)]
    put(tmp_path, [record for key, config, us in measured for record in records_of(key, [(config, us)])])
    assert sorted(differences(tmp_path)) == pytest.approx([0.045, 110 / 104.5 - 1, 0.1])
    figures = run(tmp_path)
    assert figures["other key"]["pairs"] == 3
    assert "times under two keys: 3 pairs, 50 % by at most 5.3 %, 80 % by at most" in figures["output"]


def test_shipped_records_don_t_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    for folder in (shipped, own):
        folder.mkdir()
        put(folder, landscape(3, replace(PROBLEM, M=256)) if folder == shipped else landscape(5))
    monkeypatch.setenv(SHIPPED, str(shipped))
    (answers,) = left_out(measured_in(own), board=False).values()
    assert (answers.asked, answers.unanswered) == (1, 1)
    assert os.environ[SHIPPED] == str(shipped)


def test_without_landscapes_it_says_so(tmp_path: Path) -> None:
    put(tmp_path, landscape(3)[:9])
    figures = run(tmp_path)
    assert f"not measured, for {tmp_path} has no problem with 10" in figures["output"]
    assert "near shape" not in figures


def test_the_regret_of_another_board_is_that_of_its_best() -> None:
    there = Space("k", "A", {"a": 1.0, "b": 2.0, "c": 3.0, "d": np.inf})
    here = Space("k", "B", {"a": np.inf, "b": 30.0, "c": 20.0, "d": 10.0})
    outcome = other_board(there, here, trials=4, seeds=2)
    # b is the fastest there of what runs here: 3 times the optimum, which fails there.
    assert outcome == {"regret": [2.0, 2.0], "transfer": [2.0, 2.0], "own": [0.0, 0.0]}
    assert whole_table(there, here) == 2.0


def test_a_table_is_read_as_its_format_says(tmp_path: Path) -> None:
    path = tmp_path / "kernel__GPU_X.npz"
    np.savez(
        path,
        X=np.array([[0, 1], [1, 0]]),
        names=np.array(["block", "pad"]),
        dom=np.array(json.dumps({"block": [16, 32], "pad": [False, True]})),
        time=np.array([0.5, np.nan]),
        times=np.array([[0.5, 0.5], [np.nan, np.nan]]),
    )
    space = load(path)
    assert (space.kernel, space.gpu, space.least_us) == ("kernel", "GPU_X", 500.0)
    assert space.times_us == {'{"block":16,"pad":true}': 500.0, '{"block":32,"pad":false}': np.inf}
