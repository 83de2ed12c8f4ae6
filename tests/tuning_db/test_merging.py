"""Which of two records stays, that the order of merging doesn't matter, and that a merge is whole or not at all."""

from __future__ import annotations

import io
import itertools
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.tuning_db import (
    DatabaseCorruptError,
    Environment,
    Provenance,
    Record,
    Status,
    Times,
    TuningDB,
    UsageError,
)
from tilewright.tuning_db.interchange import export
from tilewright.tuning_db.merging import Merged
from tilewright.tuning_db.upkeep import check

DEVICE = "rtx3090-82sm"
TIMES = Times(10.0, 9.5, 10.5, 20)


def moment(second: int) -> str:
    return f"2026-01-31T12:00:{second:02}.000000+00:00"


def made(folder: Path, records: list[Record], environment: Environment, started_at: str = moment(0)) -> TuningDB:
    db = TuningDB.open(DEVICE, folder)
    run = db.start_run(environment)
    db._file.write(lambda connection: connection.execute("UPDATE runs SET started_at = ?", (started_at,)))
    db.add_many(records, run)
    return db


def text_of(db: TuningDB) -> bytes:
    stream = io.BytesIO()
    export(db._file, DEVICE, stream)
    return stream.getvalue()


@pytest.fixture
def rival(make_record):
    """A record of one key and configuration; `status` without times unless ok."""

    def make(status: Status = Status.OK, times: Times = TIMES, second: int = 0, **changes) -> Record:
        record = make_record("{}", created_at=moment(second), **changes)
        return replace(record, status=status, times=times if status is Status.OK else None)

    return make


@pytest.mark.parametrize(
    ("stays", "goes"),
    [
        # a wrong result before all others, however old
        ({"status": Status.INCORRECT}, {"times": Times(1, 1, 1, 1000), "second": 9}),
        ({"status": Status.INCORRECT}, {"status": Status.TIMEOUT, "second": 9}),
        # a time before any refusal
        ({}, {"status": Status.COMPILE_ERROR, "second": 9}),
        ({}, {"status": Status.OUT_OF_RESOURCES, "second": 9}),
        ({}, {"status": Status.TIMEOUT, "second": 9}),
        # what the compiler says before what the machine may have caused
        ({"status": Status.COMPILE_ERROR}, {"status": Status.RUNTIME_ERROR, "second": 9}),
        ({"status": Status.INVALID}, {"status": Status.TIMEOUT, "second": 9}),
        # more samples, slower and older though it may be
        ({"times": Times(12, 10, 14, 21)}, {"times": TIMES, "second": 9}),
        # less spread
        ({"times": Times(12.0, 11.9, 12.1, 20)}, {"times": TIMES, "second": 9}),
        # the newer one
        ({"second": 2}, {"second": 1}),
        ({"status": Status.TIMEOUT, "second": 2}, {"status": Status.RUNTIME_ERROR, "second": 1}),
        # any rule that doesn't ask which came first
        ({"message": "b"}, {"message": "a"}),
    ],
)
def test_the_one_with_more_evidence_stays(tmp_path: Path, environment, rival, stays: dict, goes: dict) -> None:
    for name, mine, theirs, fate in (
        ("arrives", goes, stays, Merged(replaced=1)),
        ("is there", stays, goes, Merged(kept=1)),
    ):
        with (
            made(tmp_path / name, [rival(**mine)], environment) as target,
            made(tmp_path / f"{name} source", [rival(**theirs)], replace(environment, host="other")) as source,
        ):
            assert target.merge(source) == fate
            assert list(target.find()) == [rival(**stays)]


def test_measured_and_predicted_are_no_rivals(tmp_path: Path, environment, rival) -> None:
    predicted = rival(provenance=Provenance.PREDICTED, second=9)
    with (
        made(tmp_path / "a", [rival()], environment) as target,
        made(tmp_path / "b", [predicted], environment) as source,
    ):
        assert target.merge(source) == Merged(added=1)
        assert set(target.find()) == {rival(), predicted}


