"""What is known of a model after it went through: one document, `report.json`, which `html.py` shows and programs read.

The same run gives the same bytes: fields come in the order in which they are declared here, names of a mapping sorted,
and neither dates nor durations are in it. Times are microseconds, each with what it is based on; a time of the whole
model is called measured only if every part of it was. `VERSION` changes when a field does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Self

from tilewright.kernels.device import Device
from tilewright.tuner.model.report.estimate import Estimate, Roofs
from tilewright.tuner.model.report.memory import Memory
from tilewright.tuner.model.verify.compare import Comparison
from tilewright.tuning_db.atomic import whole_file

VERSION = 4
"""Of the document: the names, types and meanings of its fields."""


@dataclass(frozen=True, slots=True)
class TensorPart:
    """An input or output of the model."""

    name: str
    dtype: str  # canonical name
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelPart:
    """The model that came in."""

    name: str  # of its file, without folders
    sha256: str  # of its file
    bytes: int  # of its file and its external data
    opset: int  # of its file
    read_opset: int  # what that was converted to
    nodes: int  # of the main graph, once read and folded
    inputs: tuple[TensorPart, ...]
    outputs: tuple[TensorPart, ...]
    folded: dict[str, int]  # how often each rule of folding was used


@dataclass(frozen=True, slots=True)
class DevicePart:
    """What it is to run on."""

    key: str
    name: str
    arch: str  # `sm_86`
    bandwidth_gbs: float
    present: bool  # whether the device was at hand

    @classmethod
    def of(cls, device: Device) -> Self:
        """A device's part."""
        return cls(device.key, device.name, device.sm, device.bandwidth_gbs, bool(device.live))


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A fused node."""

    node: str
    plugin: str
    stands_for: tuple[str, ...]  # nodes of the original, in their order
    end: str  # why its chain goes no further


@dataclass(frozen=True, slots=True)
class LeftNode:
    """A node that looked like a pattern's and was left."""

    node: str
    pattern: str
    reason: str


@dataclass(frozen=True, slots=True)
class FusionPart:
    """What was fused."""

    nodes_before: int
    nodes_after: int
    patterns: dict[str, int]  # how often each matched
    layers: tuple[FusedLayer, ...]
    left: tuple[LeftNode, ...]


@dataclass(frozen=True, slots=True)
class WorkloadRow:
    """A distinct problem of the model."""

    first: str  # the first layer that has it
    op: str
    problem: str
    count: int
    flops: int  # of all that have it
    flops_share: float
    bytes: int
    bytes_share: float


@dataclass(frozen=True, slots=True)
class UnsupportedRow:
    """A node that multiplies matrices and that no kernel of ours runs."""

    node: str
    operator: str
    reason: str
    flops: int | None


@dataclass(frozen=True, slots=True)
class WorkloadPart:
    """What the model asks of the kernels."""

    rows: tuple[WorkloadRow, ...]
    unsupported: tuple[UnsupportedRow, ...]
    flops: int
    coverage: float  # share of `flops` that kernels of ours run


