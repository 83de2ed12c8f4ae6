"""One study for several processes: in a file for the quick tests, on a PostgreSQL server for the proof."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from tests.tuner.postgres import PASSWORD, postgres
from tests.tuner.shared_runs import CONFIGS, KEY, RACED, TRIALS, entry, opened
from tests.tuner.simulated_worker import Scenario, read_journal, time_us
from tests.tuner.simulation import BOARD, PROBLEM, ROOT, simulated, space
from tilewright.kernels.problem import Config
from tilewright.tuner import gpu_runner, tuning_run
from tilewright.tuner import storage as storage_module
from tilewright.tuner.shared import MOST_LOST, Claim, SharedSearch, _under_way
from tilewright.tuner.storage import Storage
from tilewright.tuner.tune import autotune
from tilewright.tuner.tuning_run import BATCH_PER_JOB
from tilewright.tuning_db.errors import ExportFileError, StorageError, UsageError
from tilewright.tuning_db.record import Record, Status, canonical_json
from tilewright.tuning_db.store import TuningDB


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'studies.sqlite'}"


@pytest.fixture
def two(url: str) -> Iterator[tuple[SharedSearch, SharedSearch]]:
    """Two processes' views of one study."""
    with Storage(url) as one, Storage(url) as other, opened(one) as first, opened(other) as second:
        yield first, second


def configs_of(claims: list[Claim]) -> set[Config]:
    return {claim.config for claim in claims}


def test_no_configuration_is_claimed_twice_and_all_are_claimed(two: tuple[SharedSearch, SharedSearch]) -> None:
    claimed: list[Config] = []
    for turn in range(len(CONFIGS)):
        for claim in two[turn % 2].ask(2, 1000):
            claimed.append(claim.config)
            # Every third is still under way when the others are asked for.
            if len(claimed) % 3:
                two[turn % 2].tell(claim, entry(claim.config))
    assert Counter(claimed) == Counter(CONFIGS)


