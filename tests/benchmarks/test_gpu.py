"""The comparison on a GPU, rehearsed: every case goes through, and every file says that its times are made up."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import gpu
from benchmarks.cases import FAMILIES, LARGE, RESNET_32, UP, Case, as_convolution, cases, computes_all
from benchmarks.comparison_report import markdown
from benchmarks.contenders import DEFAULT, OURS, Contender
from benchmarks.rehearsal import RehearsalBoard
from benchmarks.torch_board import Timed, driver_launch
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.registry import find_kernel

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
    (entry,) = gpu.summary([{**row, "ratio": 0.5}, {**row, "ratio": 2.0}, {**row, "ratio": None}])
    assert entry["ratio"] == pytest.approx(1.0)
    assert (entry["cases"], entry["compared"], entry["met"]) == (3, 2, True)
    (entry,) = gpu.summary([{**row, "ratio": 0.9}])
    assert entry["met"] is False
    (entry,) = gpu.summary([{**row, "ratio": None}])
    assert (entry["ratio"], entry["met"]) == (None, None)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "rtx3090"], "rtx3090 is not a GPU of this machine: nothing can be measured"),
        (["--family", "sparse"], "no family has 'sparse' in its name"),
        (["--device", "sm_1000"], "sm_1000"),
    ],
)
def test_what_can_t_be_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(gpu.main, ["--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
