"""How near int8 comes to fp32: our post-training quantisation and ONNX Runtime's, on the same models and data.

    python -m benchmarks.quantisation [--model NAME …] [--samples 256] [--calibration 64] [--json FILE]

Both are given the same folded model and the same calibration inputs, and are judged on `--samples` others:

- dB: signal-to-quantisation-noise ratio of the logits, each logit less its mean over the inputs, so that what all
  inputs have in common counts for nothing: 10·log10(Σ c² / Σ (ĉ - c)²).
- top-1: how often the largest logit is the original's.

ONNX Runtime's is `quantize_static` in QDQ form with per-channel weights: `asymmetric` is its default, with a zero point
for each activation, `symmetric` what its documentation recommends for GPUs, which have no zero points; each with the
best of MinMax, Entropy and Percentile (those that are 1 dB behind the best on 32 inputs are not run on all). It
quantises all it can; of transformers, where that does great harm, a second model has matrix products quantised alone,
and the better one counts. Ours leaves the first layer, the last one and attention at fp16, and its `int8` column is the
share of the FLOPs that are int8. The reference and both are run with graph optimisations off.

`fp16` is the largest error of the logits of the model in fp16 alone over the largest logit, or that of the logits less
their means, if that is larger.

With `--json`, results are kept in that file and models that it has are not done again.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import environment, kept, revision
from benchmarks.models import ARCHITECTURES, architecture, samples, write
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.precision.post_training import quantise
from tilewright.tuner.model.precision.quantise import apply_precision
from tilewright.tuner.model.reading.read import read_model, write_model
from tilewright.tuner.model.session import run
from tilewright.tuner.model.workloads import workloads

Array = np.ndarray[Any, Any]
Feeds = Sequence[Mapping[str, Array]]
Figures = dict[str, Any]
Say = Callable[[str], None]

METHODS = ("MinMax", "Entropy", "Percentile")
FORMS = ("asymmetric", "symmetric")
PRODUCTS = ["MatMul", "Gemm", "Conv"]
TRANSFORMERS = ("bert", "gpt", "vit")
CALIBRATION_SEED, SAMPLE_SEED = 11, 12
STRIDE = 2
"""Inputs whose intermediate values ONNX Runtime's calibrator holds at a time."""

SCREENED, SCREENED_DB = 32, 1.0
"""Inputs on which ONNX Runtime's models are compared first; those that are further behind the best of their form are
not run on the rest."""

MODELS = tuple(known.name for known in ARCHITECTURES if known.family == "light" or known.opset < 23)
"""The nine classifiers, and each transformer in the dialect that ONNX Runtime's quantisation knows best."""


class Logits:
    """The original's logits on some inputs, and how near others come.

    Of GPT's vocabulary they are 3 GB in fp32, as they are kept; sums are taken in fp64, one input after the other.
    """

    def __init__(self, model: ir.Model | None, name: str, feeds: Feeds, exact: Array | None = None) -> None:
        self._name, self._feeds = name, feeds
        if exact is None:
            assert model is not None
            exact = self.of(model)
        self.exact = exact
        self._mean = exact.mean(axis=0, dtype=np.float64)
        self._signal = sum(float(np.square(row - self._mean).sum()) for row in self._rows(exact))

    def first(self, count: int) -> Logits:
        """Those on the first inputs alone."""
        return Logits(None, self._name, self._feeds[:count], self.exact[:count])

    @property
    def varying(self) -> float:
        """The share of the variance that depends on the input."""
        total = sum(float(np.square(row - self._mean.mean()).sum()) for row in self._rows(self.exact))
        return self._signal / total

    def of(self, model: ir.Model | Path) -> Array:
        """A model's logits, (inputs, the rest)."""
        found: Array | None = None
        for at, each in enumerate(run(model, self._feeds, [self._name])):
            row = each[self._name].reshape(-1)
            if found is None:
                found = np.empty((len(self._feeds), row.size), np.float32)
            found[at] = row
        assert found is not None
        return found

    def decibels(self, logits: Array) -> float:
        """Signal to noise of the centred logits."""
        noise = np.sum([np.square(row).sum() for row in self._noise(logits)])
        with np.errstate(divide="ignore"):  # equal logits have no noise: infinite
            return float(10 * np.log10(self._signal / noise))

    def agreement(self, logits: Array, classes: int) -> float:
        """The share of places whose largest logit is the same."""
        return float(
            (logits.reshape(-1, classes).argmax(axis=1) == self.exact.reshape(-1, classes).argmax(axis=1)).mean()
        )

    def relative(self, logits: Array) -> tuple[float, float]:
        """max|a - b| / max|a| of the logits, and of the logits less their means."""
        off = (a - b for a, b in zip(self._rows(logits), self._rows(self.exact), strict=True))
        plain, largest = _largest(off), _largest(self._rows(self.exact))
        noise, centred = _largest(self._noise(logits)), _largest(row - self._mean for row in self._rows(self.exact))
        return plain / largest, noise / centred

    def _noise(self, logits: Array) -> Iterator[Array]:
        """What is off in the centred logits of each input."""
        off = logits.mean(axis=0, dtype=np.float64) - self._mean
        for row, exact in zip(self._rows(logits), self._rows(self.exact), strict=True):
            yield row - exact - off

    @staticmethod
    def _rows(logits: Array) -> Iterator[Array]:
        return (row.astype(np.float64) for row in logits)


