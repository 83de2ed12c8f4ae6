"""The forms of the fused GEMM in the interpreter against float64 and ONNX Runtime: int8, scales, gated pairs, weights
of 8 and 4 bits, groups of rows, persistent blocks, tensor descriptors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.conformance import Guarded, assert_close, check, pairwise
from tests.kernels.ops.gemm_cases import conforms, gemm_problems, out_for, run
from tilewright.kernels import GemmConfig, GemmProblem, call, gemm, resolve_device
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.gemm import api
from tilewright.kernels.ops.gemm.default import default
from tilewright.kernels.ops.gemm.grouped import grouped_gemm
from tilewright.kernels.ops.gemm.launch import FLATTEN_WARPS, GEMM
from tilewright.kernels.ops.gemm.packing import pack_int4, packed_rows
from tilewright.kernels.ops.gemm.reference import tolerance
from tilewright.kernels.ops.gemm.space import SPACE, fits, pieces
from tilewright.tuning_db.errors import (
    IllegalConfigError,
    ProblemError,
    UnsupportedError,
    UnsupportedProblemError,
    UsageError,
)

# Large tiles, whose epilogue goes through them in pieces


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "fp16", "activation": "relu"},
        {"residual": "fp32", "alpha": True},
        {"bias": "fp16", "gated": "interleaved", "activation": "silu", "residual": "fp16"},
        {"dtype": "int8", "a_scale": "row", "b_scale": "column", "bias": "fp32"},
        {"bias": "fp32", "bias_axis": "m", "out_dtype": "int8", "out_scale": True},
    ],
    ids=lambda fields: "-".join(fields),
)
@pytest.mark.parametrize("sizes", [(130, 150, 40), (256, 128, 64)], ids=["cut", "whole"])
def test_epilogues_in_pieces(fields, sizes):
    problem = GemmProblem(*sizes, **fields)
    config = GemmConfig(128, 128, 32, num_warps=4)
    assert pieces(problem, config) == 4
    conforms(problem, config)


def test_pieces_are_for_many_sums_and_what_is_fused():
    plain, fused = GemmProblem(256, 256, 64), GemmProblem(256, 256, 64, bias="fp16")
    large, small = GemmConfig(128, 256, 64, num_warps=8), GemmConfig(64, 128, 64, num_warps=8)
    assert [pieces(problem, config) for problem in (plain, fused) for config in (large, small)] == [1, 1, 4, 1]
    assert pieces(replace(fused, gated="halves"), large) == 1


# Every form with every part of the epilogue, in pairs

OPERANDS = {
    "fp16": {},
    "fp8": {"dtype": "fp8e4m3"},
    "fp32": {"dtype": "fp32"},
    "int8": {"dtype": "int8", "b_scale": "tensor"},
    "int8 weights": {"dtype": "bf16", "b_dtype": "int8"},
    "int8 weights, groups of 32": {"b_dtype": "int8", "b_scale": "group", "group_size": 32, "b_scale_dtype": "bf16"},
    "int4": {"b_dtype": "int4", "b_zero": True},
    "int4, groups of 64": {"b_dtype": "int4", "b_scale": "group", "group_size": 64, "b_scale_dtype": "fp16"},
    "int4, groups of 128": {"dtype": "bf16", "b_dtype": "int4", "b_scale": "group", "group_size": 128, "b_zero": True},
}
FORMS = {
    "one": {},
    "batch": {"batch": 2},
    "one B": {"batch": 2, "b_broadcast": True},
    "one A": {"batch": 2, "a_broadcast": True},
    "groups": {"groups": 3},
}
AXES = {
    "operands": tuple(OPERANDS),
    "form": tuple(FORMS),
    "gated": (None, "halves", "interleaved"),
    "a_scale": (None, "tensor", "row"),
    "column": (False, True),  # scales of columns, where B has none of groups
    "bias": (None, "n", "m"),
    "residual": (None, "fp16"),
    "activation": ("none", "silu", "relu2"),
    "alpha": (False, True),
    "out": ("fp32", "bf16", "int8", "fp8e5m2"),
    "layouts": tuple(itertools.product(("row", "col"), repeat=2)),
    "memory": ("dense", "unaligned", "strided"),
    "M": (1, 17, 48),
    "N": (2, 46, 64),
    "K": (1, 33, 160),
    "split": (1, 3),
    "walk": (None, "persistent", "described", "both"),
}


def case_of(row):
    """The problem of a row of AXES, and a configuration that fits it."""
    if row["walk"] in ("described", "both") and row["memory"] != "unaligned":
        row = row | {"M": 48, "N": 64, "K": 160, "layouts": ("row", row["layouts"][1])}
    fields = OPERANDS[row["operands"]] | FORMS[row["form"]]
    if "b_dtype" in fields and ("group_size" in fields or "b_zero" in fields) and fields.get("batch"):
        fields |= {"b_broadcast": True}
    if row["column"] and fields.get("b_scale") != "group":
        fields |= {"b_scale": "column"}
    problem = GemmProblem(
        **{name: row[name] for name in ("M", "N", "K", "gated", "a_scale", "residual", "activation", "alpha")},
        bias=row["bias"] and "fp32",
        bias_axis=row["bias"] or "n",
        out_dtype=row["out"],
        out_scale=row["out"] in ("int8", "fp8e5m2"),
        a_layout=row["layouts"][0],
        b_layout=row["layouts"][1],
        strided=row["memory"] == "strided",
        aligned=row["memory"] != "unaligned",
        end_aligned=row["memory"] != "unaligned",
        **fields,
    )
    config = GemmConfig(16, 32, 32, SPLIT_K=row["split"], num_warps=2)
    for walk in ({"PERSISTENT": True, "TMA": True}, {"TMA": True}, {"PERSISTENT": True}):
        wanted = {None: {}, "persistent": {"PERSISTENT": True}, "described": {"TMA": True}}.get(row["walk"], walk)
        candidate = GemmConfig(**config.to_dict() | wanted | ({"SPLIT_K": 1} if "PERSISTENT" in wanted else {}))
        if fits(problem, candidate, resolve_device("a100")) is None:
            return problem, candidate
    return problem, config


ROWS = [case_of(row) for row in pairwise(AXES)]


@pytest.mark.parametrize(("problem", "config"), ROWS, ids=str)
def test_equals_the_reference(problem, config):
    conforms(problem, config)


def test_rows_reach_every_way_to_run():
    seen = {(config.PERSISTENT, config.TMA, config.SPLIT_K > 1) for _, config in ROWS}
    assert seen >= {(True, False, False), (False, True, False), (False, True, True), (False, False, True)}


@pytest.mark.parametrize("layouts", [*itertools.product(("row", "col"), repeat=2)], ids="-".join)
@pytest.mark.parametrize("gated", [None, "halves", "interleaved"])
@pytest.mark.parametrize("kind", ["fp16", "int8", "fp8e5m2"])
def test_persistent_and_described_equals_the_reference(kind, gated, layouts):
    fused = {"a_scale": "row", "b_scale": "column", "bias": "fp32", "bias_axis": "m", "residual": "fp16"}
    problem = GemmProblem(
        48, 96, 80, dtype=kind, gated=gated, activation="silu", a_layout=layouts[0], b_layout=layouts[1], **fused
    )
    conforms(problem, GemmConfig(16, 32, 32, GROUP_M=2, PERSISTENT=True, TMA=True))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_problem_with_any_configuration(data):
    problem = data.draw(gemm_problems(st.integers(1, 40), st.integers(1, 3)))
    blocks = st.sampled_from([16, 32, 64])
    config = GemmConfig(
        data.draw(blocks),
        data.draw(blocks),
        data.draw(blocks),
        GROUP_M=data.draw(st.integers(1, 4)),
        SPLIT_K=data.draw(st.sampled_from([1, 1, 2, 5])),
        PERSISTENT=data.draw(st.booleans()),
        TMA=data.draw(st.booleans()),
    )
    if fits(problem, config, resolve_device("a100")) is not None:
        config = None
    conforms(problem, config, seed=data.draw(st.integers(0, 2**32 - 1)))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_problem_in_tiles_of_eight_rows(data):
    drawn = data.draw(gemm_problems(st.integers(2, 40), st.integers(1, 3)))  # one column lies as a row does
    depth = 32 * data.draw(st.integers(1, 8)) if drawn.b_dtype == "int4" else 16 * data.draw(st.integers(1, 16))
    problem = replace(drawn, K=depth, a_layout="row", b_layout="col", aligned=True)
    config = GemmConfig(
        8,
        data.draw(st.sampled_from([32, 64])),
        data.draw(st.sampled_from([32, 64])) if problem.group_size != 32 else 32,
        SPLIT_K=data.draw(st.sampled_from([1, 2, 5])),
        num_warps=2,
        PERSISTENT=data.draw(st.booleans()),
    )
    if config.SPLIT_K > 1:
        config = replace(config, PERSISTENT=False)
    assert fits(problem, config, resolve_device("h100")) is None
    conforms(problem, config, seed=data.draw(st.integers(0, 2**32 - 1)))


@pytest.mark.smoke
@pytest.mark.parametrize("fields", OPERANDS.values(), ids=OPERANDS)
def test_operands_with_their_default_configuration(fields):
    conforms(GemmProblem(17, 46, 160, out_dtype="fp32", gated="halves", activation="silu", **fields))


# int8


@pytest.mark.smoke
@pytest.mark.parametrize("split", [1, 4])
def test_sums_of_int8_are_exact_where_fp32_is_not(split):
    # 1056·128² is over 2^24: fp32 has no odd numbers there.
    a = np.full((17, 1056), -128, np.int8)
    b = np.full((1056, 33), -128, np.int8)
    a[:, -1], b[-1] = np.arange(17), 1
    expected = a.astype(np.int64) @ b.astype(np.int64)
    assert expected.max() > 2**24
    result = gemm(a, b, config=GemmConfig(16, 32, 64, SPLIT_K=split))
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, expected)
    groups = grouped_gemm(
        a, np.stack([b, b]), np.array([0, 5, 17], np.int32), config=GemmConfig(16, 32, 64, SPLIT_K=split)
    )
    np.testing.assert_array_equal(groups, expected)


def test_int8_is_int32_alone_and_bf16_with_scales(problems):
    a, b = np.ones((4, 32), np.int8), np.ones((32, 6), np.int8)
    assert gemm(a, b).dtype == np.int32
    assert gemm(a, b, b_scale=0.5).dtype == ml_dtypes.bfloat16
    assert (gemm(a, b, a_scale=0.25, b_scale=0.5, out_dtype="fp32") == 4).all()
    assert [problem.out_dtype for problem in problems] == ["int32", "bf16", "fp32"]


@pytest.mark.parametrize("value", [1000.0, -1000.0, 2.5, 3.5, -2.5, np.nan])
def test_a_quantised_result_rounds_to_even_and_saturates(value):
    a, b = np.full((1, 16), value / 16, np.float32), np.ones((16, 2), np.float32)
    result = gemm(a, b, out_scale=1.0, out_dtype="int8")
    expected = {1000.0: 127, -1000.0: -128, 2.5: 2, 3.5: 4, -2.5: -2}.get(value, -128)
    np.testing.assert_array_equal(result, expected)


# Arrays of a problem, recognised


@pytest.mark.parametrize("memory", ["dense", "strided", "unaligned"])
@pytest.mark.parametrize("gated", [None, "halves", "interleaved"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_arrays_of_a_problem_are_recognised_as_that_problem(operands, form, gated, memory, problems, monkeypatch):
    fields = operands | form
    if ("group_size" in fields or "b_zero" in fields) and "batch" in fields:
        fields |= {"b_broadcast": True}
    problem = GemmProblem(
        M=32,
        N=96,
        K=160,
        out_dtype="fp32",
        a_scale="row",
        bias="fp32",
        bias_axis="m",
        residual="fp16",
        alpha=True,
        gated=gated,
        b_layout="col",
        strided=memory == "strided",
        aligned=memory != "unaligned",
        end_aligned=memory != "unaligned",
        **fields,
    )
    monkeypatch.setattr(call.PlannedCall, "run", lambda *_: (None,))  # what it comes down to, not what comes out
    run(problem, problem.inputs(0), out_for(problem)["out"].array)
    assert problems == [problem]


def random_array(shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def near(result, expected):
    assert_close(result, expected.astype(np.float64), Tolerance(1e-5, 1e-5))


def test_scales_are_numbers_or_arrays(problems):
    a, b = random_array((5, 7)), random_array((7, 4))
    product = a.astype(float) @ b
    near(gemm(a, b, a_scale=2, b_scale=np.float32(3)), 6 * product)
    near(gemm(a, b, a_scale=np.full(1, 2, np.float32), b_scale=np.full((1, 1), 3, np.float32)), 6 * product)
    rows, columns = random_array((5,)), random_array((4,))
    near(gemm(a, b, a_scale=rows, b_scale=columns), product * rows[:, None] * columns)
    near(gemm(a, b, a_scale=rows[:, None], b_scale=columns[None]), product * rows[:, None] * columns)
    assert [(problem.a_scale, problem.b_scale) for problem in problems] == [("tensor", "tensor")] * 2 + [
        ("row", "column")
    ] * 2


def test_row_scales_follow_their_rows_through_batches(problems):
    a, b, scale = random_array((3, 17, 33)), random_array((33, 9)), random_array((3, 17))
    expected = (a.astype(float) @ b) * scale[..., None]
    near(gemm(a, b, a_scale=scale), expected)  # folded into rows
    bias = random_array((17,))
    near(gemm(a, b, a_scale=scale, bias=bias, bias_axis="m"), expected + bias[:, None])  # not folded
    other = random_array((2, 1, 33, 9))
    for each in (scale, scale[..., None]):
        near(gemm(a, other, a_scale=each), (a.astype(float) @ other) * scale[..., None])  # a loop
    assert [(problem.M, problem.batch) for problem in problems] == [(51, 1), (17, 3), *[(51, 1)] * 4]
    single = random_array((1, 17, 33))
    several = random_array((4, 33, 9))
    near(gemm(single, several, a_scale=scale[:1]), (single.astype(float) @ several) * scale[:1, :, None])


def test_row_scales_of_a_matrix_that_a_loop_repeats_are_those_of_one():
    single, b = random_array((17, 33)), random_array((2, 1, 33, 9))
    scale, a = random_array((17,)), np.broadcast_to(single, (3, 17, 33))
    expected = np.broadcast_to((single.astype(float) @ b) * scale[:, None], (2, 3, 17, 9))
    for each in (scale[None], scale[None, :, None]):
        near(gemm(a, b, a_scale=each), expected)
    # For all of them, which no kernel reads: of the call as a whole, and before anything is kept of it.
    before = len(api._GEMM._calls)
    for shape, weights in (((3,), (2, 1)), ((2, 1, 3), (2, 1, 1)), ((2, 1, 3), (1, 4, 1)), ((2, 3), (2, 1))):
        a = np.broadcast_to(random_array((*shape[:-1], 1, 17, 33)), (*shape, 17, 33))
        with pytest.raises(UnsupportedError) as raised:
            gemm(a, random_array((*weights, 33, 9)), a_scale=np.ones((*shape, 17), np.float32))
        assert str(raised.value) == f"a of shape {a.shape} repeats one matrix and has a_scale for all: pass a copy"
    assert len(api._GEMM._calls) == before


def test_weights_in_rows_and_columns_give_the_same():
    q = np.random.default_rng(0).integers(0, 16, (70, 33))
    a = random_array((5, 70)).astype(np.float16)
    packed = pack_int4(q)
    assert packed.strides[-2] == 1
    columns, rows = gemm(a, packed, out_dtype="fp32"), gemm(a, np.ascontiguousarray(packed), out_dtype="fp32")
    near(columns, a.astype(float) @ (q - 8))
    np.testing.assert_array_equal(columns, rows)


def test_scales_of_columns_come_as_rows_too():
    a, q = np.ones((4, 32), np.float16), np.ones((32, 6), np.int8)
    scale, zero = np.arange(6, dtype=np.float32), np.arange(6).astype(np.int8)
    expected = 32 * (1 - zero.astype(float)) * scale
    near(gemm(a, q, b_scale=scale, b_zero=zero, out_dtype="fp32"), np.tile(expected, (4, 1)))
    near(gemm(a, q, b_scale=scale[None], b_zero=zero[None], out_dtype="fp32"), np.tile(expected, (4, 1)))


# Groups of rows


OFFSETS = {
    "even": (0, 16, 32, 48),
    "ragged": (0, 1, 34, 48),
    "empty ones": (0, 0, 48, 48),
    "all empty": (0, 0, 0, 0),
    "not all rows": (3, 20, 20, 31),
    "past the last": (0, 16, 32, 64),
}


@pytest.mark.smoke
@pytest.mark.parametrize(
    "config", [GemmConfig(16, 32, 32, GROUP_M=2), GemmConfig(32, 16, 32, PERSISTENT=True)], ids=str
)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_rows_of_no_group_are_not_touched(offsets, config):
    a, b = random_array((48, 33)), random_array((3, 33, 20))
    out = Guarded((48, 20), "fp32")
    out.array[...] = 7
    result = grouped_gemm(a, b, np.array(offsets, np.int32), out=out.array, config=config)
    assert result is out.array
    expected = np.full((48, 20), 7.0)
    for g in range(3):
        rows = slice(offsets[g], min(48, offsets[g + 1]))
        expected[rows] = a[rows].astype(float) @ b[g]
    near(result, expected)
    out.assert_intact()


def test_more_groups_than_rows():
    problem = GemmProblem(5, 16, 32, dtype="fp32", groups=40, bias="fp32")
    conforms(problem, GemmConfig(16, 16, 32))


# Bits


DETERMINISTIC = (
    (GemmProblem(33, 64, 300, dtype="int8", a_scale="row", b_scale="column"), GemmConfig(16, 32, 32, SPLIT_K=3)),
    (GemmProblem(33, 64, 300, dtype="fp32", gated="halves", activation="silu"), GemmConfig(16, 32, 32, SPLIT_K=3)),
    (GemmProblem(33, 64, 300, b_dtype="int4", b_scale="group", group_size=32), GemmConfig(16, 32, 32, SPLIT_K=3)),
    (GemmProblem(33, 64, 96, dtype="fp32", groups=4), GemmConfig(16, 32, 32, PERSISTENT=True)),
)


@pytest.mark.parametrize(("problem", "config"), DETERMINISTIC, ids=str)
def test_two_runs_give_the_same_bits(problem, config):
    arrays = problem.inputs(3)
    one, other = (out_for(problem)["out"].array for _ in range(2))
    for out in (one, other):
        run(problem, arrays, out, config)
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("layouts", [*itertools.product(("row", "col"), repeat=2)], ids="-".join)
def test_persistent_and_described_are_the_plain_result_bit_for_bit(layouts):
    problem = GemmProblem(80, 96, 80, dtype="fp32", a_layout=layouts[0], b_layout=layouts[1], bias="fp32")
    arrays, draw = problem.inputs(0), np.random.default_rng(0)
    # The interpreter's products are BLAS's, whose order of summing differs from layout to layout on some processors. So
    # the sum over a tile of K is exact in any order, and that of the tiles is rounded, in the order of the kernel.
    arrays["a"][...] = draw.integers(-8, 9, (80, 80)) * 2.0 ** (16 * (np.arange(80) // 32))
    arrays["b"][...] = draw.integers(-8, 9, (80, 96))
    results = []
    for persistent, described in itertools.product((False, True), repeat=2):
        out = out_for(problem)["out"].array
        run(problem, arrays, out, GemmConfig(16, 32, 32, PERSISTENT=persistent, TMA=described))
        results.append(out.tobytes())
    assert len(set(results)) == 1


def test_loops_are_flattened_only_where_that_compiles_right():
    problem = GemmProblem(4096, 4096, 4096)
    for warps in (2, 4, 8):
        (launch,) = GEMM.launches(problem, GemmConfig(128, 128, 64, num_warps=warps, PERSISTENT=True))
        assert dict(launch.constexprs)["FLATTEN"] == (warps <= FLATTEN_WARPS)
        assert launch.blocks_per_sm * warps == 8
        assert launch.on(108).grid == (min(1024, launch.blocks_per_sm * 108), 1, 1)


# Independent oracles


def onnx_result(nodes, feeds, opset=21, **attributes):
    """What ONNX Runtime computes on a CPU."""
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    graph = onnx.helper.make_graph(nodes, "oracle", inputs, [onnx.ValueInfoProto(name="y")])
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def node(kind, *inputs, domain="", **attributes):
    return onnx.helper.make_node(kind, inputs, ["y"], domain=domain, **attributes)


def test_matmul_integer_of_onnx():
    random = np.random.default_rng(0)
    a, b = random.integers(-128, 128, (2, 17, 70), np.int8), random.integers(-128, 128, (70, 33), np.int8)
    np.testing.assert_array_equal(gemm(a, b), onnx_result([node("MatMulInteger", "a", "b")], {"a": a, "b": b}))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_gemm_of_onnx(alpha):
    a, b, c = random_array((33, 17)), random_array((20, 33)), random_array((20,))
    expected = onnx_result([node("Gemm", "a", "b", "c", alpha=alpha, transA=1, transB=1)], {"a": a, "b": b, "c": c})
    near(gemm(a.T, b.T, bias=c, alpha=alpha), expected)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_matmul_nbits_of_onnx(size, zero):
    random = np.random.default_rng(size)
    k, n = 256, 24
    q = random.integers(0, 16, (k, n)).astype(np.uint8)
    scale = random.uniform(0.5, 1.5, (k // size, n)).astype(np.float32)
    zeros = random.integers(0, 16, (k // size, n)).astype(np.uint8)
    a = random_array((5, k))
    # Theirs: (N, groups, bytes), two neighbours along K in a byte, the first in the low nibble; zero points likewise.
    blocks = q.T.reshape(n, k // size, size // 2, 2)
    feeds = {"a": a, "b": blocks[..., 0] | (blocks[..., 1] << 4), "s": np.ascontiguousarray(scale.T)}
    if zero:
        filled = np.pad(zeros.T, ((0, 0), (0, (k // size) % 2)))
        feeds["z"] = filled[:, 0::2] | (filled[:, 1::2] << 4)
    attributes = {"K": k, "N": n, "bits": 4, "block_size": size, "domain": "com.microsoft"}
    expected = onnx_result([node("MatMulNBits", *feeds, **attributes)], feeds)
    half = a.astype(np.float16)
    result = gemm(half, pack_int4(q), b_scale=scale, b_zero=zeros if zero else None, group_size=size, out_dtype="fp32")
    # The activations lost 11 bits on their way here; the sums of 256 of them are some 100.
    assert_close(result, expected.astype(np.float64), Tolerance(2**-9, 0.5))


def test_a_gated_pair_is_two_products_of_numpy():
    a, gate, up = random_array((17, 33)), random_array((33, 20), 1), random_array((33, 20), 2)
    wide = a.astype(float)
    expected = (wide @ gate) / (1 + np.exp(-(wide @ gate))) * (wide @ up)
    near(gemm(a, np.concatenate([gate, up], axis=1), gated="halves", activation="silu"), expected)
    pairs = np.stack([gate, up], axis=-1).reshape(33, 40)
    near(gemm(a, pairs, gated="interleaved", activation="silu"), expected)


# Misuse

A, B = np.ones((4, 64), np.float16), np.ones((64, 6), np.float16)
W8, W4 = np.ones((64, 6), np.int8), np.ones((32, 6), np.uint8)
F32 = np.float32


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ProblemError, "b is (16, 6) of packed int4: K=64 rows are packed in 32", {"b": W4[:16]}),
        (
            UnsupportedProblemError,
            "a is fp32 and b is int8: they must have one dtype, or a fp16",
            {"a": A.astype(F32), "b": W8},
        ),
        (UnsupportedProblemError, "a is int8 and b is fp16: they must have one dtype", {"a": A.astype(np.int8)}),
        (ProblemError, "a_scale is (6,) and must be one element or (4,) or (4, 1)", {"a_scale": np.ones(6, F32)}),
        (ProblemError, "b_scale is (4,) and must be one element or (6,) or (1, 6)", {"b_scale": np.ones(4, F32)}),
        (
            ProblemError,
            "b_scale is (2, 6) and must be one element or (6,) or (1, 6)",
            {"b": W4, "b_scale": np.ones((2, 6), F32)},
        ),
        (ProblemError, "b_scale is (6,) and must be (2, 6)", {"b": W4, "b_scale": np.ones(6, F32), "group_size": 32}),
        (ProblemError, "group_size=-1 must be 32, 64 or 128", {"b": W4, "b_scale": np.ones(6, F32), "group_size": -1}),
        (ProblemError, "group_size=0 must be 32, 64 or 128", {"b": W4, "b_scale": np.ones(6, F32), "group_size": 0}),
        (ProblemError, "bias_axis='M' must be 'n' or 'm'", {"bias": np.ones(4, F32), "bias_axis": "M"}),
        (
            ProblemError,
            "gated='half' must be 'halves', 'interleaved' or None",
            {"gated": "half", "residual": np.ones((4, 6), F32)},
        ),
        (ProblemError, "gated='halves' needs an even N, not 5", {"b": B[:, :5], "gated": "halves", "out": A[:, :2]}),
        (
            UnsupportedProblemError,
            "are for one B, not one in each of a batch",
            {"a": np.stack([[A] * 3] * 2), "b": np.stack([[W4]] * 2), "b_zero": W4[0]},
        ),
        (ProblemError, "unknown out_dtype=''", {"out_dtype": ""}),
        (UsageError, "out_dtype=5 must be a name, as 'fp16'", {"out_dtype": 5}),
        (UsageError, "must be a name, as 'fp16', or a library's dtype: float16", {"out_dtype": np.float64}),
        (
            ProblemError,
            "a_scale is (1, 4) and must be (3, 4)",
            {"a": np.stack([A] * 3), "b": np.stack([B] * 3), "a_scale": np.ones((1, 4), F32)},
        ),
        (
            ProblemError,
            "a_scale is (1, 4) and must be (3, 4)",
            {"a": np.stack([A] * 3), "b": np.ones((2, 1, 64, 6), np.float16), "a_scale": np.ones((1, 4), F32)},
        ),
        (UnsupportedProblemError, "a_scale is fp16 and must be fp32", {"a_scale": np.ones(4, np.float16)}),
        (UnsupportedProblemError, "b_scale is fp16 and must be fp32", {"b": W8, "b_scale": np.ones(6, np.float16)}),
        (ProblemError, "group_size=32 needs b_scale", {"b": W4, "group_size": 32}),
        (
            UnsupportedProblemError,
            "group_size=48 must be one of 32",
            {"b": W4, "b_scale": np.ones((2, 6), F32), "group_size": 48},
        ),
        (
            UnsupportedProblemError,
            "group_size=32 must be one of 32, 64, 128, of weights",
            {"b_scale": np.ones((2, 6), F32), "group_size": 32},
        ),
        (
            UnsupportedProblemError,
            "b_scale of groups is int8 and must be fp32",
            {"b": W4, "b_scale": W8[:2], "group_size": 32},
        ),
        (ProblemError, "b_zero is int8 and must be that of b, uint8", {"b": W4, "b_zero": W8[0]}),
        (ProblemError, "b_zero is (5,) and must be (1, 6) or (6,)", {"b": W8, "b_zero": W8[0, :5]}),
        (ProblemError, "b_zero is for weights", {"b_zero": B[0]}),
        (UnsupportedError, "a_scale must be contiguous; its strides are (2,)", {"a_scale": np.ones(8, F32)[::2]}),
        (
            UnsupportedError,
            "b_scale must be contiguous; its strides are (1, 2)",
            {"b": W4, "b_scale": np.ones((6, 2), F32).T, "group_size": 32},
        ),
        (
            UnsupportedError,
            "repeats one matrix and has a_scale for all",
            {"a": np.broadcast_to(A, (3, 4, 64)), "b": np.stack([B] * 3), "a_scale": np.ones((3, 4), F32)},
        ),
        (
            UnsupportedProblemError,
            "are for one B, not one in each of a batch",
            {"a": np.stack([A] * 3), "b": np.stack([W4] * 3), "b_zero": W4[0]},
        ),
        (ProblemError, "gated='halves' needs an even N, not 5", {"b": B[:, :5], "gated": "halves"}),
        (ProblemError, "gated='both' must be 'halves', 'interleaved' or None", {"gated": "both"}),
        (
            ProblemError,
            "residual is (4, 6) and must broadcast to (4, 3)",
            {"gated": "halves", "residual": np.ones((4, 6), F32)},
        ),
        (ProblemError, "bias is (6,) and must be (4,)", {"bias": np.ones(6, F32), "bias_axis": "m"}),
        (ProblemError, "bias_axis='m' needs a bias", {"bias_axis": "m"}),
        (
            ProblemError,
            "with neither a_scale nor b_scale gives the bare sums, in int32",
            {"a": A.astype(np.int8), "b": W8, "out_dtype": "fp16"},
        ),
        (
            ProblemError,
            "out_dtype='int32' is the bare sum",
            {"a": A.astype(np.int8), "b": W8, "b_scale": 2.0, "out_dtype": "int32"},
        ),
        (
            IllegalConfigError,
            "BLOCK_K=64 does not divide group_size=32",
            {"b": W4, "b_scale": np.ones((2, 6), F32), "group_size": 32, "config": GemmConfig(16, 16, 64)},
        ),
        (
            IllegalConfigError,
            "the smallest tile of a int4 dot is 8×16×32",
            {"b": W4, "config": GemmConfig(16, 16, 16)},
        ),
        (IllegalConfigError, "dot is 8×32×16 in halves", {"gated": "halves", "config": GemmConfig(16, 16, 16)}),
        (
            IllegalConfigError,
            "TMA is for operands of one dtype, not fp16 by int4",
            {"b": W4, "config": GemmConfig(16, 16, 32, TMA=True)},
        ),
        (
            IllegalConfigError,
            "TMA needs tiles of A and B that start at 16 bytes",
            {"config": GemmConfig(16, 16, 32, TMA=True)},
        ),
        (
            IllegalConfigError,
            "PERSISTENT goes with SPLIT_K=1, not 2",
            {"config": GemmConfig(16, 16, 32, SPLIT_K=2, PERSISTENT=True)},
        ),
        (IllegalConfigError, "PERSISTENT=1 must be true or false", {"config": GemmConfig(16, 16, 32, PERSISTENT=1)}),
        (
            IllegalConfigError,
            "is for one A and B, not batch=2",
            {
                "a": np.stack([A] * 2),
                "b": np.ones((2, 64, 16), np.float16),
                "config": GemmConfig(16, 16, 32, TMA=True, PERSISTENT=True),
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misuse_is_one_line_with_the_values(error, message, arguments):
    with pytest.raises(error) as raised:
        gemm(**{"a": A, "b": B} | arguments)
    assert type(raised.value) is error
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


GROUPED = {"a": A, "b": np.stack([B] * 2), "offsets": np.array([0, 1, 4], np.int32)}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ProblemError, "a is (4, 64) and b is (64, 6): they must be (M, K) and (groups, K, N)", {"b": B}),
        (ProblemError, "K=64 and K=63 must be equal", {"b": GROUPED["b"][:, :63]}),
        (ProblemError, "offsets is (2,) and must be (3,)", {"offsets": GROUPED["offsets"][:2]}),
        (UnsupportedProblemError, "offsets is int64 and must be int32", {"offsets": np.array([0, 1, 4])}),
        (ProblemError, "offsets is fp32 and must be int32", {"offsets": np.zeros(3, F32)}),
        (ProblemError, "bias is (6,) and must be (2, 6)", {"bias": np.ones(6, F32)}),
        (ProblemError, "residual is (4, 5) and must be (4, 6)", {"residual": np.ones((4, 5), F32)}),
        (ProblemError, "out is (4, 6) and must be (4, 3)", {"gated": "halves", "out": np.ones((4, 6), np.float16)}),
        (ProblemError, "b_scale is (6,) and must be one element or (2, 6) or (2, 1, 6)", {"b_scale": np.ones(6, F32)}),
        (
            UnsupportedProblemError,
            "groups=1025 must be from 0 to 1024",
            {"b": np.broadcast_to(B, (1025, 64, 6)), "offsets": np.zeros(1026, np.int32)},
        ),
        (
            IllegalConfigError,
            "TMA with PERSISTENT is for one A and B",
            {"b": np.ones((2, 64, 16), np.float16), "config": GemmConfig(16, 16, 32, TMA=True, PERSISTENT=True)},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misuse_of_groups_is_one_line_with_the_values(error, message, arguments):
    with pytest.raises(error) as raised:
        grouped_gemm(**GROUPED | arguments)
    assert type(raised.value) is error
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# The space


@pytest.mark.parametrize("board", ["t4", "a100", "rtx3090", "h200", "b200", "rtx5090"])
@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("gated", [None, "halves", "interleaved"])
def test_every_form_has_a_default_and_a_space(operands, gated, board):
    device = resolve_device(board)
    for m, n, k in ((1, 2, 1), (17, 4096, 4096), (4096, 8192, 4096)):
        for form in ({}, {"groups": 4}):
            problem = GemmProblem(m, n, k, out_dtype="fp16", gated=gated, **operands, **form)
            assert fits(problem, default(problem, device), device) is None
            if n < 4096 or GEMM.supported(problem, device) is not None or device.arch < 80:
                continue
            assert 100 < len(SPACE.configs(problem, device, coarse=True)) < 2000


ON_HOPPER = (
    # What a tile is, and whether descriptors bring it, against the fields that decide so.
    ((4096, 4096, 4096), {"dtype": "bf16"}, (128, 256, 64), True),
    ((16384, 256, 1024), {"dtype": "bf16"}, (256, 128, 64), True),  # 128 tiles for 132 SMs
    ((2048, 1024, 1024), {"dtype": "bf16"}, (128, 128, 32), False),
    ((4096, 4096, 4096), {"dtype": "int8", "b_layout": "col"}, (128, 256, 128), True),
    ((4096, 4096, 4096), {"dtype": "int8"}, (128, 128, 64), False),  # B's rows are not along K
    ((4096, 4096, 4096), {"dtype": "fp8e4m3", "b_layout": "col"}, (128, 128, 128), True),
    ((1, 4096, 4096), {"dtype": "bf16"}, (16, 64, 128), False),
    ((64, 8192, 8192), {"dtype": "bf16"}, (64, 64, 128), False),
    ((64, 8192, 512), {"dtype": "bf16"}, (64, 64, 32), False),
)


@pytest.mark.parametrize(("sizes", "fields", "tile", "described"), ON_HOPPER, ids=str)
def test_the_default_on_hopper_is_what_was_measured_there(sizes, fields, tile, described):
    board = resolve_device("h200")
    problem = GemmProblem(*sizes, **fields)
    config = default(problem, board)
    assert tile == (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    assert config.PERSISTENT == config.TMA == described
    assert not default(problem, resolve_device("b200")).TMA


@pytest.mark.parametrize(("n", "k", "splits"), [(4096, 4096, 4), (4096, 14336, 4), (28672, 4096, 1)])
def test_few_rows_by_int4_weights_are_split_until_the_sms_have_blocks(n, k, splits):
    problem = GemmProblem(1, n, k, dtype="bf16", b_dtype="int4", b_scale="group", group_size=128, b_layout="col")
    config = default(problem, resolve_device("h200"))
    assert (128, splits, True) == (config.BLOCK_K, config.SPLIT_K, config.PAIRS)
    assert default(replace(problem, M=64), resolve_device("h200")).SPLIT_K == 1


def test_ragged_problems_keep_their_form():
    for operands, gated in itertools.product(OPERANDS.values(), (None, "halves", "interleaved")):
        problem = GemmProblem(512, 1024, 1024, out_dtype="fp16", groups=8, gated=gated, **operands)
        config = GemmConfig(16, 32, 32)
        smaller = GEMM.ragged(problem, config)
        assert smaller.M < 64
        assert smaller.N % 32
        assert smaller.K % 32
        check(GEMM, smaller, lambda arrays, outs: run(smaller, arrays, outs["out"], config), out_for(smaller))  # noqa: B023


def test_tolerances_of_forms():
    exact = tolerance(GemmProblem(16, 16, 4096, dtype="int8"))["out"]
    assert exact == Tolerance(0.0, 0.0)
    scaled = tolerance(GemmProblem(16, 16, 2**16, dtype="int8", b_scale="column", out_dtype="fp32"))["out"]
    assert scaled.absolute < tolerance(GemmProblem(16, 16, 2**16, dtype="fp32"))["out"].absolute
    # A weight of the next group, or one nibble off, is off by about 1/√K.
    weights = GemmProblem(16, 16, 2**14, b_dtype="int4", b_scale="group", group_size=32, out_dtype="fp32")
    assert tolerance(weights)["out"].absolute < 0.1 / np.sqrt(weights.K)
    assert packed_rows(weights.K) == weights.K // 2


def test_what_the_epilogue_touches_does_not_cost_the_operands_their_copies(problems):
    wide = np.ones((40, 96), np.float16)
    weights, bias = np.ones((40, 32), np.float16), np.ones(41, np.float16)
    gemm(wide[:, :32], weights.T)
    gemm(wide[:, :32], weights.T, bias=bias[1:])
    gemm(wide[:, 1:33], weights.T)
    assert [(problem.aligned, problem.end_aligned) for problem in problems] == [
        (True, False),
        (True, False),
        (False, False),
    ]


@pytest.mark.parametrize("group_size", [32.0, "32", True, np.float32(32)])
def test_a_group_size_that_is_no_integer_is_refused_and_spoils_no_other_call(group_size):
    a, q, scale = np.ones((4, 64), np.float16), np.ones((64, 16), np.int8), np.ones((2, 16), np.float32)
    with pytest.raises(UsageError, match=r"^group_size=.* must be an integer$"):
        gemm(a, q, b_scale=scale, group_size=group_size)
    np.testing.assert_array_equal(gemm(a, q, b_scale=scale, group_size=np.int64(32)), np.full((4, 16), 64))
