"""The fused GEMM in the interpreter against float64: numbers, memory, every way to call it and to misuse it."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.conformance import ACTIVATION_NAMES, SIZES, Guarded, assert_close, assert_every_pair, pairwise
from tests.kernels.ops.gemm_cases import conforms, out_for, run
from tests.kernels.splits import check_splits
from tilewright.kernels import GemmConfig, GemmProblem, gemm, resolve_device
from tilewright.kernels import call as calling
from tilewright.kernels.dispatch import forget_plans
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.epilogue import FLOATS
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.lookup import check_supported
from tilewright.kernels.ops.gemm import api
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import INPUT_DTYPES
from tilewright.kernels.ops.gemm.reference import tolerance
from tilewright.tuning_db.errors import (
    IllegalConfigError,
    ProblemError,
    UnsupportedError,
    UnsupportedProblemError,
    UsageError,
)

# Every dtype, epilogue, layout, batch form and size, in pairs

CONFIGS = (
    None,
    GemmConfig(32, 64, 32, GROUP_M=1),
    GemmConfig(64, 16, 64, GROUP_M=4, num_warps=2, num_stages=1),
    GemmConfig(32, 64, 32, SPLIT_K=2),
    GemmConfig(64, 32, 32, SPLIT_K=4),
    GemmConfig(64, 64, 32, GROUP_M=3, SPLIT_K=8, num_warps=8),
)

AXES = {
    "dtype": ("fp16", "bf16", "fp32", "tf32", "fp8e4m3", "fp8e5m2"),
    "activation": ACTIVATION_NAMES,
    "bias": (None, "same", "fp32", "bf16"),
    "residual": (None, "same", "fp32", "fp8e5m2"),
    "residual_last": (False, True),
    "alpha": (False, True),
    "out_dtype": (None, *FLOATS),
    "a_layout": ("row", "col"),
    "b_layout": ("row", "col"),
    "batch": ("one", "both", "a", "b", "residual", "a residual", "b residual", "all"),
    "memory": ("dense", "unaligned", "strided", "strided unaligned"),
    "M": SIZES,
    "N": SIZES,
    "K": SIZES,
    "config": CONFIGS,
}


def problem_of(row):
    """The problem that a row of AXES describes."""
    fields = {name: row[name] for name in ("activation", "alpha", "out_dtype", "a_layout", "b_layout", "M", "N", "K")}
    kind, precision = (row["dtype"], None) if row["dtype"] != "tf32" else ("fp32", "tf32")
    for name in ("bias", "residual"):
        fields[name] = kind if row[name] == "same" else row[name]
    fields["residual_last"] = row["residual_last"] and fields["residual"] is not None
    if row["batch"] != "one":
        fields["batch"] = 2
        broadcast = ("a", "b", "residual") if row["batch"] == "all" else row["batch"].split()
        fields |= {f"{name}_broadcast": True for name in broadcast if name in ("a", "b")}
        fields["residual_broadcast"] = "residual" in broadcast and fields["residual"] is not None
    return GemmProblem(
        dtype=kind,
        precision=precision,
        strided="strided" in row["memory"],
        aligned="unaligned" not in row["memory"],
        end_aligned="unaligned" not in row["memory"],
        **fields,
    )


def described(row):
    config = row["config"]
    tile = "default" if config is None else f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K}/{config.SPLIT_K}"
    return f"{problem_of(row)} on {tile}"


ROWS = list(pairwise(AXES))


def test_rows_cover_every_pair():
    assert_every_pair(ROWS, AXES)


@pytest.mark.parametrize("row", ROWS, ids=described)
def test_equals_the_reference(row):
    conforms(problem_of(row), row["config"])


@pytest.mark.smoke
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("kind", [*FLOATS, "tf32"])
def test_equals_the_reference_with_all_that_can_be_fused(kind, activation):
    kind, precision = ("fp32", "tf32") if kind == "tf32" else (kind, None)
    fused = {"bias": "fp32", "residual": "bf16", "alpha": True, "activation": activation}
    conforms(GemmProblem(M=33, N=79, K=65, dtype=kind, precision=precision, b_layout="col", batch=2, **fused))
    split = GemmConfig(32, 32, 32, SPLIT_K=2)
    conforms(GemmProblem(M=17, N=48, K=129, dtype=kind, precision=precision, a_layout="col", **fused), split)


@pytest.mark.parametrize("size", SIZES)
def test_one_size_at_a_time(size):
    for sizes in ((size, 17, 33), (17, size, 33), (17, 33, size), (size, size, size)):
        conforms(GemmProblem(*sizes, dtype="fp32", bias="fp32"))


@pytest.mark.parametrize("rest", [*itertools.product((0, 1), repeat=3)], ids=str)
@pytest.mark.parametrize("layouts", [*itertools.product(("row", "col"), repeat=2)], ids="-".join)
def test_exact_multiples_need_no_mask_and_others_do(rest, layouts):
    m, n, k = (64 + extra for extra in rest)
    problem = GemmProblem(m, n, k, dtype="fp32", residual="fp32", a_layout=layouts[0], b_layout=layouts[1])
    config = GemmConfig(32, 64, 32)
    flags = dict(GEMM.launches(problem, config)[0].constexprs)
    assert [flags[name] for name in ("EVEN_M", "EVEN_N", "EVEN_K")] == [not extra for extra in rest]
    conforms(problem, config)


def test_values_that_stand_far_apart_are_added_in_fp32():
    # In fp16 every 1 after the 2048 would be lost.
    a, b = np.ones((16, 1025), np.float16), np.ones((1025, 16), np.float16)
    a[:, 0] = 2048
    np.testing.assert_array_equal(gemm(a, b, out_dtype="fp32"), np.full((16, 16), 3072))


def test_nan_and_infinity_stay_in_their_row_and_column():
    problem = GemmProblem(33, 65, 65, dtype="fp32")
    arrays = problem.inputs(0)
    arrays["a"][0, 3, 7], arrays["b"][0, 9, 5] = np.nan, np.inf
    result = run(problem, arrays)[0]
    special = ~np.isfinite(result)
    expected = np.zeros((33, 65), bool)
    expected[3, :], expected[:, 5] = True, True
    np.testing.assert_array_equal(special, expected)
    assert np.isnan(result[3]).all()
    sign = np.sign(arrays["a"][0, :, 9])
    others = np.arange(33) != 3
    np.testing.assert_array_equal(result[others, 5], sign[others] * np.inf)


small = st.integers(1, 36)
powers = st.sampled_from([16, 32, 64])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_small_problem_with_any_configuration(data):
    kind = data.draw(st.sampled_from([*FLOATS, "tf32"]))
    batch = data.draw(st.integers(1, 3))
    residual = data.draw(st.sampled_from([None, *FLOATS]))
    problem = GemmProblem(
        M=data.draw(small),
        N=data.draw(small),
        K=data.draw(small),
        dtype="fp32" if kind == "tf32" else kind,
        precision="tf32" if kind == "tf32" else None,
        out_dtype=data.draw(st.sampled_from([None, *FLOATS])),
        batch=batch,
        a_layout=data.draw(st.sampled_from(["row", "col"])),
        b_layout=data.draw(st.sampled_from(["row", "col"])),
        a_broadcast=batch > 1 and data.draw(st.booleans()),
        b_broadcast=batch > 1 and data.draw(st.booleans()),
        bias=data.draw(st.sampled_from([None, *FLOATS])),
        residual=residual,
        residual_broadcast=batch > 1 and residual is not None and data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(ACTIVATION_NAMES)),
        alpha=data.draw(st.booleans()),
        strided=data.draw(st.booleans()),
        aligned=data.draw(st.booleans()),
        end_aligned=data.draw(st.booleans()),
    )
    config = GemmConfig(
        data.draw(powers),
        data.draw(powers),
        max(data.draw(powers), 32 if "fp8" in kind else 16),
        GROUP_M=data.draw(st.integers(1, 4)),
        SPLIT_K=data.draw(st.integers(1, 5)),
    )
    conforms(problem, config, seed=data.draw(st.integers(0, 2**32 - 1)))


# Split-K


@pytest.mark.smoke
@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("split", [2, 4, 8])
def test_split_k_is_deterministic_and_leaves_its_counters_zero(split, order, monkeypatch):
    problem = GemmProblem(33, 65, 300, dtype="fp32", batch=2, bias="fp32", activation="silu")
    config = GemmConfig(32, 32, 16, SPLIT_K=split)
    check_splits(GEMM, problem, config, monkeypatch, garbage=np.nan, backwards=order == "backwards")


@pytest.mark.parametrize("k", [1, 31, 33, 64])
def test_splits_that_get_no_work_add_nothing(k):
    conforms(GemmProblem(17, 17, k, dtype="fp32", residual="fp32"), GemmConfig(16, 16, 32, SPLIT_K=8))


# Arrays


def random_array(shape, kind="fp32", seed=0):
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return values.astype(DTYPES[kind].numpy)


def near(result, expected):
    assert_close(result, expected.astype(np.float64), Tolerance(1e-5, 1e-5))


FORMS = [
    ((17, 33), (33, 9), None),
    ((1, 17, 33), (33, 9), (17, 9)),
    ((4, 17, 33), (33, 9), (4, 17, 9)),
    ((4, 17, 33), (1, 33, 9), (1, 17, 9)),
    ((17, 33), (4, 33, 9), (4, 17, 9)),
    ((1, 2, 17, 33), (1, 2, 33, 9), None),
    ((2, 1, 17, 33), (2, 1, 33, 9), (2, 1, 17, 9)),
    ((2, 3, 17, 33), (2, 3, 33, 9), (17, 9)),
    ((2, 3, 17, 33), (33, 9), (3, 17, 9)),
    ((2, 1, 17, 33), (3, 33, 9), (2, 3, 17, 9)),
    ((3, 17, 33), (2, 1, 33, 9), (2, 1, 17, 9)),
    ((2, 1, 2, 1, 5, 7), (3, 1, 3, 7, 4), (3, 2, 1, 5, 4)),
    ((3, 1, 7), (7, 4), (3, 1, 4)),
]


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize(("a", "b", "residual"), FORMS, ids=str)
def test_leading_dimensions_broadcast_as_in_matmul(a, b, residual, with_out):
    x, y, bias = random_array(a), random_array(b, seed=1), random_array((b[-1],))
    z = None if residual is None else random_array(residual, seed=2)
    expected = 2.5 * np.matmul(x.astype(float), y.astype(float)) + bias + (0 if z is None else z)
    out = Guarded(expected.shape, "fp32") if with_out else None
    result = gemm(x, y, bias=bias, residual=z, alpha=2.5, out=out and out.array)
    near(result, expected)
    if out is not None:
        assert result is out.array
        out.assert_intact()


def test_a_batch_under_one_matrix_is_folded_into_rows(problems):
    x, y = random_array((3, 17, 33)), random_array((33, 9), seed=1)
    near(gemm(x, y, residual=random_array((3, 17, 9))), x.astype(float) @ y + random_array((3, 17, 9)))
    near(gemm(x[:, ::2], y), x[:, ::2].astype(float) @ y)  # rows two apart, batches an odd number of rows
    near(gemm(x[:, :16:2], y), x[:, :16:2].astype(float) @ y)
    assert [(problem.M, problem.batch) for problem in problems] == [(51, 1), (9, 3), (8, 3)]


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
@pytest.mark.parametrize("layouts", [*itertools.product(("row", "col"), repeat=2)], ids="-".join)
@pytest.mark.parametrize("memory", ["dense", "strided", "unaligned", "strided unaligned"])
@pytest.mark.parametrize("batch", [{}, {"batch": 3}, {"batch": 3, "a_broadcast": True, "residual_broadcast": True}])
def test_arrays_of_a_problem_are_recognised_as_that_problem(kind, layouts, memory, batch, problems):
    problem = GemmProblem(
        M=32,
        N=48,
        K=80,
        dtype=kind,
        a_layout=layouts[0],
        b_layout=layouts[1],
        bias="fp32",
        residual=kind,
        alpha=True,
        activation="relu",
        strided="strided" in memory,
        aligned="unaligned" not in memory,
        end_aligned="unaligned" not in memory,
        **batch,
    )
    run(problem, problem.inputs(0), out_for(problem)["out"].array)
    assert problems == [problem]


VIEWS = {
    "every other row": lambda x: x[::2],
    "columns in the middle": lambda x: x[:, 3:20],
    "transposed": lambda x: x.T,
    "transposed part": lambda x: x[2:30:3, 1:19].T,
    "one row": lambda x: x[5:6, 2:20],
    "one column": lambda x: x[3:21, 4:5],
    "one column of a transpose": lambda x: x.T[3:21, 4:5],
    "one row, every other column": lambda x: x[5:6, ::2],
    "one element": lambda x: x[7:8, 7:8],
    "fortran order": np.asfortranarray,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_need_no_copy(view):
    base = random_array((40, 40), "fp16")
    a = view(base)
    b = view(random_array((40, 40), "fp16", seed=1)).T
    near(gemm(a, b, out_dtype="fp32"), a.astype(float) @ b.astype(float))


def test_a_subclass_is_an_array_of_its_library(tmp_path):
    a, b = random_array((5, 7)), random_array((7, 4))
    mapped = np.memmap(tmp_path / "a", np.float32, "w+", shape=a.shape)
    mapped[:] = a
    near(gemm(mapped, b), a.astype(float) @ b)


def test_repeated_batches_are_broadcast(problems):
    a = np.broadcast_to(random_array((17, 33)), (4, 17, 33))
    b = random_array((4, 33, 9))
    near(gemm(a, b), a.astype(float) @ b)
    assert problems[0].a_broadcast


def test_result_dtypes():
    for kind in FLOATS:
        a = random_array((5, 32), kind)
        result = gemm(a, random_array((32, 6), kind))
        assert result.dtype == (ml_dtypes.bfloat16 if kind.startswith("fp8") else a.dtype)
        for other in FLOATS:
            assert gemm(a, random_array((32, 6), kind), out_dtype=other).dtype == DTYPES[other].numpy


def test_alpha_of_one_costs_no_argument_and_any_other_is_read(problems):
    a, b = random_array((5, 7)), random_array((7, 4))
    for alpha in (1, 1.0, 2, -0.3, 0.0, np.float32(0.5)):
        near(gemm(a, b, alpha=alpha), float(alpha) * (a.astype(float) @ b))
    assert [problem.alpha for problem in problems] == [False, True]


def test_gelu_is_the_exact_one():
    a, b = random_array((5, 7)), random_array((7, 4))
    np.testing.assert_array_equal(gemm(a, b, activation="gelu"), gemm(a, b, activation="gelu_erf"))
    assert not np.array_equal(gemm(a, b, activation="gelu"), gemm(a, b, activation="gelu_tanh"))


# out


def test_out_may_be_the_residual():
    a, b = random_array((2, 33, 17)), random_array((17, 65))
    for accumulated in (random_array((2, 33, 65)), random_array((2, 33, 80))[..., :65]):
        expected = a.astype(float) @ b + accumulated
        assert gemm(a, b, residual=accumulated, out=accumulated, config=GemmConfig(16, 32, 16)) is accumulated
        near(accumulated, expected)


def test_out_beside_an_operand_in_one_wide_array():
    wide = random_array((32, 64))
    b = random_array((32, 32))
    expected = wide[:, :32].astype(float) @ b
    gemm(wide[:, :32], b, out=wide[:, 32:])
    near(wide[:, 32:], expected)


SQUARE = random_array((3, 32, 32))


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("a", lambda x: {"a": x[0], "b": x[1], "out": x[0]}),
        ("b", lambda x: {"a": x[0], "b": x[1], "out": x[1]}),
        ("b", lambda x: {"a": x[0], "b": x[1].T, "out": x[1]}),
        ("a", lambda x: {"a": x[0, 1:9], "b": x[1], "out": x[0, :8]}),
        ("bias", lambda x: {"a": x[0], "b": x[1], "bias": x[2, 5], "out": x[2]}),
        # One block would read what another has written.
        ("residual", lambda x: {"a": x[0, 1:9], "b": x[1], "residual": x[2, 1:9], "out": x[2, :8]}),
        ("residual", lambda x: {"a": x[:2].copy(), "b": x[2], "residual": x[0], "out": x[:2]}),
        ("a", lambda x: {"a": x[:2, None], "b": x[2].copy(), "out": x[:2, None]}),
    ],
)
def test_out_may_not_share_memory_with_what_is_read(name, arrays):
    with pytest.raises(ProblemError, match=f"^out may not share memory with {name}$"):
        gemm(**arrays(SQUARE.copy()))


def test_overlap_is_looked_for_at_every_call():
    a, b, out = SQUARE.copy()
    gemm(a, b, out=out)
    with pytest.raises(ProblemError, match="out may not share memory with a"):
        gemm(a, b, out=a)


def test_forgetting_plans_forgets_prepared_calls_too(problems):
    a, b = random_array((5, 7)), random_array((7, 4))
    gemm(a, b)
    gemm(a, b)
    assert len(problems) == 1
    forget_plans()
    gemm(a, b)
    assert len(problems) == 2


# Misuse: one line, with the values

A, B = np.ones((4, 8), np.float16), np.ones((8, 6), np.float16)


class Fake:
    """An array of a library that isn't there."""

    __cuda_array_interface__ = {}  # noqa: RUF012 - never read


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ProblemError, "a is (4, 8) and b is (7, 6): K=8 and K=7", {"b": B[:7]}),
        (ProblemError, "(2, 4, 8) and b is (3, 8, 6): the leading", {"a": np.stack([A] * 2), "b": np.stack([B] * 3)}),
        (ProblemError, "a (8,) and b (8, 6) must have at least two dimensions", {"a": A[0]}),
        (ProblemError, "b () must have at least two dimensions", {"b": np.ones((), np.float16)}),
        (ProblemError, "a is (0, 8) and b is (8, 6): no dimension may be 0", {"a": A[:0]}),
        (ProblemError, "a is (4, 0) and b is (0, 6): no dimension may be 0", {"a": A[:, :0], "b": B[:0]}),
        (ProblemError, "no dimension may be 0", {"a": np.ones((0, 4, 8), np.float16)}),
        (UnsupportedProblemError, "a is fp16 and b is fp32: they must have one dtype", {"b": B.astype(np.float32)}),
        (UnsupportedProblemError, "a is int64 and must be fp16", {"a": A.astype(np.int64), "b": B.astype(np.int64)}),
        (
            UnsupportedProblemError,
            "bias is float64 and must be fp16, bf16, fp32, fp8e4m3 or fp8e5m2",
            {"bias": np.ones(6)},
        ),
        (UnsupportedProblemError, "bias is complex64 and must be", {"bias": np.ones(6, np.complex64)}),
        (UnsupportedProblemError, "a is >f2 and must be fp16", {"a": A.astype(">f2")}),
        (UnsupportedProblemError, "dtype='int32': gemm takes fp16", {"a": A.astype(np.int32), "b": B.astype(np.int32)}),
        (UnsupportedError, "a has strides (16, 2) for shape (4, 8)", {"a": np.ones((4, 16), np.float16)[:, ::2]}),
        (UnsupportedError, "b has strides (-6, 1) for shape (8, 6)", {"b": B[::-1]}),
        (UnsupportedError, "a has negative strides (-32, 8, 1)", {"a": np.stack([A] * 2)[::-1]}),
        (UnsupportedError, "a has strides (0, 1)", {"a": np.broadcast_to(A[0], (4, 8))}),
        (UnsupportedError, "no multiples of the 2 B", {"a": np.ones((4, 8), "f2,i1")["f0"]}),
        (ProblemError, "bias is (5,) and must be (6,)", {"bias": np.ones(5, np.float16)}),
        (ProblemError, "bias is (1, 6) and must be (6,)", {"bias": np.ones((1, 6), np.float16)}),
        (UnsupportedError, "bias must be contiguous; its strides are (2,)", {"bias": np.ones(12, np.float16)[::2]}),
        (ProblemError, "residual is (4, 5) and must broadcast to (4, 6)", {"residual": np.ones((4, 5), np.float16)}),
        (ProblemError, "residual is (6,) and must", {"residual": np.ones(6, np.float16)}),
        (ProblemError, "residual is (2, 4, 6) and must", {"residual": np.ones((2, 4, 6), np.float16)}),
        (
            ProblemError,
            "residual is (3, 4, 6) and must broadcast to (2, 4, 6)",
            {"a": np.stack([A] * 2), "residual": np.ones((3, 4, 6), np.float16)},
        ),
        (UnsupportedError, "residual must be row-major", {"residual": np.ones((6, 4), np.float16).T}),
        (ProblemError, "out is (6, 4) and must be (4, 6)", {"out": np.ones((6, 4), np.float16)}),
        (UnsupportedError, "out must be row-major", {"out": np.ones((6, 4), np.float16).T}),
        (
            UnsupportedError,
            "out must be row-major, without broadcast",
            {"a": np.stack([A] * 2), "out": np.broadcast_to(np.ones((4, 6), np.float16), (2, 4, 6))},
        ),
        (ProblemError, "out is fp32 and out_dtype='fp16'", {"out": np.ones((4, 6), np.float32), "out_dtype": "fp16"}),
        (ProblemError, "unknown activation 'swosh'; did you mean swish?", {"activation": "swosh"}),
        (
            ProblemError,
            "unknown out_dtype='float16': gemm takes fp16, bf16, fp32, fp8e4m3, fp8e5m2, int8; float16 is fp16 here",
            {"out_dtype": "float16"},
        ),
        (UsageError, "out_scale=0.0 must be a number of fp32 above 0", {"out_scale": 0.0, "out_dtype": "int8"}),
        (UsageError, "out_scale=-1 must be a number of fp32 above 0", {"out_scale": -1, "out_dtype": "int8"}),
        (ProblemError, "out_dtype='int8' needs out_scale", {"out_dtype": "int8"}),
        (ProblemError, "precision='tf32' is for dtype=fp32", {"precision": "tf32"}),
        (ProblemError, "precision='fast' must be ieee or tf32", {"a": A + 0.0, "precision": "fast"}),
        (ProblemError, "a is a numpy.ndarray and b a ", {"b": Fake()}),
        (UnsupportedError, "a list is no array", {"b": [[1.0]]}),
        (UnsupportedError, "a float is no array", {"bias": 1.0}),
        (ProblemError, "a is missing", {"a": None}),
        (IllegalConfigError, "BLOCK_M=24 must be a power of two", {"config": GemmConfig(24, 16, 16)}),
        (IllegalConfigError, "B of shared memory are over", {"config": GemmConfig(256, 256, 256, num_warps=16)}),
        (UsageError, "config must be a GemmConfig, not {'BLOCK_M': 16}", {"config": {"BLOCK_M": 16}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misuse_is_one_line_with_the_values(error, message, call, monkeypatch):
    monkeypatch.setattr(calling, "kind_of", kind_of_without_cupy)
    arguments = {"a": A, "b": B} | call
    if call.get("precision") == "fast":
        arguments = {"a": A.astype(np.float32), "b": B.astype(np.float32), "precision": "fast"}
    with pytest.raises(error) as raised:
        gemm(**arguments)
    assert type(raised.value) is error
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def kind_of_without_cupy(array):
    return "another library" if isinstance(array, Fake) else original_kind_of(array)


original_kind_of = calling.kind_of


def test_a_refused_call_leaves_nothing_behind():
    before = len(api._GEMM._calls)
    with pytest.raises(ProblemError):
        gemm(A, B[:7])
    assert len(api._GEMM._calls) == before
    out = np.full((4, 6), 7, np.float16)
    with pytest.raises(UsageError):
        gemm(A, B, out=out, activation="swosh")
    assert (out == 7).all()


def test_a_read_only_out_is_not_written():
    out = np.zeros((4, 6), np.float16)
    out.flags.writeable = False
    with pytest.raises(ProblemError, match=r"^out is read-only$"):
        gemm(A, B, out=out)


@pytest.mark.parametrize(
    ("device", "fields", "reason"),
    [
        ("sm_86", {"dtype": "fp8e4m3"}, "fp8e4m3 needs sm_89 or newer, and rtx3090 is sm_86"),
        ("sm_80", {"dtype": "fp16", "out_dtype": "fp8e4m3"}, "fp8e4m3 needs sm_89 or newer, and a100 is sm_80"),
        ("sm_75", {"dtype": "bf16"}, "bf16 needs sm_80 or newer, and t4 is sm_75"),
        ("sm_75", {"dtype": "fp16", "bias": "bf16"}, "bf16 needs sm_80"),
        ("sm_75", {"dtype": "fp32", "precision": "tf32"}, "precision=tf32 needs sm_80 or newer, and t4 is sm_75"),
    ],
)
def test_dtypes_that_a_device_lacks(device, fields, reason):
    with pytest.raises(UnsupportedError) as raised:
        check_supported(GEMM, GemmProblem(16, 16, 32, **fields), resolve_device(device))
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("device", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_dtypes_that_a_device_has(device):
    resolved = resolve_device(device)
    for kind in INPUT_DTYPES:
        expected = resolved.arch >= DTYPES[kind].min_arch
        assert (GEMM.supported(GemmProblem(16, 16, 32, dtype=kind), resolved) is None) == expected


# The suite itself


def test_a_result_half_a_tolerance_off_passes_and_two_off_fails():
    expected = np.linspace(-3, 3, 7)
    bound = Tolerance(relative=1e-3, absolute=1e-4)
    off = bound.absolute + bound.relative * np.abs(expected)
    assert_close(expected + 0.5 * off, expected, bound)
    wrong = expected.copy()
    wrong[2] += 2 * off[2]
    with pytest.raises(AssertionError, match=r"1 of 7 elements are wrong; at \(2,\)"):
        assert_close(wrong, expected, bound)
    with pytest.raises(AssertionError, match="1 of 7 elements are not finite"):
        assert_close(np.where(expected == 0, np.nan, expected), expected, bound)


def test_a_guard_sees_one_byte_before_behind_and_between():
    for position in (-1, 5, 2 * 8 - 3):
        guarded = Guarded((2, 5), "fp16", gap=3)
        guarded.array[...] = 1
        guarded.assert_intact()
        row = np.lib.stride_tricks.as_strided(guarded.array[0, :1], (1,), (2,))
        np.lib.stride_tricks.as_strided(row, (1,), (2,))
        start = guarded.array.ctypes.data - guarded.buffer.ctypes.data
        guarded.buffer[start + 2 * position] ^= 1
        with pytest.raises(AssertionError, match="1 bytes around the output were written"):
            guarded.assert_intact()


def test_tolerance_grows_with_what_it_is_for():
    base = tolerance(GemmProblem(16, 16, 64, dtype="fp32"))["out"]
    assert tolerance(GemmProblem(16, 16, 4096, dtype="fp32"))["out"].absolute > base.absolute
    assert tolerance(GemmProblem(16, 16, 64, dtype="fp32", precision="tf32"))["out"].absolute > 100 * base.absolute
    assert tolerance(GemmProblem(16, 16, 64, dtype="fp16"))["out"].relative == pytest.approx(2**-10)
    # A wrong operand is off by about 1/√K: far outside, for the longest K and the coarsest operands.
    for kind, precision in (("bf16", None), ("fp8e5m2", None), ("fp32", "tf32")):
        problem = GemmProblem(16, 16, 2**16, dtype=kind, precision=precision, out_dtype="fp32")
        assert tolerance(problem)["out"].absolute < 8 / math.sqrt(problem.K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 2j}, "alpha=2j must be a real number"),
        ({"alpha": "2"}, "alpha='2' must be a real number"),
        ({"activation": ["relu"]}, "activation=['relu'] can't be a list"),
        ({"config": GemmConfig(16.0, 16, 32)}, "BLOCK_M=16.0 must be an integer of at least 1"),
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_one_line(options, message):
    a = np.ones((16, 16), np.float32)
    with pytest.raises(UsageError) as caught:
        gemm(a, a, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_masked_array_is_refused():
    a = np.ones((16, 16), np.float32)
    with pytest.raises(UnsupportedError, match="masked arrays are not supported"):
        gemm(np.ma.masked_array(a, mask=True), a)
    gemm(a, a)  # warm calls too, whose arrays look the same
    with pytest.raises(UnsupportedError, match=r"^b: masked arrays are not supported"):
        gemm(a, np.ma.masked_array(a, mask=True))


def test_a_number_of_numpy_is_none_of_its_arrays():
    a = np.ones((16, 32), np.float32)
    b = np.ones((32, 16), np.float32)
    expected = gemm(a, b, alpha=2.0)
    for alpha in (np.array(2, np.float32), np.float32(2), np.array([2], np.float32)):
        np.testing.assert_array_equal(gemm(a, b, alpha=alpha), expected)
    with pytest.raises(UsageError, match="alpha=True must be a real number or an array"):
        gemm(a, b, alpha=True)


def test_of_a_looped_call_nothing_is_written_before_all_of_it_is_ready():
    # (2, 1, M, K) by (1, 2, K, N): a call for each outer index, of which the second's A is not aligned.
    tile = GemmConfig(16, 16, 16, GROUP_M=1, num_stages=2, TMA=True)
    buffer = np.zeros(2 * 257 + 16, np.float16)
    first = (-buffer.ctypes.data % 16) // 2
    a = np.lib.stride_tricks.as_strided(buffer[first:], (2, 1, 16, 16), (257 * 2, 2, 32, 2))
    out = np.full((2, 2, 16, 16), 7, np.float16)
    with pytest.raises(IllegalConfigError, match="TMA needs tiles of A and B that start at 16 bytes"):
        gemm(a, np.ones((1, 2, 16, 16), np.float16), out=out, config=tile)
    assert (out == 7).all()


def test_numpy_scalars_are_numbers():
    a = np.ones((16, 16), np.float32)
    np.testing.assert_array_equal(gemm(a, a, alpha=np.float32(0.5)), gemm(a, a, alpha=0.5))