def _largest(rows: Iterator[Array]) -> float:
    """max|x| over all rows; NaN where there is one, which Python's `max` would pass over."""
    return float(np.max([np.abs(row).max() for row in rows]))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds as ONNX Runtime's calibrator asks for them, some at a time."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = feeds
        self.set_range(0, len(feeds))

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._feeds[start_index:end_index])

    def get_next(self) -> Mapping[str, Array] | None:
        return next(self._left, None)


@contextmanager
def silence() -> Iterator[None]:
    """ONNX Runtime's quantisation prints a line for each call of the calibrator, and warns on each model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def onnxruntime_figures(
    path: Path, calibration: Feeds, logits: Logits, classes: int, folder: Path, say: Say
) -> Figures:
    """dB and top-1 of ONNX Runtime's models, by `method form operators`; of those that it fails to make the error, and
    of those that are far behind on the first inputs the dB on these, `screened_db`."""
    figures: Figures = {}
    first = logits.first(SCREENED)
    operators = {"all": [], "products": PRODUCTS} if any(word in path.stem for word in TRANSFORMERS) else {"all": []}
    for form in FORMS:
        made: dict[str, Path] = {}
        for method, (which, chosen) in itertools.product(METHODS, operators.items()):
            start, key = time.monotonic(), f"{method} {form} {which}"
            out = folder / f"{method}.{form}.{which}.onnx"
            say(f"ONNX Runtime, {key}")
            try:
                with silence():
                    quantize_static(
                        path,
                        out,
                        Reader(calibration),
                        quant_format=QuantFormat.QDQ,
                        per_channel=True,
                        op_types_to_quantize=chosen,
                        calibrate_method=getattr(CalibrationMethod, method),
                        calibration_cache_path=folder / f"{method}.{which}.json",
                        use_external_data_format=path.stat().st_size > 2**30,
                        extra_options={"CalibStridedMinMax": STRIDE, "ActivationSymmetric": form == "symmetric"},
                    )
            except ValueError as error:  # its histograms have no bins for the -3.4e38 of a mask
                figures[key] = {"error": str(error)}
                continue
            made[key] = out
            figures[key] = {"screened_db": first.decibels(first.of(out)), "seconds": time.monotonic() - start}
        ahead = max((figures[key]["screened_db"] for key in made), default=0.0)
        for key, out in made.items():
            if figures[key]["screened_db"] >= ahead - SCREENED_DB:
                say(f"ONNX Runtime, {key}, all inputs")
                found = logits.of(out)
                figures[key] |= {"db": logits.decibels(found), "top1": logits.agreement(found, classes)}
            out.unlink()
    return figures


def our_figures(model: ir.Model, calibration: Feeds, logits: Logits, classes: int, say: Say) -> Figures:
    """dB and top-1 of ours, and what fp16 alone costs."""
    start = time.monotonic()
    fuse(model)
    half = logits.relative(logits.of(apply_precision(model, {}, base="fp16")))
    found = quantise(model, calibration, "int8", tell=say)
    seconds = time.monotonic() - start
    nearest = logits.decibels(logits.of(apply_precision(model, found.plan, base="fp16")))
    mixed = apply_precision(model, found.plan, base="fp16", weights=found.weights, shifts=found.shifts)
    result = logits.of(mixed)
    layers = workloads(model).layers
    flops = {layer.node: layer.problem.flops() for layer in layers}
    return {
        "db": logits.decibels(result),
        "db_nearest": nearest,
        "top1": logits.agreement(result, classes),
        "method": str(found.method),
        "layers": [len(found.plan), len(layers)],
        "share": sum(flops[name] for name in found.plan) / max(1, sum(flops.values())),
        "smoothed": len(found.smoothing.smoothed),
        "corrected": bool(found.shifts),
        "seconds": seconds,
        "fp16_relative": half[0],
        "fp16_centred": half[1],
    }


def measure(name: str, count: int, calibration: int, say: Say, *, small: bool = False) -> Figures:
    """All figures of one architecture."""
    known = architecture(name)
    with tempfile.TemporaryDirectory(prefix="tilewright-") as made:
        folder = Path(made)
        model = read_model(write(name, folder, small=small))
        fold(model)
        folded = folder / f"{name}.folded.onnx"
        write_model(model, folded)
        given = samples(name, calibration, CALIBRATION_SEED, small=small)
        others = samples(name, count, SAMPLE_SEED, small=small)
        logits = Logits(model, known.logits, others)
        shape = next(value for node in model.graph for value in node.outputs if value.name == known.logits).shape
        classes = max(length for length in shape or () if isinstance(length, int))
        figures: Figures = {"varying": logits.varying}
        figures["environment"] = environment() | {
            "revision": revision(),
            **{library: version(library) for library in ("onnx", "onnxruntime")},
        }
        say("quantising")
        figures["ours"] = our_figures(model, given, logits, classes, say)
        del model
        figures["onnxruntime"] = onnxruntime_figures(folded, given, logits, classes, folder, say)
    return figures


def best(figures: Figures, form: str) -> tuple[str, Figures]:
    """ONNX Runtime's best method in a form, and its figures."""
    of_form = {key: each for key, each in figures["onnxruntime"].items() if key.split()[1] == form and "db" in each}
    key = max(of_form, key=lambda key: float(of_form[key]["db"]))
    method, _, which = key.split()
    return method if which == "all" else f"{method}, {which}", of_form[key]


