"""The common epilogue: its device code against its float64 reference, in every combination, and its rules."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
import triton
import triton.language as tl

from tests.kernels.conformance import ACTIVATION_NAMES, assert_close
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.epilogue import (
    FLOATS,
    OUT_SCALE,
    QUANTISED,
    FusedProblem,
    epilogue_reference,
    finish,
    finish_gated,
    rounded,
    to_output,
)
from tilewright.kernels.interpreter import interpret
from tilewright.kernels.problem import Output
from tilewright.tuning_db.errors import ProblemError, UsageError

pytestmark = pytest.mark.smoke


@dataclass(frozen=True, slots=True)
class Elementwise(FusedProblem):
    """Nothing but an epilogue, over (rows, columns)."""

    op: ClassVar[str] = "elementwise"
    rows: int
    columns: int
    gated: str | None = None

    def __post_init__(self):
        self.check_epilogue("fp32")

    def inputs(self, seed):
        raise NotImplementedError

    def outputs(self):
        return {"out": Output((self.rows, self.columns), self.output_dtype)}

    def flops(self):
        return 0

    def bytes_moved(self):
        return 0

    @property
    def unit(self):
        return "fp32"


@triton.jit
def plain_kernel(
    x_ptr,
    residual_ptr,
    out_scale_ptr,
    out_ptr,
    ACTIVATION: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    SIZE: tl.constexpr,
):
    at = tl.arange(0, SIZE)
    residual = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at)
    y = finish(tl.load(x_ptr + at), residual, ACTIVATION, RESIDUAL_LAST, out_scale_ptr, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y)


@triton.jit
def gated_kernel(x_ptr, residual_ptr, out_scale_ptr, out_ptr, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    residual = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at)
    gate, up = tl.load(x_ptr + at), tl.load(x_ptr + SIZE + at)
    y = finish_gated(gate, up, residual, ACTIVATION, out_scale_ptr, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y)


@triton.jit
def cast_kernel(x_ptr, out_scale_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, to_output(tl.load(x_ptr + at), out_scale_ptr, out_ptr.dtype.element_ty))


SIZE = 512


@pytest.mark.parametrize("out_dtype", [*FLOATS, "int8"])
@pytest.mark.parametrize("residual", [None, "fp16", "bf16", "fp8e4m3"])
@pytest.mark.parametrize("gated", [None, "halves"])
def test_device_code_is_the_reference(out_dtype, residual, gated):
    random = np.random.default_rng(0)
    for activation, quantised, last in itertools.product(ACTIVATION_NAMES, (False, True), (False, True)):
        if (out_dtype == "int8" and not quantised) or (quantised and out_dtype not in QUANTISED):
            continue
        if last and (residual is None or gated is not None):
            continue
        problem = Elementwise(
            1,
            SIZE,
            out_dtype=out_dtype,
            residual=residual,
            residual_last=last,
            activation=activation,
            out_scale=quantised,
            gated=gated,
        )
        x = random.standard_normal((1, 2 * SIZE if gated else SIZE), np.float32)
        extra = residual and random.standard_normal((1, SIZE)).astype(dtype(residual).numpy)
        scalars = problem.epilogue_scalars()
        expected = epilogue_reference(problem, x.astype(np.float64), scalars, residual=extra, gated=gated)
        out = np.zeros((1, SIZE), dtype(out_dtype).numpy)
        arrays = {"x_ptr": x, "residual_ptr": extra, "out_scale_ptr": scalars.get("out_scale"), "out_ptr": out}
        kernel, own = (gated_kernel, {}) if gated else (plain_kernel, {"RESIDUAL_LAST": last})
        interpret(kernel, (1, 1, 1), {**arrays, "ACTIVATION": activation, **own, "SIZE": SIZE})
        assert_close(out, expected, rounded(problem, 2.0**-20, gated=gated is not None))


def cast(values, kind, scale=None):
    x = np.zeros(64, np.float32)
    x[: len(values)] = values
    out = np.zeros(64, dtype(kind).numpy)
    arrays = {"x_ptr": x, "out_ptr": out, "out_scale_ptr": None if scale is None else np.full(1, scale, np.float32)}
    interpret(cast_kernel, (1, 1, 1), {**arrays, "SIZE": 64})
    return out[: len(values)]


def test_int8_rounds_to_nearest_even_and_saturates():
    values = [
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        126.5,
        127.5,
        128,
        1e30,
        -127.5,
        -128.5,
        -129,
        -np.inf,
        np.inf,
        0.49999997,
    ]
    expected = [0, 2, 2, 0, -2, -2, 126, 127, 127, 127, -128, -128, -128, -128, 127, 0]
    assert cast(values, "int8", 1.0).tolist() == expected


def test_int8_equals_numpys_rounding_everywhere():
    values = np.linspace(-140, 140, 64, dtype=np.float32) + np.float32(0.25)
    scale = 0.7
    wanted = np.clip(np.rint(values / np.float32(scale)), -128, 127)
    np.testing.assert_array_equal(cast(values, "int8", scale), wanted.astype(np.int8))


@pytest.mark.parametrize(("kind", "largest"), [("fp8e4m3", 448.0), ("fp8e5m2", 57344.0)])
def test_fp8_saturates_and_keeps_nan(kind, largest):
    result = cast([1e9, -1e9, np.inf, -np.inf, largest, np.nan, 1.0625], kind).astype(np.float64)
    np.testing.assert_array_equal(result[:5], [largest, -largest, largest, -largest, largest])
    assert np.isnan(result[5])
    assert result[6] == float(np.array(1.0625).astype(dtype(kind).numpy))


def test_the_scale_divides():
    np.testing.assert_array_equal(cast([3.0, -1.0], "int8", 0.5), [6, -2])
    np.testing.assert_array_equal(cast([3.0], "fp8e4m3", 2.0).astype(float), [1.5])


def test_the_order_of_the_reference():
    problem = Elementwise(
        1, 2, alpha=True, bias="fp32", residual="fp32", activation="relu", out_scale=True, out_dtype="int8"
    )
    x = np.array([[10.0, -10.0]])
    arrays = {"alpha": np.array([2.0]), "out_scale": np.array([0.5])}
    bias, residual = np.array([1.0, 30.0]), np.array([[-1.0, -40.0]])
    y = epilogue_reference(problem, x, arrays, scales=(np.array([3.0]),), bias=bias, residual=residual)
    assert y.tolist() == [[(10 * 2 * 3 + 1 - 1) / 0.5, 0.0]]
    last = replace(problem, residual_last=True)
    y = epilogue_reference(last, x, arrays, scales=(np.array([3.0]),), bias=bias, residual=residual)
    assert y.tolist() == [[(10 * 2 * 3 + 1 - 1) / 0.5, -40 / 0.5]]
    halves = epilogue_reference(problem, np.array([[1.0, -2.0, 3.0, 4.0]]), arrays, residual=residual, gated="halves")
    assert halves.tolist() == [[(2 * 6 - 1) / 0.5, -40 / 0.5]]
    pairs = epilogue_reference(
        problem, np.array([[1.0, 3.0, -2.0, 4.0]]), arrays, residual=residual, gated="interleaved"
    )
    assert pairs.tolist() == halves.tolist()


@pytest.mark.parametrize(
    ("error", "message", "fields"),
    [
        (ProblemError, "out_dtype='fp17': elementwise takes fp16, bf16", {"out_dtype": "fp17"}),
        (ProblemError, "bias='int8': elementwise takes fp16", {"bias": "int8"}),
        (ProblemError, "residual='int32'", {"residual": "int32"}),
        (
            ProblemError,
            "out_scale is for a result of int8, fp8e4m3, fp8e5m2, not out_dtype='fp32'",
            {"out_scale": True},
        ),
        (ProblemError, "out_dtype='int8' needs out_scale", {"out_dtype": "int8"}),
        (ProblemError, "residual_last needs a residual", {"residual_last": True, "activation": "relu"}),
        (UsageError, "unknown activation 'swosh'", {"activation": "swosh"}),
    ],
)
def test_what_can_not_be_is_refused(error, message, fields):
    with pytest.raises(error) as caught:
        Elementwise(1, 1, **fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_spellings_are_canonical():
    problem = Elementwise(1, 1, activation="relu6")
    assert (problem.activation, problem.out_dtype) == ("clamp:0:6", "fp32")
    assert problem == Elementwise(1, 1, activation="clamp:0.0:6.0", out_dtype="fp32")
    assert str(problem) == "rows=1,columns=1,activation=clamp:0:6"
    assert Elementwise.parse(str(problem)) == problem
    # Without an activation there is nothing to be behind.
    assert not Elementwise(1, 1, residual="fp16", residual_last=True).residual_last


def test_a_tolerance_grows_with_what_the_epilogue_multiplies():
    plain = rounded(Elementwise(1, 1), 1e-6)
    assert rounded(Elementwise(1, 1, activation="relu2"), 1e-6).absolute > 10 * plain.absolute
    assert rounded(Elementwise(1, 1), 1e-6, gated=True).absolute > 10 * plain.absolute
    assert rounded(Elementwise(1, 1, activation="leaky_relu:-3"), 1e-6).absolute == pytest.approx(3 * plain.absolute)
    assert rounded(Elementwise(1, 1, out_dtype="int8", out_scale=True), 0.0).absolute == 0.5
    assert rounded(Elementwise(1, 1, out_dtype="int32"), 1.0) == (0.0, 0.0)
    assert ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max * OUT_SCALE > 6  # what is drawn fits into fp8, scaled
