"""What a run notes in the database of how far it came, for the next: never evidence, and no outcome."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from tilewright.kernels.kernel import Kernel
from tilewright.kernels.lookup import prediction_protocol
from tilewright.tuning_db.record import Key
from tilewright.tuning_db.store import TuningDB

RETUNE_AGE = timedelta(days=1)
"""A retune that began before is not gone on with: the machine is no longer as it was."""


class SearchProgress:
    """How far the search under a key came, noted in the database: an aid to the next run, never evidence."""

    def __init__(self, database: TuningDB, kernel: Kernel[Any, Any], key: Key) -> None:
        self._database = database
        self._stamp = f"search {key.digest()}"
        # A plateau is one of this very space and prediction.
        self._plateau = f"plateau {prediction_protocol(kernel)}"
        self._noted = database.noted(self._stamp)

    @property
    def interrupted(self) -> bool:
        """Whether a run, this or an earlier one, began to try configurations and has not compared the finalists."""
        return self._noted == "began"

    @property
    def at_plateau(self) -> bool:
        """Whether a run ended because it expected no improvement."""
        return self._noted == self._plateau

    def began(self) -> None:
        """Notes that configurations are being tried."""
        self._noted = "began"
        self._database.note({self._stamp: self._noted})

    def ended(self, *, plateau: bool = False) -> dict[str, str]:
        """The note that the search has ended, to be kept with its last outcomes."""
        return {self._stamp: self._plateau if plateau else "ended"}


class Retune:
    """A retune of some workloads, noted in the database from its start until each has come to its end: so that one that
    was interrupted, or whose time was up, goes on when the same command is given again.

    Attributes:
        since: when it began, ISO 8601, UTC; what is on record since then is not tried again.
    """

    def __init__(self, database: TuningDB, keys: Sequence[Key]) -> None:
        self._database = database
        self._left = {key.digest() for key in keys}
        self._stamp = f"retune {hashlib.sha256(''.join(sorted(self._left)).encode()).hexdigest()}"
        now = datetime.now(UTC)
        oldest, self.since = ((now - age).isoformat(timespec="microseconds") for age in (RETUNE_AGE, timedelta()))
        noted = database.noted(self._stamp) or ""
        if oldest <= noted <= self.since:
            self.since = noted
        else:
            database.note({self._stamp: self.since})

    def ended(self, key: Key) -> None:
        """A workload's search has come to its end."""
        self._left.discard(key.digest())
        if not self._left:
            self._database.note({self._stamp: ""})