def table(results: Mapping[str, Figures]) -> Table:
    """One row for each architecture."""
    shown = Table(title="int8 against fp32: SQNR of the centred logits in dB")
    for heading in (
        "model",
        "int8",
        "ours",
        "nearest",
        "ONNX Runtime",
        "by",
        "symmetric",
        "ahead",
        "top-1",
        "theirs",
        "fp16",
    ):
        shown.add_column(heading, justify="left" if heading in ("model", "by") else "right")
    for name, figures in results.items():
        ours, (method, theirs), (_, symmetric) = (
            figures["ours"],
            best(figures, "asymmetric"),
            best(figures, "symmetric"),
        )
        shown.add_row(
            name,
            f"{ours['share']:.0%}",
            f"{ours['db']:.1f}",
            f"{ours['db_nearest']:.1f}",
            f"{theirs['db']:.1f}",
            method,
            f"{symmetric['db']:.1f}",
            f"{ours['db'] - max(theirs['db'], symmetric['db']):+.1f}",
            f"{ours['top1']:.1%}",
            f"{theirs['top1']:.1%}",
            f"{max(ours['fp16_relative'], ours['fp16_centred']):.1e}",
        )
    return shown


def markdown(results: Mapping[str, Figures]) -> str:
    """The table of `docs/models.md`."""
    lines = [
        "| model | in int8 | ours, dB | rounded to nearest | ONNX Runtime, dB | symmetric, dB | top-1, ours | theirs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in MODELS if name in results):
        ours, theirs = results[name]["ours"], best(results[name], "asymmetric")[1]
        figures = [f"{ours['share']:.0%}", f"{ours['db']:.1f}", f"{ours['db_nearest']:.1f}", f"{theirs['db']:.1f}"]
        figures.append(f"{best(results[name], 'symmetric')[1]['db']:.1f}")
        lines.append(f"| {name} | {' | '.join(figures)} | {ours['top1']:.1%} | {theirs['top1']:.1%} |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--model",
    "names",
    multiple=True,
    type=click.Choice([known.name for known in ARCHITECTURES]),
    help="Repeatable; all if left out.",
)
@click.option(
    "--samples",
    "count",
    default=256,
    show_default=True,
    type=click.IntRange(2),
    help="Inputs that models are judged on.",
)
@click.option(
    "--calibration", default=64, show_default=True, type=click.IntRange(STRIDE), help="Other inputs, for the scales."
)
@click.option("--small", is_flag=True, help="Architectures of an eighth of the channels, or two layers: for tests.")
@click.option(
    "--json",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keeps results; models it has are not done again.",
)
def main(names: tuple[str, ...], count: int, calibration: int, small: bool, file: Path | None) -> None:
    """Compares int8 models, ours and ONNX Runtime's, with fp32."""
    calibration -= calibration % STRIDE
    key = f"{count} samples, {calibration} for calibration" + (", small" if small else "")
    results = kept(names or MODELS, key, file, lambda name, say: measure(name, count, calibration, say, small=small))
    console = Console()
    console.print(table(results))
    console.print(f"{key}; {os.cpu_count()} cores; ahead: of ONNX Runtime's better form; top-1, theirs: asymmetric")


if __name__ == "__main__":
    main()
