"""Half precision: what stays fp32 and why, that constants stay finite, and that results stay near."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from tests.tuner.model.fused_nets import dtypes, fused, node, operators, output
from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.tuner.model.fuse import norms, rms_norms
from tilewright.tuner.model.graph import DTYPES, constant, dtype_name
from tilewright.tuner.model.precision.half import STAYS, converted, lower
from tilewright.tuner.model.precision.quantise import apply_precision

LEAST = float(np.finfo(np.float32).min)


def attention_block(mask_value: float, eps: float = 1e-6) -> ir.Model:
    """A decomposed norm, a projection, masked scores, a softmax, a product: x (2, 6, 16), keep (2, 1, 6) → y."""
    nodes = [
        node("ReduceMean", ["x", "last"], ["mean"], name="mean"),
        node("Sub", ["x", "mean"], ["centred"], name="centre"),
        node("Pow", ["centred", "two"], ["squares"], name="square"),
        node("ReduceMean", ["squares", "last"], ["variance"], name="variance"),
        node("Add", ["variance", "eps"], ["safe"], name="add_eps"),
        node("Sqrt", ["safe"], ["deviation"], name="root"),
        node("Div", ["centred", "deviation"], ["normed"], name="norm"),
        node("Mul", ["normed", "gain"], ["scaled"], name="gain_of_norm"),
        node("Add", ["scaled", "shift"], ["h"], name="shift_of_norm"),
        node("MatMul", ["h", "w"], ["q"], name="project"),
        node("Transpose", ["h"], ["k"], perm=[0, 2, 1], name="turn"),
        node("MatMul", ["q", "k"], ["scores"], name="score"),
        node("Sub", ["ones", "keep"], ["hide"], name="invert"),
        node("Mul", ["hide", "masked"], ["bias"], name="to_bias"),
        node("Add", ["scores", "bias"], ["masked_scores"], name="mask"),
        node("Softmax", ["masked_scores"], ["weights"], axis=-1, name="softmax"),
        node("MatMul", ["weights", "h"], ["mixed"], name="mix"),
        node("MatMul", ["mixed", "w"], ["y"], name="out"),
    ]
    constants = {
        "last": np.array([-1]),
        "two": np.array(2, np.float32),
        "eps": np.array(eps, np.float32),
        "gain": normal(1, 16),
        "shift": normal(2, 16),
        "w": normal(3, 16, 16) * np.float32(0.25),
        "ones": np.ones(1, np.float32),
        "masked": np.array(mask_value, np.float32),
    }
    return fused(nodes, {"x": (2, 6, 16), "keep": (2, 1, 6)}, ["y"], constants)


def feed_of(hidden: tuple[int, ...] = (5,)) -> dict[str, np.ndarray]:
    keep = np.ones((2, 1, 6), np.float32)
    keep[..., hidden] = 0
    return {"x": 3 * normal(9, 2, 6, 16), "keep": keep}


@pytest.mark.parametrize("base", ["fp16", "bf16"])
@pytest.mark.parametrize("mask_value", [-1e4, -1e9, LEAST])
def test_masks_stay_finite(base: str, mask_value: float) -> None:
    model = attention_block(mask_value)
    mixed = apply_precision(model, {}, base=base)
    exact, got = output(model, feed_of()), output(mixed, feed_of())
    assert np.isfinite(got).all()
    assert relative_error(got, exact) < (5e-3 if base == "fp16" else 4e-2)


def test_rows_of_which_everything_is_masked_stay_finite() -> None:
    mixed = apply_precision(attention_block(LEAST), {}, base="fp16")
    assert np.isfinite(output(mixed, feed_of((0, 1, 2, 3, 4, 5)))).all()


def test_a_decomposed_norm_is_one_island(monkeypatch: pytest.MonkeyPatch) -> None:
    for rules in (norms, rms_norms):
        monkeypatch.setattr(rules, "apply", lambda *_: None)  # as over axes that neither takes
    mixed = apply_precision(attention_block(-1e9), {}, base="fp16")
    kinds = dtypes(mixed)
    island = ("mean", "centred", "squares", "variance", "safe", "deviation", "normed", "scaled", "h")
    assert {kinds[name] for name in island} == {"fp32"}
    # x and keep become fp16, and x fp32 again for the norm is the graph input itself; h becomes fp16, the scores fp32.
    casts = [each.inputs[0].name for each in mixed.graph if each.op_type == "Cast"]  # type: ignore[union-attr]
    assert len(casts) == len(set(casts))
    assert not set(casts) & set(island[:-1])


def test_a_constant_that_half_precision_has_no_number_for_keeps_its_node_in_fp32() -> None:
    nodes = [node("Add", ["x", "c"], ["s"], name="add"), node("Relu", ["s"], ["y"], name="relu")]
    for number, kept in ((1e-6, "fp32"), (1e-12, "fp32"), (1e-3, "fp16"), (0.0, "fp16")):
        model = model_of(nodes, {"x": (2, 3)}, ["y"], {"c": np.array([number], np.float32)})
        reasons = lower(model, {}, "fp16")
        assert dtypes(model)["s"] == kept
        assert ("add" in reasons) == (kept == "fp32")
    small = np.full(3, 1e-6, np.float32)  # a bias whose elements happen to be small: no eps
    model = model_of(nodes, {"x": (2, 3)}, ["y"], {"c": small})
    assert lower(model, {}, "fp16") == {}


@pytest.mark.parametrize(
    ("operator", "attributes", "constants"),
    [
        ("Softmax", {}, {}),
        ("LogSoftmax", {}, {}),
        ("Exp", {}, {}),
        ("Log", {}, {}),
        ("Erf", {}, {}),
        ("Pow", {}, {"c": np.array(2, np.float32)}),
        ("ReduceMean", {}, {"c": np.array([1])}),
        ("ReduceSum", {}, {"c": np.array([1])}),
        ("ReduceL2", {}, {"c": np.array([1])}),
        ("CumSum", {}, {"c": np.array(1)}),
        ("LayerNormalization", {}, {"c": np.ones(8, np.float32)}),
        ("LRN", {"size": 3}, {}),
        ("TopK", {}, {"c": np.array([2])}),
        ("InstanceNormalization", {}, {"c": np.ones(4, np.float32), "d": np.ones(4, np.float32)}),
    ],
)
def test_operators_that_lose_too_much_stay(operator: str, attributes: dict, constants: dict) -> None:
    nodes = [
        node("Relu", ["x"], ["r"], name="relu"),
        node(operator, ["r", *constants], ["y"] if operator != "TopK" else ["y", "i"], name="it", **attributes),
        node("Neg", ["y"], ["z"], name="neg"),
        node("Relu", ["z"], ["out"], name="relu2"),
    ]
    model = model_of(nodes, {"x": (2, 4, 4, 8)}, ["out"], constants)
    exact = results(model, {"x": 1 + np.abs(normal(0, 2, 4, 4, 8))})
    reasons = lower(model, {}, "fp16")
    assert reasons["it"] == STAYS[operator]
    assert dtypes(model)["y"] == "fp32"
    assert dtypes(model)["r"] == dtypes(model)["out_fp16"] == "fp16"
    got = results(model, {"x": 1 + np.abs(normal(0, 2, 4, 4, 8))})
    np.testing.assert_allclose(got[0], exact[0], rtol=2e-2, atol=1e-3)


def test_numbers_of_integers_stay_and_those_of_masks_do_not() -> None:
    nodes = [
        helper.make_node("Cast", ["n"], ["wide"], to=TensorProto.FLOAT, name="positions"),
        helper.make_node("Cast", ["n"], ["flags"], to=TensorProto.BOOL, name="to_bool"),
        helper.make_node("Cast", ["flags"], ["mask"], to=TensorProto.FLOAT, name="from_bool"),
        helper.make_node("Add", ["wide", "mask"], ["sum"], name="add"),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.INT64, name="to_integers"),
    ]
    model = model_of(nodes, {"n": (3,)}, ["y"], {}, dtype="int64")
    reasons = lower(model, {}, "fp16")
    assert reasons["positions"] == "not every int64 is a number of fp16"
    assert dtypes(model)["wide"] == "fp32"
    assert dtypes(model)["mask"] == "fp16"
    np.testing.assert_array_equal(results(model, {"n": np.array([0, 4097, 70001])})[0], [0, 4098, 70002])


def test_numbers_that_say_where_stay() -> None:
    nodes = [node("Resize", ["x", "", "scales"], ["r"], name="resize"), node("Relu", ["r"], ["y"], name="relu")]
    constants = {"scales": np.array([1, 1, 1.5, 1.5], np.float32)}
    model = model_of(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants)
    lower(model, {}, "fp16")
    resize = next(each for each in model.graph if each.op_type == "Resize")
    assert [dtype_name(value) if value is not None else None for value in resize.inputs] == ["fp16", None, "fp32"]
    assert results(model, {"x": normal(0, 1, 2, 4, 4)})[0].shape == (1, 2, 6, 6)


def test_constants_are_cut_to_what_the_type_has() -> None:
    array = np.array([1e9, -1e9, np.inf, -np.inf, 65504, -70000, 0.1, np.nan], np.float32)
    half, bound = converted(array, "fp16"), converted(array, "fp16", bound=True)
    np.testing.assert_array_equal(half[:6], np.array([32752, -32752, np.inf, -np.inf, 65504, -32752], np.float16))
    np.testing.assert_array_equal(bound[:2], np.array([65504, -65504], np.float16))
    assert half[6] == np.float16(0.1)
    assert np.isnan(half[7])
    wide = converted(np.array([LEAST, 1e30], np.float32), "bf16")
    assert np.isfinite(wide.astype(np.float32)).all()
    assert wide.dtype == ml_dtypes.bfloat16


def test_bounds_cut_nothing_off() -> None:
    nodes = [node("Clip", ["x", "low", "high"], ["c"], name="clip"), node("Neg", ["c"], ["y"], name="neg")]
    constants = {"low": np.array(0, np.float32), "high": np.array(3.4e38, np.float32)}
    model = model_of(nodes, {"x": (1,)}, ["y"], constants)
    lower(model, {}, "fp16")
    np.testing.assert_array_equal(results(model, {"x": np.array([60000], np.float32)})[0], [-60000])


def test_filled_arrays_and_constant_nodes_are_converted() -> None:
    fill = helper.make_tensor("value", TensorProto.FLOAT, [1], [-1e9])
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=fill, name="fill"),
        helper.make_node("Constant", [], ["one"], value=helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])),
        node("Add", ["x", "filled"], ["s"], name="add"),
        node("Mul", ["s", "one"], ["m"], name="mul"),
        node("Softmax", ["m"], ["y"], name="softmax"),
    ]
    model = model_of(nodes, {"x": (2, 3)}, ["y"], {"shape": np.array([2, 3])})
    lower(model, {}, "fp16")
    assert dtypes(model)["filled"] == dtypes(model)["m"] == "fp16"
    np.testing.assert_allclose(results(model, {"x": np.zeros((2, 3), np.float32)})[0], np.full((2, 3), 1 / 3))
    # Where no softmax follows it is a number like others.
    model = model_of(nodes[:-1], {"x": (2, 3)}, ["m"], {"shape": np.array([2, 3])})
    assert lower(model, {}, "fp16")["fill"] == "-1e+09 is beyond the range of fp16"
    np.testing.assert_array_equal(results(model, {"x": np.zeros((2, 3), np.float32)})[0], np.full((2, 3), -1e9))


def test_subgraphs_get_what_they_take_in_fp32() -> None:
    then = helper.make_graph(
        [node("Mul", ["r", "r"], ["t"])], "then", [], [helper.make_tensor_value_info("t", 1, [2, 3])]
    )
    other = helper.make_graph([node("Neg", ["r"], ["e"])], "else", [], [helper.make_tensor_value_info("e", 1, [2, 3])])
    nodes = [
        node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("If", ["flag"], ["chosen"], then_branch=then, else_branch=other, name="if"),
        node("Relu", ["chosen"], ["y"], name="relu2"),
    ]
    model = model_of(nodes, {"x": (2, 3)}, ["y"], {"flag": np.array(True)})
    assert lower(model, {}, "fp16")["if"] == "what is in its subgraphs stays as it is"
    assert dtypes(model)["r"] == "fp16"
    x = normal(0, 2, 3)
    assert relative_error(results(model, {"x": x})[0], np.maximum(x, 0) ** 2) < 2e-3


def test_operators_of_which_nothing_is_known_stay() -> None:
    model = model_of(
        [node("Relu", ["x"], ["r"], name="relu"), node("Neg", ["r"], ["y"], name="it")], {"x": (2,)}, ["y"], {}
    )
    next(each for each in model.graph if each.name == "it").domain = "com.example"
    assert lower(model, {}, "fp16") == {"it": "what com.example allows is not known"}


def test_bf16_is_kept_where_data_is_only_moved() -> None:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0], name="turn"),
        node("Relu", ["t"], ["r"], name="relu"),
        node("Concat", ["r", "t"], ["c"], axis=0, name="join"),
        node("Relu", ["c"], ["y"], name="relu2"),
    ]
    model = model_of(nodes, {"x": (2, 3)}, ["y"], {})
    lower(model, {}, "bf16")
    kinds = dtypes(model)
    assert [kinds[name] for name in ("t", "r", "c", "y")] == ["bf16", "fp32", "bf16", "fp32"]
    x = normal(0, 2, 3)
    assert relative_error(results(model, {"x": x})[0], np.maximum(np.concatenate([x.T, x.T]), 0)) < 1e-2


def test_graph_inputs_and_outputs_keep_names_and_types() -> None:
    nodes = [node("Relu", ["x"], ["r"], name="relu"), node("Neg", ["r"], ["y"], name="neg")]
    model = model_of(nodes, {"x": (2, 3)}, ["y", "r"], {})
    lower(model, {}, "fp16")
    assert [(each.name, dtype_name(each)) for each in (*model.graph.inputs, *model.graph.outputs)] == [
        ("x", "fp32"),
        ("y", "fp32"),
        ("r", "fp32"),
    ]
    assert operators(model).count("Cast") == 3
    x = normal(0, 2, 3)
    np.testing.assert_allclose(results(model, {"x": x})[1], np.maximum(x, 0), rtol=2**-11)


def test_fp32_changes_nothing() -> None:
    model = attention_block(-1e9)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert lower(model, {}, "fp32") == {}
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_pinned_constant_stays() -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"], name="mm"), node("Add", ["m", "b"], ["y"], name="add")]
    model = fused(nodes, {"x": (2, 3)}, ["y"], {"w": normal(0, 3, 4), "b": normal(1, 4)})
    bias = model.graph.initializers["b"]
    lower(model, {}, "fp16", pinned=frozenset([bias]))
    gemm = next(each for each in model.graph if each.op_type == "FusedGemmBias")
    assert gemm.inputs[2] is bias
    assert constant(gemm.inputs[1]).dtype == np.float16  # type: ignore[union-attr]
    assert DTYPES["fp16"] == gemm.inputs[0].dtype  # type: ignore[union-attr]


def stream(*, read_by: str = "LayerNormalization", opset: int = 21) -> ir.Model:
    """Two residual blocks between norms: x (2, 6, 16) → y."""
    nodes = []
    h = "x"
    for index in range(2):
        nodes += [
            node(
                read_by,
                [h, *(["gain"] if read_by.endswith("Normalization") else [])],
                [f"n{index}"],
                name=f"norm{index}",
            ),
            node("MatMul", [f"n{index}", "w"], [f"m{index}"], name=f"mm{index}"),
            node("Add", [f"m{index}", f"n{index}" if index == 0 else h], [f"h{index}"], name=f"add{index}"),
        ]
        h = f"h{index}"
    nodes += [node(read_by, [h, *nodes[0].input[1:]], ["y"], name="norm")]
    constants = {"w": normal(0, 16, 16) / 4, "gain": normal(1, 16)}
    return fused(
        nodes,
        {"x": (2, 6, 16)},
        ["y"],
        {name: constants[name] for name in constants if name == "w" or len(nodes[0].input) > 1},
        opset=opset,
    )


def test_the_residual_stream_between_norms_stays_fp32() -> None:
    model = stream()
    mixed = apply_precision(model, {}, base="fp16")
    kinds = dtypes(mixed)
    assert kinds["h0"] == kinds["h1"] == "fp32"
    for name in ("mm0", "mm1"):
        made = next(each for each in mixed.graph if each.name == name)
        assert made.op_type == "FusedGemmResidual"
        assert [dtype_name(value) for value in made.inputs if value is not None] == ["fp16", "fp16", "fp32"]
    feed = {"x": normal(9, 2, 6, 16)}
    assert relative_error(output(mixed, feed), output(model, feed)) < 2e-3
    # Where no operator needs fp32 the stream is narrow, as in a network of convolutions.
    narrow = apply_precision(stream(read_by="Sigmoid"), {}, base="fp16")
    assert dtypes(narrow)["h0"] == "fp16"
    bf16 = apply_precision(stream(read_by="Sigmoid"), {}, base="bf16")
    assert dtypes(bf16)["h0"] == "bf16"


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_fused_norms_read_the_stream_in_fp32_and_give_half_precision(base: str) -> None:
    model = stream(read_by="RMSNormalization", opset=23)
    mixed = apply_precision(model, {}, base=base)
    kinds = dtypes(mixed)
    assert kinds["h0"] == kinds["h1"] == kinds["y"] == "fp32"
    assert kinds["n0"] == kinds["n1"] == base
    layers = {each.name: each for each in mixed.graph}
    assert "Cast" not in [each.op_type for each in mixed.graph if each.name != "x_" + base + "_Cast"]
    assert [dtype_name(value) for value in layers["norm1"].inputs if value is not None] == ["fp32", base]
    assert [dtype_name(value) for value in layers["mm1"].inputs if value is not None] == [base, base, "fp32"]
    feed = {"x": normal(9, 2, 6, 16)}
    assert relative_error(output(mixed, feed), output(model, feed)) < (2e-3 if base == "fp16" else 2e-2)


def norms_around(*outputs: str) -> ir.Model:
    """Two layers with a norm before and one behind, as Gemma's: x (6, 16) → y."""
    nodes = [node("Sigmoid", ["x"], ["h0"], name="embed")]
    for index in range(2):
        nodes += [
            node("RMSNormalization", [f"h{index}", "gain"], [f"n{index}"], name=f"before{index}"),
            node("MatMul", [f"n{index}", "w"], [f"m{index}"], name=f"mm{index}"),
            node("RMSNormalization", [f"m{index}", "gain"], [f"a{index}"], name=f"behind{index}"),
            node("Add", [f"h{index}", f"a{index}"], [f"h{index + 1}"], name=f"add{index}"),
        ]
    nodes += [
        node("RMSNormalization", ["h2", "gain"], ["n2"], name="final"),
        node("MatMul", ["n2", "w"], ["y"], name="head"),
    ]
    constants = {"w": normal(0, 16, 16) / 4, "gain": normal(1, 16)}
    return fused(nodes, {"x": (6, 16)}, ["y", *outputs], constants, opset=23)


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_sums_of_norms_stay_fp32(base: str) -> None:
    model = norms_around()
    mixed = apply_precision(model, {}, base=base)
    kinds = dtypes(mixed)
    assert [kinds[f"h{index}"] for index in (1, 2)] == ["fp32", "fp32"]
    assert {kinds[name] for name in ("n0", "m0", "a0", "n1", "m1", "a1", "n2")} == {base}
    layers = {each.name: each for each in mixed.graph}
    for name in ("before1", "final"):
        taken = [dtype_name(value) for value in layers[name].inputs if value is not None]
        assert taken == [base, "fp32", base], name
    feed = {"x": normal(9, 6, 16)}
    assert relative_error(output(mixed, feed), output(model, feed)) < (2e-3 if base == "fp16" else 2e-2)


