"""`autotune` end to end, on small problems: real compiles for absent boards, a real database."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuner.counting import DEVICE, SMALL, CountingRunner, MeasuringRunner
from tilewright.kernels.dispatch import plan_for
from tilewright.kernels.lookup import prediction_protocol
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.prediction import MODEL
from tilewright.kernels.registry import find_kernel
from tilewright.tuner import notes, tune, tuning_run
from tilewright.tuner.results import Progress
from tilewright.tuner.suites import SUITES, Workload
from tilewright.tuner.tune import autotune, resolve_workloads
from tilewright.tuning_db.errors import (
    DatabaseCorruptError,
    ProblemError,
    UnknownKernelError,
    UnsupportedError,
    UsageError,
)
from tilewright.tuning_db.record import Provenance, Status
from tilewright.tuning_db.store import TuningDB


@pytest.mark.smoke
def test_a_first_run_compiles_and_a_second_answers_from_the_cache(tmp_path: Path) -> None:
    events: list[Progress] = []
    first = autotune("sm_86", problems=[SMALL], trials=3, jobs=2, db=tmp_path, progress=events.append)
    (result,) = first
    assert first.device.board == "rtx3090"
    assert first.db == tmp_path / f"{DEVICE.key}.sqlite"
    assert first.compiled == result.trials == 3
    assert result.status is Status.OK
    assert result.provenance is Provenance.PREDICTED
    assert not result.cached
    assert result.spills == 0
    assert 0 < result.registers <= 255
    assert 0 < result.shared_bytes <= DEVICE.shared_per_block
    assert 0 < result.roofline_fraction < 1
    # 2·64·64·128 operations in the predicted time.
    assert result.tflops == pytest.approx(2 * 64 * 64 * 128 / result.time_us / 1e6)
    assert find_kernel("gemm").space.config.from_dict(result.config)
    assert [event.done for event in events] == [0, 1, 2, 3, 3]
    assert events[-1].result is result

    second = autotune("sm_86", problems=[SMALL], trials=3, jobs=2, db=tmp_path)
    assert second.compiled == 0
    assert second.results == [replace(result, cached=True)]


@pytest.mark.smoke
def test_every_outcome_is_on_record_with_its_environment(tmp_path: Path) -> None:
    autotune("sm_86", problems=[SMALL], trials=3, db=tmp_path)
    with TuningDB.open(DEVICE.key, tmp_path, read_only=True) as database:
        records = list(database.find())
        ((_, environment),) = database.runs().values()
    assert len(records) == 3
    assert {record.provenance for record in records} == {Provenance.PREDICTED}
    assert {record.key.protocol for record in records} == {prediction_protocol(GEMM)}
    assert environment.protocol == MODEL
    assert {record.key.problem for record in records} == {GemmProblem.parse(SMALL).to_json()}


def test_calls_of_a_process_that_has_tuned_look_again(
    tmp_path: Path, counted: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = GemmProblem(16, 16, 16)
    before, _ = plan_for(GEMM, problem, -1)
    assert plan_for(GEMM, problem, -1)[0] is before
    autotune("rtx3090", problems=[SMALL], trials=1, db=tmp_path)
    again, _ = plan_for(GEMM, problem, -1)
    assert again is not before

    def fails(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning_run.TuningRun, "tune", fails)
    with pytest.raises(KeyboardInterrupt):  # what was finished is kept, and serves
        autotune("rtx3090", problems=[SMALL], trials=1, db=tmp_path)
    assert plan_for(GEMM, problem, -1)[0] is not again


def test_a_larger_budget_tries_only_what_is_new(tmp_path: Path, counted: type[CountingRunner]) -> None:
    autotune("rtx3090", problems=[SMALL], trials=4, db=tmp_path)
    assert len(counted.asked) == 4
    again = autotune("rtx3090", problems=[SMALL], trials=6, db=tmp_path)
    assert len(counted.asked) == 6
    assert len(set(counted.asked)) == 6
    assert again.results[0].trials == 6
    assert not again.results[0].cached


@pytest.mark.parametrize("live", [False, True], ids=["predicted", "measured"])
def test_a_configuration_that_a_tuned_space_gains_is_the_only_one_tried(
    tmp_path: Path, counted: type[CountingRunner], monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    problem, device = GemmProblem.parse(SMALL), replace(DEVICE, live="cuda:0") if live else DEVICE
    if live:
        monkeypatch.setattr(
            tuning_run, "_make_runner", lambda compiler, device, gpus: MeasuringRunner(compiler, device)
        )
    default = GEMM.default(problem, device)
    space = [default, *[config for config in GEMM.space.configs(problem, device) if config != default][:10]]
    *few, added = space
    for configs, tried in ((few, few), (few, []), (space, [added]), (space, [])):
        monkeypatch.setattr(type(GEMM.space), "configs", lambda *_, configs=configs, **__: list(configs))
        counted.asked.clear()
        (result,) = autotune(device, problems=[problem], trials=100, jobs=1, db=tmp_path)
        assert {config for _, config in counted.asked} == set(tried)
        assert len(counted.asked) == len(tried)
        assert result.trials == len(configs)
        assert result.cached == (not tried)


def test_what_another_search_has_tried_is_not_tried_again(tmp_path: Path, counted: type[CountingRunner]) -> None:
    autotune("rtx3090", problems=[SMALL], trials=6, seed=1, jobs=1, db=tmp_path)
    results = autotune("rtx3090", problems=[SMALL], trials=15, seed=2, jobs=1, db=tmp_path)
    assert results.results[0].trials == len(counted.asked) == len(set(counted.asked)) == 15


def test_retune_tries_again_what_is_on_record(tmp_path: Path, counted: type[CountingRunner]) -> None:
    for _ in range(2):
        results = autotune("rtx3090", problems=[SMALL], trials=3, db=tmp_path, retune=True)
    assert len(counted.asked) == 6
    assert counted.asked[:3] == counted.asked[3:]
    assert results.results[0].trials == 3


def interrupt_after(trials: int) -> Callable[[Progress], None]:
    """For a run of several workloads, counted together."""
    heard: list[Progress] = []

    def interrupt(event: Progress) -> None:
        if event.result is None and event.best_us is not None:
            heard.append(event)
        if len(heard) == trials:
            raise KeyboardInterrupt

    return interrupt


def test_a_retune_that_was_interrupted_goes_on_and_then_another_begins_anew(
    tmp_path: Path, counted: type[CountingRunner]
) -> None:
    workloads: dict[str, Any] = {"problems": [SMALL, "M=128,N=64,K=128"], "trials": 6, "jobs": 1, "db": tmp_path}
    autotune("rtx3090", **workloads)
    every = set(counted.asked)
    assert len(every) == 12
    counted.asked.clear()
    for trials in (3, 5):  # the second in the midst of the second workload
        with pytest.raises(KeyboardInterrupt):
            autotune("rtx3090", **workloads, retune=True, progress=interrupt_after(trials))
    assert len(counted.asked) == 8
    first, second = autotune("rtx3090", **workloads, retune=True)
    assert (first.cached, second.cached) == (True, False)
    assert len(counted.asked) == 12
    assert set(counted.asked) == every
    autotune("rtx3090", **workloads, retune=True)
    assert len(counted.asked) == 24


def test_a_retune_whose_time_was_up_goes_on_unless_it_is_old(
    tmp_path: Path, counted: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"problems": [SMALL], "trials": 6, "jobs": 1, "db": tmp_path, "retune": True}
    now, run = [0.0], counted.run

    def slowly(self: Any, *given: Any) -> Any:
        for outcome in run(self, *given):
            now[0] += 1.0
            yield outcome

    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(counted, "run", slowly)
    autotune("rtx3090", **options, timeout=4.0)
    assert len(counted.asked) == 4
    autotune("rtx3090", **options, timeout=1.0)
    assert len(counted.asked) == 5
    monkeypatch.setattr(notes, "RETUNE_AGE", timedelta())
    autotune("rtx3090", **options)
    assert len(counted.asked) == 11


def test_the_default_configuration_is_always_among_the_trials(tmp_path: Path, counted: type[CountingRunner]) -> None:
    autotune("rtx3090", problems=SMALL, trials=2, db=tmp_path)
    problem = GemmProblem.parse(SMALL)
    assert (problem, find_kernel("gemm").default(problem, DEVICE)) in counted.asked[:2]


def test_a_space_smaller_than_the_budget_ends_the_search(tmp_path: Path, counted: type[CountingRunner]) -> None:
    tiny = GemmProblem(M=16, N=16, K=32)
    space = find_kernel("gemm").space.configs(tiny, DEVICE)
    every = {*space, find_kernel("gemm").default(tiny, DEVICE)}
    assert len(every) < 200
    results = autotune("rtx3090", problems=[tiny], trials=200, db=tmp_path)
    assert {config for _, config in counted.asked} == every
    assert autotune("rtx3090", problems=[tiny], trials=200, db=tmp_path).results[0].cached
    assert results.results[0].trials == len(every)


def test_a_workload_of_which_nothing_works_says_why(tmp_path: Path, counted: type[CountingRunner]) -> None:
    counted.fail = True
    (result,) = autotune("rtx3090", problems=[SMALL], trials=2, db=tmp_path)
    assert result.config is None
    assert result.time_us is None
    assert result.status is Status.COMPILE_ERROR
    assert result.message == "ptxas refused it"
    assert result.trials == 2


def test_when_the_time_is_up_nothing_more_is_started(tmp_path: Path, counted: type[CountingRunner]) -> None:
    autotune("rtx3090", problems=[SUITES["default"][1]], trials=2, db=tmp_path)
    counted.asked.clear()
    results = autotune("rtx3090", trials=50, timeout=1e-9, jobs=1, db=tmp_path)
    assert not counted.asked
    assert len(results) == len(SUITES["default"])
    # What is on record is still the answer.
    assert results.results[1].config is not None
    others = [result for index, result in enumerate(results) if index != 1]
    assert {result.status for result in others} == {Status.TIMEOUT}
    assert {result.message for result in others} == {"the time was up before anything was tried"}


@pytest.mark.parametrize("options", [{"retune": True}, {"trials": 12}])
def test_where_nothing_was_tried_the_answer_is_from_the_cache(
    tmp_path: Path, counted: type[CountingRunner], options: dict[str, Any]
) -> None:
    (first,) = autotune("rtx3090", problems=[SMALL], trials=2, db=tmp_path)
    (late,) = autotune("rtx3090", problems=[SMALL], timeout=1e-9, db=tmp_path, **options)
    assert late == replace(first, cached=True)
    # The time is up while it is being ranked.
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        ranked = tuning_run.Outlook.of
        patch.setattr(tune.time, "monotonic", lambda: now[0])
        patch.setattr(tuning_run.Outlook, "of", lambda *given: (now.__setitem__(0, 2.0), ranked(*given))[1])
        (late,) = autotune("rtx3090", problems=[SMALL], timeout=1.0, db=tmp_path, **options)
    assert late == replace(first, cached=True)
    (unheard,) = autotune("rtx3090", problems=["M=16,N=16,K=32"], timeout=1e-9, db=tmp_path, **options)
    assert not unheard.cached


def test_each_workload_gets_its_share_of_the_time(
    tmp_path: Path, counted: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every trial takes a second of a clock that only trials move."""
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    original = counted.run

    def run(self: Any, kernel: Any, problem: Any, configs: Any, deadline: Any = None) -> Any:
        for outcome in original(self, kernel, problem, configs, deadline):
            now[0] += 1.0
            yield outcome

    monkeypatch.setattr(counted, "run", run)
    results = autotune("rtx3090", problems=list(SUITES["vit-b"][-2:]), trials=50, timeout=20.0, jobs=1, db=tmp_path)
    assert [result.trials for result in results] == [10, 10]
    assert now[0] == 20.0


