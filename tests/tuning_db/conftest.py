"""A question, records that answer it, and where they were made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from tilewright.tuning_db import (
    Environment,
    Key,
    Provenance,
    Record,
    Resources,
    Status,
    Times,
    TuningDB,
    canonical_json,
)

ASKED = Key(
    op="gemm",
    kernel_hash="rev-b",
    problem=canonical_json({"M": 16, "N": 4096, "dtype": "fp16"}),
    device="rtx3090-82sm",
    arch=86,
    triton="3.9.0",
    ptxas="13.0.88",
    protocol="graph-1",
)


class MakeRecord(Protocol):
    """How tests call the fixture `make_record`."""

    def __call__(self, config: str = ..., time_us: float | None = ..., spills: int = ..., **changes: Any) -> Record: ...


@pytest.fixture
def key() -> Key:
    return ASKED


@pytest.fixture
def make_record() -> MakeRecord:
    """A record under ASKED; `changes` are fields of the record, or of its key."""

    def make(config: str = "{}", time_us: float | None = 10.0, spills: int = 0, **changes: Any) -> Record:
        of_key = {name: changes.pop(name) for name in list(changes) if name in Key.__dataclass_fields__}
        return Record(
            key=replace(ASKED, **of_key),
            config=config,
            resources=Resources(registers=64, spill_bytes=spills, stack_bytes=0, shared_bytes=49152),
            **{
                "status": Status.OK,
                "provenance": Provenance.MEASURED,
                "times": None if time_us is None else Times.single(time_us),
                **changes,
            },
        )

    return make


@pytest.fixture(scope="session")
def environment() -> Environment:
    return Environment(
        tilewright="0.1.0",
        triton="3.9.0",
        ptxas="13.0.88",
        python="3.12.3",
        host="lab",
        protocol="graph-1",
        driver="580.65",
        cuda="13.0",
        extra={"sm_clock_mhz": 1695, "note": "µ"},
    )


@pytest.fixture
def db(tmp_path: Path) -> Iterator[TuningDB]:
    with TuningDB.open(ASKED.device, tmp_path) as opened:
        yield opened


@pytest.fixture
def run_id(db: TuningDB, environment: Environment) -> int:
    return db.start_run(environment)
