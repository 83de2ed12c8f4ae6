"""A model run node by node in ONNX Runtime, on a few samples at once, with somebody watching or stepping in.

Seeding needs the activations of a layer before it decides the numbers of the next one. A session per layer over all
that is before it would take n passes for n layers; this is one pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
Samples = list[Array]
"""A value of every sample, in order; of one array where it is the same for all."""

Step = Callable[[ir.Node, "list[Samples | None]"], "list[Samples]"]

HEAVY = {"Conv", "Gemm", "MatMul"}
"""Only these are given more than one thread: waking others costs more than the rest takes."""


def session_options(threads: int = 0) -> onnxruntime.SessionOptions:
    """ONNX Runtime as it is used here: nothing fused or rewritten, same bits every time. `threads` 0: one per core."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.use_deterministic_compute = True
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Idle threads of a session would take the cores from those of the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class Operators:
    """Sessions of one node each, made when first needed and shared by nodes with the same attributes and types."""

    def __init__(self, opset_imports: Mapping[str, int]) -> None:
        self._imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opset_imports.items()]
        self._sessions: dict[tuple[Any, ...], onnxruntime.InferenceSession] = {}

    def __call__(self, node: ir.Node, inputs: list[Samples | None]) -> list[Samples]:
        """The outputs of the node for every sample."""
        given = {f"i{index}": samples for index, samples in enumerate(inputs) if samples is not None}
        session = self._session_for(node, [samples[0].dtype if samples else None for samples in inputs])
        rows = [
            session.run(None, {name: samples[index % len(samples)] for name, samples in given.items()})
            for index in range(max((len(samples) for samples in given.values()), default=1))
        ]
        return [list(column) for column in zip(*rows, strict=True)]

    def _session_for(self, node: ir.Node, dtypes: Sequence[np.dtype[Any] | None]) -> onnxruntime.InferenceSession:
        types = tuple(None if dtype is None else dtype.str for dtype in dtypes)
        wanted = tuple(bool(output.name) for output in node.outputs)
        proto = ir.serde.serialize_node(node)
        attributes = tuple(sorted(attribute.SerializeToString() for attribute in proto.attribute))
        key = (node.domain, node.op_type, attributes, types, wanted)
        if key not in self._sessions:
            self._sessions[key] = self._session(proto, types, wanted)
        return self._sessions[key]

    def _session(
        self, node: onnx.NodeProto, types: Sequence[str | None], wanted: Sequence[bool]
    ) -> onnxruntime.InferenceSession:
        del node.input[:], node.output[:]
        node.input.extend("" if kind is None else f"i{index}" for index, kind in enumerate(types))
        node.output.extend(f"o{index}" if want else "" for index, want in enumerate(wanted))
        inputs = [
            onnx.helper.make_tensor_value_info(f"i{index}", onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
            for index, kind in enumerate(types)
            if kind is not None
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = onnx.helper.make_graph([node], "node", inputs, outputs)
        model = onnx.helper.make_model(graph, opset_imports=self._imports, ir_version=10)
        options = session_options(0 if node.op_type in HEAVY else 1)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def walk(model: ir.Model, feeds: Sequence[Feed], step: Step) -> None:
    """Runs the graph in order on all feeds: `step` is given every node with its inputs, and answers its outputs, as an
    `Operators` does. What no later node needs is let go."""
    graph = model.graph
    values: dict[ir.Value, Samples] = {value: [feed[value.name or ""] for feed in feeds] for value in graph.inputs}
    left = Counter(value for node in graph for value in node.inputs if value is not None)
    for node in graph:
        outputs = step(node, [None if value is None else samples_of(value, values) for value in node.inputs])
        for value in node.inputs:
            if value is not None:
                left[value] -= 1
                if not left[value]:
                    values.pop(value, None)
        named = [value for value in node.outputs if value.name]
        values.update((value, samples) for value, samples in zip(named, outputs, strict=True) if left[value])


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """The static shape of a value that has one."""
    if value is None or value.shape is None:
        raise ValueError(f"{value} has no shape")
    return value.shape.numpy()


def array_of(value: ir.Value | None) -> Array:
    """The data of an initializer that has it."""
    if value is None or value.const_value is None:
        raise ValueError(f"{value} has no data")
    return value.const_value.numpy()


def samples_of(value: ir.Value, values: Mapping[ir.Value, Samples]) -> Samples:
    """Of a value that was computed, or is an initializer."""
    if value in values:
        return values[value]
    return [array_of(value)]
