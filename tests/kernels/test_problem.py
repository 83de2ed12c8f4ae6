"""Problems and configurations as values: their texts, their keys, and what they refuse. GEMM's stand for all."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.ops.gemm_cases import gemm_problems
from tilewright.kernels import GemmConfig, GemmProblem
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.epilogue import FLOATS
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.packing import pack_int4
from tilewright.kernels.ops.gemm.problem import INPUT_DTYPES
from tilewright.kernels.ops.gemm.reference import reference
from tilewright.kernels.registry import KERNELS
from tilewright.tuning_db.errors import ProblemError, UsageError

GEMM_PROBLEMS = gemm_problems(st.integers(1, 2**31 - 2), st.integers(1, 2**20))


# Texts and keys


@settings(deadline=None)
@given(GEMM_PROBLEMS)
def test_a_problem_is_its_texts(problem):
    assert GemmProblem.from_json(problem.to_json()) == problem
    assert GemmProblem.from_dict(problem.to_dict()) == problem
    assert GemmProblem.parse(str(problem)) == problem
    assert "\n" not in str(problem)


@settings(deadline=None)
@given(GEMM_PROBLEMS, GEMM_PROBLEMS)
def test_texts_are_equal_exactly_when_problems_are(one, other):
    assert (one.to_json() == other.to_json()) == (one == other)
    assert (str(one) == str(other)) == (one == other)


@settings(deadline=None)
@given(st.builds(GemmConfig, *[st.integers(-(2**40), 2**40)] * 7))
def test_a_configuration_is_its_text(config):
    assert GemmConfig.from_json(config.to_json()) == config


def test_the_text_of_a_problem_in_a_database_is_what_it_was():
    # Records are found under this text: changing it makes every one of them unreachable.
    assert GemmProblem(16, 32, 64, bias="fp32", activation="gelu").to_json() == (
        '{"K":64,"M":16,"N":32,"a_broadcast":false,"a_layout":"row","a_scale":null,"activation":"gelu_erf"'
        ',"aligned":true,"alpha":false,"b_broadcast":false,"b_dtype":null,"b_layout":"row","b_scale":null'
        ',"b_scale_dtype":"fp32","b_zero":false,"batch":1,"bias":"fp32","bias_axis":"n","dtype":"fp16"'
        ',"end_aligned":true,"gated":null,"group_size":0,"groups":0,"out_dtype":"fp16","out_scale":false,"precision":null,"residual":null'
        ',"residual_broadcast":false,"strided":false}'
    )


def test_a_field_that_came_later_is_in_the_text_where_it_says_something():
    plain = GemmProblem(16, 32, 64, residual="fp16", activation="silu")
    last = replace(plain, residual_last=True)
    assert "residual_last" not in plain.to_json()
    assert '"residual_last":true' in last.to_json()
    assert GemmProblem.from_json(last.to_json()) == last
    assert GEMM.distance(plain, last) is None
    # Of gated columns the residual is always last.
    assert replace(last, gated="halves") == replace(plain, gated="halves")


def test_what_is_left_out_follows_from_the_rest():
    assert str(GemmProblem(1, 2, 3)) == "M=1,N=2,K=3"
    assert GemmProblem(1, 2, 3).out_dtype == "fp16"
    assert GemmProblem(1, 2, 3, dtype="fp8e5m2").out_dtype == "bf16"
    assert GemmProblem(1, 2, 3, dtype="fp32").precision == "ieee"
    assert GemmProblem(1, 2, 3, dtype="bf16").precision is None
    assert GemmProblem(1, 2, 3, activation="gelu") == GemmProblem(1, 2, 3, activation="gelu_erf")
    assert GemmProblem(1, 2, 3, dtype="fp32", out_dtype="fp32") == GemmProblem(1, 2, 3, dtype="fp32")
    assert GemmProblem(1, 2, 3, dtype="int8").out_dtype == "int32"
    assert GemmProblem(1, 2, 3, dtype="int8", b_scale="column").out_dtype == "bf16"
    assert GemmProblem(1, 2, 3, b_dtype="fp16").b_dtype is None
    assert str(GemmProblem(1, 2, 3, batch=4, a_broadcast=True)) == "M=1,N=2,K=3,batch=4,a_broadcast=true"


def test_blanks_and_spellings_of_a_typed_problem():
    typed = GemmProblem.parse(" M=4 , N = 5,K=6, activation=gelu,aligned=no,alpha=YES,bias=None ")
    assert typed == GemmProblem(4, 5, 6, activation="gelu_erf", aligned=False, alpha=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text of a GemmProblem is empty: write NAME=VALUE, with commas between them"),
        (" ", "the text of a GemmProblem is empty"),
        ("M=4,N=5", "GemmProblem is missing K"),
        ("M=4", "GemmProblem is missing N, K"),
        ("M=4,N=5,K=", "'K=' in 'M=4,N=5,K=' is not NAME=VALUE"),
        ("M=4,N=5,K=6,", "'' in 'M=4,N=5,K=6,' is not NAME=VALUE"),
        ("M=4,N=5,K=6,M=7", "M is given twice"),
        ("M=4,N=5,K=6.5", "K='6.5' must be an integer"),
        ("M=4,N=5,K=6,dtyp=fp16", "no field 'dtyp'; did you mean dtype?"),
        ("m=4,N=5,K=6", "no field 'm'"),
        ("M=4,N=5,K=6,aligned=maybe", "aligned='maybe' must be bool"),
        ("M=0,N=5,K=6", "M=0 must be from 1 to 2147483647"),
        ("M=4,N=-5,K=6", "N=-5 must be from 1"),
        ("M=4,N=5,K=2147483648", "K=2147483648 must be from 1"),
        ("M=4,N=5,K=6,batch=0", "batch=0 must be from 1"),
        ("M=4,N=5,K=6,dtype=float16", "unknown dtype='float16': gemm takes fp16"),
        ("M=4,N=5,K=6,dtype=int32", "dtype='int32': gemm takes fp16"),
        ("M=4,N=5,K=6,dtype=int8,out_dtype=fp16", "dtype='int8' with neither a_scale nor b_scale gives"),
        ("M=4,N=5,K=6,dtype=int8,activation=relu", "dtype='int8' with neither a_scale nor b_scale gives"),
        ("M=4,N=5,K=6,dtype=int8,b_scale=tensor,out_dtype=int32", "out_dtype='int32' is the bare sum of dtype='int8'"),
        ("M=4,N=5,K=6,out_dtype=int32", "out_dtype='int32' is the bare sum of dtype='int8'"),
        ("M=4,N=5,K=6,out_dtype=int8", "out_dtype='int8' needs out_scale"),
        ("M=4,N=5,K=6,dtype=fp32,b_dtype=int4", "dtype='fp32' with b_dtype='int4': they are one, or fp16 or bf16 with"),
        ("M=4,N=5,K=6,b_dtype=bf16", "dtype='fp16' with b_dtype='bf16': they are one, or"),
        ("M=4,N=5,K=6,b_dtype=int4,group_size=32", "group_size=32 and b_scale=None: 'group' has a size, and only it"),
        ("M=4,N=5,K=6,b_dtype=int4,b_scale=group", "group_size=0 and b_scale='group': 'group' has a size"),
        ("M=4,N=5,K=6,b_dtype=int4,b_scale=group,group_size=48", "group_size=48 must be one of 32, 64, 128"),
        ("M=4,N=5,K=6,b_scale=group,group_size=32", "group_size=32 must be one of 32, 64, 128, of weights of b_dtype"),
        ("M=4,N=5,K=6,b_scale=column,b_scale_dtype=fp16", "b_scale_dtype='fp16': scales are fp32, those of groups"),
        ("M=4,N=5,K=6,b_zero=true", "b_zero is for weights of b_dtype int8 or int4"),
        ("M=4,N=5,K=6,batch=2,b_dtype=int4,b_zero=true", "are for one B, not one in each of batch=2"),
        ("M=4,N=5,K=6,b_scale=row", "b_scale='row' must be 'tensor', 'column', 'group' or None"),
        ("M=4,N=5,K=6,a_scale=column", "a_scale='column' must be 'tensor', 'row' or None"),
        ("M=4,N=5,K=6,gated=halves", "gated='halves' needs an even N, not 5"),
        ("M=4,N=6,K=6,gated=thirds", "gated='thirds' must be 'halves', 'interleaved' or None"),
        ("M=4,N=5,K=6,bias_axis=m", "bias_axis='m' needs a bias"),
        ("M=4,N=5,K=6,bias=fp32,bias_axis=k", "bias_axis='k' must be 'n' or 'm'"),
        ("M=4,N=5,K=6,groups=-1", "groups=-1 must be from 0 to 1024"),
        ("M=4,N=5,K=6,groups=2,batch=2", "groups=2 are pieces of one A: batch=2 must be 1"),
        ("M=4,N=5,K=6,bias=int8", "bias='int8': gemm takes"),
        ("M=4,N=5,K=6,out_dtype=x", "out_dtype='x': gemm takes"),
        ("M=4,N=5,K=6,a_layout=diagonal", "a_layout='diagonal' must be 'row' or 'col'"),
        ("M=4,N=5,K=6,precision=tf32", "precision='tf32' is for dtype=fp32; fp16 has only one"),
        ("M=4,N=5,K=6,precision=fast", "precision='fast' must be ieee or tf32"),
        ("M=4,N=5,K=6,dtype=fp32,precision=fp16", "precision='fp16' must be ieee or tf32"),
        ("M=4,N=5,K=6,a_broadcast=true", "a_broadcast needs batch > 1"),
        ("M=4,N=5,K=6,batch=2,residual_broadcast=true", "residual_broadcast needs a residual and batch > 1"),
    ],
)
def test_a_malformed_problem_is_refused_in_one_line(text, message):
    with pytest.raises(ProblemError) as raised:
        GemmProblem.parse(text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_activation_is_refused():
    with pytest.raises(UsageError, match="unknown activation 'swosh'"):
        GemmProblem.parse("M=4,N=5,K=6,activation=swosh")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"M": True}, "M=True must be int"),
        ({"M": 4.0}, "M=4.0 must be int"),
        ({"M": "4"}, "M='4' must be int"),
        ({"M": None}, "M=None must be int"),
        ({"alpha": 1}, "alpha=1 must be bool"),
        ({"dtype": None}, "dtype=None must be str"),
        ({"bias": 3}, "bias=3 must be str or NoneType"),
        ({"out_dtype": float}, "out_dtype=<class 'float'> must be str or NoneType, one of fp16, bf16, fp32, .*"),
    ],
)
def test_values_of_the_wrong_type_are_refused(values, message):
    with pytest.raises(ProblemError, match=f"^{message}$"):
        GemmProblem.from_dict({"M": 4, "N": 5, "K": 6} | values)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null"])
def test_text_that_is_no_object_is_refused(text):
    with pytest.raises(ProblemError, match=r"^GemmConfig expects a JSON object"):
        GemmConfig.from_json(text)


def test_a_configuration_of_another_revision_is_refused():
    with pytest.raises(ProblemError, match="GemmConfig has no field 'BLOCK_L'"):
        GemmConfig.from_json(json.dumps({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_L": 1}))
    assert GemmConfig.from_json('{"BLOCK_M":16,"BLOCK_N":16,"BLOCK_K":16}').num_stages == 3


def test_problems_are_dictionary_keys_and_never_change():
    problem = GemmProblem(4, 5, 6)
    assert {problem: 1}[GemmProblem(4, 5, 6)] == 1
    with pytest.raises(AttributeError):
        problem.M = 7


# Arrays


def test_inputs_are_equal_for_equal_seeds_and_no_others():
    problem = GemmProblem(5, 6, 7, bias="fp32", residual="bf16", alpha=True)
    one, same, other = (problem.inputs(seed) for seed in (3, 3, 4))
    assert list(one) == ["a", "b", "bias", "residual", "alpha"]
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
        if name != "alpha":
            assert not np.array_equal(one[name], other[name])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("kind", FLOATS)
def test_inputs_have_the_problems_layout_alignment_and_padding(kind, strided, aligned):
    fused = {"bias": "fp32", "residual": "bf16", "residual_broadcast": True, "a_layout": "col"}
    laid = {"strided": strided, "aligned": aligned, "end_aligned": aligned}
    problem = GemmProblem(5, 6, 7, dtype=kind, batch=3, b_broadcast=True, **laid, **fused)
    arrays = problem.inputs(0)
    assert {name: array.shape for name, array in arrays.items()} == problem.shapes()
    assert problem.shapes() == {"a": (3, 5, 7), "b": (1, 7, 6), "bias": (6,), "residual": (1, 5, 6)}
    for name, array in arrays.items():
        size = array.itemsize
        assert array.dtype == DTYPES[{"bias": "fp32", "residual": "bf16"}.get(name, kind)].numpy
        assert (array.ctypes.data % 16 == 0) == aligned
        rows = array.swapaxes(-1, -2) if name == "a" else array
        assert rows.strides[-1] == size
        if name == "bias":
            continue
        pitch = rows.strides[-2] // size
        assert (pitch > rows.shape[-1]) == strided
        if strided:
            assert (pitch % 16 == 0) == aligned
            last = rows[0, 0, -1:].view(f"u{size}")
            after = np.lib.stride_tricks.as_strided(last, (2,), (size,))[1:].view(array.dtype)
            assert np.isnan(after.astype(np.float32)).all()
        if array.shape[0] > 1:
            assert array.strides[0] == pitch * size * rows.shape[-2]


def test_results_stay_near_one_however_long_k_is():
    for k in (1, 64, 4096):
        problem = GemmProblem(32, 32, k, dtype="fp32")
        assert 0.8 < reference(problem, problem.inputs(0))["out"].std() < 1.25


@pytest.mark.parametrize("k", [64, 4096])
@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "int8", "a_scale": "row"},
        {"dtype": "int8", "b_scale": "column"},
        {"dtype": "int8", "a_scale": "tensor", "b_scale": "tensor"},
        {"b_dtype": "int8"},
        {"b_dtype": "int8", "b_scale": "group", "group_size": 32, "b_zero": True},
        {"b_dtype": "int4", "b_scale": "column", "b_zero": True},
        {"b_dtype": "int4", "b_scale": "group", "group_size": 128},
        {"a_scale": "row", "b_scale": "column"},
        {"groups": 3, "b_scale": "column"},
    ],
    ids=str,
)
def test_scales_bring_results_near_one(k, fields):
    problem = GemmProblem(64, 64, k, **fields)
    assert 0.3 < reference(problem, problem.inputs(0))["out"].std() < 1.25


def test_the_reference_by_hand():
    arrays = {
        "a": np.array([[[1.0, 2.0]]]),
        "b": np.array([[[3.0, -4.0], [5.0, -6.0]]]),
        "bias": np.array([1.0, 2.0]),
        "residual": np.array([[[10.0, -20.0]]]),
        "alpha": np.array([0.5]),
    }
    problem = GemmProblem(1, 2, 2, bias="fp32", residual="fp32", alpha=True, activation="relu")
    # [1·3 + 2·5, -1·4 - 2·6] = [13, -16]; halved, plus bias, plus residual: [17.5, -26].
    np.testing.assert_array_equal(reference(problem, arrays)["out"], [[[17.5, 0.0]]])
    assert reference(problem, arrays)["out"].dtype == np.float64
    both = GemmProblem(1, 2, 2, batch=3, a_broadcast=True, b_broadcast=True)
    operands = {"a": arrays["a"], "b": arrays["b"]}
    np.testing.assert_array_equal(reference(both, operands)["out"], [[[13.0, -16.0]]] * 3)


def test_the_reference_takes_the_values_the_kernel_is_given():
    problem = GemmProblem(3, 3, 32, dtype="fp8e5m2")
    arrays = problem.inputs(0)
    exact = reference(problem, {name: array.astype(np.float64) for name, array in arrays.items()})
    np.testing.assert_array_equal(reference(problem, arrays)["out"], exact["out"])


def test_the_reference_of_every_form_by_hand():
    a = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    b = np.array([[[1.0, 2.0], [3.0, 5.0]]])  # A·B = [[7, 12], [15, 26]]
    halves = GemmProblem(2, 2, 2, gated="halves", activation="relu")
    np.testing.assert_array_equal(reference(halves, {"a": a, "b": b})["out"], [[[84.0], [390.0]]])
    scaled = GemmProblem(2, 2, 2, a_scale="row", b_scale="column", bias="fp32", bias_axis="m")
    arrays = {"a_scale": np.array([[1.0, 2.0]]), "b_scale": np.array([10.0, 100.0]), "bias": np.array([0.5, -0.5])}
    expected = [[[70.5, 1200.5], [299.5, 5199.5]]]
    np.testing.assert_array_equal(reference(scaled, {"a": a, "b": b} | arrays)["out"], expected)
    grouped = GemmProblem(2, 2, 2, groups=3, bias="fp32")
    each = {
        "b": np.concatenate([b, 9 * b, 2 * b]),
        "offsets": np.array([0, 1, 1, 2]),
        "bias": np.array([[0, 1], [2, 3], [4, 5]]),
    }
    np.testing.assert_array_equal(reference(grouped, {"a": a} | each)["out"], [[[7.0, 13.0], [34.0, 57.0]]])
    weights = GemmProblem(1, 1, 33, b_dtype="int4", b_scale="group", group_size=32, b_zero=True)
    q = np.full((1, 33, 1), 9, np.uint8)
    q[0, 0], q[0, 32] = 15, 1
    packed = {"b": pack_int4(q), "b_scale": np.array([[2.0], [3.0]]), "b_zero": np.array([[7], [4]], np.uint8)}
    # 2·((15 - 7) + 31·(9 - 7)) + 3·(1 - 4)
    np.testing.assert_array_equal(reference(weights, {"a": np.ones((1, 1, 33))} | packed)["out"], [[[131.0]]])


@settings(max_examples=60, deadline=None)
@given(gemm_problems(st.integers(2, 300), st.integers(1, 6)), st.integers(0, 2**32 - 1))
def test_a_part_is_that_part_of_the_whole(problem, seed):
    arrays = problem.inputs(seed)
    whole = reference(problem, arrays)["out"]
    smaller, chosen, index = problem.part(arrays, np.random.default_rng(seed))
    assert {name: array.shape for name, array in chosen.items() if name in smaller.shapes()} == smaller.shapes()
    part = reference(smaller, chosen)["out"]
    np.testing.assert_allclose(part, whole[np.ix_(*index["out"])], rtol=1e-9, atol=1e-9)


# Costs


def test_operations_and_bytes_by_hand():
    problem = GemmProblem(2, 3, 5, batch=4, bias="fp32", residual="bf16", out_dtype="fp32")
    assert problem.flops() == 2 * 4 * 2 * 3 * 5
    # A 4·2·5, B 4·5·3 and the residual 4·2·3 of 2 bytes; bias 3 and the result 4·2·3 of 4.
    assert problem.bytes_moved() == 2 * (40 + 60 + 24) + 4 * (3 + 24)
    shared = replace(problem, a_broadcast=True, b_broadcast=True, residual_broadcast=True)
    assert shared.bytes_moved() == 2 * (10 + 15 + 6) + 4 * (3 + 24)
    assert shared.flops() == problem.flops()
    # A 2·64 of 2 bytes, B 32·6 bytes and two rows of 6 scales and zero points, the result 2·3.
    weights = GemmProblem(2, 6, 64, b_dtype="int4", b_scale="group", group_size=32, b_zero=True, gated="halves")
    assert weights.bytes_moved() == 2 * 128 + 32 * 6 + 4 * 12 + 12 + 2 * 6
    grouped = GemmProblem(7, 6, 5, dtype="int8", groups=4, a_scale="row", b_scale="column")
    assert grouped.bytes_moved() == 7 * 5 + 4 * 5 * 6 + 4 * 7 + 4 * 4 * 6 + 4 * 5 + 2 * 7 * 6
    assert grouped.flops() == 2 * 7 * 6 * 5


def test_the_unit_that_does_the_work():
    units = {kind: GemmProblem(1, 1, 1, dtype=kind).unit for kind in INPUT_DTYPES}
    floats = {"fp16": "fp16", "bf16": "bf16", "fp32": "fp32", "fp8e4m3": "fp8", "fp8e5m2": "fp8"}
    assert units == floats | {"int8": "int8"}
    assert GemmProblem(1, 1, 1, b_dtype="int4").unit == "fp16"
    assert GemmProblem(1, 1, 1, dtype="fp32", precision="tf32").unit == "tf32"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_op_names_itself(kernel):
    assert kernel.problem.op == kernel.name
    assert all(field.default is not None or "None" in str(field.type) for field in fields(kernel.problem))


# Neighbours


def test_distance_counts_doublings():
    problem = GemmProblem(64, 256, 1024)
    assert GEMM.distance(problem, problem) == 0
    assert GEMM.distance(problem, replace(problem, M=128)) == 1
    assert GEMM.distance(problem, replace(problem, M=32, K=4096)) == 3
    assert GEMM.distance(problem, replace(problem, batch=8)) == 3
    assert GEMM.distance(problem, replace(problem, M=96)) == pytest.approx(math.log2(1.5))
    assert GEMM.distance(problem, replace(problem, K=16384)) == 4
    assert GEMM.distance(problem, replace(problem, K=16384, M=65)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bf16"},
        {"activation": "relu"},
        {"bias": "fp16"},
        {"a_layout": "col"},
        {"strided": True},
        {"aligned": False},
        {"N": 255},  # its loads are narrow
        {"K": 1025},
        {"gated": "halves"},
        {"b_dtype": "int4"},
        {"groups": 4},
    ],
    ids=str,
)
def test_what_compiles_to_other_code_is_no_neighbour(change):
    problem = GemmProblem(64, 256, 1024)
    assert GEMM.distance(problem, replace(problem, **change)) is None
    assert GEMM.distance(replace(problem, **change), problem) is None


def test_rows_count_for_alignment_only_where_columns_are_read():
    row, column = GemmProblem(64, 256, 1024), GemmProblem(64, 256, 1024, a_layout="col")
    assert GEMM.distance(row, replace(row, M=65)) is not None
    assert GEMM.distance(column, replace(column, M=65)) is None
    assert GEMM.distance(column, replace(column, M=80)) is not None


def test_numpys_integers_are_pythons() -> None:
    problem = GemmProblem(np.int64(64), 64, np.uint16(32), group_size=np.int32(0))
    assert problem == GemmProblem(64, 64, 32)
    assert {type(value) for value in (problem.M, problem.K, problem.group_size)} == {int}
    assert problem.to_json() == GemmProblem(64, 64, 32).to_json()
    with pytest.raises(ProblemError, match=r"^N=.*64.* must be int$"):
        GemmProblem(64, np.float32(64), 32)
