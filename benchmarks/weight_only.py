"""How near 4-bit weights come to fp32: `w4a16` and ONNX Runtime's 4-bit quantiser, on the same models and data.

    python -m benchmarks.weight_only [--model NAME …] [--samples 64] [--calibration 32] [--json FILE]

All are given the same folded model, and are judged on `--samples` inputs that ours has not seen, as in
`benchmarks.quantisation`: dB of the centred logits, and how often the largest stays the largest. All quantise the same
products, those with constant weights but the last, in blocks of 128 rows: ours with scales alone, rounded by the
calibration inputs, or to nearest; ONNX Runtime's `MatMulNBitsQuantizer`, which looks at weights alone, with its default
algorithm, symmetric, and with zero points. Activations are fp32 in all, so that nothing but the weights differs. All
are run by ONNX Runtime with graph optimisations off.

With `--json`, results are kept in that file and models that it has are not done again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import onnx
import onnx_ir as ir
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import environment, kept, revision
from benchmarks.models import architecture, samples, write
from benchmarks.quantisation import CALIBRATION_SEED, SAMPLE_SEED, TRANSFORMERS, Logits, silence
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import copy_of, fused_nodes, is_constant, plugin_inputs
from tilewright.tuner.model.precision.grouped import (
    LARGEST_GROUP,
    WEIGHT_ONLY,
    GroupedWeights,
    matrix_of,
    quantise_matrix,
)
from tilewright.tuner.model.precision.rounding import round_groups
from tilewright.tuner.model.precision.rules import weight_plan
from tilewright.tuner.model.reading.read import read_model, write_model

Figures = dict[str, Any]

KIND = "w4a16"
MODELS = tuple(f"{name}_opset17" for name in TRANSFORMERS)
FORMS = {
    "ours": "ours",
    "nearest": "rounded to nearest",
    "symmetric": "ONNX Runtime, symmetric",
    "zeros": "with zero points",
}
"""What is measured, and what the table calls it."""


def compared(folded: ir.Model, fused: ir.Model) -> list[str]:
    """Names of the products whose weights all quantise: those that are `MatMul`, as ONNX Runtime's quantiser has it."""
    plan, _ = weight_plan(fused, KIND, None)
    products = {node.name for node in folded.graph if node.op_type == "MatMul"}
    return [name for name, precision in plan.items() if precision.kind == KIND and name in products]


def numbers(weights: GroupedWeights) -> Any:
    """What 4-bit weights stand for, (K, N) in fp32."""
    scales = weights.scales.astype("float32")
    rows = scales.repeat(weights.group, axis=0)[: len(weights.values)] if weights.group else scales
    return (weights.values.astype("float32") - 8) * rows


def with_weights(fused: ir.Model, weights: Mapping[str, GroupedWeights]) -> ir.Model:
    """A fused model in fp32 whose products have the numbers that 4-bit weights stand for."""
    made = copy_of(fused)
    for node in fused_nodes(made):
        given = weights.get(node.name or "")
        if given is None:
            continue
        b = plugin_inputs(node)["b"]
        array = numbers(given)
        value = ir.Value(
            name=f"{node.name}_numbers",
            type=b.type,
            shape=b.shape,
            const_value=ir.tensor(array if tuple(array.shape) == tuple(b.shape or ()) else array.T.copy()),
        )
        made.graph.initializers.add(value)
        node.replace_input_with(list(node.inputs).index(b), value)
    return made


def theirs(folded: Path, products: list[str], *, symmetric: bool, to: Path) -> Path:
    """ONNX Runtime's model."""
    model = onnx.load(folded)
    others = [node.name for node in model.graph.node if node.name not in products]
    with silence():
        quantiser = MatMulNBitsQuantizer(
            model, bits=WEIGHT_ONLY[KIND], block_size=LARGEST_GROUP, is_symmetric=symmetric, nodes_to_exclude=others
        )
        quantiser.process()
        quantiser.model.save_model_to_file(str(to), use_external_data_format=folded.stat().st_size > 2**30)
    return to


def measure(name: str, count: int, calibration: int, *, small: bool = False) -> Figures:
    """All figures of one architecture."""
    known = architecture(name)
    with tempfile.TemporaryDirectory(prefix="tilewright-") as made:
        folder = Path(made)
        model = read_model(write(name, folder, small=small))
        fold(model)
        for index, node in enumerate(model.graph):
            node.name = node.name or f"node_{index}"
        path = folder / "folded.onnx"
        write_model(model, path)
        given = samples(name, calibration, CALIBRATION_SEED, small=small)
        logits = Logits(model, known.logits, samples(name, count, SAMPLE_SEED, small=small))
        shape = next(value for node in model.graph for value in node.outputs if value.name == known.logits).shape
        classes = max(length for length in shape or () if isinstance(length, int))
        fused = copy_of(model)
        fuse(fused)
        products = compared(model, fused)
        layers = {node.name: node for node in fused_nodes(fused) if node.name in products}
        plan = {layer: precision for layer, precision in weight_plan(fused, KIND, None)[0].items() if layer in layers}
        rounded = round_groups(fused, plan, given)
        nearest = {layer: quantise_matrix(matrix_of(node), WEIGHT_ONLY[KIND]) for layer, node in layers.items()}
        models: dict[str, ir.Model | Path] = {
            "ours": with_weights(fused, rounded),
            "nearest": with_weights(fused, nearest),
            "symmetric": theirs(path, products, symmetric=True, to=folder / "symmetric.onnx"),
            "zeros": theirs(path, products, symmetric=False, to=folder / "zeros.onnx"),
        }
        figures: Figures = {
            "products": len(products),
            "of": sum(is_constant(plugin_inputs(node).get("b")) for node in fused_nodes(fused)),
            "environment": environment()
            | {"revision": revision(), **{each: version(each) for each in ("onnx", "onnxruntime")}},
        }
        for form, each in models.items():
            found = logits.of(each)
            figures[form] = {"db": logits.decibels(found), "top1": logits.agreement(found, classes)}
    return figures


def table(results: Mapping[str, Figures]) -> Table:
    """One row for each architecture."""
    shown = Table(title="4-bit weights against fp32: SQNR of the centred logits in dB, and top-1")
    for heading in ("model", "products", *FORMS.values()):
        shown.add_column(heading, justify="left" if heading == "model" else "right")
    for name, figures in results.items():
        cells = (f"{figures[form]['db']:.1f}, {figures[form]['top1']:.1%}" for form in FORMS)
        shown.add_row(name, str(figures["products"]), *cells)
    return shown


@click.command()
@click.option("--model", "names", multiple=True, type=click.Choice(MODELS), help="Repeatable; all if left out.")
@click.option(
    "--samples",
    "count",
    default=64,
    show_default=True,
    type=click.IntRange(2),
    help="Inputs to be judged on.",
)
@click.option(
    "--calibration", default=32, show_default=True, type=click.IntRange(2), help="Other inputs, for the rounding."
)
@click.option("--small", is_flag=True, help="Architectures of two layers: for tests.")
@click.option(
    "--json",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keeps results; models it has are not done again.",
)
def main(names: tuple[str, ...], count: int, calibration: int, small: bool, file: Path | None) -> None:
    """Compares models of 4-bit weights, ours and ONNX Runtime's, with fp32."""
    key = f"{count} samples, {calibration} for calibration" + (", small" if small else "")
    results = kept(names or MODELS, key, file, lambda name, _: measure(name, count, calibration, small=small))
    console = Console()
    console.print(table(results))
    console.print(key)


if __name__ == "__main__":
    main()