def test_a_record_keeps_its_run(tmp_path: Path, environment, make_record) -> None:
    other = replace(environment, host="other", extra={"power_limit_w": 250})
    with (
        made(tmp_path / "a", [make_record("{}")], environment) as target,
        made(tmp_path / "b", [make_record('{"n":1}'), make_record('{"n":2}')], other, moment(7)) as source,
    ):
        target.merge(source)
        assert target.runs() == {1: (moment(0), environment), 2: (moment(7), other)}
        assert [record.config for record in target.find(run_id=2)] == ['{"n":1}', '{"n":2}']
        # Again: nothing new, and no second run like it.
        assert target.merge(source) == Merged(known=2)
        assert len(target.runs()) == 2


def test_a_run_none_of_whose_records_stayed_is_not_taken_along(tmp_path: Path, environment, rival) -> None:
    with (
        made(tmp_path / "a", [rival(second=1)], environment) as target,
        made(tmp_path / "b", [rival()], replace(environment, host="other")) as source,
    ):
        target.merge(source)
        assert len(target.runs()) == 1


STATUSES = [Status.OK, Status.OK, Status.INCORRECT, Status.COMPILE_ERROR, Status.TIMEOUT]
SKETCH = st.tuples(
    st.integers(0, 2), st.sampled_from(STATUSES), st.sampled_from([5.0, 10.0]), st.integers(1, 2), st.integers(0, 2)
)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(SKETCH, max_size=3, unique_by=lambda sketch: sketch[0]), min_size=2, max_size=3))
def test_the_order_of_merging_does_not_matter(tmp_path_factory, environment, files: list[list[tuple]]) -> None:
    from tests.tuning_db.conftest import ASKED

    folder = tmp_path_factory.mktemp("order")
    sources = []
    for place, sketches in enumerate(files):
        records = []
        for config, status, time, samples, second in sketches:
            times = Times(time, time, time + 1, samples) if status is Status.OK else None
            records.append(
                Record(ASKED, f'{{"n":{config}}}', status, Provenance.MEASURED, times, created_at=moment(second))
            )
        sources.append(made(folder / f"source {place}", records, replace(environment, host=f"host {place}")))
    results = set()
    for number, order in enumerate(itertools.permutations(sources)):
        with TuningDB.open(DEVICE, folder / str(number)) as target:
            for source in (*order, *order):
                target.merge(source)
            results.add(text_of(target))
    for source in sources:
        source.close()
    assert len(results) == 1


def test_a_merge_is_whole_or_not_at_all(tmp_path: Path, environment, make_record) -> None:
    records = [make_record(f'{{"n":{number}}}', created_at=moment(0)) for number in range(9)]
    with (
        made(tmp_path / "a", records[:1], environment) as target,
        made(tmp_path / "b", records[1:], replace(environment, host="other")) as source,
    ):
        before = text_of(target)
        deep = '{"n":' * 100000 + "1" + "}" * 100000
        last = max(source._file.rows("SELECT id, key_digest, config FROM records"), key=lambda row: row["config"])["id"]
        for change, error, reason in (
            ("status = 'okay'", DatabaseCorruptError, "status='okay' is none there is"),
            ("key_digest = 'zz'", DatabaseCorruptError, "doesn't match its key"),
            ("median_us = NULL", DatabaseCorruptError, "median_us=None is no number"),
            ("registers = 'x'", DatabaseCorruptError, "registers='x' is no integer"),
            (f"config = '{deep}'", DatabaseCorruptError, r"characters\), which must be a JSON object"),
            ("config = '{\"n\":[1]}'", DatabaseCorruptError, "which must be an object of plain values"),
        ):
            old = source._file.rows(f"SELECT * FROM records WHERE id = {last}")[0]
            column = change.split()[0]
            source._file.write(lambda db, change=change: db.execute(f"UPDATE records SET {change} WHERE id = {last}"))
            with pytest.raises(error, match=reason) as caught:
                target.merge(source)
            assert f"record {last} " in str(caught.value)
            assert str(source.path) in str(caught.value)
            assert text_of(target) == before
            assert len(target.runs()) == 1
            restore = f"UPDATE records SET {column} = ? WHERE id = {last}"
            source._file.write(lambda db, old=old, column=column, restore=restore: db.execute(restore, (old[column],)))
        assert target.merge(source) == Merged(added=8)


