"""How long a whole model should take on a device: a sum over its nodes, each with what its time is based on.

    fused nodes                     the tuner's results, as the caller gives them; without one as the next line
    MatMul, Gemm, Conv, Attention,  the prediction (docs/prediction.md) of the default configuration of the problem that
    RMSNormalization                the node is, at its data type; nothing is compiled
    where no kernel takes it        the roofline of its FLOPs and bytes, and a launch
    all others                      bytes read and written over the bandwidth of device memory, and a launch
    views, and what depends on      nothing
    constants or shapes alone

The sum takes nodes to run one after another, each from device memory to device memory. It is a prediction unless every
node of it was measured, and is called one. Of products that nothing counts (recurrent layers, Einsum) and of nodes with
subgraphs only inputs and outputs are in it: `workloads` lists the former.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.prediction import (
    BLOCK_START_CYCLES,
    DRAM_EFFICIENCY,
    DRAM_LATENCY_CYCLES,
    LAUNCH_US,
    predict,
    roofline_us,
)
from tilewright.kernels.problem import Problem
from tilewright.kernels.registry import find_kernel
from tilewright.tuner.model.graph import dtype_name, is_constant, is_fused, known_behind
from tilewright.tuner.model.report.memory import is_view, known_bytes
from tilewright.tuner.model.report.node_problem import problem_of
from tilewright.tuner.model.workloads import flops_of
from tilewright.tuning_db.errors import IllegalConfigError, UsageError

MEASURED, TRANSFERRED, PREDICTED, ROOFLINE, FREE = "measured", "transferred", "predicted", "roofline", "free"
PROVENANCES = (MEASURED, TRANSFERRED, PREDICTED, ROOFLINE, FREE)
"""What a node's time is based on, best evidence first; `free`: it takes none."""

_PARTIAL_READERS = frozenset({"Gather", "GatherElements", "GatherND", "Slice"})
"""Operators that read as much of their first input as they write."""


@dataclass(frozen=True, slots=True)
class NodeTime:
    """One node's part of the time."""

    node: str
    op: str  # the operator: `Conv`, `FusedGemmBias`
    kernel: str  # the op of ours that runs it, or would: `gemm`; "" for none
    time_us: float
    provenance: str  # one of `PROVENANCES`
    flops: int  # of products alone, a multiply-add counted as two
    bytes: int  # at the least: each input read once, each output written once
    unit: str  # rate of the device that its products run at; "" without products
    share: float  # of the model's time

    @property
    def intensity(self) -> float:
        """FLOP per byte of device memory."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def tflops(self) -> float:
        """TFLOP/s that the time comes to."""
        return self.flops / self.time_us / 1e6 if self.time_us else 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A model's time on a device."""

    device: str  # `Device.key`
    time_us: float
    provenance: str  # `measured` only if every node's time is; else `predicted`
    nodes: tuple[NodeTime, ...]  # in the graph's order

    @property
    def flops(self) -> int:
        """Of all nodes."""
        return sum(node.flops for node in self.nodes)

    @property
    def bytes(self) -> int:
        """Of all nodes."""
        return sum(node.bytes for node in self.nodes)

    def by_provenance(self) -> dict[str, float]:
        """Microseconds by what they are based on."""
        found = {name: sum(row.time_us for row in self.nodes if row.provenance == name) for name in PROVENANCES}
        return {name: time for name, time in found.items() if time > 0}


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """What the nodes of one operator take."""

    operator: str
    count: int
    time_us: float
    share: float  # of the model's time
    bytes: int


@dataclass(frozen=True, slots=True)
class Roofs:
    """The limits that a roofline plot has: min(peak, intensity · bandwidth)."""

    bandwidth_gbs: float
    tflops: dict[str, float]  # of each unit that some node runs at