def test_boards_of_one_arch_have_files_of_their_own(tmp_path: Path, counted: type[CountingRunner]) -> None:
    for name in ("a10", "rtx3090"):
        autotune(name, problems=[SMALL], trials=1, db=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.sqlite")) == ["a10-72sm.sqlite", "rtx3090-82sm.sqlite"]


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on_from_there(
    tmp_path: Path, counted: type[CountingRunner]
) -> None:
    def interrupt(event: Progress) -> None:
        if event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        autotune("rtx3090", problems=[SMALL], trials=6, jobs=1, db=tmp_path, progress=interrupt)
    with TuningDB.open(DEVICE.key, tmp_path, read_only=True) as database:
        assert len(list(database.find())) == 3
    before = len(counted.asked)
    results = autotune("rtx3090", problems=[SMALL], trials=6, jobs=1, db=tmp_path)
    assert results.results[0].trials == 6
    assert len(counted.asked) - before == 3


def test_a_damaged_page_stops_no_run_that_does_not_need_it(
    tmp_path: Path, counted: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(database: TuningDB) -> None:
        raise DatabaseCorruptError("a page that lists devices")

    monkeypatch.setattr(TuningDB, "refuse_other_devices", damaged)
    (result,) = autotune("rtx3090", problems=[SMALL], trials=1, db=tmp_path)
    assert result.trials == len(counted.asked) == 1


def test_a_damaged_database_is_set_aside_and_named(tmp_path: Path, counted: type[CountingRunner]) -> None:
    path = tmp_path / f"{DEVICE.key}.sqlite"
    path.write_bytes(b"this is no database" * 100)
    results = autotune("rtx3090", problems=[SMALL], trials=1, db=tmp_path)
    assert results.set_aside is not None
    assert results.set_aside.read_bytes().startswith(b"this is no database")
    assert results.results[0].config is not None


def test_what_can_be_asked_for() -> None:
    workloads = resolve_workloads(
        DEVICE, None, [SMALL, GemmProblem.parse(SMALL), Workload("mine", GemmProblem(1, 2, 3))]
    )
    assert [workload.name for workload in workloads] == [SMALL, SMALL, "mine"]
    assert resolve_workloads(DEVICE) == SUITES["default"]
    for op in ("gemm", "conv2d", "attention"):
        of_op = tuple(workload for workload in SUITES["default"] if workload.op == op)
        assert resolve_workloads(DEVICE, [op]) == of_op != ()
    assert resolve_workloads(DEVICE, ["gemm", "gemm"], [SMALL]) == resolve_workloads(DEVICE, ["gemm"], [SMALL])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernels": ["gem"]}, UnknownKernelError, "unknown op 'gem'; did you mean gemm?"),
        (
            {"kernels": ["gemm", "conv2d"], "problems": [SMALL]},
            UsageError,
            "is of one op: name it alone, not ",
        ),
        ({"problems": []}, UsageError, "there is nothing to do"),
        ({"problems": ["M=64,N=64"]}, ProblemError, "missing K"),
        ({"problems": ["M=64,N=64,K=0"]}, ProblemError, "K=0 must be from 1"),
        ({"problems": ["M=64,N=64,K=-3"]}, ProblemError, "K=-3 must be from 1"),
        ({"problems": ["M=64,N=64,KK=3"]}, ProblemError, "'KK'"),
        ({"problems": ["M=64,M=64,K=3"]}, ProblemError, "M is given twice"),
        ({"problems": ["M=64,N=64,K=64,dtype=fp8e4m3"]}, UnsupportedError, "fp8e4m3 needs sm_89 or newer"),
        ({"problems": ["M=2147483647,N=2147483647,K=64"]}, UsageError, "does not fit M=2147483647"),
        ({"problems": [{"M": 64}]}, UsageError, "is no problem"),
        ({"trials": 0}, UsageError, "trials=0"),
        ({"trials": 2.5}, UsageError, "trials=2.5"),
        ({"timeout": -1.0}, UsageError, "timeout=-1.0"),
        ({"timeout": float("nan")}, UsageError, "timeout=nan"),
        ({"jobs": 0}, UsageError, "jobs=0"),
        ({"workers": 0}, UsageError, "workers=0"),
        ({"trials": True}, UsageError, "trials=True must be an integer of at least 1"),
        ({"trials": "a"}, UsageError, "trials='a' must be an integer of at least 1"),
        ({"trials": float("nan")}, UsageError, "trials=nan must be an integer of at least 1"),
        ({"timeout": "5"}, UsageError, "timeout='5' must be more than 0 seconds, as a number"),
        ({"timeout": True}, UsageError, "timeout=True"),
        ({"jobs": 1.0}, UsageError, "jobs=1.0 must be an integer"),
        ({"jobs": 100000}, UsageError, "jobs=100000 must be an integer from 1 to 1024"),
        ({"workers": "1"}, UsageError, "workers='1' must be an integer of at least 1"),
        ({"workers": None}, UsageError, "workers=None"),
        ({"seed": -1}, UsageError, "seed=-1 must be an integer from 0 to 4294967295"),
        ({"seed": 1.5}, UsageError, "seed=1.5 must be an integer"),
        ({"seed": 2**32}, UsageError, "seed=4294967296"),
        ({"workers": 2}, UsageError, "workers=2 need a GPU each"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        autotune("rtx3090", db=tmp_path / "db", **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "db").exists()


def test_an_unusual_compiler_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    with pytest.raises(
        UsageError, match="DISABLE_PTXAS_OPT=1 makes Triton compile other machine code: nothing is tuned"
    ):
        autotune("rtx3090", db=tmp_path / "db")
    assert not (tmp_path / "db").exists()


def test_configurations_read_back_from_the_database(tmp_path: Path, counted: type[CountingRunner]) -> None:
    (result,) = autotune("rtx3090", problems=[SMALL], trials=2, db=tmp_path)
    assert GemmConfig.from_dict(result.config).to_dict() == result.config
    assert json.loads(json.dumps(result.problem)) == result.problem


@pytest.mark.parametrize(
    ("text", "ops"),
    [
        ("B=2,H=4,Sq=33,Skv=47,D=64", "--kernel attention"),
        ("N=1,H=8,W=8,C=3,K=8,R=3,S=3", "--kernel conv2d"),
        ("M=4,N=4", "--kernel rmsnorm"),
        ("dtype=fp16", "--kernel conv2d or --kernel attention or --kernel rmsnorm"),
    ],
)
def test_a_problem_of_another_op_needs_its_name(text: str, ops: str) -> None:
    with pytest.raises(
        ProblemError, match=rf"^GemmProblem .*; a problem of another op than gemm needs its name: {ops}$"
    ):
        resolve_workloads(DEVICE, problems=[text])


def test_a_problem_of_no_op_is_answered_with_gemms_fields() -> None:
    with pytest.raises(ProblemError, match=r"^GemmProblem has no field 'm' \(fields: [^()]*\)$"):
        resolve_workloads(DEVICE, problems=["m=4,N=4,K=4"])


def test_numpys_numbers_are_numbers(tmp_path: Path, counted: type[CountingRunner]) -> None:
    options = {"trials": np.int64(2), "timeout": np.float32(60), "jobs": np.int32(1), "seed": np.uint32(2**32 - 1)}
    (result,) = autotune("rtx3090", problems=[SMALL], db=tmp_path, **options)
    assert result.trials == len(counted.asked) == 2
