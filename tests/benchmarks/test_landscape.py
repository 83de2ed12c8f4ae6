"""Landscapes on a simulated GPU: measured, killed, gone on with, replayed."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import landscape as module
from benchmarks import replay_tables, search_quality
from benchmarks.landscape import BUDGET_S, FIRST, HOPELESS, PRESETS, chosen_workloads, files, measure, named_configs
from benchmarks.landscape_file import load
from tests.benchmarks.landscape_runs import simulated_landscapes
from tests.tuner.simulated_worker import Scenario, read_journal, time_us
from tests.tuner.simulation import BOARD, PROBLEM, ROOT, space
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import check_supported, predictions
from tilewright.kernels.registry import find_kernel
from tilewright.tuner import gpu_runner
from tilewright.tuner.gpu_runner import Effort
from tilewright.tuner.runner import Outcome
from tilewright.tuning_db.errors import IllegalConfigError, UsageError
from tilewright.tuning_db.record import Status, Times, canonical_json

SMALL = ["--op", "gemm", "--problem", str(PROBLEM)]
GEMM = find_kernel("gemm")


def started(folder: Path, *arguments: object, kill_at: Any = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-P", "-m", "tests.benchmarks.landscape_runs", str(folder), json.dumps(kill_at)]
    return subprocess.Popen(
        [*command, "--jobs", "2", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: object, kill_at: Any = None) -> tuple[int, str, str]:
    process = started(folder, *arguments, kill_at=kill_at)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def attempts(folder: Path) -> Counter[str]:
    """How often each configuration was measured."""
    begun = [each for each in read_journal(folder / "journal") if each["moment"] == "begin" and each["config"]]
    return Counter(canonical_json(each["config"]) for each in begun)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The landscape of every configuration of a small problem."""
    folder = tmp_path_factory.mktemp("whole")
    files = ("--out", folder / "small__a100.npz", "--json", folder / "summary.json")
    status, out, err = run(folder, *SMALL, *files, "--jobs", "1")  # so that they are compiled in their order
    assert (status, err) == (0, "")
    assert "25 configurations, 0 on file, 25 to come" in out
    assert "━" in out
    return folder / "small__a100.npz"


def test_every_configuration_is_in_the_file_with_its_time(whole: Path) -> None:
    landscape = load(whole)
    assert {config: landscape.times_us[config] for config in space()} == {
        config: pytest.approx(time_us(config.to_dict())) for config in space()
    }
    assert (landscape.problem, landscape.key.op, landscape.device) == (PROBLEM, "gemm", BOARD)
    assert landscape.effort == Effort(check=True, ragged=False, clearly_slower=HOPELESS, budget_s=BUDGET_S)
    assert landscape.size == len(space())
    assert sorted(row.place for row in landscape.rows.values()) == list(range(len(space())))
    assert landscape.environments[0]["gpu"] == BOARD.name
    outcome = landscape.rows[space()[0]].outcome
    assert (outcome.resources.registers, outcome.times.samples) == (100, 10)


def test_the_default_and_the_best_predicted_come_first(whole: Path) -> None:
    landscape = load(whole)
    ranked = sorted(predictions(GEMM, PROBLEM, BOARD), key=lambda pair: pair[0].order)
    wanted = {GEMM.default(PROBLEM, BOARD), *(config for _, config in ranked[:FIRST])}
    predicted = {config: each.time_us for each, config in ranked}
    first = {config for config, row in landscape.rows.items() if row.first}
    assert first == wanted
    assert {config: row.predicted_us for config, row in landscape.rows.items() if config in predicted} == predicted
    assert set(list(landscape.rows)[: len(first)]) == first


def test_the_summary_is_of_the_file(whole: Path) -> None:
    document = json.loads((whole.parent / "summary.json").read_text())
    (result,) = document["results"].values()
    best, default = min(map(time_us, (each.to_dict() for each in space()))), GEMM.default(PROBLEM, BOARD)
    assert result["best_us"] == pytest.approx(best)
    assert result["default_us"] == pytest.approx(time_us(default.to_dict()))
    assert (result["size"], result["measured"], result["worked"]) == (25, 25, 25)


