from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tilewright.kernels.devices import resolve_device
from tilewright.tuner.commands import report
from tilewright.tuner.results import Progress, Result, Results
from tilewright.tuning_db.record import Provenance, Status

pytestmark = pytest.mark.smoke

GOOD = Result(
    workload="llama3-8b qkv, decode",
    op="gemm",
    problem={"M": 1, "N": 6144, "K": 4096},
    config={
        "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 1, "SPLIT_K": 4, "num_warps": 4, "num_stages": 3,
    },
    time_us=61.27,
    tflops=0.82,
    roofline_fraction=0.877,
    registers=72,
    spills=0,
    shared_bytes=40960,
    provenance=Provenance.PREDICTED,
    trials=16,
)  # fmt: skip
BAD = Result("odd one", "gemm", {"M": 3}, status=Status.COMPILE_ERROR, message="ptxas refused it", trials=2)


@pytest.fixture
def results() -> Results:
    return Results(
        resolve_device("rtx3090"), Path("/data/rtx3090-82sm.sqlite"), [GOOD, BAD], compiled=18, elapsed_s=9.0
    )


def printed(renderable: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(renderable)
    return stream.getvalue()


def test_the_table_has_every_column_of_a_result(results: Results) -> None:
    header, good, bad = (line.split("  ") for line in printed(report.results_table(results)).strip().splitlines())
    cells = [cell.strip() for cell in good if cell.strip()]
    assert cells == [
        "llama3-8b qkv, decode",
        "16×64×128 split 4 warps 4 stages 3",
        "61.3",
        "0.8",
        "88",
        "72",
        "0",
        "40960",
        "predicted",
    ]
    assert [cell.strip() for cell in header if cell.strip()] == [
        "workload", "configuration", "time µs", "TFLOP/s", "% of roofline", "registers", "spills", "shared B",
        "provenance",
    ]  # fmt: skip
    assert [cell.strip() for cell in bad if cell.strip()][-1] == "compile_error"
    assert report.failure_lines(results) == ["odd one: compile_error: ptxas refused it"]


def test_the_end_says_where_it_was_saved_and_that_it_was_not_measured(results: Results) -> None:
    text = "\n".join(report.closing_lines(results, Path("/data")))
    assert "18 kernels compiled or found compiled in 9.0 s (2.0/s)" in text
    assert "/data/rtx3090-82sm.sqlite" in text
    assert "predicted, not measured" in text
    assert "from tilewright.kernels import gemm" in text
    assert "export" not in text
    results.results = [Result("w", "gemm", {}, {"BLOCK_M": 16}, provenance=Provenance.MEASURED)]
    assert "predicted" not in "\n".join(report.closing_lines(results, Path("/data")))


def test_where_nothing_was_tried_nothing_is_said_to_be_saved(results: Results) -> None:
    results.results = [Result("w", "gemm", {}, status=Status.TIMEOUT)]
    assert "saved" not in "\n".join(report.closing_lines(results, Path("/data")))


def test_results_in_another_folder_come_with_how_programs_find_it(results: Results) -> None:
    assert "export TILEWRIGHT_DB_DIR=/data" in "\n".join(report.closing_lines(results, Path("/home/me/tilewright")))


def test_how_programs_find_them_is_a_command_to_copy(results: Results, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    results.db = Path("my dir") / "rtx3090-82sm.sqlite"
    text = "\n".join(report.closing_lines(results, Path("/data")))
    assert f"`export TILEWRIGHT_DB_DIR='{tmp_path}/my dir'`" in text


def test_where_every_configuration_failed_programs_find_nothing(results: Results) -> None:
    results.results = [BAD]
    text = "\n".join(report.closing_lines(results, Path("/data")))
    assert "saved in /data" in text
    assert "Programs find" not in text
    results.results = [BAD, replace(GOOD, op="conv2d")]
    assert "import conv2d" in "\n".join(report.closing_lines(results, Path("/data")))


def test_a_failure_on_record_is_told_from_a_new_one(results: Results) -> None:
    known = replace(BAD, cached=True)
    line = "compile_error: ptxas refused it (on record; --retune tries again)"
    assert report.one_line(known) == line
    assert report.failure_lines(replace(results, results=[known])) == [f"odd one: {line}"]


def test_a_long_message_widens_no_table(results: Results) -> None:
    narrow = printed(report.results_table(results))
    long = replace(results, results=[GOOD, replace(BAD, message="ptxas refused it " * 99)])
    assert printed(report.results_table(long)) == narrow
    assert "ptxas refused it " * 99 in report.failure_lines(long)[0]


def test_the_json_document(results: Results) -> None:
    document = json.loads(report.to_json(results))
    assert document["device"]["name"] == "NVIDIA GeForce RTX 3090"
    assert document["device"]["arch"] == "sm_86"
    assert document["device"]["sms"] == 82
    assert document["db"] == "/data/rtx3090-82sm.sqlite"
    assert document["elapsed_s"] == 9.0
    assert document["compiled"] == 18
    assert set(document["results"][0]) >= {
        "workload", "op", "problem", "config", "time_us", "tflops", "roofline_fraction", "registers", "spills",
        "shared_bytes", "provenance", "status", "trials", "cached",
    }  # fmt: skip
    assert document["results"][0]["provenance"] == "predicted"
    assert document["results"][1]["time_us"] is None
    assert document["results"][1]["status"] == "compile_error"


def test_plain_progress_is_a_line_per_workload() -> None:
    stream = io.StringIO()
    with report.ProgressView(Console(file=stream, width=200), quiet=False, heading="the board") as view:
        assert stream.getvalue() == ""
        view(Progress("llama3-8b qkv, decode", 0, 2, 3, 16, 70.0))
        view(Progress("llama3-8b qkv, decode", 0, 2, 16, 16, 61.27, result=GOOD))
        view(Progress("odd one", 1, 2, 2, 2, None, result=BAD))
    assert stream.getvalue().splitlines() == [
        "the board",
        "[1/2] llama3-8b qkv, decode: 61.3 µs predicted, 16×64×128 split 4 warps 4 stages 3 (16 trials)",
        "[2/2] odd one: compile_error: ptxas refused it",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_name_is_no_markup(terminal: bool, results: Results) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=300, force_terminal=terminal)
    with report.ProgressView(console, quiet=False) as view:
        view(Progress("blk[/0]/mm", 0, 1, 3, 16, 70.0))
        view(Progress("blk[/0]/mm", 0, 1, 16, 16, 61.27, result=GOOD))
    assert "blk[/0]/mm" in stream.getvalue()
    console.print(report.results_table(replace(results, results=[replace(GOOD, workload="blk[/1]/mm")])))
    assert "blk[/1]/mm" in stream.getvalue()


def test_a_message_of_a_compiler_is_one_printable_line(results: Results) -> None:
    bad = replace(BAD, message="ptxas\nrefused\x1b[2J it")
    stream = io.StringIO()
    with report.ProgressView(Console(file=stream, width=200), quiet=False) as view:
        view(Progress("odd one", 0, 1, 2, 2, None, result=bad))
    assert stream.getvalue() == "[1/1] odd one: compile_error: ptxas refused?[2J it\n"


def test_bars_on_a_terminal_show_the_workload_and_its_best() -> None:
    stream = io.StringIO()
    with report.ProgressView(Console(file=stream, width=200, force_terminal=True), quiet=False) as view:
        view(Progress("llama3-8b qkv, decode", 0, 2, 3, 16, 70.0))
    assert "llama3-8b qkv, decode" in stream.getvalue()
    assert "70.0 µs" in stream.getvalue()


def test_quiet_shows_nothing() -> None:
    stream = io.StringIO()
    with report.ProgressView(Console(file=stream, width=200), quiet=True) as view:
        view(Progress("w", 0, 1, 1, 1, 1.0, result=GOOD))
    assert stream.getvalue() == ""


def test_the_device_line_says_whether_it_measures() -> None:
    device = resolve_device("a10")
    assert report.describe_device(device) == "NVIDIA A10 (a10, sm_86, 72 SMs), not here: times are predicted"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Console, "push_render_hook"),  # midway in the start of the bars: the cursor is hidden, and no hook is there
        (report.ProgressBars, "add_task"),
        (report.ProgressBars, "stop"),  # a second Ctrl-C, or one at the end
    ],
)
def test_ctrl_c_leaves_a_terminal_its_cursor(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=True)
    with pytest.raises(KeyboardInterrupt), report.ProgressView(console, quiet=False):
        pass
    hidden, shown = (stream.getvalue().rfind(f"\x1b[?25{mode}") for mode in "lh")
    assert 0 <= hidden < shown
    monkeypatch.undo()
    with report.ProgressView(console, quiet=False) as view:  # nothing of the former is in the way
        view(Progress("llama3-8b qkv, decode", 0, 2, 3, 16, 70.0))
