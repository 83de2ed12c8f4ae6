"""The way of a model: read, fold, fuse, lower, tune, verify, estimate, write.

Everything that can be told wrong with the arguments, the model or the data is told before the output folder is made.
Files are written apart and put in their places at the end, the report last. A run that is killed goes on where it was
when it is started again: tuned configurations are in the device's database, scales and tried plans in the folder
`.resume` of the output, under keys of all that they depend on; the rest takes seconds, and is done again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tilewright.tuner.model.assemble import Findings, assemble, closing_lines
from tilewright.tuner.model.calibration.data import Samples, load_data
from tilewright.tuner.model.fuse import FusionReport
from tilewright.tuner.model.messages import legible, listed, quoted
from tilewright.tuner.model.output_folder import OutputFolder, check_output, output_folder
from tilewright.tuner.model.precision.given import Given, given_layers
from tilewright.tuner.model.precision.lower import lower
from tilewright.tuner.model.prepare import READING_ERROR, Prepared, check_fusing, check_reading, prepare
from tilewright.tuner.model.report import document as parts
from tilewright.tuner.model.report.estimate import Estimate, OperatorTime, estimate, not_fused
from tilewright.tuner.model.report.html import write_page
from tilewright.tuner.model.report.readme import write_readme
from tilewright.tuner.model.request import Request
from tilewright.tuner.model.resume import resume_key
from tilewright.tuner.model.session import check_default
from tilewright.tuner.model.verify.compare import Comparison
from tilewright.tuner.model.verify.judge import Judge
from tilewright.tuner.model.workloads import ModelWorkloads, workloads
from tilewright.tuner.model.write import write_model
from tilewright.tuner.results import Progress, Result
from tilewright.tuner.tune import planned, tune
from tilewright.tuning_db.errors import MissingDependencyError, ModelError, RunError, UsageError

EVALUATION = 8
"""Of the inputs, how many the errors are measured on at the least; scales never see them."""

MOST_EVALUATION = 128
"""And at the most, of many a quarter, unless a bound on top-1 agreement takes more to tell: every plan tried runs on
each."""

LONGEST = 5
"""Operators that a dry run names of those that are not fused."""

LARGE_ERROR = 0.1
"""Relative error of an output from which on it is warned of, where no budget bounds it."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What a dry run says."""

    request: Request
    workloads: ModelWorkloads
    fusion: FusionReport
    data: Samples
    defaults: list[str]  # inputs of the file that become constants
    given: Given  # the layers that are in 8 bits already
    time: Estimate  # of the fused model, before it is lowered

    @property
    def rest(self) -> list[OperatorTime]:
        """What is not fused, by operator, and takes time."""
        return not_fused(self.time, {layer.node for layer in self.workloads.layers})

    def lines(self) -> list[str]:
        """For people."""
        request, found = self.request, self.workloads
        budget = "" if request.budget is None else f", inside {request.budget}"
        nodes = (self.fusion.nodes_before, self.fusion.nodes_after)
        return [
            f"{nodes[0]} nodes become {nodes[1]}, of which {len(found.layers)} are fused, "
            f"with {found.coverage:.1%} of the model's operations",
            _rest_line(self.rest) + (" (before layers are lowered)" if self.before_lowering and self.rest else ""),
            *([_default_line(request, self.defaults)] if self.defaults else []),
            *(f"not fused: {legible(left.operator)} {quoted(left.node)}: {left.reason}" for left in found.unsupported),
            f"precision: {request.precision}{budget}, on {len(self.data)} inputs ({self.data.origin})",
            *([self.given.told(len(found.layers))] if self.given.found else []),
            f"to tune for {request.device.board}: {len(found.distinct())} distinct workloads"
            + (f", listed before they are lowered to {request.precision}" if self.before_lowering else ""),
            f"to write: {', '.join(request.files)}" + (f" in {request.output}" if request.output else ""),
        ]

    @property
    def before_lowering(self) -> bool:
        """Whether the workloads have other data types than those that will be tuned: which layers keep theirs, only
        calibration says."""
        return self.request.precision != "fp32"

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "device": self.request.device.key,
            "precision": self.request.precision,
            "calibration": {"origin": self.data.origin, "samples": len(self.data)},
            "fusion": self.fusion.to_dict(),
            "defaults": self.defaults,
            "before_lowering": self.before_lowering,
            "given": {
                "layers": {name: layer.kind for name, layer in self.given.plan.items()},
                "reasons": dict(self.given.reasons),
            },
            **self.workloads.to_dict(),
            "rest": [asdict(row) for row in self.rest],
            "files": self.request.files,
        }


