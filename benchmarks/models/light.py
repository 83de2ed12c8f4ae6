"""The nine image classifiers that come with onnx's own tests, `onnx/backend/test/data/light/*.onnx`.

They are real graphs as Caffe2 exported them, at opset 9, but for the large weights: `ConstantOfShape` nodes stand in
for them to make the files small.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from benchmarks.models.operators import array_of, shape_of
from benchmarks.models.parameters import Kind, Parameter

OPSET, SIZE = 9, 224
FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"

LOGITS: Mapping[str, str] = {
    "bvlc_alexnet": "r24",
    "densenet121": "fc6_1",  # has no Softmax
    "inception_v1": "r143",
    "inception_v2": "r507",
    "resnet50": "r174",
    "shufflenet": "r201",
    "squeezenet": "r65",  # behind a Relu and the average over places
    "vgg19": "r46",
    "zfnet512": "r20",
}
"""By architecture, the value that its Softmax makes probabilities of, of shape (1, 1000) or (1, 1000, 1, 1)."""

DIVISOR: Mapping[str, int] = {"shufflenet": 2}
SMALL_DIVISOR = 8
"""A small model has this many times fewer channels in every layer, and so about the square of it fewer weights and
FLOPs. ShuffleNet's are no multiples of 8."""

CLASSES = 1000
"""The width of the last layer, which stays."""

SHIFT_MEAN, SHIFT_STD, GAIN_STD = 0.5, 0.3, 0.2
"""Before a Relu a channel has about unit variance and this mean: it passes two values of three."""

BRANCH = 0.5
"""Standard deviation of what is added in a residual sum, relative to others: it grows slowly."""

LOGITS_STD = 2.0
"""Of each logit over inputs, whose mean the last layer's bias takes away, but for a random rest. Logits of trained
classifiers are so; without it an average over 7 x 7 places behind a Relu leaves them much the same for all inputs (of
the small ResNet-50's variance 5 % would depend on the input)."""


def read(name: str, *, small: bool = False) -> tuple[ir.Model, dict[str, Parameter]]:
    """An architecture without its numbers, and what each of its parameters is.

    Against the file: weights are initializers instead of `ConstantOfShape` nodes, no longer graph inputs as IR version
    3 wanted them, and without data until they are seeded. Nodes, opset and the names of all values stay.
    """
    model = ir.load(FOLDER / f"light_{name}.onnx")
    graph = model.graph
    model.ir_version = 8
    model.producer_name = "tilewright benchmarks"
    divisor = DIVISOR.get(name, SMALL_DIVISOR) if small else 1
    for node in list(graph):
        if node.op_type == "ConstantOfShape":
            shape, output = array_of(node.inputs[0]).tolist(), node.outputs[0]
            weight = ir.Value(name=output.name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
            output.name = None
            output.replace_all_uses_with(weight)
            graph.remove(node, safe=True)
            graph.initializers.add(weight)
    graph.inputs[:] = [value for value in graph.inputs if value.name not in graph.initializers]
    for unused in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[unused]
    found = parameters(graph)
    for parameter, role in found.items():
        if role.kind is not Kind.CONSTANT:
            value = graph.initializers[parameter]
            value.shape = ir.Shape(shape_of(value))
            value.const_value = None
    if divisor > 1:
        narrow(graph, divisor)
    return model, found


def parameters(graph: ir.Graph) -> dict[str, Parameter]:
    """What each initializer is, by the op that takes it. The last layer makes the logits."""
    found = {name: Parameter(Kind.CONSTANT) for name in graph.initializers}
    layers = [node for node in graph if node.op_type in ("Conv", "Gemm")]

    def note(value: ir.Value | None, parameter: Parameter) -> None:
        while value is not None and (node := value.producer()) is not None:  # a Reshape or Unsqueeze of it
            value = node.inputs[0]
        if value is not None and value.name in found:
            found[value.name] = parameter

    for node in graph:
        if node in layers:
            followers = [use.node.op_type for use in node.outputs[0].uses()]
            last = node is layers[-1]
            std, shift = (LOGITS_STD, 0.0) if last else (1.0, SHIFT_MEAN)
            kind = Kind.NORMED if followers == ["BatchNormalization"] else Kind.WEIGHT
            tuned = node.op_type == "Conv" and not last
            axis = 0 if node.inputs[1] in graph.initializers.values() else 2  # of (1, 1, N, K), behind a Reshape
            spread = 0.0 if last else GAIN_STD
            note(node.inputs[1], Parameter(kind, std, axis=axis, channels=True, tuned=tuned, spread=spread))
            if len(node.inputs) > 2:
                note(node.inputs[2], Parameter(Kind.BIAS, mean=shift, std=SHIFT_STD * std))
        elif node.op_type == "BatchNormalization":
            followers = [use.node.op_type for use in node.outputs[0].uses()]
            size = BRANCH if followers == ["Sum"] else 1.0
            random = 0.0 if followers == ["Mul"] else size  # Caffe's has scale and shift in nodes of their own
            note(node.inputs[1], Parameter(Kind.GAIN, mean=size, std=GAIN_STD * random))
            note(node.inputs[2], Parameter(Kind.BIAS, mean=SHIFT_MEAN * random, std=SHIFT_STD * random))
            note(node.inputs[3], Parameter(Kind.MEAN))
            note(node.inputs[4], Parameter(Kind.VARIANCE))
        elif node.op_type == "Mul":
            note(node.inputs[1], Parameter(Kind.GAIN, mean=1.0, std=GAIN_STD))
        elif node.op_type == "Add":
            note(node.inputs[1], Parameter(Kind.BIAS, mean=SHIFT_MEAN, std=SHIFT_STD))
    return found


def narrow(graph: ir.Graph, divisor: int) -> None:
    """Divides the channels of all layers, but for the colours that come in and the classes that go out."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            continue
        shape = shape_of(value)
        reshaped = shape[:2] == (1, 1)  # a Gemm's, as Caffe kept it
        channels = shape[2:] if reshaped else shape
        kept = {0} if channels[0] == CLASSES else set()
        taker = next(iter(value.uses())).node
        if len(channels) > 1 and (channels[1] == 1 or taker.inputs[0] in graph.inputs):
            kept.add(1)  # depthwise, or the colours
        divided = [
            length if index in kept or index > 1 else exact(length, divisor, value.name)
            for index, length in enumerate(channels)
        ]
        value.shape = ir.Shape([*shape[:2], *divided] if reshaped else divided)
    for node in graph:
        group = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
        if group > 1 and shape_of(node.inputs[1])[1] == 1:
            node.attributes["group"] = ir.AttrInt64("group", exact(group, divisor, node.name))
        if node.op_type == "Reshape":
            target = node.inputs[1]
            lengths = array_of(target).copy()
            place = 2 if len(lengths) == 5 else 1  # (1, groups, channels of a group, height, width), or channels second
            lengths[place] = exact(int(lengths[place]), divisor, node.name)
            if target is not None:
                target.const_value = ir.tensor(lengths, name=target.name)


def exact(length: int, divisor: int, name: str | None) -> int:
    """The quotient, which must be whole."""
    if length % divisor:
        raise ValueError(f"{name}: {length} channels are no multiple of {divisor}")
    return length // divisor


def data_input(name: str) -> str:
    """The name of the input that images, (1, 3, 224, 224), go to."""
    graph = onnx.load(FOLDER / f"light_{name}.onnx").graph
    weights = {tensor.name for tensor in graph.initializer}
    return next(str(value.name) for value in graph.input if value.name not in weights)
