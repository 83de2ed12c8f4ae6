"""The precision of every layer: by rule, or by a search inside an error budget.

Layers that the model came with in 8 bits compute in them (`given.py`), and then no other is quantised: somebody has
decided which they are. Without a budget all layers that the rules let get the precision that was asked for
(`rules.py`, `kept.py`); with one, as many as keep the errors inside it, the cheapest loss of speed first (`budget.py`).
What 8-bit layers need comes from `post_training.py`, and is kept for a run that is killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype
from tilewright.tuner.model.calibration.data import Samples
from tilewright.tuner.model.graph import copy_of, fused_nodes
from tilewright.tuner.model.precision.budget import Evaluation, Outcome, Plan, search
from tilewright.tuner.model.precision.given import Given, given_layers
from tilewright.tuner.model.precision.grouped import WEIGHT_ONLY, GroupedWeights, blank
from tilewright.tuner.model.precision.half import HALVES
from tilewright.tuner.model.precision.kept import kept
from tilewright.tuner.model.precision.post_training import STEPS, quantise
from tilewright.tuner.model.precision.quantise import QUANTISED, LayerPrecision, apply_precision
from tilewright.tuner.model.precision.quantised_file import Quantised
from tilewright.tuner.model.precision.ranges import extremes
from tilewright.tuner.model.precision.rounding import round_groups
from tilewright.tuner.model.precision.rules import weight_plan
from tilewright.tuner.model.report.document import ROUNDING, CalibrationPart, LayerPlan, ParetoPoint, PrecisionPart
from tilewright.tuner.model.report.estimate import estimate, predicted_us
from tilewright.tuner.model.verify.compare import Comparison, Reference
from tilewright.tuner.model.verify.error_budget import Budget
from tilewright.tuner.model.verify.judge import Judge
from tilewright.tuner.model.workloads import workloads

FLOATS = ("fp32", "fp16", "bf16")
SAME = 1.02
"""Times that differ by less are equal: a prediction tells no more."""

UNCHANGED = 1e-4
"""The largest error that moving ranges may have: what fp32 itself has after a deep network, with room to spare."""

CHECKED = 2
"""Calibration inputs on which that is checked."""

GIVEN = "the model came with it in 8 bits"

SLOWER = "weights of fewer bits are predicted to save it no time"

MEASURE = "largest error of an output over its largest value"


@dataclass(frozen=True, slots=True)
class Lowered:
    """A model whose layers have their precision, and what is to be said of it."""

    model: ir.Model
    part: PrecisionPart | None  # None: everything stayed as it was
    outcome: Outcome | None  # of a search


def lower(
    fused: ir.Model,
    device: Device,
    *,
    kind: str,
    calibration: Samples,
    reference: Reference,
    budget: Budget | None,
    key: str,
    resume: Path,
    tell: Callable[[str], None],
) -> Lowered:
    """Lowers a fused fp32 model; the one given stays as it is.

    Args:
        fused: the model.
        device: it decides which kinds there are, and how long layers take.
        kind: `fp32`, `fp16`, `bf16`, `int8`, `fp8`, `w8a16`, `w4a16`, or `auto`: whatever is fastest inside the budget.
        calibration: inputs that scales are measured on.
        reference: the original's outputs on other inputs, which errors are measured on.
        budget: of errors; None: as low as the rules let it be, whatever the error.
        key: hash of what scales and errors depend on.
        resume: folder in which scales and tried plans are kept.
        tell: prints a line of progress.

    Raises:
        ModelError: calibration data on which the model gives NaN or infinity.
        RunError: ONNX Runtime failed.
    """
    if kind == "fp32" and budget is None:
        return Lowered(fused, None, None)
    chooser = _Chooser(fused, device, kind, calibration, reference, key, resume, tell)
    if budget is None:
        return chooser.by_rule()
    return chooser.by_search(budget)


def kinds_for(kind: str, device: Device) -> tuple[str, ...]:
    """The kinds of precision that a request lets layers have, the fewest bits first.

    fp8 has as many bits as int8 and another error, and weights of 4 bits are for products of few rows: `auto` tries
    what the device has.
    """
    known = {
        "auto": ("int8", "fp8", "w4a16", "w8a16", "fp16", "fp32"),
        "w4a16": ("w4a16", "w8a16", "fp16", "fp32"),
        "w8a16": ("w8a16", "fp16", "fp32"),
        "int8": ("int8", "fp16", "fp32"),
        "fp8": ("fp8", "fp16", "fp32"),
        "fp16": ("fp16", "fp32"),
        "bf16": ("bf16", "fp32"),
        "fp32": ("fp32",),
    }[kind]
    needs = {"int8": "int8", "fp8": "fp8e4m3", "w8a16": "int8", "w4a16": "int4"}
    return tuple(each for each in known if device.arch >= dtype(needs.get(each, "fp16")).min_arch)


class _Chooser:
    """One model on the way to its precision."""

    def __init__(
        self,
        fused: ir.Model,
        device: Device,
        kind: str,
        calibration: Samples,
        reference: Reference,
        key: str,
        resume: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._fused, self._device, self._kind = fused, device, kind
        self._calibration, self._reference = calibration, reference
        self._key, self._resume, self._tell = key, resume, tell
        self._given = Given() if kind == "fp32" else given_layers(fused, device)
        self._all = [node.name or "" for node in fused_nodes(fused)]
        self._layers = [name for name in self._all if name not in self._given.plan]
        self._kinds = kinds_for(kind, device)
        if self._given.found:
            self._kinds = tuple(each for each in self._kinds if each in FLOATS)
            tell(self._given.told(len(self._all)))
        # By the kind of precision that the model's ranges were moved for; "" of the model as it was fused.
        self._extremes: dict[str, dict[str, tuple[float, float]]] = {}
        self._reasons: dict[tuple[str, str], dict[str, str]] = {}
        self._eight: Quantised | None = None  # of 8 bits, for layers that 4 are too few for

    def by_rule(self) -> Lowered:
        """Every layer as low as the rules let it be."""
        base = self._kind if self._kind in FLOATS else "fp16"
        quantised = None
        if self._kind in self._kinds and self._kind not in FLOATS:
            alone = self._kind in WEIGHT_ONLY
            quantised = self._rounded(self._weight_only(self._kind)) if alone else self._quantised(self._kind)
        plan = {} if quantised is None else dict(quantised.plan)
        plan |= {layer: LayerPrecision("fp32") for layer in self._kept(quantised, base) if layer not in plan}
        return Lowered(self._made(plan, base, quantised), self._part(plan, base, quantised, None), None)

    def by_search(self, budget: Budget) -> Lowered:
        """As low as the budget lets it be."""
        kinds = self._kinds
        if not self._layers:
            base = self._base([kind for kind in kinds if kind in FLOATS], budget)
            return Lowered(self._made({}, base, None), self._part({}, base, None, None), None)
        floats = [kind for kind in kinds if kind in FLOATS]
        base = self._base(floats, budget)
        quantised = self._fastest(self._candidates(base))
        if quantised is None:
            # Between float types layers are told apart as well: those that need the most bits keep them.
            choices = {
                layer: [kind for kind in floats if layer not in self._kept(None, kind)] for layer in self._layers
            }
        else:
            stays = self._kept(quantised, base)
            choices = {
                layer: [*_kinds_of(layer, quantised), "fp32" if layer in stays else base] for layer in self._layers
            }
            if quantised.kind in WEIGHT_ONLY:
                choices = self._faster(choices, quantised, base)
                quantised = self._rounded(_left(quantised, choices))

        def evaluate(plan: Plan) -> Evaluation:
            model = self._made(_precisions(plan, quantised, base), base, quantised)
            comparison = self._reference.compare(model)
            time = estimate(model, self._device).time_us
            return Evaluation(time, error_of(comparison), comparison.within(budget), {"base": base})

        outcome = search(
            choices,
            self._saved_us(choices, quantised, base),
            evaluate,
            study=self._resume / "precision.sqlite",
            name=self._key[:16],
            progress=lambda done, most: self._tell(f"precision: {done} plans tried, at most {most}"),
        )
        plan = _precisions(outcome.chosen.plan, quantised, base)
        reason = f"the fastest inside {budget}" if outcome.met else f"nothing tried is inside {budget}: this is nearest"
        part = self._part(plan, base, quantised, outcome, reason)
        return Lowered(self._made(plan, base, quantised), part, outcome)

    def _base(self, floats: Sequence[str], budget: Budget) -> str:
        """The type of what is no layer: that of the fewest bits with which the budget is met while no layer has 8."""
        for kind in floats[:-1]:
            if self._reference.compare(self._made({}, kind, None)).within(budget):
                return kind
            self._tell(f"{kind} alone is outside the error budget: what is no layer has more bits")
        return floats[-1]

    def _candidates(self, base: str) -> list[Quantised]:
        """All that layers may be quantised to. Weights alone are where the base is what kernels unpack them to; and
        where the kind asked for is left open, only where that takes less time than 8-bit layers, and than none, as for
        products of few rows. They are not rounded yet."""
        found = [self._quantised(kind) for kind in self._kinds if kind in QUANTISED]
        lightest = next((kind for kind in self._kinds if kind in WEIGHT_ONLY), None)
        if lightest is None or base not in HALVES:
            return found
        alone = self._weight_only(lightest)
        if found:
            half = estimate(self._made({}, "fp16", None), self._device).time_us
            if self._time_us(alone) * SAME > min(half, *map(self._time_us, found)):
                return found
        return [*found, alone]

    def _fastest(self, found: Sequence[Quantised]) -> Quantised | None:
        """The kind whose model takes the least time with all layers in it; of equal ones that of the least error. One
        model has one kind: each moves ranges between layers in its own way."""
        if len(found) < 2:
            return found[0] if found else None
        times = {each.kind: self._time_us(each) for each in found}
        best = min(times.values())
        return max((each for each in found if times[each.kind] <= best * SAME), key=lambda each: each.decibel)

    def _time_us(self, quantised: Quantised) -> float:
        """The prediction of the model with all layers of a kind in it."""
        return estimate(self._made(quantised.plan, "fp16", quantised, timed=True), self._device).time_us

    def _quantised(self, kind: str) -> Quantised:
        """All that 8-bit layers of one kind need, from the calibration data, or as an earlier run left it."""
        file = self._resume / f"{kind}.npz"
        known = Quantised.load(file, self._key)
        if known is None:
            model = copy_of(self._fused)
            found = quantise(model, self._calibration.feeds, kind, tell=self._tell)
            changed = self._changed(model)
            if changed > UNCHANGED:
                self._tell(f"{kind}: moved ranges changed results by {changed:.1e} and are left out")
                model = copy_of(self._fused)
                found = quantise(model, self._calibration.feeds, kind, smoothing=False, tell=self._tell)
            known = Quantised.of(found, model)
            known.save(file, self._key)
        self._tell(f"{kind}: {len(known.plan)} of {len(self._all)} layers")
        return known

    def _weight_only(self, kind: str) -> Quantised:
        """The layers whose weights alone may be quantised; none are rounded yet."""
        plan, reasons = weight_plan(self._fused, kind, self._device)
        stays = self._kept(None, "fp16")
        plan = {layer: precision for layer, precision in plan.items() if layer not in stays}
        return Quantised(kind, self._fused, plan, reasons, "", 0.0, {}, {})

    def _rounded(self, found: Quantised) -> Quantised:
        """The same with the weights of its layers rounded by what they are multiplied by, from the calibration data, or
        as an earlier run left them."""
        kind, file = found.kind, self._resume / f"{found.kind}.npz"
        known = Quantised.load(file, self._key, self._fused)
        if known is None or known.plan != found.plan:

            def progress(done: int, most: int) -> None:
                if done % STEPS == 0:
                    self._tell(f"{kind}: {done} of {most} layers rounded")

            weights = round_groups(self._fused, found.plan, self._calibration.feeds, progress=progress)
            known = replace(found, method=ROUNDING if weights else "", grouped=weights)
            known.save(file, self._key)
        self._tell(f"{kind}: {len(found.plan)} of {len(self._all)} layers")
        return replace(found, method=known.method, grouped=known.grouped)

    def _changed(self, model: ir.Model) -> float:
        """The error of a model, whose ranges were moved, before anything is rounded to 8 bits."""
        with Judge(self._fused, list(self._calibration.feeds[:CHECKED])) as reference:
            return error_of(reference.compare(model))

    def _made(
        self, plan: Mapping[str, LayerPrecision], base: str, quantised: Quantised | None, *, timed: bool = False
    ) -> ir.Model:
        """A model of a plan. One that is only to be `timed` has no numbers where weights alone are quantised."""
        seen, given = self._seen(quantised), self._given
        if quantised is None:
            return apply_precision(
                self._fused,
                {**plan, **given.plan},
                base=base,
                weights=given.weights,
                extremes=seen,
                device=self._device,
            )
        return apply_precision(
            quantised.model,
            plan,
            base=base,
            weights=quantised.weights,
            grouped=blank(quantised.model, _kinds(plan)) if timed else self._grouped(plan, quantised),
            shifts=quantised.shifts,
            extremes=seen,
            device=self._device,
        )

    def _grouped(self, plan: Mapping[str, LayerPrecision], quantised: Quantised) -> Mapping[str, GroupedWeights]:
        """The weights of layers whose weights alone are quantised, of those that have 8 bits instead of 4 as well."""
        four = [layer for layer, precision in quantised.plan.items() if precision.kind == "w4a16"]
        raised = [layer for layer in four if layer in plan and plan[layer].kind == "w8a16"]
        if not raised:
            return quantised.grouped
        if self._eight is None:
            eight = dict.fromkeys(four, LayerPrecision("w8a16"))
            self._eight = self._rounded(replace(quantised, kind="w8a16", plan=eight))
        return {**quantised.grouped, **{layer: self._eight.grouped[layer] for layer in raised}}

    def _seen(self, quantised: Quantised | None) -> dict[str, tuple[float, float]]:
        """The least and largest numbers of values on the calibration data: they decide what fp16 has room for."""
        if self._kind == "fp32":
            return {}
        model = self._fused if quantised is None else quantised.model
        key = "" if quantised is None or model is self._fused else quantised.kind
        if key not in self._extremes:
            self._extremes[key] = extremes(model, self._calibration.feeds)
        return self._extremes[key]

    def _kept(self, quantised: Quantised | None, base: str) -> dict[str, str]:
        """The layers that stay fp32 where others become `base`, and why."""
        if base == "fp32":
            return {}
        model = self._fused if quantised is None else quantised.model
        key = ("" if quantised is None or model is self._fused else quantised.kind, base)
        if key not in self._reasons:
            reasons = kept(model, base, self._seen(quantised)).reasons
            self._reasons[key] = {node.name or "": reasons[node] for node in fused_nodes(model) if node in reasons}
        return self._reasons[key]

    def _faster(self, choices: Mapping[str, list[str]], quantised: Quantised, base: str) -> dict[str, list[str]]:
        """The kinds of each layer without those that are no faster than one of more bits: integers have to be unpacked,
        which only pays where few rows are multiplied."""
        times = [
            self._times({layer: kinds[min(rank, len(kinds) - 1)] for layer, kinds in choices.items()}, quantised, base)
            for rank in range(max(map(len, choices.values())))
        ]
        found = {}
        for layer, kinds in choices.items():
            mine = [times[rank].get(layer, 0.0) for rank in range(len(kinds))]
            found[layer] = [
                kind for rank, kind in enumerate(kinds) if all(mine[rank] < other for other in mine[rank + 1 :])
            ]
        return found

    def _times(self, plan: Plan, quantised: Quantised | None, base: str) -> dict[str, float]:
        """The prediction of each layer's problem, in µs."""
        known: dict[Any, float] = {}
        times = {}
        for layer in workloads(self._made(_precisions(plan, quantised, base), base, quantised, timed=True)).layers:
            if layer.problem not in known:
                known[layer.problem] = predicted_us(layer.problem, self._device) or 0.0
            times[layer.node] = known[layer.problem]
        return times

    def _saved_us(
        self, choices: Mapping[str, Sequence[str]], quantised: Quantised | None, base: str
    ) -> dict[str, float]:
        """What each layer's fewest bits save against its most, by the prediction of its problem in both."""
        low, high = (
            self._times({layer: kinds[end] for layer, kinds in choices.items()}, quantised, base) for end in (0, -1)
        )
        return {layer: high.get(layer, 0.0) - low.get(layer, 0.0) for layer in choices}

    def _part(
        self,
        plan: Mapping[str, LayerPrecision],
        base: str,
        quantised: Quantised | None,
        outcome: Outcome | None,
        chosen_for: str = "asked for",
    ) -> PrecisionPart:
        given = self._given
        rules = given.reasons if quantised is None else quantised.reasons
        rules = {**rules, **dict.fromkeys(given.plan, GIVEN)}
        half = next((kind for kind in self._kinds if kind in HALVES), "fp32")
        stays = self._kept(quantised, half)
        calibration = None
        if quantised is not None and quantised.method and set(_kinds(plan).values()) - set(FLOATS):
            methods = (quantised.method,)
            calibration = CalibrationPart(self._calibration.origin, len(self._calibration), methods)
        plan = {**plan, **given.plan}
        kinds = {name: plan[name].kind if name in plan else base for name in self._all}
        ruled = {} if quantised is None else _kinds(quantised.plan)

        def reason(name: str, kind: str) -> str:
            if kind == "fp32" and name in stays:
                return stays[name]
            # A rule says why a layer has the kind that it gives it, or has none of fewer bits; not why it has another.
            return rules.get(name, chosen_for) if ruled.get(name, kind) == kind else chosen_for

        layers = tuple(LayerPlan(name, kind, reason(name, kind)) for name, kind in kinds.items())
        front, chosen = (outcome.front, outcome.chosen) if outcome is not None else ((), None)
        points = tuple(
            ParetoPoint(
                trial.evaluation.time_us,
                "predicted",
                trial.evaluation.error if math.isfinite(trial.evaluation.error) else None,
                sum(kind in FLOATS for kind in trial.plan.values()),
                trial == chosen,
            )
            for trial in front
        )
        return PrecisionPart(self._kind, base, layers, calibration, MEASURE, points)


