"""Which of a file's records are worth carrying to others: the best few of each problem."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from tilewright.tuning_db.schema import ANSWERABLE
from tilewright.tuning_db.weighing import merged


def _as_written(op: str, config: str) -> str:
    return config


@dataclass(frozen=True, slots=True)
class BestFew:
    """The fastest measured configurations of each problem and toolchain, and the default beside them.

    Of several kernel revisions or protocols that a problem was measured under with one toolchain, the one measured last
    gives its fastest, and each of the others what is among the fastest of all together, as a lookup weighs them
    (`tilewright.tuning_db.weighing`), so that no answer is lost by measuring a little under a new revision. Failures
    and predictions are not taken: nobody is answered with one, and a failure only keeps a configuration from being
    carried over to a problem that has better answers of its own here. The default is, however slow, of each revision
    that gives any: a lookup keeps it unless the fastest beats it beyond noise, and compares the times of two revisions
    by it.

    Attributes:
        count: configurations of each problem.
        default: the default configuration (canonical JSON) of an op's problem (canonical JSON); None where it has none.
        form: the text of an op's configuration as the present revision writes it.
    """

    count: int
    default: Callable[[str, str], str | None]
    form: Callable[[str, str], str] = _as_written

    def ids(self, connection: sqlite3.Connection) -> list[int]:
        """The ids of these records."""
        chosen: list[int] = []
        rows = connection.execute(_LAST_FIRST)
        for (op, problem), of_one in groupby(rows, key=lambda row: (row["op"], row["problem"])):
            default = self.default(op, problem)
            for _, of_toolchain in groupby(of_one, key=lambda row: (row["arch"], row["triton"], row["ptxas"])):
                keys = [list(of_key) for _, of_key in groupby(of_toolchain, key=lambda row: row["key_digest"])]
                chosen += self._of_keys(op, keys, default)
        return chosen

    def _of_keys(self, op: str, keys: Sequence[Sequence[sqlite3.Row]], default: str | None) -> list[int]:
        """The ids of one problem and toolchain, from the rows of each key, fastest first."""
        ids: list[dict[str, int]] = []
        times: list[dict[str, float]] = []
        for rows in keys:
            forms = {self.form(op, row["config"]): row for row in reversed(rows)}
            fastest = dict(reversed(forms.items()))
            ids.append({form: row["id"] for form, row in fastest.items()})
            times.append({form: row["median_us"] for form, row in fastest.items()})
        chosen = dict.fromkeys((0, form) for form in islice(times[0], self.count))
        chosen |= dict.fromkeys(islice(merged(times), self.count))
        if default is not None:
            chosen |= dict.fromkeys(
                (place, default) for place in {place for place, _ in chosen} if default in ids[place]
            )
        return [ids[place][form] for place, form in chosen]


_MEASURED = f"{ANSWERABLE} AND provenance = 'measured'"
_LAST_FIRST = f"""
    SELECT id, key_digest, op, problem, arch, triton, ptxas, config, median_us,
        max(created_at) OVER (PARTITION BY key_digest) AS newest
    FROM records WHERE {_MEASURED}
    ORDER BY op, problem, arch, triton, ptxas, newest DESC, key_digest, median_us, config
"""
