"""How `rmsnorm` may be called, on which arrays, and what it says to misuse."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from tests.kernels.conformance import Guarded
from tests.kernels.ops.rmsnorm_cases import WALKS, near, norm, outs_for, random_array, run
from tilewright.kernels import RmsNormConfig, RmsNormProblem, rmsnorm
from tilewright.kernels import call as calling
from tilewright.kernels.dispatch import forget_plans
from tilewright.kernels.ops.rmsnorm import api
from tilewright.kernels.ops.rmsnorm.problem import reference
from tilewright.tuning_db.errors import (
    IllegalConfigError,
    ProblemError,
    UnsupportedError,
    UnsupportedProblemError,
    UsageError,
)


@pytest.fixture
def problems(monkeypatch):
    """The problems, and constants, that calls come down to, as they are prepared."""
    seen = []
    original = calling.plan_for

    def plan_for(kernel, problem, ordinal, **options):
        seen.append((problem, dict(options["constants"])))
        return original(kernel, problem, ordinal, **options)

    forget_plans()
    monkeypatch.setattr(calling, "plan_for", plan_for)
    yield seen
    forget_plans()


@pytest.mark.parametrize("config", WALKS, ids=["whole rows", "walk"])
def test_eps_and_the_weights_offset_are_the_calls(config, problems):
    x, w = 0.01 * random_array((4, 50)), random_array((50,))
    for eps, offset in ((1e-6, 0.0), (1e-2, 0.0), (1e-6, 1), (0.0, -0.5)):
        near(rmsnorm(x, w, eps=eps, weight_offset=offset, config=config), norm(x, eps) * (offset + w))
        near(rmsnorm(x, eps=eps, weight_offset=offset, config=config), norm(x, eps))
    assert len({problem for problem, _ in problems}) == 2
    assert {(each["EPS"], each["WEIGHT_OFFSET"]) for _, each in problems} == {
        (float(np.float32(eps)), float(offset)) for eps, offset in ((1e-6, 0), (1e-2, 0), (1e-6, 1), (0, -0.5))
    }
    problem = RmsNormProblem(M=4, N=50, dtype="fp32", weight="fp32")
    near(norm(x, 1e-2) * (1 + w), reference(problem, {"x": x, "weight": w}, eps=1e-2, weight_offset=1.0)["out"])


# Arrays


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (2, 3, 7), (2, 1, 3, 1, 7), (1, 1), (4, 1)], ids=str)
def test_leading_dimensions_are_rows(shape):
    x, r, w = random_array(shape), random_array(shape, seed=1), random_array(shape[-1:])
    out, h, scale = rmsnorm(x, w, residual=r, return_residual=True, out_dtype="int8", out_scale="row")
    assert (out.shape, h.shape, scale.shape) == (shape, shape, (*shape[:-1], 1))
    expected = norm(x.astype(float) + r) * w
    assert (np.abs(out * scale.astype(float) - expected) <= 0.501 * scale).all()
    near(h, x.astype(float) + r)
    near(rmsnorm(x), norm(x))


def test_one_result_is_no_tuple_and_several_come_in_order():
    x = random_array((3, 8), "fp16")
    assert rmsnorm(x).dtype == np.float16
    assert rmsnorm(x, residual=x).shape == (3, 8)
    out, h = rmsnorm(x, residual=random_array((3, 8)), return_residual=True)
    assert (out.dtype, h.dtype) == (np.float16, np.float32)
    out, scale = rmsnorm(x, out_dtype="int8", out_scale="row")
    assert (out.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (3, 1))
    out, h, scale = rmsnorm(x, residual=x, return_residual=True, out_dtype="int8", out_scale="row")
    assert (out.dtype, h.dtype, scale.dtype) == (np.int8, np.float16, np.float32)
    given = np.empty((3, 8), np.float16)
    assert rmsnorm(x, residual=x, residual_out=given)[1] is given
    assert rmsnorm(x, out=given) is given


VIEWS = {
    "every other row": lambda x: x[::2],
    "columns in the middle": lambda x: x[:, 3:20],
    "one row": lambda x: x[5:6, 2:20],
    "one column": lambda x: x[:, 4:5],
    "one element": lambda x: x[7:8, 7:8],
    "blocks of rows": lambda x: x.reshape(5, 8, 40)[:, :, 1:9],
    "a length of one": lambda x: x.reshape(8, 5, 40)[:, 2:3],
    "a row": lambda x: x[3],
    "every other pair of rows": lambda x: x.reshape(10, 2, 2, 40)[:, 1:, :1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_need_no_copy(view):
    x, r = view(random_array((40, 40))), view(random_array((40, 40), seed=1))
    near(rmsnorm(x, residual=r), norm(x.astype(float) + r))
    big = Guarded((40, 40), "fp32")
    out = view(big.array)
    untouched = np.ones((40, 40), bool)
    view(untouched)[...] = False
    rmsnorm(x, residual=r.copy(), out=out)
    near(out, norm(x.astype(float) + r))
    assert np.isnan(big.array[untouched]).all()


@pytest.mark.parametrize("memory", ["dense", "strided", "unaligned", "strided unaligned"])
@pytest.mark.parametrize(
    "fields", [{}, {"out_dtype": "int8", "row_scale": True}, {"out_dtype": "int8", "out_scale": True}]
)
def test_arrays_of_a_problem_are_recognised_as_that_problem(memory, fields, problems):
    problem = RmsNormProblem(
        M=6,
        N=48,
        weight="fp32",
        residual="fp16",
        residual_out=True,
        strided="strided" in memory,
        aligned="unaligned" not in memory,
        **fields,
    )
    run(problem, problem.inputs(0), {name: guarded.array for name, guarded in outs_for(problem).items()})
    assert [each for each, _ in problems] == [problem]


@pytest.mark.parametrize("config", [None, RmsNormConfig(1, 16), RmsNormConfig(4, 64)], ids=str)
@pytest.mark.parametrize(
    ("out", "residual_out"),
    [("x", None), ("residual", None), (None, "x"), (None, "residual"), ("x", "residual"), ("residual", "x")],
)
def test_results_may_replace_the_inputs(out, residual_out, config):
    arrays = {"x": random_array((5, 50)), "residual": random_array((5, 50), seed=1)}
    w = random_array((50,))
    total = arrays["x"].astype(float) + arrays["residual"]
    result, h = rmsnorm(
        arrays["x"],
        w,
        residual=arrays["residual"],
        out=arrays.get(out),
        residual_out=arrays.get(residual_out),
        return_residual=True,
        config=config,
    )
    near(result, norm(total) * w)
    near(h, total)
    assert out is None or result is arrays[out]
    assert residual_out is None or h is arrays[residual_out]


BASE = random_array((3, 40, 64))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("out may not share memory with x", lambda b: {"x": b[0, :8], "out": b[0, 1:9]}),
        ("out may not share memory with weight", lambda b: {"x": b[0], "weight": b[1, 3], "out": b[1]}),
        (
            "residual_out may not share memory with out",
            lambda b: {"x": b[0], "residual": b[1], "out": b[2], "residual_out": b[2]},
        ),
        (
            "out may not share memory with residual",
            lambda b: {"x": b[0], "residual": b[1, :, :].T[:40].T, "out": b[1, :, 1:41]},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_results_may_not_share_other_memory(message, call):
    arrays = call(BASE.copy())
    if "residual" in arrays and arrays["residual"].shape != arrays["x"].shape:
        arrays["x"] = arrays["x"][:, :40]
    with pytest.raises(ProblemError, match=f"^{message}$"):
        rmsnorm(arrays.pop("x"), arrays.pop("weight", None), **arrays)


# Misuse: one line, with the values

X, W = np.ones((4, 8), np.float16), np.ones(8, np.float16)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ProblemError, "x is (): it must have a dimension", {"x": np.ones((), np.float16)}),
        (ProblemError, "x is (4, 0): it must have a dimension, and none of length 0", {"x": X[:, :0]}),
        (ProblemError, "x is (0, 8)", {"x": X[:0]}),
        (ProblemError, "weight is (7,) and must be (8,)", {"weight": W[:7]}),
        (ProblemError, "weight is (4, 8) and must be (8,)", {"weight": X}),
        (UnsupportedError, "weight must be contiguous; its stride is 2", {"weight": np.ones(16, np.float16)[::2]}),
        (ProblemError, "residual is (8,) and must be (4, 8), as x", {"residual": W}),
        (ProblemError, "out is (8, 4) and must be (4, 8)", {"out": np.ones((8, 4), np.float16)}),
        (ProblemError, "out is fp32 and out_dtype='fp16'", {"out": np.ones((4, 8), np.float32), "out_dtype": "fp16"}),
        (ProblemError, "out is fp16 and out_dtype='half': leave one out", {"out": X.copy(), "out_dtype": "half"}),
        (ProblemError, "unknown out_dtype='half': rmsnorm takes fp16", {"out_dtype": "half"}),
        (UsageError, "out_scale=0.0 must be a number of fp32 above 0", {"out_scale": 0.0, "out_dtype": "int8"}),
        (ProblemError, "residual_out is (8,) and must be (4, 8)", {"residual": X, "residual_out": W.copy()}),
        (ProblemError, "return_residual and residual_out need a residual", {"return_residual": True}),
        (ProblemError, "return_residual and residual_out need a residual", {"residual_out": X.copy()}),
        (
            ProblemError,
            "residual_out is fp32 and residual fp16: they must be of one dtype",
            {"residual": X, "residual_out": np.ones((4, 8), "f4")},
        ),
        (UnsupportedError, "x has strides (16, 2) for shape (4, 8)", {"x": np.ones((4, 16), np.float16)[:, ::2]}),
        (UnsupportedError, "x has strides (1, 8)", {"x": np.ones((8, 8), np.float16).T}),
        (UnsupportedError, "x has strides (0, 1)", {"x": np.broadcast_to(W, (4, 8))}),
        (UnsupportedError, "x has strides (-8, 1)", {"x": X[::-1]}),
        (
            UnsupportedError,
            "x has strides (32, 8, 1) for shape (2, 3, 8): rows must be contiguous, and at one distance",
            {"x": np.ones((2, 4, 8), np.float16)[:, :3], "weight": None},
        ),
        (UnsupportedError, "out has strides (1, 4)", {"out": np.ones((8, 4), np.float16).T}),
        (UnsupportedProblemError, "x is int64 and must be fp16, bf16 or fp32", {"x": X.astype(np.int64)}),
        (UnsupportedProblemError, "dtype='int8': rmsnorm takes fp16, bf16, fp32", {"x": X.astype(np.int8)}),
        (UnsupportedProblemError, "weight='int8': rmsnorm takes", {"weight": W.astype(np.int8)}),
        (UnsupportedProblemError, "residual='int32': rmsnorm takes", {"residual": X.astype(np.int32)}),
        (ProblemError, "out_dtype='int8' needs out_scale", {"out_dtype": "int8"}),
        (ProblemError, "out_scale is for a result of int8", {"out_scale": 0.5}),
        (ProblemError, "out_scale is for a result of int8", {"out_scale": "row"}),
        (ProblemError, "out_dtype='int32' is for sums of int8", {"out_dtype": "int32"}),
        (UsageError, "out_scale='column' must be a real number", {"out_scale": "column", "out_dtype": "int8"}),
        (ProblemError, 'row_scale is written with out_scale="row"', {"row_scale": np.ones((4, 1), np.float32)}),
        (
            ProblemError,
            "row_scale is (4,) of fp32 and must be (4, 1) of fp32",
            {"row_scale": np.ones(4, np.float32), "out_scale": "row", "out_dtype": "int8"},
        ),
        (
            UnsupportedError,
            "row_scale must be contiguous; its strides are (2, 1)",
            {"row_scale": np.ones((4, 2), np.float32)[:, :1], "out_scale": "row", "out_dtype": "int8"},
        ),
        (UsageError, "eps=-1e-06 must be a finite number of at least 0", {"eps": -1e-6}),
        (UsageError, "eps=1e+39 must be a finite number of at least 0, of fp32", {"eps": 1e39}),
        (UsageError, "eps=nan must be a finite number", {"eps": math.nan}),
        (UsageError, "eps='small' must be a finite number", {"eps": "small"}),
        (UsageError, "eps=[1e-06] must be a finite number", {"eps": [1e-6]}),
        (UsageError, "weight_offset=inf must be a finite number", {"weight_offset": math.inf}),
        (UsageError, "config must be a RmsNormConfig, not {}", {"config": {}}),
        (IllegalConfigError, "BLOCK_N=24 must be a power of two", {"config": RmsNormConfig(1, 24)}),
        (IllegalConfigError, "BLOCK_M=0 must be an integer", {"config": RmsNormConfig(0, 16)}),
        (IllegalConfigError, "num_warps=64 is over the 32", {"config": RmsNormConfig(1, 16, 64)}),
        (
            IllegalConfigError,
            "512 registers a thread for its part of the tile are over the 255",
            {"config": RmsNormConfig(16, 1024, 1)},
        ),
        (
            IllegalConfigError,
            "128 registers a thread for its part of the tile are over the 64",
            {"config": RmsNormConfig(128, 1024, 32)},
        ),
        (IllegalConfigError, "is over the 1048576 elements of a tensor", {"config": RmsNormConfig(64, 32768, 32)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misuse_is_one_line_with_the_values(error, message, call):
    arguments = {"x": X, "weight": W} | call
    with pytest.raises(error) as raised:
        rmsnorm(arguments.pop("x"), arguments.pop("weight"), **arguments)
    assert type(raised.value) is error
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["eps", "weight_offset"])
@pytest.mark.parametrize("value", [True, np.True_, 1 + 0j], ids=repr)
def test_what_equals_the_number_of_a_call_before_is_refused_as_well(name, value):
    constants = {"eps": 1.0, "weight_offset": 1.0}
    rmsnorm(X, W, **constants)
    with pytest.raises(UsageError, match=rf"^{name}={re.escape(repr(value))} must be a finite number"):
        rmsnorm(X, W, **constants | {name: value})


def test_a_refused_call_leaves_nothing_behind():
    before = len(api._RMSNORM._calls)
    out = np.full((4, 8), 7, np.float16)
    with pytest.raises(UsageError):
        rmsnorm(X, W, out=out, eps=-1)
    assert (out == 7).all()
    assert len(api._RMSNORM._calls) == before