def test_a_search_is_replayed_on_the_file(whole: Path) -> None:
    table = replay_tables.load(whole)
    assert (table.kernel, table.gpu, len(table.configs)) == ("small", "a100", 25)
    assert table.best == pytest.approx(1e-3 * min(time_us(config.to_dict()) for config in space()))
    figures = whole.parent / "search.json"
    options = ["--space", whole, "--budget", 25, "--seeds", 1, "--jobs", 1, "--strategy", "tilewright", "--noise"]
    done = CliRunner().invoke(search_quality.main, [*map(str, options), "--json", str(figures)])
    assert done.exit_code == 0, done.output
    # All 25 were tried, so the best was found.
    assert json.loads(figures.read_text())["results"]["tilewright"]["mean"]["25"] == 1.0


def test_a_file_is_the_same_when_it_was_read_and_written(whole: Path, tmp_path: Path) -> None:
    landscape = load(whole)
    landscape.save(tmp_path / "again.npz")
    again = load(tmp_path / "again.npz")
    assert again.rows.keys() == landscape.rows.keys()
    with np.load(whole) as one, np.load(tmp_path / "again.npz") as other:
        assert set(one.files) == set(other.files)
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
            assert one[name].dtype == other[name].dtype


def test_a_run_that_is_killed_goes_on_from_its_file(tmp_path: Path) -> None:
    out = tmp_path / "small__a100.npz"
    status, _, _ = run(tmp_path, *SMALL, "--out", out, kill_at=("measure", "begin", 12))
    assert status == -signal.SIGKILL
    there = load(out)
    assert len(there.rows) == 11
    status, text, err = run(tmp_path, *SMALL, "--out", out)
    assert (status, err) == (0, "")
    assert "11 on file, 14 to come" in text
    landscape = load(out)
    assert landscape.times_us.keys() == set(space())
    assert len(landscape.environments) == 2
    assert list(landscape.rows)[:11] == list(there.rows)
    repeated = {config: count for config, count in attempts(tmp_path).items() if count > 1}
    assert len(attempts(tmp_path)) == 25
    assert sum(repeated.values()) - len(repeated) == 1  # the one in progress
    status, text, _ = run(tmp_path, *SMALL, "--out", out)
    assert status == 0
    assert "25 on file, 0 to come" in text
    assert sum(attempts(tmp_path).values()) == 26


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_run_that_is_interrupted_keeps_what_it_has(tmp_path: Path, number: int, status: int, word: str) -> None:
    process = started(tmp_path, *SMALL, "--workload", "bert-base attention", "--out", tmp_path / "out")
    deadline = time.monotonic() + 60
    while sum(attempts(tmp_path).values()) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    measured = sum(len(load(path).rows) for path in (tmp_path / "out").glob("*.npz"))
    assert process.returncode == status
    assert err.strip() == f"{word}: what was measured is in the files, the same command goes on from there"
    assert 7 <= measured <= sum(attempts(tmp_path).values()) < 25 + 142


def test_failures_keep_their_status(tmp_path: Path) -> None:
    configs = [config.to_json() for config in space()]
    default = GEMM.default(PROBLEM, BOARD).to_json()
    aborts, hangs = [config for config in configs if config != default][:2]
    out = tmp_path / "small__a100.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_runner, "MEASURE_TIMEOUT_S", 1.0)
        compiling = Scenario(str(tmp_path / "c"), {aborts: "compiler abort"})
        measuring = Scenario(str(tmp_path / "m"), {hangs: "endless kernel"})
        with simulated_landscapes(compiling, measuring, tmp_path):
            done = CliRunner().invoke(module.command, [*SMALL, "--out", str(out), "--jobs", "2"])
    assert done.exit_code == 0, done.output
    landscape = load(out)
    by_config = {config.to_json(): row.outcome for config, row in landscape.rows.items()}
    assert len(by_config) == 25
    assert by_config[aborts].status is Status.COMPILE_ERROR
    assert "numStages > 1" in by_config[aborts].message
    assert by_config[aborts].resources is None
    assert by_config[hangs].status is Status.TIMEOUT
    assert by_config[hangs].times is None
    assert by_config[hangs].resources.registers == 100
    table = replay_tables.load(out)
    assert int(np.isnan(table.times).sum()) == 2