def test_a_source_with_a_record_of_no_run_is_refused(tmp_path: Path, environment, make_record) -> None:
    with (
        TuningDB.open(DEVICE, tmp_path / "a") as target,
        made(tmp_path / "b", [make_record("{}")], environment) as source,
    ):
        with closing(sqlite3.connect(source.path)) as other, other:
            other.execute("DELETE FROM runs")
        with pytest.raises(DatabaseCorruptError, match="record 1 is of a run that there is not"):
            target.merge(source)
        assert list(target.find()) == []


def test_another_device_and_itself_are_refused(tmp_path: Path, environment, make_record) -> None:
    with made(tmp_path / "a", [make_record("{}")], environment) as db:
        with pytest.raises(UsageError, match="can't be merged into itself"):
            db.merge(db)
        with TuningDB.open("a10-72sm", tmp_path) as target:
            with pytest.raises(UsageError, match=f"record 1 is of '{DEVICE}', and to be merged with a10-72sm's"):
                target.merge(db)
            assert list(target.find()) == []


MERGER = """
import os, signal, sys
from pathlib import Path
from tilewright.tuning_db import TuningDB, merging
folder, sources, fatal = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
inner = merging.in_key_order

def in_key_order(*arguments):
    in_key_order.passes += 1
    for number, row in enumerate(inner(*arguments)):
        if in_key_order.passes == 2 and number == fatal:  # the first is the check
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

in_key_order.passes = 0
merging.in_key_order = in_key_order
for source in sources:
    with (
        TuningDB.open("rtx3090-82sm", folder) as db,
        TuningDB.open("rtx3090-82sm", Path(source), read_only=True) as other,
    ):
        db.merge(other)
"""


def merger(folder: Path, sources: list[Path], fatal: int = -1) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", MERGER, folder, ",".join(map(str, sources)), str(fatal)])


@pytest.fixture
def sources(tmp_path: Path, environment, make_record) -> list[Path]:
    """Three databases of 60 records each, of 90 configurations in all."""
    folders = []
    for place in range(3):
        records = [
            make_record(f'{{"n":{number}}}', 10.0 + place, created_at=moment(place))
            for number in range(15 * place, 15 * place + 60)
        ]
        made(tmp_path / f"source {place}", records, replace(environment, host=f"host {place}")).close()
        folders.append(tmp_path / f"source {place}")
    return folders


def test_processes_that_merge_at_once_lose_nothing(tmp_path: Path, sources: list[Path]) -> None:
    orders = [sources, sources[::-1], [*sources[1:], sources[0]], sources]
    mergers = [merger(tmp_path / "target", order) for order in orders]
    assert [process.wait(60) for process in mergers] == [0] * 4
    assert merger(tmp_path / "alone", sources).wait(60) == 0
    with TuningDB.open(DEVICE, tmp_path / "target") as target, TuningDB.open(DEVICE, tmp_path / "alone") as alone:
        assert len(list(target.find())) == 90
        assert text_of(target) == text_of(alone)


def test_a_merge_that_is_killed_leaves_what_was_there(tmp_path: Path, sources: list[Path]) -> None:
    assert merger(tmp_path / "target", sources[:1]).wait(60) == 0
    with TuningDB.open(DEVICE, tmp_path / "target") as target:
        before = text_of(target)
    assert merger(tmp_path / "target", sources[1:], fatal=50).wait(60) == -signal.SIGKILL
    with TuningDB.open(DEVICE, tmp_path / "target") as target:
        assert target.set_aside is None
        assert text_of(target) == before
        assert len(target.runs()) == 1
        assert check(target.path) == []


@pytest.mark.parametrize("time_us", [5e-324, 1e308])
def test_a_time_that_no_kernel_takes_is_refused(tmp_path: Path, environment, rival, time_us: float) -> None:
    with (
        made(tmp_path / "a", [rival()], environment) as target,
        made(tmp_path / "b", [rival(times=Times(time_us, time_us, time_us, 99))], environment) as source,
    ):
        with pytest.raises(DatabaseCorruptError, match=r"record 1: median_us=.* must be a number of µs from 0.001 to"):
            target.merge(source)
        assert list(target.find()) == [rival()]
