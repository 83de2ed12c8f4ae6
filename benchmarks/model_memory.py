"""The peak memory of `autotune --model` on a large model, as a multiple of the model.

    python -m benchmarks.model_memory [--megabytes 1024] [--precision fp16] [--outside] [--json FILE]

The model is a chain of linear layers of random weights, so large in fp32, in one file or with its weights beside it
(`--outside`). Memory is the most that the process had in use at a time (`VmHWM`), libraries and mapped files included,
without the processes that compile; the share of the libraries alone is measured by the same command on a small model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import environment
from tilewright.tuner.model.write import write_model

WIDTH = 2048
ROWS = 16
SCRIPT = """
import sys
from tilewright.tuner.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        (peak,) = [line.split()[1] for line in status if line.startswith("VmHWM")]
    print("peak KiB", peak, file=sys.stderr)
"""


def chain(megabytes: int) -> ir.Model:
    """y = relu(… relu(x·W₁) …)·Wₙ, with as many (2048, 2048) weights as come to so many megabytes, and one at least."""
    random = np.random.default_rng(0)
    count = max(1, round(megabytes * 2**20 / (4 * WIDTH * WIDTH)))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([ROWS, WIDTH]))
    nodes, weights, value = [], [], x
    for index in range(count):
        array = (random.standard_normal((WIDTH, WIDTH), np.float32) * np.float32(np.sqrt(2 / WIDTH))).astype(np.float32)
        name = f"w{index}"
        weight = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=name),
        )
        weights.append(weight)
        nodes.append(ir.node("MatMul", [value, weight], name=f"layer{index}"))
        nodes.append(ir.node("Relu", [nodes[-1].outputs[0]], name=f"relu{index}"))
        for node in nodes[-2:]:
            node.outputs[0].name = f"{node.name}_out"
        value = nodes[-1].outputs[0]
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([ROWS, WIDTH])
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="chain")
    return ir.Model(graph, ir_version=10)


def peak_of(megabytes: int, precision: str, outside: bool) -> dict[str, Any]:
    """The size of a model and the peak of optimising it, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "model.onnx"
        model = chain(megabytes)
        if outside:
            ir.save(model, path, external_data="model.data")
        else:
            write_model(model, path)
        del model
        size = sum(file.stat().st_size for file in folder.iterdir())
        arguments = ["--device", "sm_86", "--model", str(path), "--output", str(folder / "build"), "--trials", "1"]
        arguments += ["--precision", precision, "--samples", "4", "--db", str(folder / "db"), "--quiet"]
        done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(done.stderr.strip())
        (peak,) = [line.split()[2] for line in done.stderr.splitlines() if line.startswith("peak KiB")]
    return {"model_bytes": size, "peak_bytes": int(peak) * 1024, "peak_over_model": int(peak) * 1024 / size}


@click.command(help=__doc__)
@click.option("--megabytes", default=1024, show_default=True, help="size of the model")
@click.option("--precision", default="fp16", show_default=True)
@click.option("--outside", is_flag=True, help="weights as external data")
@click.option("--json", "output", type=click.Path(path_type=Path), help="write the figures there")
def main(megabytes: int, precision: str, outside: bool, output: Path | None) -> None:
    """Prints the figures."""
    rows = {name: peak_of(size, precision, outside) for name, size in (("small", 1), ("large", megabytes))}
    table = Table("model", "model MiB", "peak MiB", "peak over model")
    for name, row in rows.items():
        sizes = [f"{row[key] / 2**20:.0f}" for key in ("model_bytes", "peak_bytes")]
        table.add_row(name, *sizes, f"{row['peak_over_model']:.2f}")
    Console().print(table)
    if output is not None:
        document = {"environment": environment(), "precision": precision, "outside": outside, "results": rows}
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
