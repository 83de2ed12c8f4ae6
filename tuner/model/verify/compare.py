"""How far one model is from another: the errors of its outputs, and of its layers, over the same inputs.

With a of the original, b of the changed model, e = b - a, and m the mean of a over the inputs, element by element:

    relative           max|e| / max|a|
    centred relative   max|e| / max|a - m|
    cosine             Σ a·b / √(Σ a² · Σ b²)
    SQNR               10 · log₁₀(Σ (a - m)² / Σ e²)   dB; of layers, a² in place of (a - m)²
    top-1              share of rows whose largest element stands at the same place; of integers and booleans the share
                       of equal elements, and nothing else

Outputs that hardly depend on the input make every cosine near 1 and every relative error small: a network with careless
weights gives cosines of 0.9998 between *different* inputs. Centred measures see what depends on the input alone. The
original's mean is taken from both, so that an error that is the same for every input counts as well. Of an output that
is the same for every input, m is 0.

What is not finite is left out, and so are rows of padding that see no key (`masked_rows.py`).

Both models run in ONNX Runtime with its optimisations off. One feed's values are held at a time, and sums over them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.graph import elements, static_shape
from tilewright.tuner.model.messages import legible, quoted
from tilewright.tuner.model.verify.error_budget import Budget
from tilewright.tuner.model.verify.error_sums import LayerError, LayerSums, OutputError, OutputSums
from tilewright.tuner.model.verify.masked_rows import MaskedRows, RowPlaces
from tilewright.tuning_db.errors import ModelError, RunError

Array = np.ndarray[Any, Any]
Feeds = Sequence[Mapping[str, Array]]
Runner = Callable[[ir.Model | Path, Feeds, Sequence[str]], Iterator[dict[str, Array]]]

KEPT_BYTES = 64 << 20
"""Of the original's outputs that are held in memory; beyond that they go to a temporary file without a name."""

LAYER_BYTES = 256 << 20
"""Of layers' values that one pass asks of each model, as fp32: with more, further passes are made."""