@pytest.mark.parametrize(("check", "status"), [("--check", Status.INCORRECT), ("--no-check", Status.OK)])
def test_results_are_checked_unless_told_not_to(tmp_path: Path, check: str, status: Status) -> None:
    wrong = GEMM.default(PROBLEM, BOARD).to_json()
    out = tmp_path / "small__a100.npz"
    measuring = Scenario(str(tmp_path / "m"), {wrong: "wrong result"}, real=True)
    with simulated_landscapes(Scenario(str(tmp_path / "c")), measuring, tmp_path):
        done = CliRunner().invoke(module.command, [*SMALL, "--out", str(out), "--sample", "3", "--jobs", "1", check])
    assert done.exit_code == 0, done.output
    found = {config.to_json(): row.outcome.status for config, row in load(out).rows.items()}
    assert found.pop(wrong) is status
    assert list(found.values()) == [Status.OK, Status.OK]


def test_a_sample_has_the_first_and_then_others_by_the_seed(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(drawn)}__a100.npz"
        with simulated_landscapes(Scenario(str(tmp_path / "c")), Scenario(str(tmp_path / "m")), tmp_path):
            done = CliRunner().invoke(
                module.command, [*SMALL, "--out", str(out), "--sample", "20", "--seed", str(seed), "--jobs", "1"]
            )
        assert done.exit_code == 0, done.output
        landscape = load(out)
        assert len(landscape.rows) == 20
        first = {config for config, row in landscape.rows.items() if row.first}
        assert GEMM.default(PROBLEM, BOARD) in first
        assert len(first) in (FIRST, FIRST + 1)
        drawn.append(set(landscape.rows) - first)
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_named_is_measured_before_the_others(tmp_path: Path) -> None:
    predicted = {config: each.time_us for each, config in predictions(GEMM, PROBLEM, BOARD)}
    slowest = max(predicted, key=predicted.__getitem__)
    first = tmp_path / "first.json"
    entry = {"op": "gemm", "problem": PROBLEM.to_dict(), "configs": [slowest.to_dict()]}
    other = {"op": "gemm", "problem": replace(PROBLEM, M=32).to_dict(), "configs": []}
    first.write_text(json.dumps([entry, other]))
    out = tmp_path / "small__a100.npz"
    options = [*SMALL, "--out", str(out), "--sample", "2", "--first", str(first), "--jobs", "1"]
    with simulated_landscapes(Scenario(str(tmp_path / "c")), Scenario(str(tmp_path / "m")), tmp_path):
        done = CliRunner().invoke(module.command, options)
    assert done.exit_code == 0, done.output
    assert list(load(out).rows) == [GEMM.default(PROBLEM, BOARD), slowest]
    assert load(out).rows[slowest].first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no list of configurations: JSONDecodeError"),
        ("[1]", "is no list of configurations: TypeError"),
        ('[{"op": "gemm"}]', "is no list of configurations: KeyError('configs')"),
        ('[{"op": "gem", "problem": {}, "configs": []}]', "unknown op 'gem'"),
        ('[{"op": "gemm", "problem": {"M": 1}, "configs": [{"BLOCK": 1}]}]', "GemmConfig has no field 'BLOCK'"),
    ],
)
def test_a_file_that_names_no_configurations_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "first.json"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        named_configs(path)
    assert str(raised.value).startswith(str(path))
    assert said in str(raised.value)