@dataclass(frozen=True, slots=True)
class Made:
    """What a run made."""

    report: parts.ModelReport
    met: bool  # whether the errors are inside the budget, if there is one, and NaN and infinities the original's
    lines: tuple[str, ...]  # the end of what people are told

    @property
    def document(self) -> str:
        """`report.json`."""
        return parts.to_json(self.report)

    @property
    def rows(self) -> list[parts.LayerTimes]:
        """Times before and after, layer by layer."""
        return parts.layer_times(self.report.estimate)


@dataclass(frozen=True, slots=True)
class _Listener:
    """Who hears of a run, as `optimise` takes it."""

    tell: Callable[[str], None]
    warn: Callable[[str], None]
    progress: Callable[[Progress], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Way:
    """What the way goes on with once all that can be told wrong was looked at."""

    request: Request
    prepared: Prepared
    calibration: Samples
    evaluation: Samples
    reference: Judge  # on the inputs for evaluation
    fused_errors: Comparison
    warnings: tuple[str, ...]  # until here
    key: str  # of what a run goes on from


def _nothing(_: Any) -> None:
    """For those who don't listen."""


def _rest_line(rest: Sequence[OperatorTime]) -> str:
    """What the nodes beside the fused ones take."""
    if not rest:
        return "what is not fused takes no time of its own"
    shown = [f"{legible(row.operator)} {row.share:.1%} ({row.count})" for row in rest[:LONGEST]]
    more = f", {len(rest) - LONGEST} other operators" if len(rest) > LONGEST else ""
    share = sum(row.share for row in rest)
    return f"what is not fused takes {share:.1%} of the predicted time: {', '.join(shown)}{more}"


def plan(request: Request, tell: Callable[[str], None] = _nothing) -> Planned:
    """What `optimise` would do; nothing is written.

    Raises:
        ModelError, UsageError: as `optimise`.
    """
    prepared = prepare(request, tell)
    data = load_data(request.calibration, prepared.original, count=request.samples)
    data.split(_evaluation(request, data))
    given = Given() if request.precision == "fp32" else given_layers(prepared.fused, request.device)
    time = estimate(prepared.fused, request.device)
    return Planned(request, prepared.workloads, prepared.fusion, data, prepared.defaults, given, time)


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
        RunError: ONNX Runtime can't run the model, or fusing changed what it computes, then nothing was written; or
            something failed on the way, and what was measured is kept.
    """
    assert request.output is not None
    prepared = prepare(request, tell)
    data = load_data(request.calibration, prepared.original, count=request.samples)
    warnings: list[str] = []  # for the reports

    def warned(line: str) -> None:
        warnings.append(line)
        warn(line)

    if data.warning is not None:
        warned(data.warning)
    if prepared.defaults:
        warned(_default_line(request, prepared.defaults))
    calibration, evaluation = data.split(_evaluation(request, data))
    names = [*request.files, *request.engine_files]
    check_output(request.output, names, request.model)
    with Judge(prepared.original, evaluation.feeds, fused=prepared.fused) as reference:
        reference.work_out()
        check_reading(request, prepared, evaluation, tell)
        fused_errors = check_fusing(request, prepared, reference)
        masked = sum(rows.count for rows in reference.masked())
        if masked:
            warned(
                f"{masked} rows of the inputs that errors are measured on see no key, as padding in front of a "
                "sequence: they are left out of the errors"
            )
        apart = [row.output for row in fused_errors.outputs if row.error > READING_ERROR and not row.logits]
        if apart:
            cause = ", or an output makes something of those rows" if masked else ""
            warned(
                f"{listed(apart)}: differs by more than {READING_ERROR:.0%} when {request.model.name} is computed in "
                f"another order: the model amplifies rounding, and lower precision more so{cause}"
            )
        if (few := _few_rows(request, fused_errors)) is not None:
            warned(few)
        _check_loads(request, prepared.fused, request.files[0], evaluation, warned)
        key = resume_key(request, prepared.source, data)
        way = _Way(request, prepared, calibration, evaluation, reference, fused_errors, tuple(warnings), key)
        with output_folder(request.output, names, request.model) as folder:
            return _optimised(way, folder, _Listener(tell, warn, progress))


def _optimised(way: _Way, output: OutputFolder, listener: _Listener) -> Made:
    """The rest of the way, from what was read, in a folder of this run's own."""
    request, prepared, reference = way.request, way.prepared, way.reference
    lowered = lower(
        prepared.fused,
        request.device,
        kind=request.precision,
        calibration=way.calibration,
        reference=reference,
        budget=request.budget,
        key=way.key,
        resume=output.resume,
        tell=listener.tell,
    )
    folder, origin = output.path, way.evaluation.origin
    fused, final = (folder / f"model.{name}.onnx" for name in ("fused", request.precision))
    more_warnings: list[str] = []
    if request.precision != "fp32":
        _check_loads(request, lowered.model, final.name, way.evaluation, more_warnings.append)
    results = _tune(request, lowered.model, listener.progress)
    errors = [parts.ErrorPart(fused.name, origin, None, (), way.fused_errors)]
    if request.precision != "fp32":
        comparison = reference.compare(lowered.model, layers=prepared.shared_numbers(lowered.model))
        errors.append(_error_part(request, final.name, origin, comparison))
    else:
        final = fused
        errors[0] = _error_part(request, fused.name, origin, way.fused_errors)
    comparison = errors[-1].comparison
    spoiled = _spoiled(comparison)
    warnings = [*more_warnings, *_error_warnings(request, final.name, comparison)]
    before = estimate(prepared.original, request.device)
    after = estimate(lowered.model, request.device, _times(lowered.model, results))
    said = (*way.warnings, *warnings)
    there = f"; what was in {folder} before is there still"
    try:
        with output.staged() as new:
            written = list(write_model(prepared.fused, new / fused.name))
            if final != fused:
                written += write_model(lowered.model, new / final.name)
            written += _engine(request, new / final.name, output.resume, listener.tell)
            report = assemble(Findings(request, prepared, lowered, results, errors, before, after, written, said), new)
            write_readme(report, new / "README.md")
            write_page(report, new / "report.html")
            parts.write_report(report, new / "report.json")
            there = ""
            output.place(written, [new / name for name in ("README.md", "report.html", "report.json")])
            output.keep([*written, *(folder / name for name in request.files)], request.model)
    except (OSError, UsageError) as error:
        reason = error if isinstance(error, UsageError) else f"{folder} can't be written ({error.strerror})"
        raise RunError(f"{reason}{there}") from None
    for line in warnings:
        listener.warn(line)
    return Made(report, not (errors[-1].breaches or spoiled), tuple(closing_lines(report, folder)))


def _check_loads(request: Request, model: ir.Model, name: str, data: Samples, warn: Callable[[str], None]) -> None:
    """Does nothing for a model that ONNX Runtime loads and runs as its users have it: what is compared is run without
    optimisations, which refuse some models, and valid ones.

    Raises:
        RunError: it doesn't, and does so with the file that was read; where neither works, that is warned of.
    """
    feed = next(iter(data.feeds))
    try:
        check_default(model, name, feed)
        return
    except (ModelError, RunError) as error:
        reason = str(error)
    try:
        check_default(request.model, request.model.name, feed)
    except (ModelError, RunError):
        warn(f"with its optimisations on ONNX Runtime doesn't run {request.model.name}, and so not {reason}")
        return
    advice = "" if name == request.files[0] else "; --precision fp32 leaves types as they are"
    raise RunError(
        f"{reason} (with its optimisations on, with which it runs {request.model.name}; no model was written{advice})"
    )


def _error_part(request: Request, name: str, origin: str, comparison: Comparison) -> parts.ErrorPart:
    budget = request.budget
    breaches = () if budget is None else comparison.breaches(budget)
    return parts.ErrorPart(name, origin, None if budget is None else str(budget), breaches, comparison)


def _default_line(request: Request, names: list[str]) -> str:
    """What is said of inputs that have a value in the file."""
    return (
        f"{listed(names)}: input with a value in {request.model.name}, which becomes a constant: the models written "
        "don't take it"
    )


def _error_warnings(request: Request, name: str, comparison: Comparison) -> list[str]:
    """What must not be missed of a model's errors: NaN and infinities, and what is large where no budget bounds it."""
    spoiled = _spoiled(comparison)
    if spoiled:
        ranges = {"fp32": "", "bf16": ": --precision fp32 has the digits"}
        kind = ranges.get(request.precision, ": --precision bf16 or fp32 has the range")
        return [f"{listed(spoiled)} of {name} has other NaN or infinities than the original{kind}"]
    advice = "--max-error bounds that" if request.budget is None else f"{request.budget} bounds nothing of that"
    far = [row for row in comparison.unbounded(request.budget) if not row.logits and row.error > LARGE_ERROR]
    sized, discrete = ([row.output for row in far if row.discrete is kind] for kind in (False, True))
    found = []
    if sized:
        found.append(f"{listed(sized)} of {name} is off by more than {LARGE_ERROR:.0%} of its largest value: {advice}")
    if discrete:
        found.append(f"{listed(discrete)} of {name} differs in more than {LARGE_ERROR:.0%} of its integers: {advice}")
    return found


def _evaluation(request: Request, data: Samples) -> int:
    """How many of the inputs errors are measured on, where there are twice as many."""
    return min(max(len(data) // 4, EVALUATION), max(MOST_EVALUATION, _needed(request) or 0))


def _needed(request: Request) -> int | None:
    """Rows of which one may differ inside a bound on top-1 agreement; None without one, or of 1, which none may."""
    limit = None if request.budget is None else request.budget.top1
    return None if limit is None or limit == 1.0 else math.ceil(round(1.0 / (1.0 - limit), 6))


def _few_rows(request: Request, comparison: Comparison) -> str | None:
    """What is said where a bound on top-1 agreement lets no row differ, since there are so few."""
    needed = _needed(request)
    if needed is None or not comparison.classes:
        return None
    assert request.budget is not None
    fewest = min(comparison.classes, key=lambda row: row.rows)
    if fewest.rows >= needed:
        return None
    what = "elements" if fewest.discrete else "rows"
    return (
        f"top1={request.budget.top1:g} is judged on {fewest.rows} {what} of {quoted(fewest.value)}, none of which may "
        f"differ: it takes {needed} to tell it, so give more inputs, with --samples"
    )


def _spoiled(comparison: Comparison) -> list[str]:
    """The outputs with other NaN or infinities than the original's."""
    return list(dict.fromkeys(row.output for row in comparison.outputs if row.bad_changed))


def _tune(request: Request, model: ir.Model, progress: Callable[[Progress], None]) -> dict[Any, Result]:
    """The best configuration of every distinct problem, by the problem."""
    # Their names are shown while it goes.
    wanted = [replace(each, name=legible(each.name)) for each in workloads(model).distinct()]
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


def _engine(request: Request, model: Path, resume: Path, tell: Callable[[str], None]) -> list[Path]:
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
            timing_cache=resume / "timing.cache",
            db=request.tuning.db,
        )
    except (MissingDependencyError, RunError, UsageError) as error:
        # The model is there and checked: an engine that can't be built takes nothing from it.
        tell(f"no engine was built: {error}")
        return []
    return [made.path, made.provenance_path]
