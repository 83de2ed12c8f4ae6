"""Triton's interpreter on NumPy arrays: numbers against ml_dtypes and float64, memory, and how it fails."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter as shipped

from tilewright.kernels import interpreter
from tilewright.kernels.interpreter import interpret, require_interpreter
from tilewright.tuning_db.errors import RunError, UsageError

pytestmark = pytest.mark.smoke

BF16, E4M3, E5M2 = (np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"))
ONE = (1, 1, 1)


# Device code


@triton.jit
def cast_kernel(x, n, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def rtz_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def dot_kernel(a, b, c, d, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    acc = tl.load(c + m * N + n)
    tile_a = tl.load(a + m * K + k[None, :])
    tile_b = tl.load(b + k[:, None] * N + n)
    acc = tl.dot(tile_a, tile_b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    tl.store(d + m * N + n, acc)


@triton.jit
def raw_arithmetic_kernel(x, y, total, negated, less, larger, most, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(total + i, a + b)
    tl.store(negated + i, -a)
    tl.store(less + i, (a < b).to(tl.int32) + 1, mask=a < b)
    tl.store(larger + i, tl.where(a > b, a, b))
    tl.store(most, tl.max(a, axis=0))


@triton.jit
def reduce_kernel(x, total, running, position, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(total, tl.sum(values, axis=0))
    tl.store(running + i, tl.cumsum(values, axis=0))
    tl.store(position, tl.argmin(values, axis=0))


@triton.jit
def constants_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=1.7))
    if y.dtype.element_ty.primitive_bitwidth > 8:  # Triton 3.6 to 3.9 compiles no fp8 constants but zero
        tl.store(y + BLOCK + i, tl.full((BLOCK,), -0.3, y.dtype.element_ty))


@triton.jit
def exp_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.exp(tl.load(x + i)))


@triton.jit
def twice_kernel(x, stride_m, stride_n, y, y_stride_m, y_stride_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    mask = (m < M) & (n < N)
    values = tl.load(x + m.to(tl.int64) * stride_m + n * stride_n, mask=mask, other=0)
    tl.store(y + m.to(tl.int64) * y_stride_m + n * y_stride_n, values * 2, mask=mask)


@triton.jit
def activate(x, NAME: tl.constexpr):
    if NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "relu":
        y = tl.maximum(x, 0.0)
    else:
        y = x
    return y


@triton.jit
def language_kernel(x, bias, lo, hi, n, counter, y, STEPS: tl.constexpr, NAME: tl.constexpr):
    offsets = tl.multiple_of(tl.program_id(0) * 4, 4) + tl.arange(0, 4)
    values = tl.load(x + offsets)
    if bias is not None:
        values += tl.load(bias + offsets)
    result = activate(values, NAME) + tl.math.erf(values) + tl.exp(values) + tl.exp2(values)
    result += tl.where(values > 0, values, -values)
    for k in tl.range(lo, hi):
        result += k
    for k in tl.static_range(STEPS):
        result += k
    result += min(n, 3) + max(n, 3) + tl.minimum(n, 3) + tl.cdiv(n, 2)
    result += tl.program_id(1) * 10 + tl.program_id(2) * 100
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel")
    row = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    tl.store(y + row.to(tl.int64) * tl.num_programs(0) * 4 + offsets, result)


@triton.jit
def last_one_kernel(partial, lock, y, SPLITS: tl.constexpr):
    split = tl.program_id(0)
    tl.store(partial + split, split + 1)
    tl.debug_barrier()
    arrived = tl.atomic_add(lock, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        tl.store(y, tl.sum(tl.load(partial + tl.arange(0, SPLITS))))


@triton.jit
def refusing_kernel(y, WIDTH: tl.constexpr):
    tl.static_assert(WIDTH < 3, "too wide")
    tl.store(y, WIDTH)


@triton.jit
def atomic_kernel(y):
    tl.atomic_add(y, 1.0)


# Conversions


def cast(values, to):
    values = np.ascontiguousarray(values).reshape(-1)
    out = np.zeros(values.shape, dtype=to)
    interpret(cast_kernel, ONE, {"x": values, "n": values.size, "y": out, "BLOCK": triton.next_power_of_2(values.size)})
    return out


def is_nan(values):
    with np.errstate(invalid="ignore"):  # NumPy warns of casting a signalling NaN
        return np.isnan(values.astype(np.float64))


def assert_same(actual, expected):
    """Equal bit for bit, except that any NaN is as good as another."""
    assert actual.dtype == expected.dtype
    nan = is_nan(expected)
    np.testing.assert_array_equal(is_nan(actual), nan)
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    np.testing.assert_array_equal(actual[~nan].view(bits), expected[~nan].view(bits))


def patterns(dtype):
    return np.arange(2 ** (8 * dtype.itemsize), dtype=np.uint32).astype(f"u{dtype.itemsize}").view(dtype)


@pytest.mark.parametrize("to", ["float32", "float64"])
@pytest.mark.parametrize("source", [BF16, E4M3, E5M2], ids=str)
def test_every_pattern_upcasts_to_its_number(source, to):
    everything = patterns(source)
    with np.errstate(invalid="ignore"):
        expected = everything.astype(to)
    assert_same(cast(everything, to), expected)


@pytest.mark.parametrize("to", [np.dtype("float16"), BF16], ids=str)
@pytest.mark.parametrize("source", [E4M3, E5M2], ids=str)
def test_every_fp8_pattern_upcasts_to_16_bits(source, to):
    assert_same(cast(patterns(source), to), patterns(source).astype(to))


def test_bf16_to_fp16_rounds_once():
    with np.errstate(over="ignore", invalid="ignore"):
        expected = patterns(BF16).astype(np.float32).astype(np.float16)
    assert_same(cast(patterns(BF16), "float16"), expected)


def test_fp32_to_bf16_rounds_to_nearest_even():
    # Around every bf16 number: itself, its neighbours, just below the tie, the tie, just above.
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << np.uint32(16)
    bits = (upper | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)).reshape(-1)
    values = bits.view(np.float32)
    out = cast(values, BF16)
    with np.errstate(invalid="ignore"):
        assert_same(out, values.astype(BF16))
    # And once more without ml_dtypes, in integers: half of the last place, less one where that place is even.
    finite = np.isfinite(values)
    rounded = (bits[finite].astype(np.uint64) + 0x7FFF + ((bits[finite] >> 16) & 1)) >> 16
    np.testing.assert_array_equal(out[finite].view(np.uint16), rounded)


def nearest_saturating(values, dtype):
    """The slow way: of the format's two finite neighbours the nearer one, of two equally near the even one."""
    finite = patterns(dtype)[: 2 ** (8 * dtype.itemsize - 1)]  # the positive ones, in order, since the sign is a bit
    grid = finite.astype(np.float64)
    grid = grid[np.isfinite(grid)]
    magnitude = np.minimum(np.abs(values.astype(np.float64)), grid[-1])
    above = np.minimum(np.searchsorted(grid, magnitude), len(grid) - 1)
    below = np.maximum(above - 1, 0)
    to_below, to_above = magnitude - grid[below], grid[above] - magnitude
    pick = np.where((to_below < to_above) | ((to_below == to_above) & (below % 2 == 0)), below, above)
    return (pick.astype(np.uint8) | np.where(np.signbit(values), 0x80, 0).astype(np.uint8)).view(dtype)