def error_of(comparison: Comparison) -> float:
    """The largest relative error of an output or its logits: what plans are compared by. Infinite if any is NaN."""
    if not comparison.finite:
        return math.inf
    return max((row.error for row in comparison.outputs), default=0.0)


def _kinds_of(layer: str, quantised: Quantised) -> list[str]:
    """The quantised kinds that a layer may have, the fewest bits first."""
    own = quantised.plan[layer].kind if layer in quantised.plan else None
    return [] if own is None else [own, "w8a16"] if own == "w4a16" else [own]


def _left(quantised: Quantised, choices: Mapping[str, Sequence[str]]) -> Quantised:
    """What is left where weights of so few bits are no choice of a layer: those of more, or its own in a float type."""
    fewest = {layer: choices[layer][0] for layer in quantised.plan}
    plan = {layer: LayerPrecision(kind) for layer, kind in fewest.items() if kind in WEIGHT_ONLY}
    reasons = {layer: SLOWER for layer, kind in _kinds(quantised.plan).items() if fewest[layer] != kind}
    return replace(quantised, plan=plan, reasons={**quantised.reasons, **reasons})


def _kinds(plan: Mapping[str, LayerPrecision]) -> dict[str, str]:
    return {layer: precision.kind for layer, precision in plan.items()}


def _precisions(plan: Plan, quantised: Quantised | None, base: str) -> dict[str, LayerPrecision]:
    """The plan in the form that it is carried out in: layers of the base type need no entry."""
    return {
        layer: quantised.plan[layer] if quantised is not None and kind == quantised.kind else LayerPrecision(kind)
        for layer, kind in plan.items()
        if kind != base
    }
