"""The README of the folder that a model's files are written to: what they are, and the lines that load them.

Names of inputs and outputs are those of the file that came in, and so nothing to trust: they are written as JSON texts,
in which only ASCII is left, inside code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tilewright.tuner.model.report.document import ModelReport, TensorPart
from tilewright.tuner.model.report.units import BASELINE, bytes_text, factor_text, time_text
from tilewright.tuning_db.atomic import whole_file


def readme(report: ModelReport) -> str:
    """The text, in Markdown."""
    before, after = report.estimate.before, report.estimate.after
    models = [each for each in report.artefacts if each.kind == "onnx"]
    engines = [each for each in report.artefacts if each.kind == "engine"]
    lines = [f"# {_code(report.model.name)}, for {_code(report.device.name)}", ""]
    lines += [f"Made by Tilewright {report.tilewright} from a file with the SHA-256 `{report.model.sha256}`.", ""]
    lines += [line for warning in report.warnings for line in (f"Warning: {_code(warning)}", "")]
    if models:
        lines += ["In ONNX Runtime:", "", *_block(onnxruntime_lines(models[-1].file)), ""]
    if engines:
        lines += [f"In TensorRT, on a {_code(report.device.name)}:", "", *_block(tensorrt_lines(engines[-1].file)), ""]
    elif models:
        lines += [*_engine_text(report.device.name, models[-1].file), ""]
    if models or engines:
        lines += ["`feeds` has an array for each input:", "", *_tensors(report.model.inputs), ""]
        lines += ["and the outputs are:", "", *_tensors(report.model.outputs), ""]
    if models:
        lines += [*_inlined_text(models[-1].file), ""]
    lines += [
        f"Time of one run: {time_text(before.time_us)} before ({before.provenance}), {time_text(after.time_us)} after "
        f"({after.provenance}): {factor_text(before.time_us, after.time_us)}. Before is {BASELINE}.",
        *_caution(before.provenance, after.provenance),
        "",
        "| file | | size |",
        "|---|---|---|",
        *(f"| {_code(each.file)} | {each.what} | {bytes_text(each.bytes)} |" for each in report.artefacts),
        "",
    ]
    return "\n".join(lines)


def write_readme(report: ModelReport, path: Path) -> None:
    """Writes the text, whole or not at all.

    Raises:
        UsageError: the file can't be written.
    """
    with whole_file(path) as stream:
        stream.write(readme(report).encode())


def onnxruntime_lines(file: str) -> tuple[str, str, str]:
    """What loads a model in ONNX Runtime and runs it on `feeds`, arrays by input name."""
    return (
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({json.dumps(file)})",
        "outputs = session.run(None, feeds)",
    )


def tensorrt_lines(file: str) -> tuple[str, str, str]:
    """What loads an engine and runs it on `feeds`; it needs neither this package's plugins nor a registration."""
    return (
        "import tilewright.kernels.tensorrt as plugins",
        f"runner = plugins.Runner({json.dumps(file)})",
        "outputs = runner(feeds)",
    )


def engine_lines(file: str) -> tuple[str, str]:
    """What builds the engine of a model, whose shapes are fixed."""
    return (
        "import tilewright.kernels.tensorrt as plugins",
        f"plugins.build_engine({json.dumps(file)}, {json.dumps(_renamed(file, '.engine'))})",
    )


def inlined_lines(file: str) -> tuple[str, str, str]:
    """What writes a model without its functions, beside it: its weights may be in a third file."""
    return (
        "import onnx, onnx.inliner",
        f"model = onnx.load({json.dumps(file)}, load_external_data=False)",
        f"onnx.save(onnx.inliner.inline_local_functions(model), {json.dumps(_renamed(file, '.inlined.onnx'))})",
    )


def _renamed(file: str, ending: str) -> str:
    return file.removesuffix(".onnx") + ending


def _engine_text(device: str, file: str) -> list[str]:
    return [
        f"On the {_code(device)}, with TensorRT, this builds the engine; shapes are fixed, so it takes no profiles:",
        "",
        *_block(engine_lines(file)),
        "",
        "The kernels in it are chosen by the tuning database of that machine. Tune there before, or bring the records: "
        "`autotune export` here, `autotune import` there. The command that made this does all of it there at once.",
    ]


def _inlined_text(file: str) -> list[str]:
    return [
        "What doesn't know ONNX's functions needs another file, which these lines make. So does TensorRT where this "
        "package's plugins are not registered, as in `trtexec`: it finds functions by name alone, and refuses a "
        "file in which several have one.",
        "",
        *_block(inlined_lines(file)),
    ]


def _caution(*provenances: str) -> list[str]:
    if all(each == "measured" for each in provenances):
        return []
    return ["What is predicted was worked out from the device's figures and never ran: measure before you rely on it."]


def _block(lines: Sequence[str]) -> list[str]:
    return ["```python", *lines, "```"]


def _tensors(tensors: Sequence[TensorPart]) -> list[str]:
    rows = [
        f"| {_code(each.name)} | {each.dtype} | {' × '.join(map(str, each.shape)) or 'a number'} |" for each in tensors
    ]
    return ["| name | data type | shape |", "|---|---|---|", *rows]


def _code(name: str) -> str:
    """A name, or a line with names in it, as Markdown's code, in a table or out of it."""
    text = json.dumps(name)[1:-1].replace("|", "\\u007c")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    blank = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{blank}{text}{blank}{fence}"