@pytest.mark.parametrize("source", ["float32", "float16", BF16], ids=str)
@pytest.mark.parametrize("to", [E4M3, E5M2], ids=str)
def test_to_fp8_rounds_to_nearest_even_and_saturates(source, to):
    if source == "float32":
        numbers = patterns(to).astype(np.float32)
        numbers = np.sort(numbers[np.isfinite(numbers)])
        ties = (numbers[1:] + numbers[:-1]) / 2
        exact = np.concatenate([numbers, ties, numbers[[0, -1]] * np.float32(1.03), [1e30, np.inf, -0.0, 1e-45, 1e-10]])
        exact = exact.astype(np.float32)
        values = np.concatenate([exact, np.nextafter(exact, np.float32(9e9)), np.nextafter(exact, np.float32(-9e9))])
        values = np.concatenate([values, -values])
    else:
        values = patterns(np.dtype(source))
        values = values[~np.isnan(values.astype(np.float32))]
    out = cast(values, to)
    assert_same(out, nearest_saturating(values, to))
    largest = float(ml_dtypes.finfo(to).max)
    assert_same(out, np.clip(values.astype(np.float32), -largest, largest).astype(to))
    assert np.isnan(cast(np.full(4, np.nan, dtype=source), to).astype(np.float32)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=16), st.sampled_from([BF16, E4M3, E5M2]))
