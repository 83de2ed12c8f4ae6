"""The way of a model: read, fold, fuse, lower, tune, verify, estimate, write.

Everything that can be told wrong with the arguments, the model or the data is told before the output folder is made.
Files are written whole, the report last. A run that is killed goes on where it was when it is started again: tuned
configurations are in the device's database, scales and tried plans in the folder `.resume` of the output, under keys of
all that they depend on; the rest takes seconds, and is done again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import onnx_ir as ir

from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype
from tilewright.tuner.model.calibration.data import RANDOM, Samples, load_data
from tilewright.tuner.model.folding.fold import FoldingReport, fold
from tilewright.tuner.model.fuse import FusionReport, fuse
from tilewright.tuner.model.graph import copy_of, dtype_name, fused_nodes, static_shape
from tilewright.tuner.model.messages import listed, quoted, shown
from tilewright.tuner.model.output_folder import RESUME, OutputFolder, check_output, output_folder
from tilewright.tuner.model.precision.lower import Lowered, lower
from tilewright.tuner.model.reading.read import OPSET, read_model
from tilewright.tuner.model.reading.shapes import parse_shapes
from tilewright.tuner.model.reading.source import Source
from tilewright.tuner.model.report import document as parts
from tilewright.tuner.model.report.estimate import Estimate, estimate, pairing, roofs
from tilewright.tuner.model.report.html import write_page
from tilewright.tuner.model.report.memory import memory_of
from tilewright.tuner.model.report.readme import write_readme
from tilewright.tuner.model.verify.compare import Comparison, Reference
from tilewright.tuner.model.verify.error_budget import Budget
from tilewright.tuner.model.verify.error_sums import OutputError
from tilewright.tuner.model.workloads import ModelWorkloads, workloads
from tilewright.tuner.model.write import write_model
from tilewright.tuner.report import short_config
from tilewright.tuner.results import Progress, Result
from tilewright.tuner.tune import TuningOptions, planned, tune
from tilewright.tuning_db.errors import MissingDependencyError, ModelError, RunError, UnsupportedError, UsageError

SAMPLES = 32
"""Calibration inputs by default: ranges of activations change little with more (measured in docs/models.md)."""

EVALUATION = 8
"""Of the inputs, how many the errors are measured on; scales never see them."""

READING_ERROR = 1e-2
"""Relative difference of outputs between a file and what was read of it that is no rounding."""

ERRORS_TOLD = 3
"""Outputs whose errors are told one by one."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for."""

    model: Path
    output: Path | None
    device: Device
    shapes: Mapping[str, tuple[int, ...]]
    dims: Mapping[str, int]
    precision: str
    calibration: str
    samples: int
    budget: Budget | None
    tuning: TuningOptions

    @classmethod
    def parse(
        cls,
        model: Path,
        output: Path | None,
        device: Device,
        *,
        shapes: Sequence[str] = (),
        precision: str | None = None,
        calibration: str | None = None,
        samples: int | None = None,
        max_error: str | None = None,
        tuning: TuningOptions | None = None,
    ) -> Self:
        """From the texts of the command line; `tuning` as `autotune` has it by default.

        Raises:
            UsageError: a text that can't be read, or options that don't go together.
        """
        bound, dims = parse_shapes(shapes)
        budget = None if max_error is None else Budget.parse(max_error)
        if precision == "auto" and budget is None:
            raise UsageError("--precision auto needs --max-error, the bound inside which it looks for the fastest")
        chosen = precision or "fp16"
        kind = {"fp8": "fp8e4m3", "auto": "fp16"}.get(chosen, chosen)
        if device.arch < dtype(kind).min_arch:
            raise UnsupportedError(
                f"--precision {chosen} needs sm_{dtype(kind).min_arch} or newer: {device.board} is {device.sm}"
            )
        if output is not None and output.exists() and not output.is_dir():
            raise UsageError(f"--output {output} is a file: name a folder")
        return cls(
            model,
            output,
            device,
            bound,
            dims,
            chosen,
            calibration or RANDOM,
            samples or SAMPLES,
            budget,
            tuning or TuningOptions(),
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that was read, folded and fused; nothing is written yet."""

    original: ir.Model  # as it was read, with static shapes
    fused: ir.Model
    source: Source
    folding: FoldingReport
    fusion: FusionReport
    workloads: ModelWorkloads

    @property
    def reasons(self) -> dict[str, str]:
        """Why nodes were not fused."""
        return {miss.node: miss.reason for miss in self.fusion.misses}


@dataclass(frozen=True, slots=True)
class Planned:
    """What a dry run says."""

    request: Request
    workloads: ModelWorkloads
    fusion: FusionReport
    data: Samples

    def lines(self) -> list[str]:
        """For people."""
        request, found = self.request, self.workloads
        budget = "" if request.budget is None else f", inside {request.budget}"
        nodes = (self.fusion.nodes_before, self.fusion.nodes_after)
        return [
            f"{nodes[0]} nodes become {nodes[1]}, of which {len(found.layers)} are fused, "
            f"with {found.coverage:.1%} of the model's operations",
            *(f"not fused: {shown(left.operator)} {quoted(left.node)}: {left.reason}" for left in found.unsupported),
            f"precision: {request.precision}{budget}, on {len(self.data)} inputs ({self.data.origin})",
            f"to tune for {request.device.board}: {len(found.distinct())} distinct workloads",
            f"to write: {', '.join(files(request))}" + (f" in {request.output}" if request.output else ""),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "device": self.request.device.key,
            "precision": self.request.precision,
            "calibration": {"origin": self.data.origin, "samples": len(self.data)},
            "fusion": self.fusion.to_dict(),
            **self.workloads.to_dict(),
            "files": files(self.request),
        }


@dataclass(frozen=True, slots=True)
class Made:
    """What a run made."""

    report: parts.ModelReport
    met: bool  # whether the errors are inside the budget, if there is one, and nothing new is NaN or infinite
    lines: tuple[str, ...]  # the end of what people are told

    @property
    def document(self) -> str:
        """`report.json`."""
        return parts.to_json(self.report)

    @property
    def rows(self) -> list[parts.LayerTimes]:
        """Times before and after, layer by layer."""
        return parts.layer_times(self.report.estimate)


def files(request: Request) -> list[str]:
    """The files of the output folder."""
    lowered = [] if request.precision == "fp32" else [f"model.{request.precision}.onnx"]
    return ["model.fused.onnx", *lowered, "report.json", "report.html", "README.md"]


def _engine_files(request: Request) -> list[str]:
    """Those of an engine, if one may be built."""
    name = "fused" if request.precision == "fp32" else request.precision
    return [f"model.{name}.engine", f"model.{name}.engine.json"] if request.device.live else []


def _nothing(_: Any) -> None:
    """For those who don't listen."""


def prepare(request: Request, tell: Callable[[str], None]) -> Prepared:
    """Reads, folds and fuses.

    Raises:
        ModelError, UsageError: the model can't be used, or its shapes aren't all given.
    """
    model = read_model(request.model, request.shapes, request.dims)
    source = Source.of(request.model, model)
    original = copy_of(model)
    tell(f"read {request.model}: {len(model.graph)} nodes")
    folding = fold(model)
    fusion = fuse(model)
    found = workloads(model, {miss.node: miss.reason for miss in fusion.misses})
    tell(
        f"fused: {len(original.graph)} nodes became {fusion.nodes_after}, {len(found.layers)} of them fused, with "
        f"{found.coverage:.1%} of the operations"
    )
    return Prepared(original, model, source, folding, fusion, found)


def plan(request: Request, tell: Callable[[str], None] = _nothing) -> Planned:
    """What `optimise` would do; nothing is written.

    Raises:
        ModelError, UsageError: as `optimise`.
    """
    prepared = prepare(request, tell)
    data = load_data(request.calibration, prepared.original, count=request.samples)
    data.split(EVALUATION)
    return Planned(request, prepared.workloads, prepared.fusion, data)


def optimise(
    request: Request,
    tell: Callable[[str], None] = _nothing,
    warn: Callable[[str], None] = _nothing,
    progress: Callable[[Progress], None] = _nothing,
) -> Made:
    """Goes the whole way.

    Args:
        request: what is asked for.
        tell: is given a line of progress at a time, `warn` what must not be missed, `progress` the tuner's events.

    Raises:
        ModelError, UsageError: the model, the data or the arguments can't be used; nothing was written.
        RunError: ONNX Runtime can't run the model, then nothing was written; or something failed on the way, and what
            was finished is kept.
    """
    assert request.output is not None
    prepared = prepare(request, tell)
    data = load_data(request.calibration, prepared.original, count=request.samples)
    if data.warning is not None:
        warn(data.warning)
    halves = data.split(EVALUATION)
    names = [*files(request), *_engine_files(request)]
    check_output(request.output, names, request.model)
    with Reference(prepared.original, halves[1].feeds) as reference:
        reference.work_out()
        _check_reading(request, prepared, halves[1], tell)
        key = _key(request, prepared.source, data)
        with output_folder(request.output, names, request.model) as folder:
            return _optimised(request, prepared, key, halves, reference, folder, tell, warn, progress)


def _check_reading(request: Request, prepared: Prepared, data: Samples, tell: Callable[[str], None]) -> None:
    """Does nothing where the file computes what was read of it: functions were inlined, opsets converted, and all that
    follows is held against the result.

    Raises:
        ModelError: they differ.
    """
    with Reference(request.model, data.feeds[:1]) as reference:
        try:
            reference.work_out()
        except (ModelError, RunError) as error:  # what was read of it did run
            tell(f"{request.model} as it is was not run: {error}")
            return
        found = reference.compare(prepared.original)
    for output in found.outputs:
        if output.bad_original != output.bad_changed:
            how = f"has {output.bad_changed} NaN and infinities, not {output.bad_original}"
        elif (output.relative or 0.0) > READING_ERROR:
            how = f"differs by {output.relative:.1e} of its largest value"
        else:
            continue
        raise ModelError(
            f"{request.model} computes something else once it is read, which inlines functions and converts it to "
            f"opset {OPSET}: output {quoted(output.output)} {how}. Export it with opset {OPSET}, without functions"
        )


def _optimised(
    request: Request,
    prepared: Prepared,
    key: str,
    halves: tuple[Samples, Samples],
    reference: Reference,
    output: OutputFolder,
    tell: Callable[[str], None],
    warn: Callable[[str], None],
    progress: Callable[[Progress], None],
) -> Made:
    """The rest of the way, from what was read, in a folder of this run's own."""
    calibration, evaluation = halves
    folder = output.path
    written = list(write_model(prepared.fused, folder / "model.fused.onnx"))
    fused_file = written[0]
    fused_errors = reference.compare(prepared.fused, layers=_same_names(prepared))
    lowered = lower(
        prepared.fused,
        request.device,
        kind=request.precision,
        calibration=calibration,
        reference=reference,
        budget=request.budget,
        key=key,
        resume=output.resume,
        tell=tell,
    )
    results = _tune(request, lowered.model, progress)
    errors = [parts.ErrorPart(fused_file.name, evaluation.origin, None, (), fused_errors)]
    final = fused_file
    if request.precision != "fp32":
        final, *others = write_model(lowered.model, folder / f"model.{request.precision}.onnx")
        written += [final, *others]
        comparison = reference.compare(lowered.model, layers=_same_names(prepared))
        errors.append(_error_part(request, final.name, evaluation, comparison))
    elif request.budget is not None:
        errors[0] = _error_part(request, fused_file.name, evaluation, fused_errors)
    before = estimate(prepared.original, request.device)
    after = estimate(lowered.model, request.device, _times(lowered.model, results))
    engine = _engine(request, final, tell)
    made = _report(request, prepared, lowered, results, errors, (before, after), folder, (*written, *engine))
    parts.write_report(made, folder / "report.json")
    write_page(made, folder / "report.html")
    write_readme(made, folder / "README.md")
    output.keep([*written, *engine, *(folder / name for name in files(request))], request.model)
    breaches, spoiled = errors[-1].breaches, _spoiled(errors[-1].comparison)
    if spoiled:
        ranges = {"fp32": "", "bf16": ": --precision fp32 has the digits"}
        kind = ranges.get(request.precision, ": --precision bf16 or fp32 has the range")
        warn(f"{listed(spoiled)} of {final.name} has NaN or infinities that the original has not{kind}")
    return Made(made, not (breaches or spoiled), tuple(_closing(made, before, after, breaches, folder)))


def _key(request: Request, source: Source, data: Samples) -> str:
    """A hash of what scales and errors depend on, besides the plan."""
    digest = hashlib.sha256(source.digest.encode())
    settings = [data.digest, request.precision, request.device.key, str(request.budget), _code()]
    digest.update(json.dumps([settings, dict(request.shapes), dict(request.dims)], sort_keys=True).encode())
    return digest.hexdigest()


@cache
def _code() -> list[str]:
    """What computes scales and errors: a hash of this package's files, and the versions of the libraries."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), *(version(name) for name in ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy"))]


def _same_names(prepared: Prepared) -> dict[str, str]:
    """Results of fused nodes that the original has as well: fusing keeps the names of values."""
    known = {value.name for node in prepared.original.graph for value in node.outputs}
    names = [node.outputs[0].name for node in fused_nodes(prepared.fused)]
    return {name: name for name in names if name is not None and name in known}


def _tune(request: Request, model: ir.Model, progress: Callable[[Progress], None]) -> dict[Any, Result]:
    """The best configuration of every distinct problem, by the problem."""
    # Their names are shown while it goes.
    wanted = [replace(each, name=shown(each.name)) for each in workloads(model).distinct()]
    if not wanted:
        return {}
    results = tune(planned(request.device, request.tuning, problems=wanted), progress)
    return {workload.problem: result for workload, result in zip(wanted, results, strict=True)}


def _times(model: ir.Model, results: Mapping[Any, Result]) -> dict[str, tuple[float, str]]:
    """The time of every fused node that tuning has one of."""
    times = {}
    for layer in workloads(model).layers:
        result = results.get(layer.problem)
        if result is not None and result.time_us is not None and result.provenance is not None:
            times[layer.node] = (result.time_us, str(result.provenance))
    return times


def _engine(request: Request, model: Path, tell: Callable[[str], None]) -> list[Path]:
    """A TensorRT engine, where TensorRT's builder and the GPU are."""
    if not request.device.live:
        return []
    from tilewright.kernels.tensorrt import build_engine

    path = model.with_suffix(".engine")
    try:
        made = build_engine(
            model,
            path,
            device=request.device.live,
            timing_cache=path.parent / RESUME / "timing.cache",
            db=request.tuning.db,
        )
    except (MissingDependencyError, RunError, UsageError) as error:
        # The model is there and checked: an engine that can't be built takes nothing from it.
        tell(f"no engine was built: {error}")
        return []
    return [made.path, made.provenance_path]


def _error_part(request: Request, name: str, data: Samples, comparison: Comparison) -> parts.ErrorPart:
    budget = request.budget
    breaches = () if budget is None else comparison.breaches(budget)
    return parts.ErrorPart(name, data.origin, None if budget is None else str(budget), breaches, comparison)


def _report(
    request: Request,
    prepared: Prepared,
    lowered: Lowered,
    results: Mapping[Any, Result],
    errors: Sequence[parts.ErrorPart],
    times: tuple[Estimate, Estimate],
    folder: Path,
    made: Sequence[Path],
) -> parts.ModelReport:
    before, after = times
    original, found = prepared.original, workloads(lowered.model, prepared.reasons)
    return parts.ModelReport(
        tilewright=version("tilewright"),
        model=_model_part(request, prepared),
        device=parts.DevicePart.of(request.device),
        fusion=_fusion_part(prepared, original),
        workloads=parts.WorkloadPart(
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
            tuple(
                parts.UnsupportedRow(each.node, each.operator, each.reason, each.flops) for each in found.unsupported
            ),
            found.flops,
            found.coverage,
        ),
        tuning=tuple(_tuning_row(problem, result) for problem, result in results.items()),
        precision=lowered.part,
        errors=tuple(errors),
        memory=parts.MemoryPart(memory_of(original), memory_of(lowered.model)),
        estimate=parts.EstimatePart(
            before, after, roofs(request.device, before, after), pairing(original, lowered.model)
        ),
        artefacts=tuple(_artefact(path, folder) for path in dict.fromkeys(made)),
    )


def _model_part(request: Request, prepared: Prepared) -> parts.ModelPart:
    original = prepared.original
    return parts.ModelPart(
        name=request.model.name,
        sha256=prepared.source.sha256,
        bytes=prepared.source.bytes,
        opset=original.opset_imports[""],
        nodes=len(original.graph),
        inputs=tuple(_tensor(value) for value in original.graph.inputs),
        outputs=tuple(_tensor(value) for value in original.graph.outputs),
        folded=dict(prepared.folding.folded),
    )


def _tensor(value: ir.Value) -> parts.TensorPart:
    return parts.TensorPart(value.name or "", dtype_name(value), static_shape(value) or ())


def _fusion_part(prepared: Prepared, original: ir.Model) -> parts.FusionPart:
    fusion = prepared.fusion
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


def _closing(
    made: parts.ModelReport, before: Estimate, after: Estimate, breaches: Sequence[str], folder: Path
) -> list[str]:
    factor = before.time_us / after.time_us if after.time_us else 1.0
    lines = [
        f"the whole model: {before.time_us:.0f} µs ({before.provenance}) before, {after.time_us:.0f} µs "
        f"({after.provenance}) after, {factor:.1f} times as fast"
    ]
    lines += _error_lines(made.errors[-1].comparison.outputs)
    lines += [f"outside the error budget: {breach}" for breach in breaches]
    lines.append(f"written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")
    return lines


def _spoiled(comparison: Comparison) -> list[str]:
    """The outputs with more NaN or infinities than the original's."""
    return list(dict.fromkeys(row.output for row in comparison.outputs if row.bad_changed > row.bad_original))


def _error_lines(rows: Sequence[OutputError]) -> list[str]:
    """The errors of the outputs, the worst first; the others' as one."""

    def error(row: OutputError) -> float:
        return math.inf if row.relative is None else row.relative

    ordered = sorted(rows, key=lambda row: (max(0, row.bad_changed - row.bad_original), error(row)), reverse=True)
    lines = []
    for row in ordered[:ERRORS_TOLD]:
        bad = row.bad_changed - row.bad_original
        said = f"{row.relative:.1e} of its largest value" if row.relative is not None else "zeros before, no more"
        lines.append(
            f"error of {shown(row.value)}: {said}"
            + (f", and {bad} NaN or infinite more than before" if bad > 0 else "")
        )
    others = ordered[ERRORS_TOLD:]
    if others:
        lines.append(f"error of other outputs ({len(others)}): at most {max(map(error, others)):.1e}")
    return lines
