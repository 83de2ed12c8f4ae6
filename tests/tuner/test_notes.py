"""How far a run came, as the next one hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewright.kernels import GemmProblem, resolve_device
from tilewright.kernels.lookup import TIMING_PROTOCOL, record_key
from tilewright.kernels.registry import find_kernel
from tilewright.tuner import notes
from tilewright.tuner.notes import Retune, SearchProgress
from tilewright.tuning_db.store import TuningDB

GEMM = find_kernel("gemm")
BOARD = resolve_device("rtx3090")
KEYS = [record_key(GEMM, GemmProblem(m, 64, 64), BOARD, TIMING_PROTOCOL) for m in (64, 128)]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[TuningDB]:
    with TuningDB.open(BOARD.key, tmp_path) as database:
        yield database


def test_a_search_that_began_and_has_not_ended_was_interrupted(database: TuningDB) -> None:
    progress = SearchProgress(database, GEMM, KEYS[0])
    assert (progress.interrupted, progress.at_plateau) == (False, False)
    progress.began()
    assert progress.interrupted
    assert SearchProgress(database, GEMM, KEYS[0]).interrupted
    assert not SearchProgress(database, GEMM, KEYS[1]).interrupted
    database.note(progress.ended())
    ended = SearchProgress(database, GEMM, KEYS[0])
    assert (ended.interrupted, ended.at_plateau) == (False, False)


def test_a_plateau_is_of_one_space_and_prediction(database: TuningDB, monkeypatch: pytest.MonkeyPatch) -> None:
    database.note(SearchProgress(database, GEMM, KEYS[0]).ended(plateau=True))
    assert SearchProgress(database, GEMM, KEYS[0]).at_plateau
    monkeypatch.setattr(notes, "prediction_protocol", lambda kernel: "another")
    assert not SearchProgress(database, GEMM, KEYS[0]).at_plateau


def test_a_retune_goes_on_until_every_workload_has_ended(database: TuningDB) -> None:
    first = Retune(database, KEYS)
    assert Retune(database, KEYS[::-1]).since == first.since
    first.ended(KEYS[0])
    assert Retune(database, KEYS).since == first.since
    assert Retune(database, KEYS[:1]).since > first.since  # of other workloads
    first.ended(KEYS[1])
    assert Retune(database, KEYS).since > first.since


def test_a_retune_that_began_long_ago_begins_anew(database: TuningDB, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Retune(database, KEYS)
    monkeypatch.setattr(notes, "RETUNE_AGE", -notes.RETUNE_AGE)  # none is young enough
    assert Retune(database, KEYS).since > first.since
