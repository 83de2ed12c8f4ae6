"""Problems and configurations as values: their texts, their keys, and what they refuse. GEMM's stand for all."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.kernels import GemmConfig, GemmProblem
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.epilogue import ACTIVATIONS
from tilewright.kernels.ops.gemm.problem import INPUT_DTYPES, OUTPUT_DTYPES, distance, reference
from tilewright.kernels.registry import KERNELS
from tilewright.tuning_db.errors import ProblemError, UsageError


@st.composite
def gemm_problems(draw):
    size = st.integers(1, 2**31 - 1)
    kind = draw(st.sampled_from(INPUT_DTYPES))
    batch = draw(st.integers(1, 2**20))
    residual = draw(st.sampled_from([None, *OUTPUT_DTYPES]))
    return GemmProblem(
        M=draw(size),
        N=draw(size),
        K=draw(size),
        dtype=kind,
        out_dtype=draw(st.sampled_from([None, *OUTPUT_DTYPES])),
        batch=batch,
        a_layout=draw(st.sampled_from(["row", "col"])),
        b_layout=draw(st.sampled_from(["row", "col"])),
        a_broadcast=batch > 1 and draw(st.booleans()),
        b_broadcast=batch > 1 and draw(st.booleans()),
        bias=draw(st.sampled_from([None, *OUTPUT_DTYPES])),
        residual=residual,
        residual_broadcast=batch > 1 and residual is not None and draw(st.booleans()),
        activation=draw(st.sampled_from([*ACTIVATIONS, "gelu", "swish"])),
        alpha=draw(st.booleans()),
        precision=draw(st.sampled_from([None, "ieee", "tf32"])) if kind == "fp32" else None,
        strided=draw(st.booleans()),
        aligned=draw(st.booleans()),
    )


# Texts and keys


@settings(deadline=None)
@given(gemm_problems())
def test_a_problem_is_its_texts(problem):
    assert GemmProblem.from_json(problem.to_json()) == problem
    assert GemmProblem.from_dict(problem.to_dict()) == problem
    assert GemmProblem.parse(str(problem)) == problem
    assert "\n" not in str(problem)


@settings(deadline=None)
@given(gemm_problems(), gemm_problems())
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
        '{"K":64,"M":16,"N":32,"a_broadcast":false,"a_layout":"row","activation":"gelu_erf","aligned":true,"alpha":false'
        ',"b_broadcast":false,"b_layout":"row","batch":1,"bias":"fp32","dtype":"fp16","out_dtype":"fp16"'
        ',"precision":null,"residual":null,"residual_broadcast":false,"strided":false}'
    )


def test_what_is_left_out_follows_from_the_rest():
    assert str(GemmProblem(1, 2, 3)) == "M=1,N=2,K=3"
    assert GemmProblem(1, 2, 3).out_dtype == "fp16"
    assert GemmProblem(1, 2, 3, dtype="fp8e5m2").out_dtype == "bf16"
    assert GemmProblem(1, 2, 3, dtype="fp32").precision == "ieee"
    assert GemmProblem(1, 2, 3, dtype="bf16").precision is None
    assert GemmProblem(1, 2, 3, activation="gelu") == GemmProblem(1, 2, 3, activation="gelu_erf")
    assert GemmProblem(1, 2, 3, dtype="fp32", out_dtype="fp32") == GemmProblem(1, 2, 3, dtype="fp32")
    assert str(GemmProblem(1, 2, 3, batch=4, a_broadcast=True)) == "M=1,N=2,K=3,batch=4,a_broadcast=true"


def test_blanks_and_spellings_of_a_typed_problem():
    typed = GemmProblem.parse(" M=4 , N = 5,K=6, activation=gelu,aligned=no,alpha=YES,bias=None ")
    assert typed == GemmProblem(4, 5, 6, activation="gelu_erf", aligned=False, alpha=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' in '' is not NAME=VALUE"),
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
        ("M=4,N=5,K=6,dtype=int8", "dtype='int8': gemm takes fp16"),
        ("M=4,N=5,K=6,bias=int8", "bias='int8': gemm takes"),
        ("M=4,N=5,K=6,out_dtype=x", "out_dtype='x': gemm takes"),
        ("M=4,N=5,K=6,a_layout=diagonal", "a_layout='diagonal' must be row or col"),
        ("M=4,N=5,K=6,precision=tf32", "precision='tf32' is for dtype=fp32; fp16 has only one"),
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
@pytest.mark.parametrize("kind", INPUT_DTYPES)
def test_inputs_have_the_problems_layout_alignment_and_padding(kind, strided, aligned):
    fused = {"bias": "fp32", "residual": "bf16", "residual_broadcast": True, "a_layout": "col"}
    problem = GemmProblem(5, 6, 7, dtype=kind, batch=3, b_broadcast=True, strided=strided, aligned=aligned, **fused)
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
        assert 0.8 < reference(problem, problem.inputs(0)).std() < 1.25


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
    np.testing.assert_array_equal(reference(problem, arrays), [[[17.5, 0.0]]])
    assert reference(problem, arrays).dtype == np.float64
    both = GemmProblem(1, 2, 2, batch=3, a_broadcast=True, b_broadcast=True)
    np.testing.assert_array_equal(reference(both, {"a": arrays["a"], "b": arrays["b"]}), [[[13.0, -16.0]]] * 3)


def test_the_reference_takes_the_values_the_kernel_is_given():
    problem = GemmProblem(3, 3, 32, dtype="fp8e5m2")
    arrays = problem.inputs(0)
    exact = reference(problem, {name: array.astype(np.float64) for name, array in arrays.items()})
    np.testing.assert_array_equal(reference(problem, arrays), exact)


# Costs


def test_operations_and_bytes_by_hand():
    problem = GemmProblem(2, 3, 5, batch=4, bias="fp32", residual="bf16", out_dtype="fp32")
    assert problem.flops() == 2 * 4 * 2 * 3 * 5
    # A 4·2·5, B 4·5·3 and the residual 4·2·3 of 2 bytes; bias 3 and the result 4·2·3 of 4.
    assert problem.bytes_moved() == 2 * (40 + 60 + 24) + 4 * (3 + 24)
    shared = replace(problem, a_broadcast=True, b_broadcast=True, residual_broadcast=True)
    assert shared.bytes_moved() == 2 * (10 + 15 + 6) + 4 * (3 + 24)
    assert shared.flops() == problem.flops()


def test_the_unit_that_does_the_work():
    units = {kind: GemmProblem(1, 1, 1, dtype=kind).unit for kind in INPUT_DTYPES}
    assert units == {"fp16": "fp16", "bf16": "bf16", "fp32": "fp32", "fp8e4m3": "fp8", "fp8e5m2": "fp8"}
    assert GemmProblem(1, 1, 1, dtype="fp32", precision="tf32").unit == "tf32"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_op_names_itself(kernel):
    assert kernel.problem.op == kernel.name
    assert all(field.default is not None or "None" in str(field.type) for field in fields(kernel.problem))


# Neighbours


def test_distance_counts_doublings():
    problem = GemmProblem(64, 256, 1024)
    assert distance(problem, problem) == 0
    assert distance(problem, replace(problem, M=128)) == 1
    assert distance(problem, replace(problem, M=32, K=4096)) == 3
    assert distance(problem, replace(problem, batch=8)) == 3
    assert distance(problem, replace(problem, M=96)) == pytest.approx(math.log2(1.5))
    assert distance(problem, replace(problem, K=16384)) == 4
    assert distance(problem, replace(problem, K=16384, M=65)) is None


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
    ],
    ids=str,
)
def test_what_compiles_to_other_code_is_no_neighbour(change):
    problem = GemmProblem(64, 256, 1024)
    assert distance(problem, replace(problem, **change)) is None
    assert distance(replace(problem, **change), problem) is None


def test_rows_count_for_alignment_only_where_columns_are_read():
    row, column = GemmProblem(64, 256, 1024), GemmProblem(64, 256, 1024, a_layout="col")
    assert distance(row, replace(row, M=65)) is not None
    assert distance(column, replace(column, M=65)) is None
    assert distance(column, replace(column, M=80)) is not None
