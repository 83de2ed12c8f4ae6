"""The profile of what falls short: which cases, the profiler's command, and what is read from what it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import profiling
from benchmarks.cases import LARGE, SWIGLU, Case, cases
from benchmarks.contenders import OURS
from tilewright.tuning_db.errors import RunError

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"

HEAD = [
    *("ID", "Process ID", "Kernel Name", "gpu__time_duration.sum", profiling.COUNTERS["dram"], "launch__grid_size"),
    *("sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active", "sm__inst_executed_pipe_lsu.sum"),
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    *(f"{profiling.STALLED}{name}{profiling.PER_ISSUE}" for name in ("wait", "barrier", "long_scoreboard", "gmma")),
]
UNITS = ["", "", "", "us", "%", "", "%", "inst", "%", *["inst"] * 4]


CONFIG = {"BLOCK_M": 64}


def row(kernel: str, time: str = "12.5", *stalls: str) -> list[str]:
    return ["0", "77", kernel, time, "61.25", "1,024", "40", "9,999", "50", *(stalls or ("1", "5", "", "2"))]


def printed(folder: Path, *rows: list[str]) -> Path:
    """What ncu writes: its own remarks, then the raw page."""
    lines = [
        "==PROF== Connected to process 77",
        *(",".join(f'"{cell}"' for cell in each) for each in (HEAD, UNITS, *rows)),
    ]
    path = folder / "ncu.csv"
    path.write_text("\n".join([*lines, "==PROF== Disconnected", ""]))
    return path


def run_of(ratios: dict[Case, float]) -> dict[str, Any]:
    """A result file of a few cases."""
    rows = [
        {"family": case.family.name, "name": case.name, "ratio": ratio, "against": "cuBLAS"}
        | {"chosen": {"config": CONFIG}}
        for case, ratio in ratios.items()
    ]
    names = dict.fromkeys(case.family.name for case in ratios)
    families = [
        {"family": name, "ratio": min(each["ratio"] for each in rows if each["family"] == name)} for name in names
    ]
    return {"cases": rows, "families": families}


def test_the_worst_cases_below_a_bar_are_chosen() -> None:
    one, worst, other = [case for case in cases() if case.family is LARGE][:3]
    swiglu = next(case for case in cases() if case.family is SWIGLU)
    document = run_of({one: 0.9, worst: 0.7, other: 0.8, swiglu: 1.06})  # of which the last is above its bar
    assert profiling.short_of(document, 1) == [(worst, "cuBLAS", CONFIG)]
    assert profiling.short_of(document, 2) == [(worst, "cuBLAS", CONFIG), (other, "cuBLAS", CONFIG)]
    assert profiling.short_of(document, 2, ["large"]) == profiling.short_of(document, 2)
    assert profiling.short_of(document, 2, ["swiglu"]) == []
    document["cases"].append(document["cases"][0] | {"name": "of another version", "ratio": 0.1})
    assert profiling.short_of(document, 1) == [(worst, "cuBLAS", CONFIG)]


def test_the_profiler_leaves_clocks_alone_and_runs_these_very_cases(tmp_path: Path) -> None:
    words = profiling.command("/bin/ncu", tmp_path / "gpu.json", "cuda:1", tmp_path, 3, ["gemm"])
    text = " ".join(words)
    assert "--clock-control none --cache-control all" in text
    assert all(f"--section {section}" in text for section in profiling.SECTIONS)
    child = words[words.index(sys.executable) :]
    assert child[1:4] == ["-m", "benchmarks.profiling", str(tmp_path / "gpu.json")]
    assert {"--child", "cuda:1", "3", "gemm"} <= set(child)


def test_counters_are_read_from_the_raw_page(tmp_path: Path) -> None:
    one, other = profiling.kernels_of(printed(tmp_path, row("a_kernel"), row("b_kernel", "1,500.0")))
    assert (one["kernel"], one["us"], one["dram"], one["blocks"]) == ("a_kernel", 12.5, 61.25, 1024)
    assert one["pipes"] == {"fma": 50, "alu": 40}  # counts are none
    assert list(one["stalls"].items()) == [("barrier", 5), ("gmma", 2), ("wait", 1)]  # the longest first
    assert other["us"] == 1500
    assert "l2" not in one  # what ncu didn't measure


def test_a_file_without_the_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ncu.csv"
    path.write_text("==ERROR== The user does not have permission\n")
    with pytest.raises(RunError, match=r"ncu\.csv has no table"):
        profiling.kernels_of(path)


def test_kernels_are_those_of_the_calls_between_marks(tmp_path: Path) -> None:
    mark = row("void at::cuda::spin_kernel(long)", "1")
    chosen = [profiling.Short(case, "cuBLAS", CONFIG) for case in cases()[:2]]
    names = ("ours", "first", "second", "ours again", "theirs")
    calls = [row(name) for name in names]
    rows = [row("leftover"), mark, calls[0], mark, *calls[1:3], mark, calls[3], mark, calls[4]]
    found = profiling.attributed(chosen, profiling.kernels_of(printed(tmp_path, *rows)))
    kernels = [[[kernel["kernel"] for kernel in each] for each in case["contenders"].values()] for case in found]
    assert kernels == [[["ours"], ["first", "second"]], [["ours again"], ["theirs"]]]
    assert [case["name"] for case in found] == [case.name for case, _, _ in chosen]
    assert list(found[0]["contenders"]) == [OURS, "cuBLAS"]
    assert found[0]["config"] == CONFIG
    table = profiling.markdown(found)
    assert table.count("\n") == 2 + len(names)
    assert "| barrier 5.0, gmma 2.0, wait 1.0 |" in table
    with pytest.raises(RunError, match="ncu saw 3 of 4 calls"):
        profiling.attributed(chosen, profiling.kernels_of(printed(tmp_path, *rows[:-2])))


def test_a_failing_profiler_is_one_line_with_its_reason(tmp_path: Path) -> None:
    code = "import sys; print('==ERROR== no permission', file=sys.stderr); sys.exit(3)"
    with pytest.raises(RunError, match="exit status 3: ==ERROR== no permission"):
        profiling.profile([sys.executable, "-c", code], tmp_path)
    with pytest.raises(RunError, match="exit status 0: it said nothing"):
        profiling.profile([sys.executable, "-c", ""], tmp_path)
    printed(tmp_path, row("of an earlier run"))
    with pytest.raises(RunError, match="it said nothing"):
        profiling.profile([sys.executable, "-c", ""], tmp_path)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    results.write_text(json.dumps(run_of({cases()[0]: 0.5})))
    done = CliRunner().invoke(profiling.main, [str(results), "--device", "h200", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert done.stderr.splitlines() == ["error: h200 is not a GPU of this machine: nothing can be profiled"]
    assert list(tmp_path.iterdir()) == [results]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"families": [{}]}'])
def test_a_file_of_something_else_is_one_line(tmp_path: Path, text: str) -> None:
    results = tmp_path / "gpu.json"
    results.write_text(text)
    done = CliRunner().invoke(profiling.main, [str(results), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "is no result file of" in done.stderr


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/profile.json")), ids=lambda path: path.parent.name)
def test_a_profile_on_record_is_whole_and_every_miss_has_its_cause(path: Path) -> None:
    document = json.loads(path.read_text())
    causes = json.loads((path.parent / "causes.json").read_text())
    assert document["revision"]
    assert document["environment"]["triton"]
    profiled = {case["family"] for case in document["cases"]}
    for case in document["cases"]:
        assert OURS in case["contenders"]
        assert all(kernel["us"] > 0 for kernels in case["contenders"].values() for kernel in kernels)
    run = json.loads((path.parent / "gpu.json").read_text())
    short = {each.case.family.name for each in profiling.short_of(run, 1)}
    assert short <= set(causes)
    # What fell short after the profile says that no profiler has seen it.
    assert all("not profiled" in causes[family] for family in set(causes) - profiled)