@dataclass(frozen=True, slots=True)
class TuningRow:
    """What tuning found for one problem."""

    op: str
    problem: str
    config: str | None  # as `autotune` prints it; None if none works
    time_us: float | None
    provenance: str | None
    tflops: float | None
    roofline_fraction: float | None  # least possible time over this one
    status: str
    message: str
    trials: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The precision of one fused node."""

    node: str
    kind: str  # fp32 fp16 bf16 int8 fp8 w8a16 w4a16
    reason: str  # the rule or the search that decided it


ROUNDING = "rounding"


@dataclass(frozen=True, slots=True)
class CalibrationPart:
    """What scales were taken from, or what weights that alone are quantised were rounded by."""

    origin: str  # the file or folder, or `random`
    samples: int
    methods: tuple[str, ...]  # of scales; `ROUNDING` where there are none


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """A precision plan that no other beats in both time and error."""

    time_us: float
    provenance: str
    error: float | None  # None of a plan that gave NaN or infinities
    higher: int  # layers kept above the lowest precision
    chosen: bool


@dataclass(frozen=True, slots=True)
class PrecisionPart:
    """What precision each layer has, and why."""

    requested: str  # fp16 bf16 int8 fp8 w8a16 w4a16 auto
    base: str  # data type of what has no plan
    layers: tuple[LayerPlan, ...]
    calibration: CalibrationPart | None
    measure: str  # what `ParetoPoint.error` is
    pareto: tuple[ParetoPoint, ...]


@dataclass(frozen=True, slots=True)
class ErrorPart:
    """A model that was written, against the original."""

    model: str  # its file
    data: str  # the inputs: the file or folder, or `random`
    budget: str | None  # as `--max-error` takes it
    breaches: tuple[str, ...]  # what of the budget is not met
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """What the models need, in bytes."""

    before: Memory
    after: Memory


@dataclass(frozen=True, slots=True)
class EstimatePart:
    """Times of the whole model."""

    before: Estimate
    after: Estimate
    roofs: Roofs
    stands_for: dict[str, tuple[str, ...]]  # of each node after, the nodes before: `estimate.pairing`


@dataclass(frozen=True, slots=True)
class Artefact:
    """A file that was written."""

    file: str  # relative to the folder
    kind: str  # `onnx`, `engine` or another word
    bytes: int
    sha256: str
    what: str  # one line for people


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The document. A part that a run left out is None, or empty."""

    tilewright: str  # version
    model: ModelPart
    device: DevicePart
    fusion: FusionPart
    workloads: WorkloadPart
    tuning: tuple[TuningRow, ...]
    precision: PrecisionPart | None
    errors: tuple[ErrorPart, ...]
    memory: MemoryPart
    estimate: EstimatePart
    artefacts: tuple[Artefact, ...]
    warnings: tuple[str, ...]  # what must not be missed, a line each


def to_json(report: ModelReport) -> str:
    """The document as text: ASCII, so that no name in it can be taken for anything else, and a newline at its end."""
    return json.dumps({"version": VERSION, **_plain(report)}, indent=1, allow_nan=False) + "\n"


def write_report(report: ModelReport, path: Path) -> None:
    """Writes the document, whole or not at all.

    Raises:
        UsageError: the file can't be written.
    """
    with whole_file(path) as stream:
        stream.write(to_json(report).encode("ascii"))


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """A node after, beside what it replaced."""

    node: str
    op: str
    before_us: float | None  # None: nothing before is known to be this
    before_provenance: str  # of several nodes the weakest
    after_us: float | None  # None: it is gone, and nothing is known to stand for it
    after_provenance: str


def layer_times(part: EstimatePart) -> list[LayerTimes]:
    """Times before and after, node by node: in the order of the nodes after, then what nothing stands for. What takes
    no time on both sides is left out. Each side's times add up to that side's whole."""
    before = {row.node: row for row in part.before.nodes}
    rows, seen = [], set[str]()
    for after in part.after.nodes:
        replaced = [before[name] for name in part.stands_for.get(after.node, ()) if name in before and name not in seen]
        seen.update(row.node for row in replaced)
        time = sum(row.time_us for row in replaced) if replaced else None
        if after.time_us or time:
            weakest = weakest_provenance(*(row.provenance for row in replaced))
            rows.append(LayerTimes(after.node, after.op, time, weakest, after.time_us, after.provenance))
    for row in part.before.nodes:
        if row.node not in seen and row.time_us:
            rows.append(LayerTimes(row.node, row.op, row.time_us, row.provenance, None, ""))
    return rows


def weakest_provenance(*given: str) -> str:
    """Of what several times are based on, the one that says least; what is free doesn't count. "" of none."""
    order = ("free", "measured", "transferred", "predicted", "roofline")
    return max(given, key=order.index, default="")


def _plain(value: Any) -> Any:
    """A value of dataclasses, mappings and tuples as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(value[name]) for name in sorted(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value