def test_any_fp32_downcasts_as_ml_dtypes_does(numbers, to):
    values = np.array(numbers, dtype=np.float32)
    limit = np.inf if to == BF16 else float(ml_dtypes.finfo(to).max)
    with np.errstate(over="ignore"):
        expected = np.clip(values, -limit, limit).astype(to)
    assert_same(cast(values, to), expected)


def test_rounding_to_zero_on_request():
    values = np.array([1.99999, -1.99999, 3.0, 1e-3], dtype=np.float32)
    out = np.zeros(4, dtype=BF16)
    interpret(rtz_kernel, ONE, {"x": values, "y": out, "BLOCK": 4})
    np.testing.assert_array_equal(out.view(np.uint16), values.view(np.uint32) >> 16)


def test_float_to_integer_saturates():
    values = np.array([1.9, -1.9, 3e9, -3e9, np.nan, np.inf, 200.0, 70000.0], dtype=np.float32)
    top, bottom = 2**31 - 1, -(2**31)
    assert cast(values, np.int32).tolist() == [1, -1, top, bottom, 0, top, 200, 70000]
    assert cast(values, np.int8).tolist() == [1, -1, -1, 0, 0, -1, -56, -1]  # the low byte of 16 saturated bits
    assert cast(values[:2], np.int64).tolist() == [1, -1]


def test_integers_and_booleans_convert():
    assert cast(np.array([-3, 300, 257], dtype=np.int32), BF16).astype(float).tolist() == [-3, 300, 256]
    assert cast(np.array([True, False]), np.float32).tolist() == [1, 0]
    assert cast(np.array([-1, 128], dtype=np.int64), np.int8).tolist() == [-1, -128]


# tl.dot


def dot(a, b, acc, precision="tf32"):
    out = np.empty_like(acc)
    (m, k), n = a.shape, b.shape[1]
    interpret(dot_kernel, ONE, {"a": a, "b": b, "c": acc, "d": out, "M": m, "N": n, "K": k, "PRECISION": precision})
    return out


@pytest.mark.parametrize("dtype", ["float16", BF16, E4M3, E5M2, "float32"], ids=str)
def test_dot_is_the_float64_product(dtype):
    rng = np.random.default_rng(3)
    m, n, k = 16, 32, 64
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    acc = rng.standard_normal((m, n)).astype(np.float32)
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    # k additions in fp32, each wrong by at most half of 2^-23 of the sum of magnitudes so far.
    bound = k * 2.0**-24 * (np.abs(a64) @ np.abs(b64) + np.abs(acc))
    error = np.abs(dot(a, b, acc, "ieee") - (a64 @ b64 + acc))
    assert (error <= bound).all()


def test_dot_of_fp16_into_fp16_adds_in_fp32():
    a, b = np.full((16, 64), 0.1, dtype=np.float16), np.full((64, 16), 0.1, dtype=np.float16)
    acc = np.full((16, 16), 1000.0, dtype=np.float16)
    expected = np.float16(64 * float(a[0, 0]) ** 2 + 1000)
    np.testing.assert_array_equal(dot(a, b, acc), np.full((16, 16), expected))


def test_dot_of_fp32_cuts_operands_to_tf32():
    a = np.zeros((16, 16), dtype=np.float32)
    np.fill_diagonal(a, 1 + 2.0**-10 + 2.0**-11 + 2.0**-20)
    eye, zero = np.eye(16, dtype=np.float32), np.zeros((16, 16), dtype=np.float32)
    tf32 = np.diag(np.full(16, 1 + 2.0**-10, dtype=np.float32))
    np.testing.assert_array_equal(dot(a, eye, zero, "tf32"), tf32)
    np.testing.assert_array_equal(dot(eye, -a, zero, "tf32"), -tf32)
    np.testing.assert_array_equal(dot(a, eye, zero, "tf32x3"), a)
    np.testing.assert_array_equal(dot(a, eye, zero, "ieee"), a)


