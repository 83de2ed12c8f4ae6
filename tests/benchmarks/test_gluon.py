"""The comparison of kernels in Gluon, rehearsed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import gluon
from benchmarks.cases import PREFILL, PREFILL_OTHER, UP, Case, cases
from benchmarks.contenders import OURS, Contender
from benchmarks.gluon import (
    ATTENTION_CONFIGS,
    GEMM_CONFIGS,
    chosen_cases,
    contenders,
    label,
    main,
    markdown,
    rated,
)
from benchmarks.rehearsal import RehearsalBoard
from benchmarks.torch_board import Timed
from tilewright.kernels.devices import resolve_device
from tilewright.tuning_db.errors import UsageError

ONE, OTHER = (label(config) for config in GEMM_CONFIGS[:2])
LIBRARY = [Contender(name, role, lambda arrays: None) for name, role in (("product", "library"), ("epilogue", "fused"))]
CASE = next(case for case in cases() if case.family is UP)


def times(**changed: Timed) -> dict[str, Timed]:
    found = {
        OURS: Timed(120.0, difference=0.0),
        ONE: Timed(100.0, difference=0.001),
        OTHER: Timed(110.0, difference=0.001),
        "product": Timed(60.0),
        "epilogue": Timed(90.0, difference=0.001),
    }
    return found | changed


def test_a_rehearsal_writes_every_case_and_says_what_it_is(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--rehearse", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "gluon.json").read_text())
    assert document["simulated"] is True
    assert [row["name"] for row in document["cases"]] == [case.name for case in chosen_cases()]
    for row, case in zip(document["cases"], chosen_cases(), strict=True):
        fitting = len(contenders(case, resolve_device("h200")))
        assert len(row["contenders"]) == 1 + fitting + 3
        assert row["best"]
    assert (tmp_path / "gluon.md").read_text().startswith("**Rehearsal: nothing here was measured.**")


def test_without_its_gpu_one_line_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--device", "sm_90", "--out", str(tmp_path / "new")])
    assert done.exit_code == 2
    assert "sm_90 is not a GPU of this machine: nothing can be measured (--rehearse rehearses)" in done.output
    assert not (tmp_path / "new").exists()


def test_another_arch_or_no_end_is_refused(tmp_path: Path) -> None:
    for more, said in (
        (["--device", "rtx3090"], "rtx3090 is sm_86, and the kernel is of sm_90: name such a GPU"),
        (["--minutes", "nan"], "--minutes nan must be a finite number"),
    ):
        done = CliRunner().invoke(main, ["--rehearse", "--out", str(tmp_path / "new"), *more])
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())
    (tmp_path / "gluon.json").write_text('{"simulated": false}')
    done = CliRunner().invoke(main, ["--rehearse", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "has the results of another run" in done.output


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    document = gluon.run(RehearsalBoard("h200"), 0.0, tmp_path, chosen_cases())
    assert document["cases"] == []
    assert len(document["left_out"]) == len(chosen_cases())
    assert "Left out for want of time: gemm, large: 4096 x 4096 x 4096 bf16;" in markdown(document)


def test_all_that_is_launched_is_compiled_ahead_in_a_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Preparing(RehearsalBoard):
        simulated = False

        def prepare(self, chosen: Sequence[Case], seconds: float) -> int:
            asked.append((len(chosen), seconds))
            raise UsageError("no compiler")  # each is compiled in its turn, then

    def compiled(jobs: Sequence[dict[str, Any]], seconds: float) -> int:
        asked.append((len(jobs), seconds))
        return len(jobs)

    asked: list[tuple[int, float]] = []
    monkeypatch.setattr(gluon, "compile_ahead", compiled)
    document = gluon.run(Preparing("h200"), time.monotonic() + 400, tmp_path, [CASE])
    assert [row["name"] for row in document["cases"]] == [CASE.name]
    (ours, ours_s), (own, own_s) = asked
    assert (ours, own) == (1, len(GEMM_CONFIGS))
    assert 50 < ours_s == own_s <= 100


def test_the_best_is_held_against_ours_and_what_computes_the_same() -> None:
    row = rated(CASE, LIBRARY, times())
    assert (row["best"], row["library"]) == (ONE, "epilogue")
    assert (row["of_ours"], row["of_library"]) == (1.2, 0.9)


def test_a_wrong_result_has_no_time() -> None:
    for difference in (0.02, float("nan"), None):
        row = rated(CASE, LIBRARY, times(**{ONE: Timed(50.0, difference=difference)}))
        assert row["best"] == OTHER
        assert row["contenders"][ONE]["median_us"] == 0.0
        assert row["contenders"][ONE]["error"] == f"the result differs from ours by {difference} of the largest element"


def test_a_case_where_nothing_worked_is_a_row() -> None:
    row = rated(CASE, LIBRARY, times(**dict.fromkeys((ONE, OTHER, OURS), Timed(error="out of memory"))))
    assert (row["best"], row["of_ours"], row["of_library"]) == (None, None, None)
    assert row["contenders"][OURS]["error"] == "out of memory"
    row = rated(CASE, LIBRARY, times(**{OURS: Timed(error="out of memory"), ONE: Timed(90.0)}))
    assert row["contenders"][ONE]["error"] == "there is no result of ours to hold it against"


def test_one_op_is_chosen(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--rehearse", "--out", str(tmp_path), "--op", "attention"])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "gluon.json").read_text())
    assert {row["family"] for row in document["cases"]} == {PREFILL.name, PREFILL_OTHER.name}
    assert {case.op for case in chosen_cases("gemm")} == {"gemm"}
    assert len(chosen_cases()) == len(chosen_cases("gemm")) + len(chosen_cases("attention"))


def test_configurations_fit_and_have_labels_of_their_own() -> None:
    labels = {label(config) for config in (*GEMM_CONFIGS, *ATTENTION_CONFIGS)}
    assert len(labels) == len(GEMM_CONFIGS) + len(ATTENTION_CONFIGS)
    device = resolve_device("h200")
    assert all(config.shared_bytes() <= device.shared_per_block for config in GEMM_CONFIGS)
    assert [each.name for each in contenders(CASE, device)] == [label(config) for config in GEMM_CONFIGS]
    of_dim = {
        dim: {
            each.name
            for case in chosen_cases("attention")
            if case.problem.to_dict()["D"] == dim
            for each in contenders(case, device)
        }
        for dim in (64, 128)
    }
    assert of_dim[64] == {label(config) for config in ATTENTION_CONFIGS}  # each of them is tried
    assert of_dim[128] == of_dim[64] - {"Gluon, 128 keys, 4 stages, 8 heads in turns"}  # 320 KiB