def estimate(model: ir.Model, device: Device, tuned: Mapping[str, tuple[float, str]] | None = None) -> Estimate:
    """The time of a model on a device.

    Args:
        model: with data types and static shapes of all values.
        device: a board; it need not be there.
        tuned: of fused nodes, by their names, the time in microseconds and what it is based on: `measured`,
            `transferred` or `predicted`.

    Raises:
        UsageError: `tuned` names a node that is not fused, or has a time or a provenance that can't be.
        ModelError: a value has no static shape.
    """
    tuned = tuned or {}
    _check(model, tuned)
    predictions: dict[Problem, float | None] = {}
    free: set[ir.Value] = set()
    rows: list[dict[str, Any]] = []
    for node in model.graph:
        if _is_free(node, free):
            free.update(node.outputs)
            rows.append(_row(node, 0.0, FREE))
            continue
        if is_view(node):
            rows.append(_row(node, 0.0, FREE))
            continue
        problem = problem_of(node)
        if problem is not None and problem not in predictions:
            predictions[problem] = predicted_us(problem, device)
        known = tuned.get(node.name or "")
        if known is None and problem is not None and (time := predictions[problem]) is not None:
            known = (time, PREDICTED)
        if known is not None:
            rows.append(_row(node, *known, problem=problem))
            continue
        flops = (flops_of(node) or 0) if len(node.inputs) > 1 else 0
        unit, moved = _unit(node), node_bytes(node)
        time = max(memory_us(moved, device), roofline_us(flops, moved, unit, device) + launch_us(device))
        rows.append({**_row(node, time, ROOFLINE), "flops": flops, "bytes": moved, "unit": unit if flops else ""})
    total = math.fsum(row["time_us"] for row in rows)
    nodes = tuple(NodeTime(**row, share=row["time_us"] / total if total else 0.0) for row in rows)
    proven = bool(nodes) and all(node.provenance in (MEASURED, FREE) for node in nodes) and total > 0
    return Estimate(device.key, total, MEASURED if proven else PREDICTED, nodes)


def not_fused(found: Estimate, fused: Collection[str]) -> list[OperatorTime]:
    """What the nodes that are not fused take, by operator, the longest first. `fused` are the names of those that are.
    Nodes that take no time are left out."""
    rows: dict[str, list[NodeTime]] = {}
    for row in found.nodes:
        if row.node not in fused and row.provenance != FREE:
            rows.setdefault(row.op, []).append(row)
    times = (
        OperatorTime(
            op,
            len(nodes),
            math.fsum(row.time_us for row in nodes),
            math.fsum(row.share for row in nodes),
            sum(row.bytes for row in nodes),
        )
        for op, nodes in rows.items()
    )
    return sorted(times, key=lambda row: (-row.time_us, row.operator))


def predicted_us(problem: Problem, device: Device) -> float | None:
    """The predicted time of a problem's default configuration, from estimated resources; None where the device can't
    run it."""
    kernel: Kernel[Any, Any] = find_kernel(problem.op)
    if kernel.supported(problem, device) is not None:
        return None
    config = kernel.default(problem, device)
    try:
        kernel.space.check(problem, config, device)
    except IllegalConfigError:
        return None
    return predict(kernel.work(problem, config), kernel.estimate(problem, config, device), device).time_us


def launch_us(device: Device) -> float:
    """What a kernel takes that does next to nothing: the gap to the one before it, the start of its blocks, and one
    answer of device memory. `predict` counts the same for the kernels of ours."""
    return LAUNCH_US + (BLOCK_START_CYCLES + DRAM_LATENCY_CYCLES) / device.boost_mhz


def memory_us(moved: float, device: Device) -> float:
    """The time of a kernel that only moves bytes, at the share of the bandwidth that a copy reaches."""
    return launch_us(device) + moved / (device.bandwidth_gbs * DRAM_EFFICIENCY * 1e3)


def node_bytes(node: ir.Node) -> int:
    """Bytes that a node reads and writes at the least: every input once, and every output. What has no
    known size counts nothing."""
    used = (value for value in node.outputs if value.name and (value.uses() or value.is_graph_output()))
    written = sum(known_bytes(value) for value in used)
    read = {value: known_bytes(value) for value in node.inputs if value is not None}
    first = node.inputs[0] if node.inputs else None
    if first is not None and node.domain == "" and node.op_type in _PARTIAL_READERS:
        read[first] = min(read[first], written)
    return written + sum(read.values())