def test_dot_of_int8_is_exact():
    rng = np.random.default_rng(5)
    a = rng.integers(-128, 128, (16, 64), dtype=np.int8)
    b = rng.integers(-128, 128, (64, 16), dtype=np.int8)
    a[0], b[:, 0] = -128, -128
    acc = rng.integers(-(2**31), 2**31, (16, 16)).astype(np.int32)
    acc[0, 0] = 2**31 - 1  # overflows: wraps like the hardware's adder
    wide = a.astype(np.int64) @ b.astype(np.int64) + acc
    np.testing.assert_array_equal(dot(a, b, acc), wide.astype(np.int32))


# bf16 and fp8 without an upcast: slow habits of a kernel, but never wrong numbers


@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2], ids=str)
def test_arithmetic_on_raw_types_is_on_numbers(dtype):
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((2, 64)).astype(dtype)
    out = {name: np.zeros(64, dtype=dtype) for name in ("total", "negated", "larger")}
    less, most = np.zeros(64, dtype=np.int32), np.zeros(1, dtype=dtype)
    interpret(raw_arithmetic_kernel, ONE, {"x": x, "y": y, **out, "less": less, "most": most, "BLOCK": 64})
    wide_x, wide_y = x.astype(np.float32), y.astype(np.float32)
    assert_same(out["total"], (wide_x + wide_y).astype(dtype))
    assert_same(out["larger"], np.maximum(wide_x, wide_y).astype(dtype))
    np.testing.assert_array_equal(out["negated"].astype(np.float32), -wide_x)
    np.testing.assert_array_equal(less, 2 * (wide_x < wide_y))
    assert float(most[0]) == wide_x.max()


@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2], ids=str)
def test_reductions_of_raw_types_are_of_numbers(dtype):
    x = np.array([2, -3, 0.5, -1.5], dtype=dtype)
    total, running, position = np.zeros(1, dtype=dtype), np.zeros(4, dtype=dtype), np.zeros(1, dtype=np.int32)
    interpret(reduce_kernel, ONE, {"x": x, "total": total, "running": running, "position": position, "BLOCK": 4})
    assert running.astype(float).tolist() == [2, -1, -0.5, -2]
    assert float(total[0]) == -2
    assert position[0] == 1


@pytest.mark.parametrize("dtype", ["float16", BF16, E4M3, E5M2], ids=str)
def test_constants_are_rounded_into_the_type(dtype):
    x, y = np.ones(8, dtype=dtype), np.zeros(16, dtype=dtype)
    interpret(constants_kernel, ONE, {"x": x, "y": y, "n": 5, "BLOCK": 8})
    expected = np.array([1.0] * 5 + [1.7] * 3 + [-0.3] * 8, dtype=np.float32).astype(dtype)
    stored = 8 * np.dtype(dtype).itemsize  # both halves, of 16-bit types
    assert_same(y[:stored], expected[:stored])


def test_overflow_and_nan_raise_no_warning():
    before = np.geterr()
    x, y = np.array([1e4, -1e4, np.nan, 0], dtype=np.float32), np.zeros(4, dtype=np.float32)
    interpret(exp_kernel, ONE, {"x": x, "y": y, "BLOCK": 4})
    np.testing.assert_array_equal(y, [np.inf, 0, np.nan, 1])
    assert np.geterr() == before


# Memory