def test_a_sum_that_takes_the_lower_type_elsewhere_has_it() -> None:
    nodes = [
        node("Sigmoid", ["x"], ["s"], name="left"),
        node("Tanh", ["x"], ["t"], name="right"),
        node("Add", ["s", "t"], ["h"], name="add"),
        node("RMSNormalization", ["h", "gain"], ["n"], name="norm"),
        node("Sigmoid", ["h"], ["g"], name="gate"),
        node("Mul", ["n", "g"], ["y"], name="mul"),
    ]
    model = fused(nodes, {"x": (6, 16)}, ["y"], {"gain": normal(1, 16)}, opset=23)
    assert "FusedRmsNormResidualWeight" in operators(model)
    mixed = apply_precision(model, {}, base="fp16")
    assert dtypes(mixed)["h"] == "fp16"
    feed = {"x": normal(9, 6, 16)}
    assert relative_error(output(mixed, feed), output(model, feed)) < 2e-3


def test_a_sum_that_is_an_output_keeps_its_type() -> None:
    model = norms_around("h2")
    mixed = apply_precision(model, {}, base="fp16")
    assert [dtype_name(value) for value in mixed.graph.outputs] == ["fp32", "fp32"]
    feed = {"x": normal(9, 6, 16)}
    for got, wanted in zip(results(mixed, feed), results(model, feed), strict=True):
        assert relative_error(got, wanted) < 2e-3