def test_what_is_named_need_not_be_listed_but_must_run(tmp_path: Path) -> None:
    (workload,) = chosen_workloads([], [str(PROBLEM)], [], [])
    unlisted = replace(space()[0], num_stages=7)
    too_large = replace(space()[0], BLOCK_M=256, BLOCK_N=256, BLOCK_K=256)
    survey = module.prepare(workload, BOARD, tmp_path / "x.npz", Effort(), 0, None, {}, [unlisted])
    survey.fill(DoneCompiler())  # type: ignore[arg-type]
    list(survey.take(Clocked({"gemm": 1.0}), 100.0))  # type: ignore[arg-type]
    assert survey.landscape.size == 25
    assert list(survey.landscape.rows)[1] == unlisted
    row = survey.landscape.rows[unlisted]
    assert (row.place, row.first, math.isnan(row.predicted_us)) == (25, True, True)
    survey.save()
    assert load(tmp_path / "x.npz").rows[unlisted].place == 25
    with pytest.raises(IllegalConfigError):
        module.prepare(workload, BOARD, tmp_path / "y.npz", Effort(), 0, None, {}, [too_large])


class DoneCompiler:
    """Has compiled everything already."""

    def submit(self, kernel: Any, problem: Any, config: Any) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        future.set_result({})
        return future