def test_of_two_that_claim_at_once_one_gets_it(
    two: tuple[SharedSearch, SharedSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second decides on the same proposal, and claims it, after the first has claimed and before it has looked."""
    first, second = two
    late: list[Claim] = []
    row = first._sampler.propose(first._study)
    proposals = iter([row, None])
    beat = first._storage.beat

    def interrupted(trial: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(second._sampler, "propose", lambda study: next(proposals))
            late.extend(second.ask(1, 1000))
        beat(trial)

    monkeypatch.setattr(first._storage, "beat", interrupted)
    claims = first.ask(1, 1000)
    assert configs_of(claims) == {first._candidates.pool[row]}
    assert late == []
    assert next(proposals, "used up") == "used up"
    # What was withdrawn is no failure, and nothing that is lost.
    assert second.outcomes() == {}
    assert configs_of(second.ask(1, 1000)) != configs_of(claims)


def test_of_two_that_claim_the_last_of_a_budget_one_gets_it(
    two: tuple[SharedSearch, SharedSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found one left; they claim different configurations."""
    first, second = two
    beat = first._storage.beat
    late = []

    def interrupted(trial: int) -> None:
        late.append(second._claimed(CONFIGS[0], 1))
        beat(trial)

    monkeypatch.setattr(first._storage, "beat", interrupted)
    (claim,) = first.ask(1, 1)
    assert claim.config != CONFIGS[0]
    assert late == [None]
    first.withdraw([claim])
    assert [claim.lost for claim in second.ask(2, 1)] == [0]


def test_a_study_that_is_deleted_meanwhile_is_an_error_of_the_storage(url: str) -> None:
    import optuna

    with Storage(url) as storage:
        search = opened(storage)
        (claim,) = search.ask(1, 1000)
        optuna.delete_study(study_name=search.name, storage=url)
        with pytest.raises(StorageError) as caught:
            search.tell(claim, entry(claim.config))
        reason = "Record does not exist. (was the study deleted? the same command begins another)"
        assert str(caught.value) == f"the storage {storage.name} failed: {reason}"


def test_the_budget_is_that_of_all(two: tuple[SharedSearch, SharedSearch]) -> None:
    first, second = two
    assert len(first.ask(3, 5)) == 3
    assert len(second.ask(3, 5)) == 2
    assert second.ask(3, 5) == []
    assert second.waiting()


def test_what_is_withdrawn_is_open_again(two: tuple[SharedSearch, SharedSearch]) -> None:
    first, second = two
    claims = first.ask(2, 2)
    assert second.ask(2, 2) == []
    first.tell(claims[0], entry(claims[0].config))
    first.withdraw(claims)
    assert second.waiting()
    assert second.tried == 1
    assert len(second.ask(2, 2)) == 1
    assert not second.waiting()


def test_what_a_third_gives_up_after_one_has_asked_is_asked_for_again(
    two: tuple[SharedSearch, SharedSearch], url: str
) -> None:
    first, second = two
    lost = died(first, 1)
    with Storage(url) as storage, opened(storage) as third:
        assert second.ask(1, 1) == third.ask(1, 1) == []
        age_heartbeats(url, storage_module.GRACE_S + 5)
        assert second.ask(0, 1) == []  # misses it
        assert not any(_under_way(trial) for trial in third._trials())
        assert third.waiting()
        assert configs_of(third.ask(1, 1)) == configs_of(lost)


def test_the_end_of_a_process_withdraws_its_claims(url: str) -> None:
    with Storage(url) as one, Storage(url) as other, opened(other) as second:
        with opened(one) as first:
            assert len(first.ask(2, 2)) == 2
        assert len(second.ask(2, 2)) == 2


@pytest.mark.parametrize(
    ("error", "withdrawn"),
    [
        (OperationalError("SELECT 1", None, Exception("no answer")), 0),
        (IntegrityError("SELECT 1", None, Exception("no answer")), 3),
    ],
)
def test_a_storage_that_gives_no_answer_is_not_asked_to_withdraw_the_claims(
    url: str, monkeypatch: pytest.MonkeyPatch, error: Exception, withdrawn: int
) -> None:
    """Each attempt may take as long as the one that failed; one that answers gets the claims back."""
    asked: list[int] = []

    def fails() -> None:
        with Storage(url) as storage, opened(storage) as search:
            search.ask(3, 1000)
            monkeypatch.setattr(storage.rdb, "set_trial_user_attr", lambda trial, *_: asked.append(trial))
            with storage.explained():
                raise error

    with pytest.raises(StorageError, match="no answer"):
        fails()
    assert len(asked) == withdrawn


def test_what_is_published_is_not_tried_and_counts(two: tuple[SharedSearch, SharedSearch]) -> None:
    first, second = two
    known = {config: entry(config, None if config.x == 2 else 3.0) for config in CONFIGS[:20]}
    first.publish(known)
    second.publish(known)
    assert second.outcomes() == known
    assert len(second._trials()) == 20
    assert configs_of(second.ask(100, 1000)) == set(CONFIGS[20:])


def test_what_is_under_way_is_not_published(two: tuple[SharedSearch, SharedSearch]) -> None:
    first, second = two
    (claim,) = first.ask(1, 10)
    second.publish({claim.config: entry(claim.config)})
    assert second.outcomes() == {}


def test_other_keys_and_other_spaces_are_other_studies(url: str) -> None:
    with Storage(url) as storage:
        names = {
            opened(storage).name,
            opened(storage, configs=CONFIGS[::-1]).name,  # the same list in another order is the same
            opened(storage, replace(KEY, kernel_hash="other")).name,
            opened(storage, replace(KEY, device="a10-72sm")).name,
            opened(storage, configs=CONFIGS[1:]).name,
        }
    assert len(names) == 4


def died(search: SharedSearch, count: int) -> list[Claim]:
    """Claims of a process that is dead from then on, and was missed."""
    claims = search.ask(count, 1000)
    for claim in claims:
        search._storage.rest(claim.trial)
    search._mine.clear()
    return claims


def age_heartbeats(url: str, seconds: int) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        changed = connection.execute(
            "UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, ?)", (f"-{seconds} seconds",)
        )
        assert changed.rowcount


def test_what_a_process_dies_with_is_the_next_to_be_tried(two: tuple[SharedSearch, SharedSearch], url: str) -> None:
    first, second = two
    lost = died(first, 2)
    assert not configs_of(second.ask(1, 1000)) & configs_of(lost)
    assert second.waiting()
    age_heartbeats(url, storage_module.GRACE_S + 5)
    again = second.ask(2, 1000, only_lost=True)
    assert configs_of(again) == configs_of(lost)
    assert {claim.lost for claim in again} == {1}
    # It was not dead after all: what it has to say is too late, and the claim stays where it is.
    first.tell(lost[0], entry(lost[0].config, 7.0))
    assert second.outcomes() == {}
    second.tell(again[0], entry(again[0].config, 8.0))
    assert first.outcomes() == {again[0].config: entry(again[0].config, 8.0)}


def test_a_process_that_dies_before_its_first_heartbeat_is_missed_too(
    two: tuple[SharedSearch, SharedSearch], url: str
) -> None:
    first, second = two
    first._storage.beat = lambda trial: None  # type: ignore[method-assign]
    lost = died(first, 1)
    second.ask(0, 1000)  # comes along
    age_heartbeats(url, storage_module.GRACE_S + 5)
    assert configs_of(second.ask(1, 1000)) == configs_of(lost)


def test_an_outcome_that_its_process_could_not_end_its_trial_with_counts(
    two: tuple[SharedSearch, SharedSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    (claim,) = first.ask(1, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(first, "_finish", lambda trial, time_us: None)
        first.tell(claim, entry(claim.config, 4.0))
    assert not second.waiting()
    second.ask(0, 1000)
    (trial,) = second._trials()
    assert (trial.state.name, trial.value) == ("COMPLETE", 4.0)


def test_a_heartbeat_goes_on_while_a_trial_does(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "HEARTBEAT_S", 0.01)
    beats = threading.Semaphore(0)
    with Storage(url) as storage, opened(storage) as search:
        monkeypatch.setattr(storage.rdb, "record_heartbeat", lambda trial: beats.release())
        claims = search.ask(1, 1000)
        for _ in range(5):
            assert beats.acquire(timeout=30)
        search.tell(claims[0], entry(claims[0].config))
        assert not storage._beating


def test_a_plateau_that_one_has_come_to_is_that_of_all(
    two: tuple[SharedSearch, SharedSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    monkeypatch.setattr("tilewright.tuner.shared.PLATEAU", 1e9)  # nothing that is expected is enough
    while not first.at_plateau():
        for claim in first.ask(2, 1000):
            first.tell(claim, entry(claim.config, 1.0 + claim.config.x))
    assert first.tried < len(CONFIGS)
    assert second.at_plateau()


def run(folder: Path, url: str, host: str, **options: Any) -> Any:
    """A run in this process, on a host of that name, and its journal."""
    mine = folder / host
    mine.mkdir(exist_ok=True)
    scenario = Scenario(str(mine / "journal"))
    with simulated(scenario, scenario, mine), mock.patch("socket.gethostname", return_value=host):
        return autotune(BOARD, problems=[PROBLEM], jobs=1, db=mine / "db", storage=url, **options)


def measured(journal: Path) -> Counter[str]:
    """How often each configuration was measured, comparisons of the best left out."""
    begun = [note for note in read_journal(journal) if (note["do"], note["moment"]) == ("measure", "begin")]
    return Counter(canonical_json(note["config"]) for note in begun if note["config"])


def records_of(folder: Path, host: str) -> dict[str, tuple[Record, str]]:
    """The records of a host's file by configuration, each with the host that it was made on."""
    with TuningDB.open(BOARD.key, folder / host / "db", read_only=True) as database:
        return {
            record.config: (record, environment.host)
            for run_id, (_, environment) in database.runs().items()
            for record in database.find(run_id=run_id)
        }


def hosts_of(folder: Path, host: str) -> set[str]:
    """The hosts whose outcomes came into a host's file; those of the best few were measured anew there since."""
    with TuningDB.open(BOARD.key, folder / host / "db", read_only=True) as database:
        return {environment.host for _, environment in database.runs().values()}


def test_a_storage_that_fails_loses_nothing_that_is_under_way(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise StorageError("the storage failed: no answer")

    monkeypatch.setattr(SharedSearch, "tell", fails)
    with pytest.raises(StorageError, match="no answer"):
        run(tmp_path, url, "alpha", trials=8)
    measurements = measured(tmp_path / "alpha" / "journal")
    assert len(measurements) == BATCH_PER_JOB > 1
    assert set(records_of(tmp_path, "alpha")) == set(measurements)


def test_who_comes_late_has_the_outcomes_and_measures_nothing_but_the_best(tmp_path: Path, url: str) -> None:
    first = run(tmp_path, url, "one", trials=8).results[0]
    late = run(tmp_path, url, "two", trials=8).results[0]
    assert (late.config, late.time_us, late.trials) == (first.config, first.time_us, 8)
    assert late.cached
    assert not measured(tmp_path / "two" / "journal")
    ones, twos = records_of(tmp_path, "one"), records_of(tmp_path, "two")
    assert ones.keys() == twos.keys()
    # The best few and the default were compared on its own GPU, the others are as the first has them.
    compared = [config for config, (_, host) in twos.items() if host == "two"]
    assert 2 <= len(compared) <= tuning_run.FINALISTS + 1
    assert {config: ones[config] for config in ones if config not in compared} == {
        config: found for config, found in twos.items() if config not in compared
    }
    before = read_journal(tmp_path / "two" / "journal")
    assert run(tmp_path, url, "two", trials=8).results[0] == late
    assert read_journal(tmp_path / "two" / "journal") == before


def test_what_a_file_has_already_is_for_all(tmp_path: Path, url: str) -> None:
    run(tmp_path, None, "one", trials=8)  # type: ignore[arg-type]
    with TuningDB.open(BOARD.key, tmp_path / "one" / "db") as database:
        assert len(list(database.find())) == 8
    run(tmp_path, url, "one", trials=8)
    run(tmp_path, url, "two", trials=12)
    assert len(measured(tmp_path / "two" / "journal")) == 4
    assert not measured(tmp_path / "two" / "journal").keys() & measured(tmp_path / "one" / "journal").keys()
    assert len(records_of(tmp_path, "two")) == 12


def test_a_configuration_that_processes_are_lost_with_counts_as_failed(tmp_path: Path, url: str) -> None:
    lost: list[Config] = []

    class Unlucky(SharedSearch):
        """Others were lost with whatever it claims first."""

        def ask(self, *arguments: Any, **options: Any) -> list[Claim]:
            claims = super().ask(*arguments, **options)
            if claims and not lost:
                lost.append(claims[0].config)
                claims[0] = replace(claims[0], lost=MOST_LOST)
            return claims

    with mock.patch.object(tuning_run, "SharedSearch", Unlucky):
        results = run(tmp_path, url, "one", trials=5)
    assert results.results[0].trials == 5
    (record, _) = records_of(tmp_path, "one")[lost[0].to_json()]
    assert record.status is Status.RUNTIME_ERROR
    assert record.message == f"the process that tried it was lost, {MOST_LOST} times: not tried again"
    assert record.config not in measured(tmp_path / "one" / "journal")


def test_a_run_whose_time_is_up_keeps_no_claims(tmp_path: Path, url: str) -> None:
    faults = {config.to_json(): "endless kernel" for config in space()}
    scenario = Scenario(str(tmp_path / "journal"), faults)
    with simulated(scenario, scenario, tmp_path), mock.patch.object(gpu_runner, "MEASURE_TIMEOUT_S", 1.0):
        autotune(BOARD, problems=[PROBLEM], jobs=1, db=tmp_path / "db", storage=url, trials=20, timeout=2.0)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        (running,) = connection.execute("SELECT count(*) FROM trials WHERE state = 'RUNNING'").fetchone()
        (trials,) = connection.execute("SELECT count(*) FROM trials").fetchone()
    assert trials
    assert not running


def test_a_storage_that_fails_in_a_run_is_one_line_and_what_was_tried_is_kept(tmp_path: Path, url: str) -> None:
    class Failing(SharedSearch):
        """Its storage is broken after two outcomes."""

        told = 0

        def tell(self, claim: Claim, entry: Any) -> None:
            super().tell(claim, entry)
            self.told += 1
            if self.told == 2:
                with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
                    connection.execute("ALTER TABLE trials RENAME TO gone")

    with mock.patch.object(tuning_run, "SharedSearch", Failing), pytest.raises(StorageError) as caught:
        run(tmp_path, url, "one", trials=8)
    assert str(caught.value) == f"the storage {url} failed: no such table: trials"
    assert len(records_of(tmp_path, "one")) == 2


def test_an_outcome_that_somebody_has_edited_is_refused(tmp_path: Path, url: str) -> None:
    run(tmp_path, url, "one", trials=3)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute(
            "UPDATE trial_user_attributes SET value_json = replace(value_json, '\"median_us\": ', '\"median_us\": -')"
        )
    with pytest.raises(ExportFileError, match=r"study 'tilewright gemm \w+' .*:\d+: times.median_us=-"):
        run(tmp_path, url, "two", trials=3)
    assert not records_of(tmp_path, "two")


def test_what_other_tools_add_to_a_study_is_passed_over(two: tuple[SharedSearch, SharedSearch]) -> None:
    fields = two[0]._candidates.fields(CONFIGS[0])
    for params in ({}, {"BLOCK_M": [1]}, fields):
        two[0]._study.enqueue_trial(params)
    (claim,) = two[1].ask(1, 1000)
    two[1].tell(claim, entry(claim.config))
    assert set(two[0].outcomes()) == {claim.config}
    assert not two[0].waiting()
    # What was enqueued, and nobody takes up, is tried all the same.
    claims = two[0].ask(len(CONFIGS), 1000)
    assert configs_of(claims) == set(CONFIGS) - {claim.config}


def test_retuning_what_others_have_tried_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match=r"retune and storage \(--retune, --storage\) exclude each other"):
        run(tmp_path, url, "one", retune=True)
    assert not (tmp_path / "one" / "db").exists()


PROCESSES = 4
WITHIN_S = 120.0


def together(what: str, folder: Path, url: str, *arguments: str) -> dict[str, subprocess.CompletedProcess[str]]:
    """Runs `shared_runs` on so many hosts at once."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    running = {}
    for number in range(PROCESSES):
        host = f"host-{number}"
        command = [sys.executable, "-P", "-m", "tests.tuner.shared_runs", what, url, folder, host, str(PROCESSES)]
        running[host] = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    try:
        return {host: subprocess.CompletedProcess(process.args, *end_of(process)) for host, process in running.items()}
    finally:
        for process in running.values():
            process.kill()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=WITHIN_S)
    return process.returncode, output, errors


def test_processes_that_claim_as_fast_as_they_can_claim_each_configuration_once(tmp_path: Path) -> None:
    with postgres() as url:
        ended = together("claim", tmp_path, url)
    assert {process.returncode for process in ended.values()} == {0}, ended
    claimed = [tuple(each) for process in ended.values() for each in json.loads(process.stdout)]
    assert Counter(claimed) == Counter((config.x, config.y) for config in RACED)


def test_several_processes_share_a_search_and_one_is_killed_in_a_trial(tmp_path: Path) -> None:
    with postgres() as url:
        ended = together("tune", tmp_path, url, "7")
        assert sorted(process.returncode for process in ended.values()) == [-signal.SIGKILL, 0, 0, 0], ended
        assert not any(PASSWORD in process.stderr + process.stdout for process in ended.values())
        # Each configuration was tried once over all processes; what the dead one was at was tried again, by another.
        tries = measured(tmp_path / "journal")
        assert tries.keys() == {config.to_json() for config in space()}
        assert sorted(tries.values()) == [1] * (TRIALS - 1) + [2]
        (retried,) = [config for config, count in tries.items() if count == 2]
        begun = [note for note in read_journal(tmp_path / "journal") if note["moment"] == "begin" and note["config"]]
        pids = [note["pid"] for note in begun if canonical_json(note["config"]) == retried]
        assert len(set(pids)) == 2
        assert len({note["pid"] for note in begun}) == PROCESSES
        # All who lived have the outcomes of all, of the dead one too, and the true winner.
        (dead,) = [host for host, process in ended.items() if process.returncode]
        living = sorted(ended.keys() - {dead})
        best = min((config.to_dict() for config in space()), key=time_us)
        files = {host: records_of(tmp_path, host) for host in living}
        for host in living:
            assert json.loads(ended[host].stdout) == best
            assert files[host].keys() == tries.keys()
            assert {record.status for record, _ in files[host].values()} == {Status.OK}
            assert hosts_of(tmp_path, host) == set(ended)
        # Who comes late measures nothing that was measured.
        late = run(tmp_path, url, "late", trials=TRIALS).results[0]
        assert late.config == best
        assert not measured(tmp_path / "late" / "journal")
        assert records_of(tmp_path, "late").keys() == tries.keys()
