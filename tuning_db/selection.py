"""Which of a file's records are worth carrying to others: the best few of each problem."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from tilewright.tuning_db.schema import ANSWERABLE


@dataclass(frozen=True, slots=True)
class BestFew:
    """The fastest measured configurations of each problem and toolchain, and the default beside them.

    Of several kernel revisions or protocols that a problem was measured under with one toolchain, the one measured last
    is taken. Failures and predictions are not: nobody is answered with one, and a failure only keeps a configuration
    from being carried over to a problem that has better answers of its own here. The default is, however slow: a lookup
    keeps it unless the fastest beats it beyond noise, and needs its time for that.

    Attributes:
        count: configurations of each problem.
        default: the default configuration (canonical JSON) of an op's problem (canonical JSON); None where it has none.
    """

    count: int
    default: Callable[[str, str], str | None]

    def ids(self, connection: sqlite3.Connection) -> list[int]:
        """The ids of these records."""
        chosen: list[int] = []
        digest, place, default = "", 0, None
        for row in connection.execute(_LATEST):
            if row["key_digest"] != digest:
                digest, place, default = row["key_digest"], 0, self.default(row["op"], row["problem"])
            if place < self.count or row["config"] == default:
                chosen.append(row["id"])
            place += 1
        return chosen


_MEASURED = f"{ANSWERABLE} AND provenance = 'measured'"
_LATEST = f"""
    SELECT id, key_digest, op, problem, config FROM records
    WHERE {_MEASURED} AND key_digest IN (
        SELECT key_digest FROM (
            SELECT key_digest, row_number() OVER (
                PARTITION BY op, problem, arch, triton, ptxas ORDER BY max(created_at) DESC, key_digest
            ) AS place
            FROM records WHERE {_MEASURED} GROUP BY key_digest
        ) WHERE place = 1
    )
    ORDER BY key_digest, median_us, config
"""