def pairing(original: ir.Model, changed: ir.Model) -> dict[str, tuple[str, ...]]:
    """Of each node of a changed model, by name, the nodes of the original that it stands for, in their order.

    They are found by the values' names: what lies between the values that the changed model's nodes make, in the
    original. A node that makes nothing that the original has, such as a cast, stands for none; but a fused one for what
    moves behind it give, less those moves that the original has too, and any other for a node of its name and operator.
    """
    makers = {value.name: node for node in original.graph for value in node.outputs if value.name}
    named = {(node.name, node.op_type): node for node in original.graph if node.name}
    place = {node: index for index, node in enumerate(original.graph)}
    kept = {value.name for node in changed.graph for value in node.outputs}
    taken: set[ir.Node] = set()
    found: dict[str, tuple[str, ...]] = {}
    for node in changed.graph:
        if node.name in found:
            continue
        mine, moves = set[ir.Node](), set[tuple[str | None, str]]()
        waiting = [makers[value.name] for value in node.outputs if value.name in makers]
        if not waiting and is_fused(node):
            value, passed = known_behind(node.outputs[0], makers)
            waiting = [makers[value.name]] if value is not None and value.name else []
            moves = {(each.name, each.op_type) for each in passed}
        elif not waiting and (same := named.get((node.name or "", node.op_type))) is not None:
            waiting = [same]
        while waiting:
            maker = waiting.pop()
            if maker in taken:
                continue
            taken.add(maker)
            if (maker.name, maker.op_type) in moves:
                found[maker.name or ""] = (maker.name or "",)
            else:
                mine.add(maker)
            sources = (value.name for value in maker.inputs if value is not None)
            waiting += [makers[name] for name in sources if name in makers and name not in kept]
        found[node.name or ""] = tuple(each.name or "" for each in sorted(mine, key=place.__getitem__))
    return found


def roofs(device: Device, *estimates: Estimate) -> Roofs:
    """The device's limits, for the units that the nodes of these estimates run at."""
    units = sorted({node.unit for each in estimates for node in each.nodes if node.unit})
    return Roofs(device.bandwidth_gbs, {unit: device.tflops(unit) for unit in units})


def _row(node: ir.Node, time_us: float, provenance: str, *, problem: Problem | None = None) -> dict[str, Any]:
    return {
        "node": node.name or "",
        "op": node.op_type,
        "kernel": problem.op if problem is not None else "",
        "time_us": time_us,
        "provenance": provenance,
        "flops": problem.flops() if problem is not None else 0,
        "bytes": problem.bytes_moved() if problem is not None else 0,
        "unit": problem.unit if problem is not None else "",
    }


def _is_free(node: ir.Node, free: set[ir.Value]) -> bool:
    """Whether a node takes nothing of the model's inputs but their shapes: its result is known before a run."""
    if node.domain != "" or any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return False
    if node.op_type in ("Shape", "Size", "Constant"):
        return True
    if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
        return False
    return all(value is None or value in free or is_constant(value) for value in node.inputs)


def _unit(node: ir.Node) -> str:
    """The rate that a node's products run at, by the data type of its first input."""
    first = node.inputs[0] if node.inputs else None
    kind = dtype_name(first) if first is not None else "fp32"
    return {"fp16": "fp16", "bf16": "bf16", "int8": "int8", "uint8": "int8", "fp8e4m3": "fp8"}.get(kind, "fp32")


def _check(model: ir.Model, tuned: Mapping[str, tuple[float, str]]) -> None:
    fused = {node.name for node in model.graph if is_fused(node)}
    for name, (time_us, provenance) in tuned.items():
        if name not in fused:
            raise UsageError(f"there is a time for {name!r}, which is no fused node of the model")
        if not (math.isfinite(time_us) and time_us > 0):
            raise UsageError(f"the time of {name!r} is {time_us} µs and must be a number above 0")
        if provenance not in (MEASURED, TRANSFERRED, PREDICTED):
            raise UsageError(f"the time of {name!r} is {provenance!r}: it must be measured, transferred or predicted")
