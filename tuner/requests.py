"""What the tuner asks of its worker processes, and what they reply: JSON objects, field by field.

`pool` sends the requests, `worker` has what answers them. A reply whose `status` is not ok has a `message`, and of the
rest as much as was known by then.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict, final


class Reply(TypedDict):
    """What there is in every reply."""

    status: str  # of `Status`
    message: NotRequired[str]  # unless ok
    killed: NotRequired[bool]  # the process was, or its ptxas, by somebody else


class CompileRequest(TypedDict):
    """To compile a configuration."""

    do: Literal["compile"]
    op: str
    problem: dict[str, Any]
    config: dict[str, Any]
    arch: int  # 86


class CompileReply(Reply):
    """What a configuration takes: of several launches, the most of each resource."""

    resources: NotRequired[dict[str, Any]]  # the fields of `Resources`
    num_warps: NotRequired[int]
    seconds: NotRequired[float]


class BuildRequest(TypedDict):
    """To compile a configuration and hand the code over."""

    do: Literal["build"]
    op: str
    problem: dict[str, Any]
    config: dict[str, Any]
    constants: dict[str, float]  # constexprs that are not the default: {"EPS": 1e-05}
    arch: int


class BuildReply(Reply):
    """The code of each launch."""

    binaries: NotRequired[list[dict[str, Any]]]  # the fields of `Binary` but `arch` and `ptx`, the cubin in base64


class Measurement(TypedDict):
    """What there is in every request to measure."""

    do: Literal["measure"]
    op: str
    problem: dict[str, Any]
    seed: int  # of the inputs
    check: bool  # False leaves the gate out: for benchmarks that repeat a measurement
    locks: str | None  # the folder in which the runs of this host take turns; None: none are taken
    ordinal: NotRequired[int]  # of the GPU; a worker that has one of its own puts it in


@final
class MeasureRequest(Measurement):
    """To check and time one configuration."""

    config: dict[str, Any]
    skip_ragged: str  # why the gate's second problem is left out, such as that its code doesn't compile; "" if it isn't
    give_up_above_us: float | None  # timing stops early above this
    budget_s: float  # for the samples


@final
class FinalistsRequest(Measurement):
    """To check configurations, and time them in turns."""

    finalists: list[dict[str, Any]]


class Timed(TypedDict):
    """What timing has shown."""

    times: dict[str, Any]  # the fields of `Times`
    gave_up: bool
    settled: bool


class MeasureReply(Reply):
    """What became of one configuration, as far as it got."""

    resources: NotRequired[dict[str, Any]]  # the fields of `Resources`
    times: NotRequired[dict[str, Any]]  # with the two below, as in `Timed`; only if the result is right
    gave_up: NotRequired[bool]
    settled: NotRequired[bool]
    method: NotRequired[str]  # `replay` or `events`
    ragged: NotRequired[str]  # what came of the gate's second problem
    clocks: NotRequired[dict[str, Any]]
    busy: NotRequired[bool]  # other runs had the GPU all the time: nothing was tried


class FinalistsReply(Reply):
    """What became of each of several configurations."""

    finalists: NotRequired[list[MeasureReply]]
    clocks: NotRequired[dict[str, Any]]
    busy: NotRequired[bool]  # as in `MeasureReply`
