"""What onnx's own tools refuse of valid models, and which opset comes out."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.tuner.model.files import function, node, proto, saved, tensor, value
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.precision.quantise import LayerPrecision, apply_precision
from tilewright.tuner.model.reading.convert import OPSET, QUANTISED_OPSET
from tilewright.tuner.model.reading.read import FILE_OPSET, read_model


def as_it_is(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What ONNX Runtime makes of a model that nobody touched."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("opset", [13, 19])
def test_functions_of_another_opset_take_small_weights(opset: int, tmp_path: Path) -> None:
    """Those of more than `SMALL` bytes are inputs by then, which have their types."""
    old = function("old", [node("MatMul", "a w", "t"), node("Relu", "t", "b")], opset=opset)
    old.input.append("w")
    call = node("old", "x w", "y")
    call.domain = "own"
    tensors = [tensor("w", normal(0, 3, 3))]
    model = proto([call], tensors=tensors, domains=["own"], functions=[old], opset=17, ir_version=8)
    feeds = {"x": normal(1, 2, 3)}
    (got,) = results(read_model(saved(model, tmp_path / "m.onnx")), feeds)
    assert relative_error(got, as_it_is(model, feeds)) < 1e-6


@pytest.mark.parametrize("opset", [9, 10])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.float32])
@pytest.mark.parametrize(
    "made",
    [
        node("Clip", "c", "y", min=0.0, max=6.0),
        node("Clip", "c", "y", max=0.5),
        node("Pad", "c", "y", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.25),
    ],
    ids=["relu6", "one-sided", "pad"],
)
def test_attributes_become_constants_of_the_right_type(
    made: onnx.NodeProto, dtype: type, opset: int, tmp_path: Path
) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = proto(
        [node("Neg", "x", "c"), made],
        inputs=[value("x", (1, 3, 4, 4), kind)],
        outputs=[value("y", None, kind)],
        opset=opset,
        ir_version=5,
    )
    read = read_model(saved(model, tmp_path / "m.onnx"))
    feeds = {"x": 4 * normal(1, 1, 3, 4, 4).astype(dtype)}
    (got,) = results(read, feeds)
    wanted = -feeds["x"]
    if made.op_type == "Pad":
        wanted = np.pad(wanted, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=0.25)
    elif len(made.attribute) == 2:
        wanted = np.clip(wanted, 0, 6)
    else:
        wanted = np.minimum(wanted, 0.5)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, wanted)


def test_constants_of_another_type_have_its_range(tmp_path: Path) -> None:
    """The least number of fp32 is what opset 6 has where there is no `min`."""
    for kind, dtype in ((TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)):
        nodes = [node("Cast", "x", "h", to=kind), node("Clip", "h", "c", max=0.5), node("Cast", "c", "y", to=1)]
        read = read_model(saved(proto(nodes, opset=10, ir_version=5), tmp_path / "m.onnx"))
        (clip,) = [each for each in read.graph if each.op_type == "Clip"]
        for end in clip.inputs[1:]:
            assert end is not None
            array = ir.convenience.get_const_tensor(end).numpy()  # type: ignore[union-attr]
            assert array.dtype == dtype
            assert np.isfinite(array)


@pytest.mark.parametrize("axes", [None, [0, 2, 3], [1]])
def test_normalisation_of_mean_and_variance(axes: list[int] | None, tmp_path: Path) -> None:
    attributes = {} if axes is None else {"axes": axes}
    nodes = [node("Neg", "x", "n"), node("MeanVarianceNormalization", "n", "y", **attributes)]
    model = proto(nodes, inputs=[value("x", (2, 4, 5, 5))], opset=17, ir_version=8)
    feeds = {"x": normal(0, 2, 4, 5, 5)}
    (got,) = results(read_model(saved(model, tmp_path / "m.onnx")), feeds)
    assert relative_error(got, as_it_is(model, feeds)) < 1e-5


@pytest.mark.parametrize(("opset", "places"), [(18, 2), (20, 2), (21, 6)])
@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (2, 6)])
def test_normalisation_of_groups(opset: int, places: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Up to opset 20 a group has a scale, and since then a channel."""
    scale, bias = 1 + normal(1, places) / 4, normal(2, places)
    model = proto(
        [
            node("Neg", "x", "n"),
            node("GroupNormalization", "n scale bias", "y", num_groups=2, epsilon=1e-3),
            node("Abs", "n", "y/shape"),
        ],
        inputs=[value("x", shape)],
        outputs=[value("y", shape), value("y/shape", shape)],
        tensors=[tensor("scale", scale), tensor("bias", bias)],
        opset=opset,
    )
    x = 3 + normal(0, *shape)
    got, other = results(read_model(saved(model, tmp_path / "m.onnx")), {"x": x})
    groups = -x.reshape(2, 2, -1)
    normed = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-3)
    if places == 2:
        wanted = (normed * scale[:, None] + bias[:, None]).reshape(shape)
    else:
        ends = (1, 6, *[1] * (len(shape) - 2))
        wanted = normed.reshape(shape) * scale.reshape(ends) + bias.reshape(ends)
    assert relative_error(got, wanted) < 1e-5
    np.testing.assert_array_equal(other, np.abs(x))


