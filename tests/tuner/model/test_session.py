"""What ONNX Runtime is given and what comes back, without a second copy of the weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from tilewright.tuner.model import session
from tilewright.tuner.model.session import Session, check_default, main_values, run
from tilewright.tuning_db.errors import MissingDependencyError, ModelError, RunError

Given = Callable[[onnx.ModelProto], "ir.Model | Path"]

SHAPE = [2, 4]
X = np.array([[1.0, -2.0, 0.5, 3.0], [0.0, 4.0, -1.0, 1 / 3]], np.float32)


def proto(nodes: list[onnx.NodeProto], outputs: list[onnx.ValueInfoProto], **arrays: np.ndarray) -> onnx.ModelProto:
    """A model of an fp32 input `x` of `SHAPE`."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )


def value(name: str, kind: int = TensorProto.FLOAT, shape: list[int] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, SHAPE if shape is None else shape)


def chain(weight: np.ndarray) -> onnx.ModelProto:
    """y = relu(x w) + 1, with what is between them named h and r."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Add", ["r", "one"], ["y"]),
    ]
    return proto(nodes, [value("y", shape=[2, weight.shape[1]])], w=weight, one=np.ones(1, np.float32))


WEIGHT = np.random.default_rng(0).standard_normal((4, 4), np.float32)


@pytest.fixture(params=["memory", "file", "large file", "external"])
def given(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    """Makes of a model what `run` may be given of it."""

    def make(model: onnx.ModelProto) -> ir.Model | Path:
        if request.param == "memory":
            return ir.from_proto(model)
        if request.param == "large file":
            monkeypatch.setattr(session, "OWN_BYTES", 0)
        external = {"save_as_external_data": True, "location": "weights", "size_threshold": 0}
        onnx.save(model, tmp_path / "model.onnx", **(external if request.param == "external" else {}))
        return tmp_path / "model.onnx"

    return make


def test_outputs_of_the_model_and_of_its_inside(given: Given) -> None:
    model = given(chain(WEIGHT))
    (plain,) = run(model, [{"x": X}])
    assert list(plain) == ["y"]
    np.testing.assert_allclose(plain["y"], np.maximum(X @ WEIGHT, 0) + 1, rtol=1e-6)

    (again,) = run(model, [{"x": X}], ["y", "y"])
    assert list(again) == ["y"]
    np.testing.assert_array_equal(again["y"], plain["y"])

    (inner,) = run(model, [{"x": X}], ["r", "x", "h", "w"])
    assert list(inner) == ["r", "x", "h", "w"]
    np.testing.assert_allclose(inner["h"], X @ WEIGHT, rtol=1e-6)
    np.testing.assert_array_equal(inner["r"], np.maximum(inner["h"], 0))
    np.testing.assert_array_equal(inner["x"], X)
    np.testing.assert_array_equal(inner["w"], WEIGHT)


def test_the_model_is_left_as_it_is() -> None:
    model = ir.from_proto(chain(np.random.default_rng(0).standard_normal((4, 4096), np.float32)))
    before = ir.to_proto(model).SerializeToString()
    list(run(model, [{"x": X}], ["h"]))
    assert ir.to_proto(model).SerializeToString() == before


def test_nothing_is_computed_ahead() -> None:
    taken = []

    def feeds():
        for number in range(3):
            taken.append(number)
            yield {"x": X + number}

    results = run(ir.from_proto(chain(WEIGHT)), feeds())
    assert taken == []
    next(results)
    assert taken == [0]
    assert len(list(results)) == 2


def test_an_output_that_is_an_input(given: Given) -> None:
    model = proto([helper.make_node("Relu", ["x"], ["y"])], [value("y"), value("x")])
    (results,) = run(given(model), [{"x": X}])
    assert list(results) == ["y", "x"]
    np.testing.assert_array_equal(results["x"], X)
    np.testing.assert_array_equal(results["y"], np.maximum(X, 0))


def test_two_runs_give_the_same_bits() -> None:
    model = ir.from_proto(chain(np.random.default_rng(1).standard_normal((4, 8192), np.float32)))
    one, other = (next(run(model, [{"x": X}]))["y"] for _ in range(2))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("prepack_bytes", [0, session.PREPACK_BYTES])
def test_large_weights_are_used_where_they_are(prepack_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PREPACK_BYTES", prepack_bytes)
    weight = np.random.default_rng(1).standard_normal((4, 8192), np.float32)
    model = ir.from_proto(chain(np.zeros_like(weight)))
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    opened = Session(model, ["h"])
    np.testing.assert_allclose(opened.run({"x": X})["h"], X @ weight, rtol=1e-5)
    # Used in place: what is written to the array, once nothing is prepacked, is what the next run computes with.
    weight *= 2
    again = opened.run({"x": X})["h"]
    np.testing.assert_allclose(again, X @ (weight if prepack_bytes == 0 else weight / 2), rtol=1e-5)


def test_weights_of_any_type_are_shared() -> None:
    nodes = [
        helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT) for name in ("bf", "f8", "h", "i8")
    ] + [helper.make_node("Cast", ["packed"], ["packed_wide"], to=TensorProto.INT8)]
    numbers = np.random.default_rng(2).standard_normal((2, 20000)).astype(np.float32)
    arrays = {
        "bf": numbers.astype(ml_dtypes.bfloat16),
        "f8": numbers.astype(ml_dtypes.float8_e4m3fn),
        "h": numbers.astype(np.float16),
        "i8": (numbers * 20).astype(np.int8),
        "packed": np.clip(numbers * 3, -8, 7).astype(ml_dtypes.int4),
    }
    outputs = [
        value(f"{name}_wide", TensorProto.FLOAT if name != "packed" else TensorProto.INT8, [2, 20000])
        for name in arrays
    ]
    model = ir.from_proto(proto(nodes, outputs))
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=name)
        weight = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        model.graph.register_initializer(weight)
        for node in model.graph:
            if node.inputs[0].name == name:
                node.replace_input_with(0, weight)
    (results,) = run(model, [{"x": X}])
    for name, array in arrays.items():
        np.testing.assert_array_equal(results[f"{name}_wide"], array.astype(results[f"{name}_wide"].dtype))


@pytest.mark.parametrize(
    ("dtype", "element"),
    [
        (ml_dtypes.bfloat16, TensorProto.BFLOAT16),
        (ml_dtypes.float8_e4m3fn, TensorProto.FLOAT8E4M3FN),
        (ml_dtypes.float8_e5m2, TensorProto.FLOAT8E5M2),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_types_that_numpy_lacks(dtype: type, element: int, given: Given) -> None:
    model = proto(
        [helper.make_node("Cast", ["x"], ["narrow"], to=element), helper.make_node("Cast", ["n"], ["y"], to=1)],
        [value("narrow", element), value("y")],
    )
    model.graph.input.append(value("n", element))
    (results,) = run(given(model), [{"x": X, "n": X.astype(dtype)}])
    assert results["narrow"].dtype == dtype
    np.testing.assert_array_equal(results["narrow"], X.astype(dtype))
    np.testing.assert_array_equal(results["y"], X.astype(dtype).astype(np.float32))


def test_nodes_that_no_output_needs_are_not_run() -> None:
    """`h` can be had although what follows it fails, which is the run's failure: any feed may be one of these."""
    nodes = [
        helper.make_node("Identity", ["x"], ["h"]),
        helper.make_node("Slice", ["h", "zero", "one"], ["row"]),
        helper.make_node("Reshape", ["row", "flat"], ["number"]),
        helper.make_node("Cast", ["number"], ["shape"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    model = proto(nodes, [], zero=np.zeros(2, np.int64), one=np.ones(2, np.int64), flat=np.array([-1]))
    model.graph.output.append(value("y", shape=["n"]))
    with pytest.raises(RunError, match=r"ONNX Runtime failed: .*Reshape") as caught:
        list(run(ir.from_proto(model), [{"x": X}]))
    assert "\n" not in str(caught.value)
    (results,) = run(ir.from_proto(model), [{"x": X}], ["h"])
    np.testing.assert_array_equal(results["h"], X)


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        ({}, "its input 'x' is not fed"),
        ({"x": X, "z": X}, "has no input 'z'"),
        ({"x": X[:, :3]}, "refuses the feed.*Got: 3 Expected: 4"),
        ({"x": X.astype(np.float64)}, "refuses the feed.*double"),
    ],
)
def test_feeds_that_do_not_fit(feed: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        list(run(ir.from_proto(chain(WEIGHT)), [feed]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("own_bytes", [0, session.OWN_BYTES])
def test_models_that_cannot_be_loaded(own_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "OWN_BYTES", own_bytes)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model at all")
    for outputs in (None, ["h"]):
        with pytest.raises(ModelError, match=r"broken\.onnx") as caught:
            run(broken, [{"x": X}], outputs)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"no\.onnx"):
        run(tmp_path / "no.onnx", [])
    with pytest.raises(ModelError, match=r"no\.onnx"):
        run(tmp_path / "no.onnx", [], ["h"])
    with pytest.raises(ModelError, match="has no value 'nowhere' in its main graph"):
        run(ir.from_proto(chain(WEIGHT)), [], ["nowhere"])
    unknown = proto([helper.make_node("NoSuchOperator", ["x"], ["y"])], [value("y")])
    with pytest.raises(
        ModelError, match=r"model 'small': ONNX Runtime can't load it: (?!Load model from).*NoSuchOperator"
    ):
        run(ir.from_proto(unknown), [])


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """An initializer that nothing uses is a warning to ONNX Runtime."""
    model = proto([helper.make_node("Relu", ["x"], ["y"])], [value("y")], unused=np.zeros(4, np.float32))
    list(run(ir.from_proto(model), [{"x": X}]))
    with pytest.raises(ModelError):
        list(run(ir.from_proto(model), [{"x": X[:1]}]))
    assert capfd.readouterr() == ("", "")


def test_no_temporary_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    opened = Session(ir.from_proto(chain(np.ones((4, 8192), np.float32))))
    assert list(tmp_path.iterdir()) == []
    assert opened.run({"x": X})["y"].shape == (2, 8192)


def test_a_folder_for_temporary_files_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(
        RunError, match=r"absent: No such file or directory: make room, or name another folder in TMPDIR$"
    ):
        Session(ir.from_proto(chain(WEIGHT)), ["y"])


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    session._runtime.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    try:
        with pytest.raises(MissingDependencyError, match=r"pip install onnxruntime$"):
            run(ir.from_proto(chain(WEIGHT)), [])
    finally:
        session._runtime.cache_clear()


@pytest.mark.parametrize(
    ("error", "cause", "raised", "said"),
    [
        (ImportError("initialization failed"), KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (
            ImportError("libc.so.6: no GLIBC_2.99"),
            None,
            RunError,
            r"installed, and can't be imported: libc.so.6: no GL",
        ),
        (ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers"), None, RunError, "'flatbuffers'"),
    ],
    ids=["interrupted", "broken", "without what it needs"],
)
def test_an_onnx_runtime_that_can_not_be_imported(
    monkeypatch: pytest.MonkeyPatch,
    error: ImportError,
    cause: BaseException | None,
    raised: type[BaseException],
    said: str,
) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "onnxruntime":
                raise error from cause

    session._runtime.cache_clear()
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    try:
        with pytest.raises(raised, match=said):
            run(ir.from_proto(chain(WEIGHT)), [])
    finally:
        session._runtime.cache_clear()


def test_main_values() -> None:
    assert set(main_values(ir.from_proto(chain(WEIGHT)))) == {"x", "w", "one", "h", "r", "y"}


ENDLESS = """
import os, signal, sys, threading
import numpy as np, onnx, onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from tilewright.tuner.model.session import Session

class Stopped(BaseException):
    pass

def stop(number, frame):
    raise Stopped

number = signal.Signals[sys.argv[1]]
signal.signal(number, stop)
info = helper.make_tensor_value_info
body = helper.make_graph(
    [helper.make_node("Identity", ["on"], ["on2"]), helper.make_node("Add", ["v", "one"], ["v2"])],
    "body",
    [info("i", TensorProto.INT64, []), info("on", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, [])],
    [info("on2", TensorProto.BOOL, []), info("v2", TensorProto.FLOAT, [])],
    [numpy_helper.from_array(np.float32(1), "one")],
)
graph = helper.make_graph(
    [helper.make_node("Loop", ["times", "", "zero"], ["y"], body=body)],
    "loop",
    [info("times", TensorProto.INT64, [])],
    [info("y", TensorProto.FLOAT, [])],
    [numpy_helper.from_array(np.float32(0), "zero")],
)
made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
session = Session(ir.from_proto(made))
threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
try:
    session.run({"times": np.array(2**40)})
except Stopped:
    assert threading.active_count() == 1
    print(session.run({"times": np.array(3)})["y"])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_takes_for_ever_can_be_interrupted(name: str) -> None:
    """And the session goes on afterwards."""
    ended = subprocess.run([sys.executable, "-c", ENDLESS, name], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "3.0\n", "")


def test_a_session_of_another_thread() -> None:
    opened = Session(ir.from_proto(chain(WEIGHT)))
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(opened.run, {"x": X}).result()
    np.testing.assert_array_equal(found["y"], opened.run({"x": X})["y"])


MEMORY = """
import resource, numpy as np, onnx_ir as ir
from tilewright.tuner.model.session import run
kind = ir.TensorType(ir.DataType.FLOAT)
x = ir.Value(name="x", type=kind, shape=ir.Shape([1, 4096]))
nodes, weights, last = [], [], x
array = np.full((4096, 4096), 1 / 4096, np.float32)
for number in range(6):
    tensor = ir.tensor(array, name=f"w{number}")
    weights.append(ir.Value(name=f"w{number}", type=kind, shape=ir.Shape(array.shape), const_value=tensor))
    nodes.append(ir.node("MatMul", [last, weights[-1]], name=f"n{number}"))
    last = nodes[-1].outputs[0]
    last.name, last.type, last.shape = f"h{number}", kind, ir.Shape([1, 4096])
graph = ir.Graph([x], [last], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="large")
model = ir.Model(graph, ir_version=10)
import onnxruntime
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(results,) = run(model, [{"x": np.ones((1, 4096), np.float32)}], ["h0", "h5"])
assert abs(results["h5"] - 1).max() < 1e-5
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_model_is_not_copied() -> None:
    """384 MB of weights, which are one array here, and would be six copies: running it takes a small part of that."""
    ended = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 64 << 10  # KiB


CASTS = MEMORY.replace("np.float32)\nfor", "np.float16)\nfor").replace(
    'nodes.append(ir.node("MatMul", [last, weights[-1]]',
    """kind16 = ir.TensorType(ir.DataType.FLOAT16)
    weights[-1].type = kind16
    nodes.append(ir.node("Cast", [weights[-1]], {"to": 1}, name=f"cast{number}"))
    nodes[-1].outputs[0].name = f"wide{number}"
    nodes.append(ir.node("MatMul", [last, nodes[-1].outputs[0]]""",
)


def test_casts_of_weights_do_not_all_live_at_once() -> None:
    """192 MB of weights in fp16, each cast to fp32, 64 MB, right before it is used: one or two at a time."""
    ended = subprocess.run([sys.executable, "-c", CASTS], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 200 << 10  # KiB; all six are 384 MB


CHECKED = CASTS.replace("import run", "import check_default").replace(
    """(results,) = run(model, [{"x": np.ones((1, 4096), np.float32)}], ["h0", "h5"])
assert abs(results["h5"] - 1).max() < 1e-5
""",
    """check_default(model, "large", {"x": np.ones((1, 4096), np.float32)})
""",
)


def test_nor_do_they_with_optimisations_on() -> None:
    """Neither folded nor cast before anything runs, and held once."""
    assert "check_default(model" in CHECKED
    ended = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 200 << 10  # KiB; 192 MB in fp16, and 384 MB in fp32


def quantised() -> onnx.ModelProto:
    """What ONNX Runtime refuses once it has moved the quantisation of int8 over a `MaxPool` (opset 21, 1.32)."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MaxPool", ["d"], ["p"], kernel_shape=[2, 2]),
        helper.make_node("Conv", ["p", "w"], ["y"]),
    ]
    arrays = {"s": np.float32(0.05), "z": np.int8(0), "w": np.ones((1, 1, 1, 1), np.float32)}
    graph = helper.make_graph(
        nodes,
        "small",
        [value("x", shape=[1, 1, 4, 4])],
        [value("y", shape=[1, 1, 3, 3])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_default_options_refuse_what_runs_without_optimisations(given: Given) -> None:
    feed = {"x": np.ones((1, 1, 4, 4), np.float32)}
    model = given(quantised())
    assert list(run(model, [feed]))
    with pytest.raises(ModelError, match=r"^its name: ONNX Runtime can't load it: .*output_dtype INT8 does not match"):
        check_default(model, "its name", feed)


@pytest.mark.parametrize("largest", [0, 1 << 30])
def test_default_options_run_what_is_right(given: Given, monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """Of a large model too, whose weights are shared and folded into nothing."""
    monkeypatch.setattr(session, "INLINE_BYTES", 16)
    monkeypatch.setattr(session, "PREPACK_BYTES", largest)
    model = given(chain(WEIGHT))
    check_default(model, "m", {"x": X})
    with pytest.raises(ModelError, match="m has no input 'other'"):
        check_default(model, "m", {"x": X, "other": X})


FACTORS = {"a": np.full((2, 4), 3, np.float32), "b": np.full((4, 4), 2, np.float32)}
SUM = [helper.make_node("MatMul", ["a", "b"], ["p"]), helper.make_node("Add", ["x", "p"], ["y"])]

IMAGE = {
    "image": np.array([1, 4, 2, 1]),
    "filters": np.full((4, 4, 1, 1), 2, np.float32),
    "scale": np.arange(4, dtype=np.float32),
    "one": np.ones(4, np.float32),
    "flat": np.array(SHAPE),
}
SCALED = [
    helper.make_node("Reshape", ["x", "image"], ["i"]),
    helper.make_node("Conv", ["i", "filters"], ["c"]),
    helper.make_node("BatchNormalization", ["c", "scale", "one", "one", "one"], ["n"]),
    helper.make_node("Reshape", ["n", "flat"], ["y"]),
]


@pytest.mark.parametrize("largest", [0, 1 << 30])
@pytest.mark.parametrize(("nodes", "arrays"), [(SUM, FACTORS), (SCALED, IMAGE)], ids=["a product", "a norm"])
def test_what_hangs_on_weights_that_are_folded_is_right(
    given: Given,
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[onnx.NodeProto],
    arrays: dict[str, np.ndarray],
    largest: int,
) -> None:
    """They are not taken for the zeros that stand in their file; and where they are not folded, for none either."""
    monkeypatch.setattr(session, "INLINE_BYTES", 48)
    monkeypatch.setattr(session, "PREPACK_BYTES", largest)
    model = given(proto(nodes, [value("y")], **arrays))
    (wanted,) = run(model, [{"x": X}])
    found = Session(model, default="m").run({"x": X})
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=1e-4, atol=1e-4)
    check_default(model, "m", {"x": X})


def test_zeros_in_place_of_large_weights_are_no_reason_to_refuse_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quotient of integers that an optimiser computes."""
    monkeypatch.setattr(session, "INLINE_BYTES", 48)
    monkeypatch.setattr(session, "PREPACK_BYTES", 0)
    monkeypatch.setattr(session, "FOLDING", ())
    nodes = [
        helper.make_node("Div", ["a", "b"], ["q"]),
        helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    model = ir.from_proto(proto(nodes, [value("y")], a=np.full(SHAPE, 6), b=np.full(SHAPE, 3)))
    with pytest.raises(ModelError, match="division by zero"):
        Session(model, default="m")
    check_default(model, "m", {"x": X})
    wrong = ir.from_proto(proto(nodes, [value("y")], a=np.full(SHAPE, 6), b=np.zeros(SHAPE, np.int64)))
    with pytest.raises(ModelError, match="division by zero"):
        check_default(wrong, "m", {"x": X})


def test_default_options_round_nothing(given: Given) -> None:
    """What is between two nodes of fp16 may stay fp32 there."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["h", "large"], ["b"]),
        helper.make_node("Div", ["b", "large"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
    ]
    model = given(proto(nodes, [value("y")], large=np.float16(6e4)))
    assert not np.isfinite(next(run(model, [{"x": X}]))["y"]).all()
    assert np.isfinite(Session(model, default="m").run({"x": X})["y"]).all()
