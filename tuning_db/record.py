"""What is remembered: one `Record` per outcome, in plain values that any SQLite tool can read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any


class Status(StrEnum):
    """How an outcome ended. Failure has a name; it is never an infinite time."""

    OK = "ok"
    INVALID = "invalid"  # the space says it can't fit; nothing was compiled
    COMPILE_ERROR = "compile_error"
    OUT_OF_RESOURCES = "out_of_resources"  # compiled, but over a limit of the device, or it spills
    INCORRECT = "incorrect"  # ran, and the correctness gate refused its result
    RUNTIME_ERROR = "runtime_error"
    TIMEOUT = "timeout"


class Provenance(StrEnum):
    """Where a number comes from, best evidence first."""

    MEASURED = "measured"  # this problem, board, kernel revision and toolchain
    TRANSFERRED = "transferred"  # measured, but on another shape, board, revision or toolchain
    PREDICTED = "predicted"  # never run
    DEFAULT = "default"  # no evidence at all


_TOO_DEEP = "it is nested too deeply"

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def canonical_json(value: Mapping[str, Any]) -> str:
    """The one text of a mapping: keys sorted, no blanks, no NaN. Equal mappings give equal texts.

    Raises:
        ValueError: it holds a number that is not finite, or is nested too deeply.
    """
    try:
        return _CANONICAL(value)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def read_json(text: str) -> Any:
    """The value of a JSON text. Whoever wrote it, nothing but a ValueError comes of it.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


@dataclass(frozen=True, slots=True)
class Key:
    """Everything that changes the answer. Two outcomes are comparable if and only if their keys are equal."""

    op: str
    kernel_hash: str  # of the kernel's AST and of every device function it calls
    problem: str  # canonical JSON
    device: str  # `Device.key`: the board and its SM count, not the arch alone
    arch: int  # 86 for sm_86
    triton: str
    ptxas: str
    protocol: str  # how the time was obtained: name and revision of the timing or prediction protocol

    def digest(self) -> str:
        """SHA-256 of the key, in hexadecimal."""
        parts = (self.op, self.kernel_hash, self.problem, self.device, str(self.arch), self.triton, self.ptxas)
        return hashlib.sha256("\0".join((*parts, self.protocol)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes, as `cuobjdump` and Triton's metadata report it."""

    registers: int  # 32-bit registers per thread
    spill_bytes: int  # local memory per thread written and read by spills; 0 is the only good value
    stack_bytes: int  # stack frame per thread
    shared_bytes: int  # shared memory per block, static and dynamic


BEYOND_NOISE = 2.5
"""Standard errors of a difference by which the best of a few must be faster. Where four are as fast as what they are
compared with, the best of them seems faster by more in 4.3 % of all comparisons of 3 samples each, in 1.8 to 2.7 % of
6 and more; with 2 it is 6 to 8 %. (Simulated, with normal noise: 1000 to 2000 runs of `tuner.timing.time_rounds` each.)
"""


@cache
def _decile_range(samples: int) -> float:
    """How far apart, in σ, the deciles of so many normal samples are expected to be, interpolated between order
    statistics as `np.quantile` does: 1.39 of 3 samples, 2.11 of 10, 2.563 of infinitely many.

    The r-th of n samples is expected at the quantile (r - 3/8)/(n + 1/4) (G. Blom, Statistical Estimates and
    Transformed Beta-Variables, 1958). That makes the range 3 % too wide of 3 samples, and is within 1 % of 6 and more.
    """
    place = 0.9 * (samples - 1)
    below, above = (
        _normal_quantile((rank + 1 - 0.375) / (samples + 0.25)) for rank in (math.floor(place), math.ceil(place))
    )
    return 2 * (below + (above - below) * (place % 1))  # the distribution is symmetric


def _normal_quantile(share: float) -> float:
    """Below how many σ of a normal distribution a share of it lies, by bisection: to import what `statistics` has for
    it takes longer than a program's first lookup."""
    low, high = -9.0, 9.0
    for _ in range(54):
        middle = (low + high) / 2
        if math.erf(middle / math.sqrt(2)) < 2 * share - 1:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True, slots=True)
class Times:
    """Statistics of one configuration's time, in microseconds. A predicted time has one sample and no spread."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int

    def __post_init__(self) -> None:
        if not (0 < self.p10_us <= self.median_us <= self.p90_us < math.inf and self.samples > 0):
            raise ValueError(
                f"times must be 0 < p10 <= median <= p90, finite, of at least one sample; got p10_us={self.p10_us} "
                f"median_us={self.median_us} p90_us={self.p90_us} samples={self.samples}"
            )

    @property
    def standard_error_us(self) -> float:
        """Of the median: 1.253·σ/√n, as of a normal distribution, with σ from the deciles, which outliers don't
        move."""
        if self.samples == 1:
            return 0.0  # a predicted time
        return 1.253 * (self.p90_us - self.p10_us) / _decile_range(self.samples) / math.sqrt(self.samples)

    def beats(self, other: Times) -> bool:
        """Whether this, the best of a few, is faster than the other beyond noise: by more than `BEYOND_NOISE` standard
        errors of the difference of the medians."""
        error = math.hypot(self.standard_error_us, other.standard_error_us)
        return other.median_us - self.median_us > BEYOND_NOISE * error

    @classmethod
    def single(cls, time_us: float) -> Times:
        """The statistics of one number."""
        return cls(time_us, time_us, time_us, 1)


@dataclass(frozen=True, slots=True)
class Record:
    """One outcome: a configuration tried on a problem, on a device, by a protocol.

    `times` is present if and only if the status is `ok`; `message` says why it is not.
    """

    key: Key
    config: str  # canonical JSON
    status: Status
    provenance: Provenance  # MEASURED or PREDICTED: what this outcome was when it was recorded
    times: Times | None = None
    resources: Resources | None = None
    message: str = ""
    predicted_us: float | None = None
    created_at: str = ""  # ISO 8601, UTC; filled in by the store when empty

    def __post_init__(self) -> None:
        if (self.times is not None) != (self.status is Status.OK):
            raise ValueError(f"a record has times exactly when its status is ok; {self.status=!s} {self.times=}")
        if self.provenance not in (Provenance.MEASURED, Provenance.PREDICTED):
            raise ValueError(f"a record is measured or predicted when it is made, not {self.provenance}")


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with what a run was made; one row of `runs`."""

    tilewright: str
    triton: str
    ptxas: str
    python: str
    host: str
    protocol: str
    driver: str = ""  # NVIDIA driver version; empty without a GPU
    cuda: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)  # clocks, power limit, anything else worth keeping


@dataclass(frozen=True, slots=True)
class Answer:
    """What `TuningDB.best` found: a record, and what it is evidence of for the question asked."""

    record: Record
    provenance: Provenance  # MEASURED, TRANSFERRED or PREDICTED with respect to the question
    reason: str  # "exact", "other revision", "other toolchain", "near shape M=16→12", "board a10", …