def test_what_a_norm_reads_alone_is_no_stream() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="mm"),
        node("RMSNormalization", ["h", "gain"], ["n"], name="norm"),
        node("MatMul", ["n", "w"], ["y"], name="last"),
    ]
    model = fused(nodes, {"x": (6, 16)}, ["y"], {"w": normal(0, 16, 16) / 4, "gain": normal(1, 16)}, opset=23)
    kinds = dtypes(apply_precision(model, {}, base="fp16"))
    assert (kinds["h"], kinds["n"]) == ("fp16", "fp16")


@pytest.mark.parametrize(("opset", "kept"), [(20, "fp32"), (21, "bf16")])
def test_a_pad_of_bf16_is_one_of_opset_21(opset: int, kept: str) -> None:
    """Below, where quantised files are, ONNX Runtime has none (1.32)."""
    nodes = [node("Relu", ["x"], ["r"], name="relu"), node("Pad", ["r", "by"], ["y"], name="pad")]
    model = model_of(nodes, {"x": (2, 3)}, ["y"], {"by": np.array([0, 1, 0, 1])}, opset=opset)
    lower(model, {}, "bf16")
    (pad,) = [each for each in model.graph if each.op_type == "Pad"]
    assert dtype_name(pad.outputs[0]) == kept
    np.testing.assert_array_equal(results(model, {"x": np.ones((2, 3), np.float32)})[0][0], [0, 1, 1, 1, 0])


def test_what_is_only_moved_to_steps_stays_fp32() -> None:
    """Casts there and back would round it before it is quantised."""
    nodes = [
        node("Reshape", ["x", "shape"], ["r"], name="move"),
        node("QuantizeLinear", ["r", "scale", "zero"], ["q"], name="quantise"),
        node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="dequantise"),
    ]
    arrays = {"shape": np.int64([4, 4]), "scale": np.float32(0.01), "zero": np.int8(0)}
    model = model_of(nodes, {"x": (2, 8)}, ["y"], arrays)
    lower(model, {}, "fp16")
    assert operators(model) == ["Reshape", "QuantizeLinear", "DequantizeLinear"]
    read = [node("Neg", ["r"], ["z"], name="read")]
    model = model_of([*nodes, *read], {"x": (2, 8)}, ["y", "z"], arrays)
    lower(model, {}, "fp16")
    assert dtypes(model)["r"] == "fp16"