def quantised(opset: int) -> onnx.ModelProto:
    """A convolution, int8 in QDQ form, and what ONNX Runtime moves its steps over."""
    nodes = [
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("QuantizeLinear", "r s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("MaxPool", "d", "p", kernel_shape=[2, 2]),
        node("Conv", "p v", "y"),
    ]
    arrays = {"w": normal(0, 8, 3, 1, 1), "v": normal(1, 8, 8, 1, 1), "s": np.float32(0.05), "z": np.int8(0)}
    tensors = [tensor(name, array) for name, array in arrays.items()]
    return proto(nodes, inputs=[value("x", (1, 3, 8, 8))], tensors=tensors, opset=opset, ir_version=8)


@pytest.mark.parametrize(
    ("opset", "wanted"), [(13, QUANTISED_OPSET), (19, QUANTISED_OPSET), (20, QUANTISED_OPSET), (21, OPSET), (23, 23)]
)
def test_what_is_quantised_stays_below_the_opset_of_output_types(opset: int, wanted: int, tmp_path: Path) -> None:
    model = read_model(saved(quantised(opset), tmp_path / "m.onnx"))
    assert model.opset_imports[""] == wanted
    assert model.meta[FILE_OPSET] == opset


@pytest.mark.parametrize(("base", "kind"), [("fp32", None), ("fp16", None), ("fp16", "int8")])
def test_onnx_runtime_loads_what_is_quantised_and_fused(base: str, kind: str | None, tmp_path: Path) -> None:
    file = quantised(13)
    feeds = {"x": normal(2, 1, 3, 8, 8)}
    model = read_model(saved(file, tmp_path / "m.onnx"))
    fuse(model)
    plan = {} if kind is None else {"Conv_c": LayerPrecision(kind, {"x": 0.05})}
    made = model if base == "fp32" else apply_precision(model, plan, base=base)
    assert made.opset_imports[""] == QUANTISED_OPSET
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert relative_error(as_it_is(ir.to_proto(made), feeds), as_it_is(file, feeds)) < (0.05 if kind else 0.02)


@pytest.mark.parametrize("shape", [(1, 2), ("n", 2)], ids=["known", "told"])
def test_casts_of_a_type_that_is_known_are_casts(shape: tuple[int | str, ...], tmp_path: Path) -> None:
    """So a constant that is cast like something is a constant."""
    nodes = [node("CastLike", "c x", "d"), node("Add", "x d", "y")]
    kind = TensorProto.FLOAT16
    model = proto(
        nodes, inputs=[value("x", shape, kind)], outputs=[value("y", None, kind)], tensors=[tensor("c", np.float32(2))]
    )
    read = read_model(saved(model, tmp_path / "m.onnx"), {}, {"n": 1} if "n" in shape else {})
    assert [each.op_type for each in read.graph] == ["Cast", "Add"]
    (got,) = results(read, {"x": np.ones((1, 2), np.float16)})
    assert got.dtype == np.float16
    assert (got == 3).all()
