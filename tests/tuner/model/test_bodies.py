"""What a body computes in ONNX Runtime is what the kernel's reference computes in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest

from tests.kernels.tensorrt import variants
from tests.tuner.model.graphs import normal, results, value
from tilewright.kernels.activations import ACTIVATIONS, activation, activation_name
from tilewright.kernels.problem import Problem
from tilewright.kernels.registry import find_kernel
from tilewright.kernels.tensorrt.catalogue import OPERATIONS
from tilewright.kernels.tensorrt.operation import PluginOperation
from tilewright.tuner.gate import compare
from tilewright.tuner.model.bodies import attach_bodies, body
from tilewright.tuner.model.graph import DTYPES, dtype_name, fused_nodes, make_fused, plugin_tensors, static_shape
from tilewright.tuning_db.errors import UnsupportedError

WITHOUT_BODY = ("alibi_slopes", "sinks")
JOBS = {
    name: job
    for name, job in variants.jobs().items()
    if not any("".join(part.capitalize() for part in word.split("_")) in job.plugin for word in WITHOUT_BODY)
}


def operation_of(op: str) -> PluginOperation:
    return next(each for each in OPERATIONS if each.kernel.name == op)


def alone(op: str, inputs: dict[str, ir.Value], constants: dict[str, np.ndarray], **settings: object) -> ir.Model:
    """A model of one fused node: what is no constant is an input."""
    names = ["out", *(brought for name, brought in operation_of(op).brings.items() if name in inputs)]
    node = make_fused(op, inputs, settings, name="layer", outputs=[ir.Value(name=name) for name in names])
    for name, array in constants.items():
        inputs[name].const_value = ir.tensor(array, name=name)
    graph = ir.Graph(
        [given for name, given in inputs.items() if name not in constants],
        node.outputs,
        nodes=[node],
        initializers=[inputs[name] for name in constants],
        opset_imports={"": 21},
        name="alone",
    )
    model = ir.Model(graph, ir_version=10)
    attach_bodies(model)
    return model


def run(model: ir.Model, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs; data types that NumPy lacks travel as the bits that they are."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {}
    for given in model.graph.inputs:
        array = np.ascontiguousarray(arrays[given.name or ""]).reshape(static_shape(given) or ())
        name = dtype_name(given)
        if name in ("bf16", "fp8e4m3"):
            bits = array.view(np.uint16 if name == "bf16" else np.uint8)
            feeds[given.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(DTYPES[name]))
        else:
            feeds[given.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    made = []
    for value_, out in zip(model.graph.outputs, session.run_with_ort_values(None, feeds), strict=True):
        kind = dtype_name(value_)
        # Through fp32, which holds them all: ONNX Runtime hands neither to NumPy.
        made.append(widened(out, kind) if kind in ("bf16", "fp8e4m3") else np.asarray(out.numpy()))
    return made


def widened(out: onnxruntime.OrtValue, kind: str) -> np.ndarray:
    cast = ir.node("Cast", [value("x", out.shape(), kind)], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].name, cast.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].shape = ir.Shape(out.shape())
    model = ir.Model(
        ir.Graph(list(cast.inputs), cast.outputs, nodes=[cast], opset_imports={"": 21}, name="cast"),  # type: ignore[arg-type]
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (made,) = session.run_with_ort_values(None, {"x": out})
    return np.asarray(made.numpy()).astype(ml_dtypes.bfloat16 if kind == "bf16" else ml_dtypes.float8_e4m3fn)


def check(model: ir.Model, problem: Problem) -> None:
    arrays = problem.inputs(0)
    kernel = find_kernel(problem.op)
    wanted = kernel.reference(problem, arrays)
    got = run(model, arrays)
    assert len(got) == len(wanted)
    for (name, expected), array in zip(wanted.items(), got, strict=True):
        assert compare(array.reshape(expected.shape), expected, kernel.tolerance(problem)[name]) is None, name


@pytest.mark.parametrize("name", JOBS)
def test_every_plugin_with_every_data_type(name):
    job = JOBS[name]
    sizes = iter(job.sizes[1])
    inputs = {}
    variant = variants.plugins()[job.plugin]
    for key, (dims, dtype) in zip(variant.inputs, job.inputs, strict=True):
        inputs[key] = value(key, [next(sizes) if isinstance(dim, list) else dim for dim in dims], dtype)
    problem = job.problem(*job.sizes[1])
    settings = dict(job.attributes)
    if problem.op == "attention":
        settings["scale"] = 0.0
    check(alone(problem.op, inputs, {}, **settings), problem)


GEMM = {"M": 33, "N": 48, "K": 64, "dtype": "fp32"}


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"a_layout": "col"}, {"trans_a": 1}),
        ({"b_layout": "col"}, {"trans_b": 1}),
        ({"b_layout": "col", "batch": 3}, {"trans_b": 1}),
        ({"gated": "halves", "activation": "silu", "bias": "fp32", "residual": "fp32"}, {}),
        ({"gated": "interleaved", "activation": "gelu_tanh"}, {}),
        ({"residual": "fp32", "residual_last": True, "activation": "relu"}, {"residual_last": 1}),
        ({"bias": "fp32", "bias_axis": "m"}, {}),
    ],
    ids=str,
)
def test_forms_of_gemm(fields, settings):
    from tilewright.kernels import GemmProblem

    problem = GemmProblem(**{**GEMM, **fields})
    arrays = problem.inputs(0)
    shapes = {name: array.shape for name, array in arrays.items()}
    if problem.batch == 1:
        shapes = {name: shape[1:] if len(shape) == 3 else shape for name, shape in shapes.items()}
    for name, layout in (("a", problem.a_layout), ("b", problem.b_layout)):
        if layout == "col":
            shapes[name] = (*shapes[name][:-2], shapes[name][-1], shapes[name][-2])
            arrays[name] = np.ascontiguousarray(arrays[name].swapaxes(-1, -2))
    if problem.bias_axis == "m":
        shapes["bias"] = (problem.M, 1)
    settings = {**settings, **{name: fields[name] for name in ("gated", "activation") if name in fields}}
    inputs = {name: value(name, shape) for name, shape in shapes.items()}
    model = alone("gemm", inputs, {}, **settings)
    wanted = find_kernel("gemm").reference(problem, problem.inputs(0))["out"]
    (got,) = run(model, arrays)
    assert compare(got.reshape(wanted.shape), wanted, find_kernel("gemm").tolerance(problem)["out"]) is None


@pytest.mark.parametrize("layout", ["row", "col"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("kind", "group"), [("int4", 0), ("int4", 32), ("int8", 0), ("int8", 32)])
def test_quantised_weights(kind, group, zero, layout):
    from tilewright.kernels import GemmProblem

    problem = GemmProblem(
        M=33,
        N=48,
        K=80,
        dtype="fp16",
        b_dtype=kind,
        b_layout=layout,
        b_scale="group" if group else "column",
        group_size=group,
        b_zero=zero,
        gated="halves",
        activation="silu",
    )
    arrays = {name: array.reshape(array.shape[-2:]) for name, array in problem.inputs(0).items()}
    if layout == "col":
        arrays["b"] = np.ascontiguousarray(arrays["b"].T)
    if not group:
        arrays |= {name: array.reshape(-1) for name, array in arrays.items() if name in ("b_scale", "b_zero")}
    arrays |= {name: array.view(np.int8) for name, array in arrays.items() if array.dtype == np.uint8}
    dtypes = {np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32", np.dtype(np.int8): "int8"}
    inputs = {name: value(name, array.shape, dtypes[array.dtype]) for name, array in arrays.items()}
    settings = {"weights": "int4"} if kind == "int4" else {}
    settings |= {"group_size": group, "trans_b": int(layout == "col"), "gated": "halves", "activation": "silu"}
    wanted = find_kernel("gemm").reference(problem, problem.inputs(0))["out"]
    (got,) = run(alone("gemm", inputs, {}, **settings), arrays)
    assert compare(got.reshape(wanted.shape), wanted, find_kernel("gemm").tolerance(problem)["out"]) is None


@pytest.mark.parametrize("word", [name for name in ACTIVATIONS if name != "none"])
def test_activations(word):
    name = activation_name({"clamp": "clamp:-0.5:1.5", "leaky_relu": "leaky_relu:0.2"}.get(word, word))
    x, one = normal(1, 40, 32), np.eye(32, dtype=np.float32)
    model = alone("gemm", {"a": value("a", x.shape), "b": value("b", one.shape)}, {"b": one}, activation=name)
    assert np.allclose(results(model, {"a": x})[0], activation(name)(x.astype(np.float64)), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"causal": True}, {"causal": 1}),
        ({"causal": True, "Skv": 40}, {"causal": 1}),
        ({"causal": True, "Skv": 9}, {"causal": 1}),  # the first queries see no key
        ({"window_left": 3, "window_right": 2}, {"window_left": 3, "window_right": 2}),
        ({"softcap": True}, {"softcap": 30.0}),
        ({"Hkv": 2}, {}),
        ({"Dv": 32}, {}),
        ({"bias": "fp32", "bias_batch": True, "bias_rows": False}, {}),
    ],
    ids=str,
)
def test_forms_of_attention(fields, settings):
    from tilewright.kernels import AttentionProblem

    problem = AttentionProblem(**{"B": 2, "H": 4, "Sq": 17, "Skv": 17, "D": 16, "dtype": "fp32", **fields})
    arrays = problem.inputs(0)
    model = alone("attention", {name: value(name, array.shape) for name, array in arrays.items()}, {}, **settings)
    check(model, problem)


@pytest.mark.parametrize("last", [0, 1])
def test_convolution_with_everything_else(last):
    from tilewright.kernels import Conv2dProblem

    fields = {"stride_h": 2, "stride_w": 1, "pad_top": 1, "pad_left": 2, "pad_bottom": 0, "pad_right": 1}
    fields |= {"dilation_h": 1, "dilation_w": 2, "groups": 4}
    problem = Conv2dProblem(
        N=2, H=11, W=13, C=16, K=24, R=3, S=3, dtype="fp32", layout="nchw", bias="fp32", residual="fp32",
        residual_last=bool(last), activation="hardswish", **fields,
    )  # fmt: skip
    arrays = problem.inputs(0)
    inputs = {name: value(name, array.shape) for name, array in arrays.items()}
    check(alone("conv2d", inputs, {}, activation="hardswish", residual_last=last, **fields), problem)


def test_a_norm_with_constants_of_its_own():
    from tilewright.kernels import RmsNormProblem

    problem = RmsNormProblem(M=6, N=24, dtype="fp32", weight="fp32")
    arrays = problem.inputs(0)
    inputs = {name: value(name, array.shape) for name, array in arrays.items()}
    (got,) = run(alone("rmsnorm", inputs, {}, eps=0.5, weight_offset=1.0), arrays)
    wanted = find_kernel("rmsnorm").reference(problem, arrays, eps=0.5, weight_offset=1.0)["out"]
    assert compare(got, wanted, find_kernel("rmsnorm").tolerance(problem)["out"]) is None


@pytest.mark.parametrize(
    ("kind", "weight", "out"),
    [("fp32", "fp32", "fp32"), ("fp16", "fp16", "fp16"), ("fp32", "fp16", "fp16"), ("bf16", "bf16", "bf16")],
)
def test_onnx_runtime_makes_one_kernel_of_a_norm(tmp_path, kind, weight, out):
    inputs = {"x": value("x", (4, 16), kind), "weight": value("weight", (16,), weight)}
    model = alone("rmsnorm", inputs, {}, out_dtype="default" if out == kind else out)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    made = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert [each for each in made if each != "Cast"] == ["SimplifiedLayerNormalization"]


def test_nodes_that_agree_share_a_body_and_others_do_not():
    nodes, before = [], value("x", (8, 16))
    weights = value("w", (16, 16))
    weights.const_value = ir.tensor(normal(0, 16, 16), name="w")
    for index, name in enumerate(("relu", "relu", "tanh")):
        node = make_fused("gemm", {"a": before, "b": weights}, {"activation": name}, name=f"n{index}")
        node.outputs[0].name = f"y{index}"
        before = node.outputs[0]
        nodes.append(node)
    graph = ir.Graph(
        [nodes[0].inputs[0]], [before], nodes=nodes, initializers=[weights], opset_imports={"": 21}, name="three"
    )
    model = ir.Model(graph, ir_version=8)
    attach_bodies(model)
    first, second, third = (node.domain for node in nodes)
    assert first == second != third
    assert [function.domain for function in model.functions.values()] == ["tilewright", first, third]
    x = normal(3, 8, 16)
    w = normal(0, 16, 16).astype(np.float64)
    wanted = np.tanh(np.maximum(np.maximum(x @ w, 0) @ w, 0) @ w)
    assert np.allclose(results(model, {"x": x})[0], wanted, atol=1e-4)
    # Once more, after a change: the old body goes.
    nodes[2].attributes["activation"] = ir.AttrString("activation", "relu")
    attach_bodies(model)
    assert len(model.functions) == 1
    assert set(model.opset_imports) == {"", first}


def test_readers_that_go_by_the_name_alone_find_a_function_that_they_can_not_run():
    """The first of a name, as TensorRT's parser takes it; every other reader goes by the domain as well."""
    x, weights, nodes = value("x", (8, 16)), value("w", (16, 16)), []
    weights.const_value = ir.tensor(normal(0, 16, 16), name="w")
    for index, name in enumerate(("relu", "tanh")):
        inputs = {"a": nodes[-1].outputs[0] if nodes else x, "b": weights}
        nodes.append(make_fused("gemm", inputs, {"activation": name}, name=f"n{index}"))
        nodes[-1].outputs[0].name = f"y{index}"
    graph = ir.Graph([x], nodes[1].outputs, nodes=nodes, initializers=[weights], opset_imports={"": 21}, name="two")
    model = ir.Model(graph, ir_version=10)
    attach_bodies(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    first = {}
    for function in proto.functions:
        first.setdefault(function.name, function)
    assert [node.op_type for node in first["FusedGemm"].node] == ["StringNormalizer"]  # TensorRT has no texts
    assert "register_the_plugins" in first["FusedGemm"].node[0].name
    inlined = onnx.inliner.inline_local_functions(proto)
    assert {node.op_type for node in inlined.graph.node} == {"MatMul", "Relu", "Tanh"}
    feeds = {"x": normal(3, 8, 16)}
    (given,) = onnx.reference.ReferenceEvaluator(inlined).run(None, feeds)
    assert np.allclose(results(model, feeds)[0], given, atol=1e-5)


def test_the_bytes_of_a_body_are_the_same_every_time():
    texts = set()
    for _ in range(2):
        inputs = {"a": value("a", (8, 16), "fp16"), "b": value("b", (16, 16), "fp16")}
        node = make_fused("gemm", inputs, {"activation": "gelu"}, name="n")
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
        texts.add(ir.serde.serialize_function(body(node, 21)).SerializeToString(deterministic=True))
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("op", "shapes", "what"),
    [
        ("attention", {"q": (1, 2, 8, 16), "k": (1, 2, 8, 16), "v": (1, 2, 8, 16), "sinks": (2,)}, "sinks"),
    ],
)
def test_what_has_no_body_says_so(op, shapes, what):
    with pytest.raises(UnsupportedError, match=what):
        alone(op, {name: value(name, shape) for name, shape in shapes.items()}, {})


def test_tensors_of_a_fused_node_are_the_plugins():
    model = alone("gemm", {"a": value("a", (4, 8, 16)), "b": value("b", (16, 24))}, {})
    (node,) = fused_nodes(model)
    tensors = plugin_tensors(node)
    assert tensors["a"].dims == (4, 8, 16)
    assert tensors["b"].dtype == "fp32"
    assert static_shape(node.outputs[0]) == (4, 8, 24)