_THROUGH = frozenset({"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""What may stand between a softmax and the output that it makes."""


class SizeError(ModelError):
    """An output whose size depends on values, as that of `NonZero`, has another in the changed model."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model against another."""

    inputs: int  # compared, entries of a batch counted singly
    outputs: tuple[OutputError, ...]  # in the order of the graph's outputs, each before its logits
    layers: tuple[LayerError, ...]  # in the order in which they were asked for

    @property
    def finite(self) -> bool:
        """Whether NaN and infinities are the original's, of which NaN may have become a number."""
        return not any(row.bad_changed for row in self._all)

    def breaches(self, budget: Budget) -> tuple[str, ...]:
        """What of a budget is not met, a line each. Other NaN and infinities than the original's break any budget.

        Every output is judged, and the logits behind it; top-1 agreement of logits, probabilities and integers alone,
        and where no softmax tells which are logits, of the first output that has classes and of others of its shape.
        """
        found = [
            f"{legible(row.value)}: NaN or infinite: {row.bad_changed} elements that are not so in both"
            for row in self._all
            if row.bad_changed
        ]
        found += [
            f"{legible(row.value)}: {_of_nothing(row)}: there is nothing to compare"
            for row in self.outputs
            if row.untold and not row.bad_changed
        ]
        limits = (
            ("max", "relative", True, budget.max),
            ("centred", "centred_relative", True, budget.centred),
            ("cosine", "cosine", False, budget.cosine),
            ("sqnr", "sqnr_db", False, budget.sqnr),
        )
        for name, field, upper, limit in limits:
            if limit is None:
                continue
            if all(row.discrete for row in self.outputs) and not all(row.exact for row in self.outputs):
                found.append(f"all outputs are integers: {name}={_limit(limit)} can't be told; give top1")
            for row in self.outputs:
                value = getattr(row, field)
                if row.discrete or row.relative == 0.0:
                    continue
                if value is None:
                    zeros = row.relative is None and row.max_abs > 0.0
                    why = "zeros in the original" if zeros else f"{self.inputs} input(s)"
                    found.append(f"{legible(row.value)}: {name} can't be told ({why}), wanted {_limit(limit)}")
                elif (value > limit) if upper else (value < limit):
                    apart = row.constant and name in ("centred", "sqnr")
                    why = "; not centred, as it doesn't depend on the input" if apart else ""
                    found.append(f"{legible(row.value)}: {_missed(name, value, upper, limit)}{why}")
        if budget.top1 is not None:
            if not self.classes:
                found.append(f"no output has classes: top1={_limit(budget.top1)} can't be told; leave it out")
            found += [
                f"{legible(row.value)}: {_missed('top1', row.top1, False, budget.top1)}"
                for row in self.classes
                if row.top1 is not None and row.top1 < budget.top1
            ]
        return tuple(found)

    def within(self, budget: Budget) -> bool:
        """Whether all of a budget is met."""
        return not self.breaches(budget)

    @property
    def classes(self) -> tuple[OutputError, ...]:
        """What a bound on top-1 agreement is one on."""
        return tuple(row for row in self.outputs if row.judged and row.top1 is not None)

    def unbounded(self, budget: Budget | None) -> tuple[OutputError, ...]:
        """The outputs that no limit of a budget is on."""
        if budget is None:
            return self.outputs
        sized = any(limit is not None for limit in (budget.max, budget.centred, budget.cosine, budget.sqnr))
        agreeing = self.classes if budget.top1 is not None else ()
        return tuple(row for row in self.outputs if row not in agreeing and (row.discrete or not sized))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in one order."""
        return asdict(self)

    @property
    def _all(self) -> Iterator[OutputError | LayerError]:
        yield from self.outputs
        yield from self.layers


@dataclass(frozen=True, slots=True)
class Logits:
    """The input of the softmax that makes an output."""

    value: str
    axis: int  # of the classes


def logits_of(model: ir.Model) -> dict[str, Logits]:
    """Of each graph output that a Softmax or LogSoftmax makes, what goes into that one, by the output's name.

    Between the softmax and the output there may be casts and changes of shape.
    """
    found = {}
    for output in model.graph.outputs:
        value: ir.Value | None = output
        while value is not None and (node := value.producer()) is not None:
            if node.domain == "" and node.op_type in ("Softmax", "LogSoftmax"):
                source = node.inputs[0]
                if source is not None and not source.is_graph_input() and source.producer() is not None:
                    found[_name(output)] = Logits(_name(source), node.attributes.get_int("axis", -1))
                break
            value = node.inputs[0] if node.domain == "" and node.op_type in _THROUGH else None
    return found


class Reference:
    """The original's outputs over some feeds: worked out once, for comparison with any number of changed models. Use it
    in a `with` block.

    Args:
        original: the model, or its file.
        feeds: what both get: arrays by input name.
        run: `session.run`, or another way to run a model.
        fused: what fusing made of the original: the rows that its attentions hide altogether are left out.
    """

    def __init__(
        self,
        original: ir.Model | Path,
        feeds: Feeds,
        *,
        run: Runner | None = None,
        fused: ir.Model | None = None,
    ) -> None:
        if not feeds:
            raise ModelError("there are no inputs to compare the models on: give at least one sample")
        self._model, self._feeds, self._run = original, feeds, run or _run
        graph = _graph_of(original)
        self._outputs = [_name(output) for output in graph.graph.outputs]
        made = logits_of(graph)
        self._logits = {output: logits for output, logits in made.items() if logits.value not in self._outputs}
        self._classes = {*made, *(logits.value for logits in made.values())}
        self._shapes = {_name(output): output.shape for output in graph.graph.outputs}
        self._unsized = {_name(output) for output in graph.graph.outputs if static_shape(output) is None}
        self._batch = _batch(graph)
        self._sizes = _sizes(graph)
        self._kept: tempfile.SpooledTemporaryFile[bytes] | None = None
        self._fused = fused
        self._masked: list[MaskedRows] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives up what was kept of the original's outputs."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def compare(self, changed: ir.Model | Path, *, layers: Mapping[str, str] | None = None) -> Comparison:
        """The errors of a changed model; see `compare`."""
        graph = _graph_of(changed)
        theirs = {_name(output) for output in graph.graph.outputs}
        missing = [name for name in self._outputs if name not in theirs]
        if missing:
            raise ModelError(
                f"the changed model has no output {', '.join(map(repr, missing))}: its outputs are "
                f"{', '.join(map(repr, sorted(theirs)))}"
            )
        changed_logits = logits_of(graph)
        # What is compared: the graph output it belongs to, its name here, its name there, the axis of its classes.
        rows = []
        for output in self._outputs:
            rows.append((output, output, output, -1))
            if output in self._logits and output in changed_logits:
                mine, other = self._logits[output], changed_logits[output]
                rows.append((output, mine.value, other.value, mine.axis))
        sums = [OutputSums(axis) for *_, axis in rows]
        inputs = 0
        wanted = list(dict.fromkeys(there for _, _, there, _ in rows))
        values = zip(self._originals(), self._run(changed, self._feeds, wanted), self.masked(), strict=True)
        for ours, others, masked in values:
            batched = [self._batch > 1 and ours[here].shape[:1] == (self._batch,) for _, here, _, _ in rows]
            inputs += self._batch if all(batched) else 1
            for (output, here, there, _), total, apart in zip(rows, sums, batched, strict=True):
                if here == output and ours[here].shape != others[there].shape:
                    kind = SizeError if output in self._unsized else ModelError
                    raise kind(_differently_shaped(output, ours[here], others[there]))
                a, b = _same_size(output, ours[here], others[there])
                total.add(a, b, apart, masked.of(here, a.shape))
        found = [
            total.row(output, here, here != output) for (output, here, _, _), total in zip(rows, sums, strict=True)
        ]
        return Comparison(inputs, self._judged(found), tuple(self._layers(changed, layers or {})))

    def _judged(self, rows: Sequence[OutputError]) -> tuple[OutputError, ...]:
        """The rows, with what top-1 agreement is judged of; see `Comparison.breaches`."""
        having = [row for row in rows if row.top1 is not None and not row.discrete]
        told = {row.output for row in having if row.output in self._classes}
        if having and not told:
            told = {row.output for row in having if self._shapes[row.output] == self._shapes[having[0].output]}
        return tuple(replace(row, judged=row.discrete or row.output in told) for row in rows)

    def work_out(self) -> None:
        """Runs the original, unless that is done: what it can't do shows before anything else is.

        Raises:
            ModelError: it can't be loaded, or a feed doesn't fit.
            RunError: ONNX Runtime failed.
        """
        if self._kept is None:
            kept: tempfile.SpooledTemporaryFile[bytes] = tempfile.SpooledTemporaryFile(KEPT_BYTES)  # noqa: SIM115
            names = self._names()
            try:
                for values in self._run(self._model, self._feeds, names):
                    for name in names:
                        np.save(kept, _plain(values[name]), allow_pickle=False)
                kept.flush()  # the last bytes may have no room either
            except OSError as error:
                with suppress(OSError):  # closing writes what waits, once more
                    kept.close()
                raise RunError(
                    f"{tempfile.gettempdir()}: {error.strerror or error}: make room, or name another folder in TMPDIR"
                ) from None
            except BaseException:
                kept.close()
                raise
            self._kept = kept

    def masked(self) -> list[MaskedRows]:
        """The rows of each feed that are left out.

        Raises:
            RunError: ONNX Runtime failed.
        """
        if self._masked is None:
            places = None if self._fused is None else RowPlaces(self._fused)
            if self._fused is None or places is None or not places.maskings:
                self._masked = [MaskedRows()] * len(self._feeds)
            else:
                biases = list(dict.fromkeys(masking.bias for masking in places.maskings))
                self._masked = [places.masked(each) for each in self._run(self._fused, self._feeds, biases)]
        return self._masked

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self._outputs, *(logits.value for logits in self._logits.values())]))

    def _originals(self) -> Iterator[dict[str, Array]]:
        """The original's outputs and logits, feed by feed, from the second time on as they were kept."""
        self.work_out()
        assert self._kept is not None
        names = self._names()
        self._kept.seek(0)
        for _ in self._feeds:
            yield {name: np.load(self._kept, allow_pickle=False) for name in names}

    def _layers(self, changed: ir.Model | Path, layers: Mapping[str, str]) -> Iterator[LayerError]:
        for group in _groups(layers, self._sizes):
            sums = {name: LayerSums() for name in group}
            here = list(dict.fromkeys(group.values()))
            both = self._run(self._model, self._feeds, here), self._run(changed, self._feeds, list(group))
            for ours, others, masked in zip(*both, self.masked(), strict=True):
                for name, total in sums.items():
                    a, b = _same_size(name, ours[group[name]], others[name])
                    total.add(a, b, masked.of(group[name], a.shape))
            yield from (total.row(name, group[name]) for name, total in sums.items())


def compare(
    original: ir.Model | Path,
    changed: ir.Model | Path,
    feeds: Feeds,
    *,
    layers: Mapping[str, str] | None = None,
    run: Runner | None = None,
) -> Comparison:
    """Runs both models over the feeds and tells how far their outputs are apart.

    Where a softmax makes an output of both, its input is compared as well. Inputs, over which means are taken, are the
    feeds, and where all of the model's inputs and an output begin with one dimension, the entries of that.

    Args:
        original, changed: models with outputs of the same names, or their files.
        feeds: arrays by input name, one entry a run.
        layers: for each value of the changed model whose error is wanted, its name in the original.
        run: `session.run`, or another way to run a model.

    Raises:
        ModelError: no feeds, or outputs that don't go together.
    """
    with Reference(original, feeds, run=run) as reference:
        return reference.compare(changed, layers=layers)


def _of_nothing(row: OutputError) -> str:
    return "NaN or infinite all over in both" if row.bad_original else "no row of it sees a key"


def _same_size(name: str, a: Array, b: Array) -> tuple[Array, Array]:
    """Both arrays, the second in the first's shape."""
    if a.size != b.size:
        raise ModelError(_differently_shaped(name, a, b))
    return a, b.reshape(a.shape)


def _missed(name: str, value: float, upper: bool, limit: float) -> str:
    """A measure beside the limit that it misses, with all its digits where fewer look as if the limit were met."""
    rounded = float(f"{value:g}")
    digits = f"{value:g}" if (rounded > limit if upper else rounded < limit) else repr(value)
    return f"{name}={digits}, wanted {'at most' if upper else 'at least'} {_limit(limit)}"


def _limit(limit: float) -> str:
    """A limit with all its digits: 1.0 is 1, and 0.9999999 is not."""
    return f"{limit:g}" if float(f"{limit:g}") == limit else repr(limit)


def _differently_shaped(name: str, a: Array, b: Array) -> str:
    return f"{quoted(name)} is {a.shape} in the original and {b.shape} in the changed model"


def _plain(array: Array) -> Array:
    """An array whose type NumPy's files know: bf16 and fp8 become fp32, which holds them exactly."""
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name.startswith("float8") else array


def _graph_of(model: ir.Model | Path) -> ir.Model:
    return model if isinstance(model, ir.Model) else ir.load(model)


def _batch(model: ir.Model) -> int:
    """The dimension that all inputs begin with, or 1."""
    shapes = [static_shape(value) for value in model.graph.inputs]
    leading = {shape[0] if shape else 1 for shape in shapes if shape != ()}
    return leading.pop() if len(leading) == 1 else 1


def _sizes(model: ir.Model) -> dict[str, int]:
    """Bytes of every value as fp32; of what has no static shape, none are known."""
    return {_name(value): 4 * (elements(value) or 0) for node in model.graph for value in node.outputs if value.name}


def _groups(layers: Mapping[str, str], sizes: Mapping[str, int]) -> Iterator[dict[str, str]]:
    """The layers in as few groups as keep to `LAYER_BYTES`, in their order."""
    group: dict[str, str] = {}
    held = 0
    for name, original in layers.items():
        size = sizes.get(original, 0)
        if group and held + size > LAYER_BYTES:
            yield group
            group, held = {}, 0
        group[name] = original
        held += size
    if group:
        yield group


def _run(model: ir.Model | Path, feeds: Feeds, outputs: Sequence[str]) -> Iterator[dict[str, Array]]:
    from tilewright.tuner.model.session import run

    return run(model, feeds, outputs)


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
