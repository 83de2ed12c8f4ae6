"""Puts the report of a run together, and what people are told at its end."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tilewright.tuner.config_text import short_config
from tilewright.tuner.model.graph import dtype_name, static_shape
from tilewright.tuner.model.messages import legible
from tilewright.tuner.model.precision.lower import Lowered
from tilewright.tuner.model.prepare import Prepared
from tilewright.tuner.model.report import document as parts
from tilewright.tuner.model.report.estimate import Estimate, pairing, roofs
from tilewright.tuner.model.report.memory import memory_of
from tilewright.tuner.model.report.units import BASELINE
from tilewright.tuner.model.request import REPORTS, Request
from tilewright.tuner.model.verify.error_sums import OutputError
from tilewright.tuner.model.workloads import ModelWorkloads, workloads
from tilewright.tuner.results import Result
from tilewright.tuning_db.version import installed_version

ERRORS_TOLD = 3
"""Outputs whose errors are told one by one."""


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """What came of a model on its way."""

    request: Request
    prepared: Prepared
    lowered: Lowered
    results: Mapping[Any, Result]  # of tuning, by the problem
    errors: Sequence[parts.ErrorPart]
    before: Estimate
    after: Estimate
    written: Sequence[Path]  # files of the output folder, the report's own left out
    warnings: Sequence[str]


def assemble(findings: Findings, folder: Path) -> parts.ModelReport:
    """The report of a run whose output folder this is."""
    request, prepared, lowered = findings.request, findings.prepared, findings.lowered
    before, after, original = findings.before, findings.after, prepared.original
    return parts.ModelReport(
        tilewright=installed_version(),
        model=_model_part(request, prepared),
        device=parts.DevicePart.of(request.device),
        fusion=_fusion_part(prepared),
        workloads=_workload_part(workloads(lowered.model, prepared.reasons)),
        tuning=tuple(_tuning_row(problem, result) for problem, result in findings.results.items()),
        precision=lowered.part,
        errors=tuple(findings.errors),
        memory=parts.MemoryPart(memory_of(original), memory_of(lowered.model)),
        estimate=parts.EstimatePart(
            before, after, roofs(request.device, before, after), pairing(original, lowered.model)
        ),
        artefacts=tuple(_artefact(path, folder) for path in dict.fromkeys(findings.written)),
        warnings=tuple(findings.warnings),
    )


def _workload_part(found: ModelWorkloads) -> parts.WorkloadPart:
    return parts.WorkloadPart(
        tuple(
            parts.WorkloadRow(
                each.name,
                each.op,
                str(each.problem),
                each.count,
                row["flops"],
                row["flops_share"],
                row["bytes"],
                row["bytes_share"],
            )
            for each, row in zip(found.distinct(), found.rows(), strict=True)
        ),
        tuple(parts.UnsupportedRow(each.node, each.operator, each.reason, each.flops) for each in found.unsupported),
        found.flops,
        found.coverage,
    )


def _model_part(request: Request, prepared: Prepared) -> parts.ModelPart:
    original = prepared.original
    return parts.ModelPart(
        name=request.model.name,
        sha256=prepared.source.sha256,
        bytes=prepared.source.bytes,
        opset=prepared.opset,
        read_opset=original.opset_imports[""],
        nodes=len(original.graph),
        inputs=tuple(_tensor(value) for value in original.graph.inputs),
        outputs=tuple(_tensor(value) for value in original.graph.outputs),
        folded=dict(prepared.folding.folded),
    )


def _tensor(value: ir.Value) -> parts.TensorPart:
    return parts.TensorPart(value.name or "", dtype_name(value), static_shape(value) or ())


def _fusion_part(prepared: Prepared) -> parts.FusionPart:
    original, fusion = prepared.original, prepared.fusion
    replaced = pairing(original, prepared.fused)
    return parts.FusionPart(
        len(original.graph),
        fusion.nodes_after,
        fusion.counts(),
        tuple(
            parts.FusedLayer(node, plugin, replaced.get(node, ()), fusion.ends.get(node, ""))
            for node, plugin in fusion.layers.items()
        ),
        tuple(parts.LeftNode(miss.node, miss.pattern, miss.reason) for miss in fusion.misses),
    )


def _tuning_row(problem: Any, result: Result) -> parts.TuningRow:
    return parts.TuningRow(
        op=result.op,
        problem=str(problem),
        config=None if result.config is None else short_config(result.config),
        time_us=result.time_us,
        provenance=None if result.provenance is None else str(result.provenance),
        tflops=result.tflops,
        roofline_fraction=result.roofline_fraction,
        status=str(result.status),
        message=result.message,
        trials=result.trials,
    )


_WORDS = {
    ".onnx": ("onnx", "the model with fused nodes: TensorRT plugins that ONNX Runtime runs by their bodies"),
    ".engine": ("engine", "a TensorRT engine for the GPU at hand"),
    ".json": ("json", "what the engine was made of"),
    ".data": ("weights", "weights of the model beside it"),
}


def _artefact(path: Path, folder: Path) -> parts.Artefact:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    kind, what = _WORDS[path.suffix]
    return parts.Artefact(str(path.relative_to(folder)), kind, path.stat().st_size, digest, what)


def closing_lines(report: parts.ModelReport, folder: Path) -> list[str]:
    """The end of what people are told."""
    before, after = report.estimate.before, report.estimate.after
    factor = before.time_us / after.time_us if after.time_us else 1.0
    lines = [
        f"the whole model: {before.time_us:.0f} µs ({before.provenance}) before, {after.time_us:.0f} µs "
        f"({after.provenance}) after, {factor:.1f} times as fast; before is {BASELINE}"
    ]
    last = report.errors[-1]
    lines += _error_lines(last.comparison.outputs)
    lines += [f"outside the error budget: {breach}" for breach in last.breaches]
    written = sorted({*(each.file for each in report.artefacts), *REPORTS})
    lines.append(f"written to {folder}: {', '.join(written)}")
    return lines


def _error_lines(rows: Sequence[OutputError]) -> list[str]:
    """The errors of the outputs, the worst first; the others' as one."""

    def error(row: OutputError) -> float:
        return row.error if row.discrete or row.relative is not None else math.inf

    ordered = sorted(rows, key=lambda row: (row.bad_changed, error(row)), reverse=True)
    lines = []
    for row in ordered[:ERRORS_TOLD]:
        without = "zeros before, no more"
        if row.untold:
            without = f"nothing but {'NaN and infinities' if row.bad_original else 'rows that see no key'} to compare"
        said = f"{row.relative:.1e} of its largest value" if row.relative is not None else without
        if row.discrete:
            said = f"{row.error:.1%} of its elements differ"
        lines.append(
            f"error of {legible(row.value)}: {said}"
            + (f", and {row.bad_changed} NaN or infinite otherwise than before" if row.bad_changed else "")
        )
    others = ordered[ERRORS_TOLD:]
    if others:
        lines.append(f"error of other outputs ({len(others)}): at most {max(map(error, others)):.1e}")
    return lines
