"""Reading an ONNX file that isn't trusted: `read_model`.

In this order: size and format; text; every tensor checked and the weights taken out; functions, names and order
checked; sizes of the inputs bound; functions inlined, the model checked by onnx and its opset converted (`convert.py`);
ONNX Runtime's own operators written in standard ones (`contrib`); shapes inferred; the weights put back. Nothing in a
file is executed, nothing outside the file's folder is read, and what a file can ask for in time and memory is bounded:
`LARGEST_FILE`, `names.LARGEST_GRAPH`, `shapes.LARGEST_VALUE`, `constants.LARGEST_FOLDED`, `writer.MOST_SHARED`.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from tilewright.tuner.model.graph import scalar, unique_names
from tilewright.tuner.model.messages import fault, quiet, quoted
from tilewright.tuner.model.reading.contrib.rewrite import rewrite, rounds_otherwise, set_apart
from tilewright.tuner.model.reading.convert import check, converted, inlined, opset_of, spell_out, typed_casts
from tilewright.tuner.model.reading.external import ExternalFiles
from tilewright.tuner.model.reading.names import check_functions, check_operators, check_text, put_in_order
from tilewright.tuner.model.reading.shapes import (
    bind_shapes,
    check_outputs,
    check_sizes,
    fold_for_shapes,
    infer_shapes,
    unknown_shapes,
)
from tilewright.tuner.model.reading.shapes import parse_shapes as parse_shapes
from tilewright.tuner.model.reading.weights import put_back, take_weights
from tilewright.tuner.model.write import write_model as write_model
from tilewright.tuning_db.errors import ModelError

LARGEST_FILE = 2**31 - 1
"""Bytes of the file without its external data: protobuf's own limit."""

OLDEST_IR, OLDEST_OPSET = 3, 9

DEFAULTS = "tilewright inputs with defaults"
"""Among a read model's `meta`, the names of the file's inputs that have values there, and are constants now."""

FILE_OPSET = "tilewright opset of the file"
"""Among a read model's `meta`, the opset that the file has."""

LEFT = "tilewright operators left"
"""Among a read model's `meta`, nodes of ONNX Runtime's own operators that have standard forms, but not as they are used
there: why, by the node's name."""

OTHERWISE = "tilewright rounded otherwise"
"""Among a read model's `meta`, whether ONNX Runtime rounds in the file's operators where what was read doesn't."""

_IR = 10  # the IR version of opset 21


def read_model(
    path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None, dims: Mapping[str, int] | None = None
) -> ir.Model:
    """The model in an ONNX file, with static shapes, functions inlined and an opset as of `convert.converted`.

    `shapes` gives inputs their shapes, `dims` named dimensions their sizes. Every value has a data type and a
    static shape, but for what onnx can't infer: outputs of `com.microsoft` operators that stay (`LEFT`, and those
    without a standard form), and of those whose result's size depends on values. Where shapes depend on constant
    arithmetic, that is folded. Every node has a name of its own. Inputs that have a default become constants
    (`DEFAULTS`); the file's opset is noted (`FILE_OPSET`). Weights are mapped, if external, else copied once: memory
    peaks at twice the file.

    Raises:
        ModelError: it is no ONNX file, broken, hostile or beyond what is supported; or an input has no size.
    """
    model = _parse(path)
    check_text(model)
    names = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in names]
    # Before IR version 4 every weight had to be an input.
    defaults = [value.name for value in model.graph.input if value.name in names and model.ir_version >= 4]
    opset = opset_of(model)
    light, weights = take_weights(model, ExternalFiles(path.parent))
    del model
    light.ir_version = max(light.ir_version, _IR)
    check_functions(light)
    put_in_order(light)
    bind_shapes(light, inputs, shapes or {}, dims or {})
    light = inlined(light)
    spell_out(light)
    check_operators(light)
    set_apart(light)
    check(light)
    light = converted(light)
    otherwise = rounds_otherwise(light)
    light, left = rewrite(light, weights)
    light = infer_shapes(light)
    typed_casts(light)
    try:
        with quiet():
            result = ir.from_proto(light)
    except Exception as error:  # noqa: BLE001 - whatever a malformed message makes the library raise
        raise ModelError(f"{path} can't be read: {fault(error)}") from None
    put_back(result, weights)
    if unknown_shapes(result):
        fold_for_shapes(result)
    check_outputs(result)
    check_sizes(result)
    unique_names(result)
    _check_repeatable(result)
    result.meta[DEFAULTS] = defaults
    result.meta[FILE_OPSET] = opset
    result.meta[LEFT] = left
    result.meta[OTHERWISE] = otherwise
    return result


def _check_repeatable(model: ir.Model) -> None:
    """Refuses a model that training left with dropout: it gives another result at every run."""
    for node in model.graph.all_nodes():
        if node.domain != "" or node.op_type != "Dropout" or len(node.inputs) < 3:
            continue
        if scalar(node.inputs[2]) and scalar(node.inputs[1]) != 0:
            raise ModelError(
                f"node {quoted(node.name or '')}, a Dropout, has training_mode=true, so that no two runs agree: "
                f"export the model for inference (in PyTorch after model.eval())"
            )


def _parse(path: Path) -> onnx.ModelProto:
    try:
        state = path.stat()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:  # a null character
        raise ModelError(f"{quoted(str(path))} is no path: {error}") from None
    try:
        if stat.S_ISDIR(state.st_mode):
            raise ModelError(f"{path} is a folder: name the .onnx file in it")
        if not stat.S_ISREG(state.st_mode):
            raise ModelError(f"{path} is not a regular file")
        if state.st_size == 0:
            raise ModelError(f"{path} is empty")
        if state.st_size > LARGEST_FILE:
            raise ModelError(
                f"{path} has {state.st_size} bytes: an ONNX file has at most {LARGEST_FILE}, and further weights in "
                f"external data"
            )
        with path.open("rb") as stream:
            content = stream.read(state.st_size)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # noqa: BLE001 - protobuf's DecodeError, which has no types
        raise ModelError(f"{path} is not an ONNX file, or is truncated: its {len(content)} bytes don't parse") from None
    if not model.ir_version or not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"{path} is not an ONNX file, or is truncated: it has no graph with nodes in it")
    if not OLDEST_IR <= model.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"{path} has IR version {model.ir_version}: onnx {onnx.__version__} reads {OLDEST_IR} to {onnx.IR_VERSION}"
        )
    opsets = {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
    newest = onnx.defs.onnx_opset_version()
    if len(opsets) != 1 or not all(OLDEST_OPSET <= version <= newest for version in opsets):
        found = " and ".join(map(str, sorted(opsets))) or "no opset"
        raise ModelError(
            f"{path} imports {found} of the standard operators: it must be one from {OLDEST_OPSET} to {newest}, the "
            f"newest that onnx {onnx.__version__} knows"
        )
    return model
