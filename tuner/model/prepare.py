"""From the file to the fused model: read, fold, fuse, and see that nothing else is computed for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from tilewright.tuner.model.calibration.data import Samples
from tilewright.tuner.model.folding.fold import FoldingReport, fold
from tilewright.tuner.model.fuse import FusionReport, fuse
from tilewright.tuner.model.fuse.norms import LAYER_NORM
from tilewright.tuner.model.fuse.opening import FLOATS
from tilewright.tuner.model.graph import copy_of, dtype_name, fused_nodes, known_behind
from tilewright.tuner.model.messages import quoted
from tilewright.tuner.model.reading.read import DEFAULTS, FILE_OPSET, LEFT, OTHERWISE, read_model
from tilewright.tuner.model.reading.source import Source
from tilewright.tuner.model.request import Request
from tilewright.tuner.model.verify.compare import Comparison, Reference
from tilewright.tuner.model.verify.error_sums import LayerError, OutputError
from tilewright.tuner.model.verify.judge import Judge
from tilewright.tuner.model.workloads import ModelWorkloads, workloads
from tilewright.tuning_db.errors import ModelError, RunError

READING_ERROR = 1e-2
"""Relative difference of outputs between a file and what was read of it that is no rounding."""

COARSE_READING_ERROR = 1e-1
"""The same of files in whose operators ONNX Runtime rounds to 8 bits where what was read doesn't, or otherwise."""

JUDGED = 8
"""Fused nodes that differ, of which the inputs are looked at: each takes a run of both models."""

EQUAL_INPUTS = 1e-4
"""Relative difference up to which the inputs of a fused node count as those that the original has there."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that was read, folded and fused; nothing is written yet."""

    original: ir.Model  # as it was read, with static shapes
    fused: ir.Model
    source: Source
    folding: FoldingReport
    fusion: FusionReport
    workloads: ModelWorkloads
    defaults: list[str]  # inputs of the file that are constants now
    opset: int  # of the file
    reading_error: float  # between the file and what was read of it, that is no rounding
    left: dict[str, str]  # why operators of ONNX Runtime's own stay, by the node

    @property
    def reasons(self) -> dict[str, str]:
        """Why nodes were not fused."""
        return {miss.node: miss.reason for miss in self.fusion.misses} | self.left

    @property
    def shared_names(self) -> dict[str, str]:
        """Results of `checked` nodes that the original has as well: fusing keeps the names of values."""
        return {name: name for name in self.known_results}

    def shared_numbers(self, lowered: ir.Model) -> dict[str, str]:
        """The `shared_names` of what a lowered model gives as numbers: integers of a grid are in other units."""
        floats = {value.name for node in lowered.graph for value in node.outputs if dtype_name(value) in FLOATS}
        return {name: original for name, original in self.shared_names.items() if name in floats}

    @property
    def known_results(self) -> dict[str, ir.Node]:
        """The `checked` nodes, by the name that the original has for their results, or for what moves behind them make
        of those."""
        known = {value.name for node in self.original.graph for value in node.outputs}
        found: dict[str, ir.Node] = {}
        for node in self.checked:
            value, _ = known_behind(node.outputs[0], known)
            if value is not None and value.name is not None:
                found[value.name] = node
        return found

    @property
    def checked(self) -> list[ir.Node]:
        """Fused nodes, and norms of fp32 that the original has written out. One of half precision is computed in fp32
        now, and differs by what the original had rounded."""
        operators = {value.name: node.op_type for node in self.original.graph for value in node.outputs}
        norms = [
            node
            for node in self.fused.graph
            if node.op_type == LAYER_NORM
            and dtype_name(node.outputs[0]) == "fp32"
            and operators.get(node.outputs[0].name) != LAYER_NORM
        ]
        return [*fused_nodes(self.fused), *norms]


def prepare(request: Request, tell: Callable[[str], None]) -> Prepared:
    """Reads, folds and fuses.

    Raises:
        ModelError, UsageError: the model can't be used, or its shapes aren't all given.
    """
    model = read_model(request.model, request.shapes, request.dims)
    source = Source.of(request.model, model)
    defaults: list[str] = model.meta[DEFAULTS]
    opset: int = model.meta[FILE_OPSET]
    left: dict[str, str] = model.meta[LEFT]
    reading_error = COARSE_READING_ERROR if model.meta[OTHERWISE] else READING_ERROR
    original = copy_of(model)
    tell(f"read {request.model}: {len(model.graph)} nodes")
    folding = fold(model)
    fusion = fuse(model)
    found = workloads(model, {miss.node: miss.reason for miss in fusion.misses} | left)
    tell(
        f"fused: {len(original.graph)} nodes became {fusion.nodes_after}, {len(found.layers)} of them fused, with "
        f"{found.coverage:.1%} of the operations"
    )
    return Prepared(original, model, source, folding, fusion, found, defaults, opset, reading_error, left)


def check_reading(request: Request, prepared: Prepared, data: Samples, tell: Callable[[str], None]) -> None:
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
        if output.bad_changed:
            how = f"has {output.bad_changed} NaN or infinities otherwise than the file's"
        elif output.error > prepared.reading_error:
            how = _apart(output)
        else:
            continue
        opset = prepared.original.opset_imports[""]
        raise ModelError(
            f"{request.model} computes something else once it is read, which inlines functions and converts it to "
            f"opset {opset}: output {quoted(output.output)} {how}. Export it with opset {opset}, without functions"
        )


def check_fusing(request: Request, prepared: Prepared, reference: Judge) -> Comparison:
    """The errors of the fused model in fp32, which are those of rounding: 10⁻⁵ or so of a value, and what the model
    makes of it further on, which may be any difference behind a comparison or a logarithm.

    Raises:
        RunError: a fused node computes something else of the same inputs, or the fused model can't be compared.
    """
    wrong = f"{request.model}: its fused form computes something else, which is a defect of Tilewright: "
    found = reference.compare(prepared.fused, layers=prepared.shared_names, lowered=False)
    apart = {row.value: row for row in found.layers if row.bad_changed or row.error > READING_ERROR}
    nodes = prepared.known_results
    # Behind those whatever differs may differ for what they give.
    for name, row in itertools.islice(apart.items(), JUDGED):
        before = reference.compare(prepared.fused, layers=_known_before(nodes[name], prepared), lowered=False).layers
        if all(not each.bad_changed and each.error <= EQUAL_INPUTS for each in before):
            bad = f", and has {row.bad_changed} other NaN or infinities" if row.bad_changed else ""
            raise RunError(f"{wrong}{quoted(name)} {_apart(row)}{bad}; nothing was written")
    return found


def _apart(row: OutputError | LayerError) -> str:
    """How far a value is off, in words."""
    if isinstance(row, OutputError) and row.discrete:
        return f"has other values in {row.error:.1%} of its elements"
    if row.relative is None:
        return f"has values up to {row.max_abs:.1e} where all were zeros"
    return f"differs by {row.error:.1e} of its largest value"


def _known_before(node: ir.Node, prepared: Prepared) -> dict[str, str]:
    """The nearest values before a fused node that some node of the original makes too, by name."""
    known = {value.name for each in prepared.original.graph for value in each.outputs}
    found: dict[str, str] = {}
    waiting, seen = [*node.inputs], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value is None or value in seen or (producer := value.producer()) is None:
            continue
        seen.add(value)
        if value.name in known:
            found[str(value.name)] = str(value.name)
        else:
            waiting += producer.inputs
    return found
