"""The comparison on a GPU, rehearsed: every case goes through, and every file says that its times are made up."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import comparison_report, gpu, torch_board
from benchmarks.cases import FAMILIES, LARGE, RESNET_32, SKINNY, UP, WEIGHTS, Case, as_convolution, cases, computes_all
from benchmarks.comparison_report import markdown
from benchmarks.contenders import CHECK, DEFAULT, OURS, Contender
from benchmarks.rehearsal import RehearsalBoard
from benchmarks.torch_board import (
    ENERGY_S,
    PATIENCE_S,
    Loop,
    Timed,
    closed_loop,
    compile_ahead,
    driver_launch,
    rates,
)
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import Choice
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.registry import find_kernel
from tilewright.tuning_db import env

ROW = {"family", "name", "op", "problem", "flops", "bytes", "ratio", "against", "contenders"}
TIMED = set(Timed._fields) | {"role"}


class Bound:
    """A plan of one launch, and that launch bound."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.written = 0
        self.start: Any = lambda *parameters: self.started.append(parameters)

    def bind(self, names: Sequence[str], strides: Any) -> Any:
        return self.launch

    def launch(self, addresses: Sequence[int], stream: int) -> None:
        self.written += 1
        self.start(stream, sum(addresses), 0)


def test_the_drivers_launch_alone_writes_no_parameters_again() -> None:
    bound = Bound()
    plan: Any = bound
    launch = driver_launch(plan, ("a_ptr", "out_ptr"), [1, 2])
    assert bound.started == []
    for _ in range(2):
        launch()
    assert bound.started == [(0, 3, 0)] * 2
    assert bound.written == 1


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a rehearsal of everything, and what it printed."""
    out = tmp_path_factory.mktemp("rehearsal")
    result = CliRunner().invoke(gpu.main, ["--rehearse", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out, result.output


def test_a_rehearsal_writes_every_file_and_says_what_it_is(rehearsed: tuple[Path, str]) -> None:
    out, printed = rehearsed
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.md", "ratios.png", "roofline.png"}
    assert (out / "ratios.png").read_bytes().startswith(b"\x89PNG")
    assert "nothing is measured" in printed
    assert "nothing here was measured" in (out / "gpu.md").read_text()
    assert json.loads((out / "gpu.json").read_text())["simulated"] is True


def test_the_document_has_every_case(rehearsed: tuple[Path, str]) -> None:
    document = json.loads((rehearsed[0] / "gpu.json").read_text())
    assert document["left_out"] == []
    assert len(document["cases"]) == len(cases())
    for row in document["cases"]:
        assert set(row) >= ROW
        assert find_kernel(row["op"]).problem.from_dict(row["problem"]).flops() == row["flops"]
        assert all(set(timed) == TIMED for timed in row["contenders"].values())
        assert row["ratio"] == pytest.approx(
            row["contenders"][row["against"]]["median_us"] / row["contenders"][OURS]["median_us"]
        )
    assert {family["family"] for family in document["families"]} == {family.name for family in FAMILIES}
    assert {entry["family"] for entry in document["load"]} == set(gpu.LOADED)


def test_the_report_has_every_family_and_case(rehearsed: tuple[Path, str]) -> None:
    document = json.loads((rehearsed[0] / "gpu.json").read_text())
    text = markdown(document)
    assert (rehearsed[0] / "gpu.md").read_text() == text
    for row in document["cases"]:
        assert f"| {row['family']} | {row['name']} |" in text


def test_every_board_in_the_catalogue_could_run_the_cases_it_supports() -> None:
    board = resolve_device("h200")
    for case in cases():
        kernel = find_kernel(case.op)
        assert kernel.supported(case.problem, board) is None
        kernel.space.check(case.problem, kernel.default(case.problem, board), board)


def test_a_convolution_of_single_pixels_is_seen_as_images_again() -> None:
    flat = [case for case in cases() if case.family is RESNET_32 and isinstance(case.problem, GemmProblem)]
    assert len(flat) > 10
    for case in flat:
        convolution = as_convolution(case)
        assert convolution is not None
        assert convolution.flops() == case.problem.flops()
        assert (convolution.N, convolution.H) == (32, convolution.W)


def timed(median_us: float) -> Timed:
    return Timed(median_us, median_us, median_us, 10)


FUSED = next(case for case in cases() if case.family is UP)
BARE = next(case for case in cases() if case.family is LARGE)


def test_the_rival_computes_the_whole_or_has_the_familys_role() -> None:
    roles = {OURS: "ours", DEFAULT: "ours", "bare": "library", "apart": "separate", "fused": "fused"}
    found = {OURS: timed(9), DEFAULT: timed(12), "bare": timed(5), "apart": timed(11), "fused": timed(10)}
    whole = dataclasses.replace(FUSED, family=dataclasses.replace(UP, against="whole"))
    assert gpu.best_rival(FUSED, roles, found) == "apart"
    assert gpu.best_rival(whole, roles, found) == "fused"
    assert gpu.best_rival(BARE, roles, found) == "bare"
    assert not computes_all(FUSED, "library")
    different = found | {"fused": timed(10)._replace(difference=0.3)}
    assert gpu.best_rival(whole, roles, different) == "apart"
    row: dict[str, Any] = {}
    gpu.rate(row, FUSED, roles, found)
    assert row == {"against": "apart", "ratio": 11 / 9, "best": "fused", "best_ratio": 10 / 9}
    refused = found | {"fused": Timed(error="no")}
    assert gpu.best_rival(whole, roles, refused) == "apart"
    assert gpu.best_rival(whole, roles, {OURS: timed(9)}) is None


def test_a_familys_figure_is_the_geometric_mean() -> None:
    row: dict[str, Any] = {"family": LARGE.name, "op": "gemm", "bytes": 1, "of_copy": 0.5, "best_ratio": 1.5}
    row["contenders"] = {}
    (entry,) = gpu.summary([{**row, "ratio": 0.5}, {**row, "ratio": 2.0}])
    assert entry["ratio"] == pytest.approx(1.0)
    assert (entry["cases"], entry["compared"], entry["met"]) == (2, 2, True)
    (entry,) = gpu.summary([{**row, "ratio": 0.9}])
    assert entry["met"] is False
    (entry,) = gpu.summary([{**row, "ratio": None}])
    assert (entry["ratio"], entry["met"]) == (None, None)


def test_a_bar_holds_only_for_a_family_of_which_every_case_was_compared() -> None:
    row: dict[str, Any] = {"family": LARGE.name, "op": "gemm", "bytes": 1, "best_ratio": 1.5, "contenders": {}}
    (entry,) = gpu.summary([{**row, "ratio": 2.0}], [f"{LARGE.name}: another"])  # the time was up
    assert (entry["cases"], entry["compared"], entry["met"]) == (2, 1, None)
    (entry,) = gpu.summary([{**row, "ratio": 2.0}, {**row, "ratio": None, "error": "differs"}])
    assert entry["met"] is False
    failed = {**row, "ratio": None, "contenders": {OURS: {"error": "LaunchError: no"}}}
    (entry,) = gpu.summary([{**row, "ratio": 2.0}, failed])
    assert entry["met"] is False


def test_the_share_of_copy_bandwidth_is_a_bar_too() -> None:
    row: dict[str, Any] = {"family": SKINNY.name, "op": "gemm", "bytes": 1, "best_ratio": 2.0, "contenders": {}}
    for part, met in ((0.8491, False), (0.85, True)):
        (entry,) = gpu.summary([{**row, "ratio": 2.0, "of_copy": part}])
        assert entry["met"] is met


@pytest.mark.parametrize("apart", [0.3, math.nan])
def test_a_result_that_no_way_of_the_librarys_shares_is_an_error_and_no_ratio(apart: float) -> None:
    roles = {OURS: "ours", DEFAULT: "ours", "bare": "library", "other": "library"}
    found = {OURS: timed(9), DEFAULT: timed(12), "bare": timed(5)._replace(difference=apart)}
    row: dict[str, Any] = {"ratio": None}
    gpu.rate(row, BARE, roles, found)
    assert "differs from every way of the library's" in row["error"]
    assert row["ratio"] is None
    row = {}
    gpu.rate(row, BARE, roles, found | {"other": timed(11)._replace(difference=1e-3)})
    assert row["against"] == "other"
    assert "error" not in row


@pytest.mark.parametrize("apart", [0.3, math.inf])
def test_two_configurations_whose_results_differ_are_an_error_and_no_ratio(tmp_path: Path, apart: float) -> None:
    class Differing(RehearsalBoard):
        def compare(self, case: Case, contenders: Sequence[Contender]) -> tuple[dict[str, Timed], str]:
            found, method = super().compare(case, contenders)
            return found | {DEFAULT: found[DEFAULT]._replace(difference=apart)}, method

    document = gpu.run(Differing("h200"), [BARE], math.inf, tmp_path)
    (row,) = document["cases"]
    said = (
        f"the results of two configurations, the chosen and the default, differ by {apart:.2g} of the largest element"
    )
    assert (row["error"], row["ratio"]) == (said, None)
    assert "default_ratio" not in row
    assert document["families"][0]["met"] is False
    assert said in (tmp_path / "gpu.md").read_text()


def test_what_ours_is_checked_by_competes_with_nothing() -> None:
    case = next(case for case in cases() if case.family is WEIGHTS)
    roles = {OURS: "ours", "bare": "library", "dequantised": CHECK}
    found = {OURS: timed(9), "bare": timed(18), "dequantised": Timed(difference=1e-3)}
    row: dict[str, Any] = {}
    gpu.rate(row, case, roles, found)
    assert row == {"against": "bare", "ratio": 2.0, "best": None, "best_ratio": None}
    row = {}
    gpu.rate(row, case, roles, found | {"dequantised": Timed(difference=0.2)})
    assert row == {"error": "the result differs from every way of the library's, by 0.2 of the largest element"}


def test_a_killed_run_leaves_a_whole_document(tmp_path: Path) -> None:
    class Killed(RehearsalBoard):
        def compare(self, case: Case, contenders: Sequence[Contender]) -> tuple[dict[str, Timed], str]:
            if case is FUSED:
                raise KeyboardInterrupt
            return super().compare(case, contenders)

    with pytest.raises(KeyboardInterrupt):
        gpu.run(Killed("h200"), [BARE, FUSED], math.inf, tmp_path)
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["name"] for row in document["cases"]] == [BARE.name]
    assert document["left_out"] == [f"{UP.name}: {FUSED.name}"]
    assert LARGE.name in markdown(document)


def test_without_peaks_or_dispatch_the_cases_are_compared_all_the_same(tmp_path: Path) -> None:
    class Small(RehearsalBoard):
        def peaks(self) -> dict[str, float]:
            raise RuntimeError("CUDA out of memory")

        def dispatch(self) -> list[tuple[str, float]]:
            raise RuntimeError("no CuPy")

    document = gpu.run(Small("h200"), [BARE], math.inf, tmp_path, "tuned by hand")
    assert "tuned by hand" in (tmp_path / "gpu.md").read_text()
    assert document["errors"] == ["peaks: RuntimeError: CUDA out of memory", "dispatch_us: RuntimeError: no CuPy"]
    assert document["cases"][0]["ratio"] > 0
    assert "Not measured: peaks: RuntimeError: CUDA out of memory" in (tmp_path / "gpu.md").read_text()


def test_another_run_s_results_are_left_alone(tmp_path: Path) -> None:
    for simulated, status in ((True, 0), (False, 2)):
        (tmp_path / "gpu.json").write_text(json.dumps({"simulated": simulated}))
        arguments = ["--rehearse", "--family", LARGE.name, "--out", str(tmp_path)]
        result = CliRunner().invoke(gpu.main, arguments)
        assert result.exit_code == status, result.output
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"simulated": False}


class Failing(RehearsalBoard):
    """A board on which one case fails as a whole and, in another, our kernel."""

    def compare(self, case: Case, contenders: Sequence[Contender]) -> tuple[dict[str, Timed], str]:
        if case is FUSED:
            raise RuntimeError("out of\nmemory")
        found, method = super().compare(case, contenders)
        if case is BARE:
            found[OURS] = Timed(error="LaunchError: no")
        return found, method


def test_what_fails_is_a_line_of_the_result(tmp_path: Path) -> None:
    document = gpu.run(Failing("h200"), [FUSED, BARE, cases()[-1]], math.inf, tmp_path)
    rows = document["cases"]
    assert rows[0]["error"] == "RuntimeError: out of memory"
    assert rows[1]["contenders"][OURS]["error"] == "LaunchError: no"
    assert [row["ratio"] for row in rows[:2]] == [None, None]
    assert rows[2]["ratio"] > 0
    assert "RuntimeError: out of memory" in (tmp_path / "gpu.md").read_text()


def test_a_run_ends_when_its_time_is_up(tmp_path: Path) -> None:
    document = gpu.run(RehearsalBoard("h200"), cases(), 0.0, tmp_path)
    assert document["cases"] == []
    assert len(document["left_out"]) == len(cases())
    assert "Left out for want of time" in (tmp_path / "gpu.md").read_text()


def test_separate_passes_are_held_against_the_copy() -> None:
    """A pass over 4096 x 4096 bf16, read and written, that takes the time of a copy at half the bandwidth."""
    problem = GemmProblem(4096, 4096, 64, dtype="bf16", bias="bf16")
    moved = 2 * 2 * 4096 * 4096
    timed = {"cuBLAS": ("library", 10.0), "cuBLAS + elementwise": ("separate", 10.0 + moved / 2000 / 1e3)}
    case = {
        "family": "f",
        "op": "gemm",
        "problem": problem.to_dict(),
        "against": "cuBLAS + elementwise",
        "ratio": 2.0,
        "contenders": {name: {"role": role, "median_us": us, "error": ""} for name, (role, us) in timed.items()},
    }
    others = [{**case, "against": "cuBLAS", "ratio": ratio} for ratio in (0.5, 0.5, None)]
    lines = comparison_report._passes([case, *others], {"copy_gbs": 4000.0})
    assert lines[-2] == "| f | 1 of 4 | 2.000 | 0.500 | 4 | 50% | 50% | 50% |"
    # Small ones say nothing of bandwidth, and yet that the family is held against passes.
    small = {**case, "problem": GemmProblem(64, 64, 64, dtype="bf16", bias="bf16").to_dict()}
    assert comparison_report._passes([small], {"copy_gbs": 4000.0})[-2] == "| f | 1 of 1 | 2.000 | - | 0 |  |  |  |"
    assert comparison_report._passes([{**case, "against": "cuBLAS"}], {"copy_gbs": 4000.0}) == []
    assert comparison_report._passes([case], {}) == []


def test_a_family_s_line_has_the_default_s_figure_and_says_which_cases_a_copy_is_held_against() -> None:
    def case(op: str, gb: float, of_copy: float, default_us: float) -> dict[str, Any]:
        times = {"cuDNN": 8.0, DEFAULT: default_us}
        contenders = {name: {"median_us": us, "error": ""} for name, us in times.items()}
        return {
            "family": "f",
            "op": op,
            "bytes": gb * 1e9,
            "of_copy": of_copy,
            "against": "cuDNN",
            "contenders": contenders,
        }

    def line(*cases: dict[str, Any]) -> str:
        family = {"family": "f", "against": "whole", "cases": 2, "compared": 2, "ratio": 1.0, "best_ratio": 1.0}
        family |= {"bar": 1.1, "met": False, "of_copy": 0.9, "copy_bar": 0.85}
        return comparison_report._families([family], cases)[-1]

    whole = "| f | best that computes the same | 2/2 | 1.000 | 1.10 | no | 1.000 |"
    small, large = case("attention", 0.5, 0.4, 4.0), case("attention", 2, 0.9, 16.0)
    assert line(small, large) == f"{whole} 1.000 | 90.0% (bar 85%) in 1 of 2 cases; 60.0% in all |"
    assert line(case("gemm", 0.5, 0.9, 4.0)) == f"{whole} 2.000 | 90.0% (bar 85%) |"
    failed = {"family": "f", "op": "gemm", "bytes": 1, "contenders": {}, "error": "no"}
    assert line(failed) == f"{whole} - | 90.0% (bar 85%) |"


def test_defaults_and_what_is_on_record_are_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = resolve_device("h200")
    recorded = dataclasses.replace(find_kernel("gemm").default(BARE.problem, board), GROUP_M=16)
    monkeypatch.setattr(
        torch_board,
        "recorded_choice",
        lambda kernel, problem, device, db: Choice(recorded, None, "on record") if problem is BARE.problem else None,
    )
    asked: list[Any] = []

    class Compiling:
        compiled = 3

        def submit(self, kernel: Any, problem: Any, config: Any) -> Future[Any]:
            asked.append((problem, config))
            future: Future[Any] = Future()
            future.set_result({"status": "ok"})
            return future

    compiler: Any = Compiling()
    assert compile_ahead(compiler, board, [BARE, FUSED], tmp_path, 1.0) == 3
    default = find_kernel("gemm").default
    assert asked == [
        (BARE.problem, default(BARE.problem, board)),
        (BARE.problem, recorded),
        (FUSED.problem, default(FUSED.problem, board)),
    ]


def test_what_torch_compiles_on_a_board_never_runs_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.DB_DIR, "before")  # the board names a folder of its own
    monkeypatch.setattr(torch_board, "TorchGpu", lambda ordinal, torch: None)
    config = SimpleNamespace(recompile_limit=8, accumulated_recompile_limit=8, fail_on_recompile_limit_hit=False)
    cuda = SimpleNamespace(is_available=lambda: True, set_device=lambda ordinal: None)
    cudnn = SimpleNamespace(benchmark=False)
    torch = SimpleNamespace(
        _dynamo=SimpleNamespace(config=config), cuda=cuda, backends=SimpleNamespace(cudnn=cudnn), __version__="2"
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    torch_board.TorchBoard(0, tmp_path)
    # Variants of the epilogues of all cases share one limit, of each of the two kinds.
    assert min(config.recompile_limit, config.accumulated_recompile_limit) > len(cases())
    assert config.fail_on_recompile_limit_hit


def simulated_loop(watt: float | None, tick_s: float = 0.1, step_s: float = 0.003) -> Loop:
    """A loop on a clock of its own, beside a counter that moves every `tick_s`."""
    now = [0.0]

    def step() -> None:
        now[0] += step_s

    def joules() -> float | None:
        return None if watt is None else watt * tick_s * math.floor(now[0] / tick_s)

    return closed_loop(step, joules, lambda: now[0])


@pytest.mark.parametrize("tick_s", [0.02, 0.1])
def test_energy_is_counted_from_one_move_of_the_counter_to_another(tick_s: float) -> None:
    loop = simulated_loop(500.0, tick_s)
    assert loop.joules is not None
    assert loop.seconds == pytest.approx(loop.steps * 0.003)
    assert ENERGY_S <= loop.seconds < ENERGY_S + 2 * tick_s
    assert loop.joules / loop.seconds == pytest.approx(500, rel=0.01)  # and not off by a part of a tick
    found = rates([loop, loop], calls=8)
    assert found["watt"] == pytest.approx(500, rel=0.01)
    assert found["calls_per_s"] == pytest.approx(8 / 0.003)
    assert found["joules_per_call"] == pytest.approx(500 * 0.003 / 8, rel=0.01)


@pytest.mark.parametrize("watt", [None, 0.0])
def test_without_a_counter_or_with_one_that_stands_still_there_is_no_energy(watt: float | None) -> None:
    loop = simulated_loop(watt)
    assert loop.seconds < ENERGY_S + 2 * PATIENCE_S
    assert set(rates([loop, loop], calls=8)) == {"calls_per_s"}


def test_no_time_is_a_mistake(tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu.main, ["--rehearse", "--minutes", "0", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "0.0 is not in the range x>0" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "rtx3090"], "rtx3090 is not a GPU of this machine: nothing can be measured"),
        (["--family", "sparse"], "no family has 'sparse' in its name"),
        (["--device", "sm_1000"], "sm_1000"),
        (["--minutes", "nan"], "--minutes nan must be a finite number"),
    ],
)
def test_what_can_t_be_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(gpu.main, ["--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