def twice(x, y):
    def strides(array):
        return [stride // array.itemsize for stride in array.strides]

    (sm, sn), (ym, yn), (rows, columns) = strides(x), strides(y), x.shape
    sizes = {"stride_m": sm, "stride_n": sn, "y_stride_m": ym, "y_stride_n": yn, "M": rows, "N": columns}
    interpret(twice_kernel, ONE, {"x": x, "y": y, **sizes, "BLOCK_M": 16, "BLOCK_N": 16})


VIEWS = {
    "whole": np.s_[:, :],
    "rows and columns": np.s_[2:9, 3:7],
    "every other": np.s_[1::2, ::3],
    "backwards": np.s_[::-1, 8:2:-2],
    "one element": np.s_[4:5, 4:5],
    "no rows": np.s_[5:5, :],
    "no columns": np.s_[:, 9:9],
}


@pytest.mark.parametrize("dtype", ["float32", "int64", "float16", BF16], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_is_read_and_written_in_place_and_nothing_around_it(view, dtype):
    base = np.arange(100).reshape(10, 10).astype(dtype)
    target = np.full((10, 10), -1).astype(dtype)
    expected = target.copy()
    expected[view] = (base[view].astype(np.float32) * 2).astype(dtype)
    untouched = base.copy()
    twice(base[view], target[view])
    np.testing.assert_array_equal(target, expected)
    np.testing.assert_array_equal(base, untouched)


def test_a_transposed_view():
    base, target = np.arange(12, dtype=np.int32).reshape(3, 4), np.zeros((4, 3), dtype=np.int32)
    twice(base.T, target)
    np.testing.assert_array_equal(target, base.T * 2)


def test_arguments_that_alias():
    both = np.arange(100, dtype=np.float32).reshape(10, 10)
    expected = both * 2
    twice(both, both)
    np.testing.assert_array_equal(both, expected)
    # Two views of one array, side by side: neither launch may write the other's half back.
    left, right = both[:, :5], both[:, 5:]
    twice(left, right)
    np.testing.assert_array_equal(both, np.hstack([expected[:, :5], expected[:, :5] * 2]))


def test_read_only_arrays_are_read_but_never_written():
    frozen = np.arange(6, dtype=np.float32).reshape(2, 3)
    frozen.flags.writeable = False
    spread = np.broadcast_to(np.float32(3), (2, 3))
    out = np.zeros((2, 3), dtype=np.float32)
    twice(frozen, out)
    np.testing.assert_array_equal(out, frozen * 2)
    twice(spread, out)
    np.testing.assert_array_equal(out, np.full((2, 3), 6))
    with pytest.raises(RunError, match=r"6 of 6 stores .* may be written"):
        twice(out, frozen)
    np.testing.assert_array_equal(frozen, np.arange(6).reshape(2, 3))


def test_an_address_outside_the_arrays_is_an_error():
    base = np.zeros(16, dtype=np.float32)
    call = {"n": 16, "BLOCK": 16}
    with pytest.raises(RunError, match=r"at program \(0, 0, 0\): IndexError: 4 of 16 loads are outside every array"):
        interpret(cast_kernel, ONE, {"x": base[:12], "y": np.zeros(16, dtype=np.float32), **call})
    with pytest.raises(RunError, match="4 of 16 stores are outside every array"):
        interpret(cast_kernel, ONE, {"x": base, "y": base.copy()[4:], **call})
    interpret(cast_kernel, ONE, {"x": base[:12], "y": np.zeros(12, dtype=np.float32), "n": 12, "BLOCK": 16})
    with pytest.raises(RunError, match="1 of 1 stores are outside every array"):
        interpret(refusing_kernel, ONE, {"y": np.zeros((3, 0), dtype=np.int32), "WIDTH": 1})


def test_a_grid_without_programs_does_nothing():
    y = np.zeros(1, dtype=np.int32)
    interpret(refusing_kernel, (0, 1, 1), {"y": y, "WIDTH": 9})
    assert y[0] == 0


# The language


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", ["gelu", "relu", "identity"])
def test_what_kernels_use_of_the_language(name, with_bias):
    rng = np.random.default_rng(11)
    x = rng.standard_normal(8).astype(np.float32)
    bias = rng.standard_normal(8).astype(np.float32) if with_bias else None
    y, counter = np.zeros((2, 3, 8), dtype=np.float32), np.zeros(1, dtype=np.int32)
    call = {"x": x, "bias": bias, "lo": 1, "hi": 4, "n": 5, "counter": counter, "y": y, "STEPS": 3, "NAME": name}
    interpret(language_kernel, (2, 2, 3), call)
    v = x.astype(np.float64) + (bias if with_bias else 0)
    erf = np.vectorize(math.erf)
    activated = {"gelu": v * (1 + erf(v / math.sqrt(2))) / 2, "relu": np.maximum(v, 0), "identity": v}
    expected = activated[name] + erf(v) + np.exp(v) + np.exp2(v) + np.abs(v) + (1 + 2 + 3) + (0 + 1 + 2) + 3 + 5 + 3 + 3
    expected = expected + 10 * np.arange(2)[:, None, None] + 100 * np.arange(3)[None, :, None]
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert counter[0] == 12


def test_the_last_program_to_arrive_sees_the_others_work():
    partial, lock, y = (np.zeros(n, dtype=np.int32) for n in (8, 1, 1))
    interpret(last_one_kernel, (8, 1, 1), {"partial": partial, "lock": lock, "y": y, "SPLITS": 8})
    assert y[0] == 36


# The patch, and how things fail


def test_patching_twice_changes_nothing_and_names_are_restored():
    watched = (tl, tl.core, tl.math, tl.tensor)
    names = [dict(vars(owner)) for owner in watched]
    cast(np.ones(4, dtype=np.float32), BF16)
    methods, hook = dict(vars(shipped.InterpreterBuilder)), shipped._patch_lang
    test_the_last_program_to_arrive_sees_the_others_work()  # calls device functions: tl.sum
    with pytest.raises(RunError):
        interpret(refusing_kernel, ONE, {"y": np.zeros(1, dtype=np.int32), "WIDTH": 9})
    assert dict(vars(shipped.InterpreterBuilder)) == methods
    assert shipped._patch_lang is hook
    assert [dict(vars(owner)) for owner in watched] == names
    assert interpreter._memory is None


FORKED = """
import os, signal, threading
import numpy as np
from tilewright.kernels import interpreter, rmsnorm

begun, go_on, check = threading.Event(), threading.Event(), interpreter._check_access

def waiting(*args, **options):
    begun.set()
    assert go_on.wait(60)
    check(*args, **options)

watched = (interpreter.tl, interpreter.tl.core, interpreter.tl.math, interpreter.tl.tensor)
call, results = lambda: rmsnorm(np.full((1, 16), 2.0, np.float32), eps=1e-9).sum(), []
call()
names = [dict(vars(owner)) for owner in watched]
interpreter._check_access = waiting
thread = threading.Thread(target=lambda: results.append(call()))
thread.start()
begun.wait(60)
child = os.fork()
if not child:
    signal.alarm(30)  # ends a child that hangs
    interpreter._check_access = check
    assert [dict(vars(owner)) for owner in watched] == names
    assert call() == 16
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
go_on.set()
thread.join()
assert results == [16]
assert [dict(vars(owner)) for owner in watched] == names
"""


def test_a_child_forked_in_the_middle_of_a_launch_has_its_own():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", FORKED], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_a_kernel_that_raises_names_program_and_cause():
    with pytest.raises(RunError, match=r"refusing_kernel failed .* \(0, 0, 0\): AssertionError: too wide"):
        interpret(refusing_kernel, (2, 1, 1), {"y": np.zeros(1, dtype=np.int32), "WIDTH": 3})
    with pytest.raises(RunError, match="atomics on"):
        interpret(atomic_kernel, ONE, {"y": np.zeros(1, dtype=BF16)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": 1}, "unexpected keyword argument 'z'"),
        ({"x": np.zeros(4, dtype=complex)}, "x is an array of complex128"),
        ({"x": np.zeros(4, dtype=">f4")}, "x is an array of >f4"),
        ({"x": [1, 2]}, "x is a list"),
        ({"n": 2**63}, "n=9223372036854775808 does not fit"),
    ],
    ids=["unknown", "complex", "byte order", "list", "too large"],
)
def test_arguments_triton_has_no_type_for(change, message):
    call = {"x": np.zeros(4, dtype=np.float32), "n": 4, "y": np.zeros(4, dtype=np.float32), "BLOCK": 4}
    with pytest.raises(UsageError, match=message):
        interpret(cast_kernel, ONE, call | change)


def test_a_missing_argument():
    with pytest.raises(UsageError, match="cast_kernel: missing a required argument: 'n'"):
        interpret(cast_kernel, ONE, {"x": np.zeros(4), "y": np.zeros(4), "BLOCK": 4})


def test_a_function_that_was_not_interpreted():
    require_interpreter()
    with pytest.raises(UsageError, match="was defined while TRITON_INTERPRET was unset"):
        interpret(triton.runtime.JITFunction(activate.fn), ONE, {})


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("import triton", "but TRITON_INTERPRET is not set; "),
        ("import os, triton; os.environ['TRITON_INTERPRET'] = '1'", "but TRITON_INTERPRET is set too late, Triton is "),
    ],
    ids=["unset", "too late"],
)
def test_without_the_variable_one_line_says_what_to_do(before, message):
    program = f"{before}\nfrom tilewright.kernels.interpreter import require_interpreter\nrequire_interpreter()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("tilewright.tuning_db.errors.UsageError: NumPy arrays need Triton's interpreter")
    assert message in last
    assert "set TRITON_INTERPRET=1 before the first `import triton`" in last
