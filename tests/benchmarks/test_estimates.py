"""Estimates beside the compiler: what is drawn, what is counted, and that the page has it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.estimates import POPULATIONS, Compared, Summary, draws, main, markdown, problems_of
from tilewright.kernels.devices import catalogue_device
from tilewright.kernels.lookup import predictions
from tilewright.kernels.registry import find_kernel
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.record import Resources

ROOT = Path(__file__).parents[2]


def compared(estimated: tuple[int, int, int], compiled: tuple[int, int, int]) -> Compared:
    """Registers, bytes spilled and of shared memory of both."""
    return Compared(*(Resources(registers, spill, spill, shared) for registers, spill, shared in (estimated, compiled)))


def test_what_is_counted() -> None:
    summary = Summary.of(
        [
            compared((100, 0, 1024), (100, 0, 1024)),
            compared((60, 0, 2048), (100, 0, 1024)),  # too few registers
            compared((90, 0, 512), (100, 0, 1024)),  # too little shared memory
            compared((255, 8, 1024), (255, 16, 1024)),
            compared((200, 0, 1024), (255, 16, 1024)),  # spills, and nobody knew
            compared((255, 8, 1024), (240, 0, 1024)),  # the other way round
        ]
    )
    assert asdict(summary) == {
        "compiled": 6,
        "registers": pytest.approx((0.9 + 1.0) / 2),
        "registers_counted": 4,
        "registers_near": 3,
        "spills": 2,
        "spills_foreseen": 1,
        "foreseen": 2,
        "shared_equal": 4,
        "shared_below": 1,
    }
    assert summary.cells() == ["6", "0.95", "3 of 4", "1 of 2", "1 of 2", "4", "1"]
    assert Summary.of([]).cells() == ["0", "-", "0 of 0", "0 of 0", "0 of 0", "0", "0"]


def test_draws_are_of_the_space_and_of_its_best_tenth() -> None:
    kernel, device = find_kernel("rmsnorm"), catalogue_device("a100")
    problems = problems_of(kernel, device, ["llama3-8b"])
    assert problems
    drawn = list(draws(kernel, device, problems, 5, seed=3))
    assert drawn == list(draws(kernel, device, problems, 5, seed=3))
    assert drawn != list(draws(kernel, device, problems, 5, seed=4))
    assert {draw.problem for draw in drawn} <= set(problems)
    for population in POPULATIONS:
        assert sum(draw.population == population for draw in drawn) == 5
    for draw in drawn:
        ranked = sorted(predictions(kernel, draw.problem, device), key=lambda pair: pair[0].order)
        place = [config for _, config in ranked].index(draw.config)
        best = draw.population == POPULATIONS[1]
        assert place < (max(5, 0.1 * len(ranked) + 1) if best else len(ranked))


def test_what_a_device_can_not_run_is_left_out() -> None:
    kernel, suites = find_kernel("gemm"), ["llama3-8b"]
    everywhere, without_int4 = (problems_of(kernel, catalogue_device(board), suites) for board in ("a100", "t4"))
    assert set(everywhere) > set(without_int4) > set()


def test_mistakes_are_one_line() -> None:
    for arguments, said in ((["--device", "sm_1"], "sm_1"), (["--suite", "bert"], "unknown suite"),
                            (["--kernel", "gem"], "did you mean gemm?")):  # fmt: skip
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2
        assert said in done.output
        assert done.output.count("\n") == 1


def test_it_runs_and_writes_its_figures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.estimates", "--device", "sm_86", "--kernel", "rmsnorm"]
    options = ["--suite", "llama3-8b", "--configs", "2", "--jobs", "1", "--list", "--json", str(figures)]
    environment = {**compiling_environment(), "COLUMNS": "40"}
    run = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "…" not in run.stdout
    document = json.loads(figures.read_text())
    assert {"cpu", "triton", "ptxas"} <= set(document["environment"])
    assert [row["population"] for row in document["results"]] == list(POPULATIONS)
    for row in document["results"]:
        assert row["summary"]["compiled"] + row["failed"] == 2
    assert markdown(document).count("\n") == 3
    assert list(tmp_path.iterdir()) == [figures]


def test_the_page_has_the_figures_on_record() -> None:
    document = json.loads((ROOT / "benchmarks/results/estimates.json").read_text())
    page = (ROOT / "docs/prediction.md").read_text()
    assert markdown(document) in page
    where = document["environment"]
    assert f"Triton {where['triton']}" in page