class Clocked:
    """A runner whose measurements take a time by the op, on a clock that only they move."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.now = seconds, 0.0
        self.ops: list[str] = []

    def run(self, kernel: Any, problem: Any, configs: Any, deadline: float) -> Iterator[tuple[Any, Outcome]]:
        for config in configs:
            if self.now >= deadline:
                return
            self.now += self.seconds[kernel.name]
            self.ops.append(kernel.name)
            yield config, Outcome(Status.OK, Times.single(10.0))


def test_the_gpu_s_time_is_shared_out_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Clocked({"gemm": 0.1, "attention": 0.5, "rmsnorm": 0.1})
    names = ["bert-base up", "llama3-8b attention, decode, 4096 keys", "llama3-8b norm, prefill 2048"]
    surveys = [
        module.prepare(workload, BOARD, tmp_path / f"{workload.op}.npz", Effort(), 0, None, {})
        for workload in chosen_workloads([], [], names, [])
    ]
    small = surveys[2].left
    assert small < 300  # so that it is through before its share of the time is up
    monkeypatch.setattr(time, "monotonic", lambda: runner.now)
    ticks: list[int] = []
    measure(surveys, DoneCompiler(), runner, 300.0, lambda: ticks.append(1))  # type: ignore[arg-type]
    assert runner.now == pytest.approx(300, abs=0.5)
    gemm, attention, norm = (survey.spent_s for survey in surveys)
    assert norm == pytest.approx(0.1 * small)
    assert gemm == pytest.approx(attention, abs=module.TURN_S + 0.5)
    assert gemm + attention + norm == pytest.approx(300, abs=0.5)
    assert len(ticks) == len(runner.ops) == sum(len(survey.landscape.rows) for survey in surveys)
    for survey in surveys:
        assert survey.landscape.kernel.default(survey.landscape.problem, BOARD) in survey.landscape.rows
    # A turn is long beside what changing over costs.
    turns = [len(list(group)) * runner.seconds[op] for op, group in itertools.groupby(runner.ops)]
    assert np.median(turns) > 0.7 * module.TURN_S


def test_when_the_time_is_up_nothing_is_begun(tmp_path: Path) -> None:
    options = [*SMALL, "--workload", "bert-base attention", "--out", str(tmp_path / "out"), "--minutes", "0.00001"]
    with simulated_landscapes(Scenario(str(tmp_path / "c")), Scenario(str(tmp_path / "m")), tmp_path):
        done = CliRunner().invoke(module.command, options)
    assert done.exit_code == 0, done.output
    assert "142 to come" in done.output
    assert not list((tmp_path / "out").iterdir())
    assert not read_journal(tmp_path / "m")


def test_another_landscape_s_file_is_refused_and_left_alone(whole: Path) -> None:
    before = whole.read_bytes()
    other = str(replace(PROBLEM, M=32))
    for arguments, said in (
        (["--problem", other], "its problem is"),
        ([*SMALL, "--seed", "3"], "its seed is 0, and 3 is to be measured"),
        ([*SMALL, "--no-check"], "its effort is"),
    ):
        status, out, err = run(whole.parent, *arguments, "--out", whole)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {whole} is another landscape: {said}")
        assert err.count("\n") == 1
    assert whole.read_bytes() == before


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "small__a100.npz"
    out.write_text("no archive")
    status, _, err = run(tmp_path, *SMALL, "--out", out)
    assert status == 2
    assert err.startswith(f"error: {out} is no replayed space: it is no .npz archive")
    assert out.read_text() == "no archive"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 9}, "is of version 9 of the format"),
        ({"key": json.dumps({"op": "gemm"})}, "is no landscape: TypeError"),
        ({"status": np.array(["fine"] * 25)}, "is no landscape: ValueError"),
        ({"names": np.array(["BLOCK"] * 9)}, "is no landscape: KeyError"),
        ({"board": None}, "it lacks board"),
    ],
)
def test_a_file_with_other_content_is_refused(whole: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with np.load(whole) as file:
        arrays = {**{name: file[name] for name in file.files}, **changes}
    path = tmp_path / "changed.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UsageError, match=said) as raised:
        load(path)
    assert str(path) in str(raised.value)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    if any(resolve_device(name).live for name in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")):
        pytest.skip("there is a GPU")
    for device in ("cuda:0", "h200"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.landscape",
                *SMALL,
                "--out",
                str(tmp_path / "x.npz"),
                "--device",
                device,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ops", "problems", "names", "said"),
    [
        ([], [], [], "nothing to measure: name --problem, --workload or --preset"),
        (["gemm"], [], [], "--op gemm needs a --problem"),
        (["gemm", "gemm"], ["M=1,N=16,K=16"], [], "1 problems need one --op for all, or one each, not 2"),
        ([], [], ["bert-base uo"], "no workload is named 'bert-base uo'; did you mean 'bert-base up'?"),
        (["gem"], ["M=1"], [], "unknown op 'gem'; did you mean gemm?"),
        ([], ["M=1,N=16"], [], "GemmProblem is missing K"),
    ],
)
def test_a_mistake_is_named(ops: list[str], problems: list[str], names: list[str], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        chosen_workloads(ops, problems, names, [])
    assert str(raised.value).startswith(said)


def test_problems_have_their_own_ops_and_come_once() -> None:
    conv = "N=1,H=8,W=8,C=16,K=16,R=3,S=3"
    chosen = chosen_workloads(["gemm", "conv2d"], [str(PROBLEM), conv], ["bert-base up", "bert-base up"], [])
    assert [workload.op for workload in chosen] == ["gemm", "gemm", "conv2d"]
    assert chosen[0].name == "bert-base up"
    assert [each.problem for each in chosen_workloads([], [str(PROBLEM)] * 2, [], [])] == [PROBLEM]


def test_files_are_named_after_workload_and_board(tmp_path: Path) -> None:
    workloads = chosen_workloads([], [], ["bert-base up", "llama3-8b attention, decode, 4096 keys"], [])
    found = [path.name for path in files(workloads, BOARD, tmp_path / "new")]
    assert found == [
        "bert-base-up__a100-108sm.npz",
        "llama3-8b-attention-decode-4096-keys__a100-108sm.npz",
    ]
    assert files(workloads[:1], BOARD, tmp_path / "x.npz") == [tmp_path / "x.npz"]
    with pytest.raises(UsageError, match="2 problems have a file each"):
        files(workloads, BOARD, tmp_path / "x.npz")
    with pytest.raises(UsageError, match="there is no folder"):
        files(workloads[:1], BOARD, tmp_path / "absent" / "x.npz")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_can_run_on_its_boards(preset: str) -> None:
    workloads = chosen_workloads([], [], [], [preset])
    assert Counter(workload.op for workload in workloads) == {"gemm": 3, "conv2d": 2, "attention": 2}
    for workload in workloads:
        check_supported(find_kernel(workload.op), workload.problem, resolve_device("h200"))
    assert len({path.name for path in files(workloads, BOARD, Path("/tmp"))}) == 7
