"""A report of a small model that went through; what tuning, precision search and files are said to be is made up."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache

import numpy as np
import onnx_ir as ir
from onnx import helper

from tests.tuner.model.graphs import model_of, normal
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.bodies import attach_bodies
from tilewright.tuner.model.graph import dtype_name, fused_nodes, make_fused
from tilewright.tuner.model.report.document import (
    Artefact,
    CalibrationPart,
    DevicePart,
    ErrorPart,
    EstimatePart,
    FusedLayer,
    FusionPart,
    LayerPlan,
    LeftNode,
    MemoryPart,
    ModelPart,
    ModelReport,
    ParetoPoint,
    PrecisionPart,
    TensorPart,
    TuningRow,
    UnsupportedRow,
    WorkloadPart,
    WorkloadRow,
)
from tilewright.tuner.model.report.estimate import estimate, pairing, roofs
from tilewright.tuner.model.report.memory import memory_of
from tilewright.tuner.model.verify.compare import compare
from tilewright.tuner.model.workloads import workloads

DEVICE = resolve_device("rtx3090")
LAYERS = 3


def original(prefix: str = "") -> ir.Model:
    """A perceptron; `prefix` begins every name of a node and of the input."""
    nodes, last = [], f"{prefix}x"
    constants = {}
    for index in range(LAYERS):
        constants[f"w{index}"] = normal(index, 256, 256) / np.float32(16)
        constants[f"b{index}"] = normal(10 + index, 256)
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"], f"{prefix}matmul{index}"))
        nodes.append(helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"], f"{prefix}add{index}"))
        nodes.append(helper.make_node("Relu", [f"a{index}"], [f"r{index}"], f"{prefix}relu{index}"))
        last = f"r{index}"
    nodes.append(helper.make_node("Softmax", [last], ["y"], f"{prefix}softmax"))
    return model_of(nodes, {f"{prefix}x": (64, 256)}, ["y"], constants)


def changed(prefix: str = "") -> ir.Model:
    """The same, fused."""
    model = original(prefix)
    last = model.graph.inputs[0]
    for index in range(LAYERS):
        chain = [
            node
            for node in model.graph
            if (node.name or "")[len(prefix) :] in (f"matmul{index}", f"add{index}", f"relu{index}")
        ]
        inputs = {
            "a": last,
            **{key: model.graph.initializers[f"{short}{index}"] for key, short in (("b", "w"), ("bias", "b"))},
        }
        node = make_fused("gemm", inputs, {"activation": "relu"}, name=f"{prefix}layer{index}")
        node.outputs[0].name = f"r{index}"
        model.graph.insert_before(chain[0], node)
        ir.convenience.replace_all_uses_with(chain[-1].outputs[0], node.outputs[0])
        model.graph.remove(list(reversed(chain)), safe=True)
        last = node.outputs[0]
    attach_bodies(model)
    return model


def tensors(values: list[ir.Value]) -> tuple[TensorPart, ...]:
    return tuple(TensorPart(str(each.name), dtype_name(each), tuple(each.shape or ())) for each in values)  # type: ignore[arg-type]


@cache
def sample(prefix: str = "", *, plain: bool = False) -> ModelReport:
    """The report; `plain` leaves out what a run may: tuning, precision, errors, files."""
    before, after = original(prefix), changed(prefix)
    feeds = [{f"{prefix}x": normal(100 + index, 64, 256)} for index in range(2)]
    layers = fused_nodes(after)
    names = [str(node.name) for node in layers]
    tuned = {} if plain else {names[0]: (9.5, "measured"), names[1]: (11.25, "transferred")}
    pairs = pairing(before, after)
    estimates = estimate(before, DEVICE), estimate(after, DEVICE, tuned)
    asked = workloads(after)
    problem = str(asked.layers[0].problem)
    digest = hashlib.sha256(prefix.encode()).hexdigest()
    report = ModelReport(
        tilewright="0.1.0",
        model=ModelPart(
            *(f"{prefix}model.onnx", digest, 790_000, 17, 21, len(before.graph)),
            inputs=tensors(list(before.graph.inputs)),
            outputs=tensors(list(before.graph.outputs)),
            folded={"constants": 2, "batch norms": 0},
        ),
        device=DevicePart.of(DEVICE),
        fusion=FusionPart(
            *(len(before.graph), len(after.graph), {"bias": 3, "activation": 3, "MatMul": 3}),
            layers=tuple(
                FusedLayer(str(n.name), n.op_type, pairs[str(n.name)], "Softmax is no epilogue") for n in layers
            ),
            left=(LeftNode(f"{prefix}softmax", "attention", "no product in front of it"),),
        ),
        workloads=WorkloadPart(
            rows=tuple(
                WorkloadRow(
                    *(row["first"], row["op"], problem, row["count"], row["flops"], row["flops_share"]),
                    *(row["bytes"], row["bytes_share"]),
                )
                for row in asked.rows()
            ),
            unsupported=(UnsupportedRow(f"{prefix}lstm", "LSTM", "no pattern takes LSTM", None),),
            flops=asked.flops,
            coverage=asked.coverage,
        ),
        tuning=(),
        precision=None,
        errors=(),
        memory=MemoryPart(memory_of(before), memory_of(after)),
        estimate=EstimatePart(*estimates, roofs(DEVICE, *estimates), pairs),
        artefacts=(),
        warnings=(),
    )
    if plain:
        return report
    layer_names = {f"r{index}": f"r{index}" for index in range(LAYERS)}
    return replace(
        report,
        tuning=(
            TuningRow("gemm", problem, "64×64×32 warps 4 stages 3", 9.5, "measured", 0.88, 0.31, "ok", "", 120),
            TuningRow("gemm", problem, None, None, None, None, None, "compile_error", f"{prefix}refused", 4),
        ),
        precision=PrecisionPart(
            *("auto", "fp16"),
            layers=tuple(LayerPlan(name, "int8", "no rule keeps it higher") for name in names),
            calibration=CalibrationPart("random", 16, ("minmax", "entropy")),
            measure="relative error",
            pareto=(ParetoPoint(30.5, "predicted", 0.012, 0, False), ParetoPoint(33.0, "predicted", 0.0031, 1, True)),
        ),
        errors=(
            ErrorPart(
                *("model.fused.onnx", "random", "max=1e-05", ()),
                comparison=compare(before, after, feeds, layers=layer_names),
            ),
            ErrorPart(
                "model.int8.onnx",
                f"{prefix}data.npz",
                "top1=1",
                ("y: top1=0.5, wanted at least 1",),
                compare(before, after, feeds),
            ),
        ),
        artefacts=(
            Artefact("model.fused.onnx", "onnx", 790_123, digest, "fused, for ONNX Runtime and TensorRT"),
            Artefact("model.int8.onnx", "onnx", 201_000, digest, "lowered to int8"),
            Artefact("model.engine", "engine", 400_000, digest, "TensorRT's engine"),
        ),
    )
