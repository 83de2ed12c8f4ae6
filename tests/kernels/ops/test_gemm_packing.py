"""Packed int4: that it comes back, where each weight is, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tilewright.kernels.ops.gemm.packing import RUN, pack_int4, packed_rows, unpack_int4
from tilewright.tuning_db.errors import ProblemError

SHAPES = st.tuples(st.integers(1, 100), st.integers(1, 9)) | st.tuples(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 5)
)


@settings(deadline=None)
@given(arrays(st.sampled_from([np.uint8, np.int8, np.int64]), SHAPES, elements=st.integers(0, 15)))
def test_what_is_packed_comes_back(q):
    packed = pack_int4(q)
    assert packed.dtype == np.uint8
    assert packed.shape == (*q.shape[:-2], packed_rows(q.shape[-2]), q.shape[-1])
    assert packed.swapaxes(-1, -2).flags.c_contiguous  # its columns are
    np.testing.assert_array_equal(unpack_int4(packed, q.shape[-2]), q)
    np.testing.assert_array_equal(unpack_int4(np.ascontiguousarray(packed), q.shape[-2]), q)


def test_where_each_weight_is():
    for k in range(3 * RUN):
        q = np.zeros((3 * RUN, 1), np.uint8)
        q[k] = 11
        packed = pack_int4(q)[:, 0]
        run, within = divmod(k, 32)
        expected = np.zeros(48, np.uint8)
        expected[16 * run + within % 16] = 11 if within < 16 else 11 << 4
        np.testing.assert_array_equal(packed, expected)


def test_what_fills_the_last_run_stands_for_nothing():
    # 8, the zero point where there is none: NaN there would spoil sums, other weights would only be masked.
    assert (pack_int4(np.zeros((1, 2), int)) == np.array([[0x80]] + [[0x88]] * 15)).all()


def test_rows_of_bytes():
    assert [packed_rows(k) for k in (1, 31, 32, 33, 64, 4096)] == [16, 16, 16, 32, 32, 2048]


def test_a_view_is_packed_as_its_copy():
    q = np.random.default_rng(0).integers(0, 16, (40, 64))
    np.testing.assert_array_equal(pack_int4(q.T), pack_int4(np.ascontiguousarray(q.T)))
    np.testing.assert_array_equal(pack_int4(q[::2, 1:40:3]), pack_int4(q[::2, 1:40:3].copy()))


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (np.full((4, 4), 16), "q has values from 16 to 16, and int4 is 0 to 15: signed weights are packed as q + 8"),
        (np.array([[-8, 7]]), "q has values from -8 to 7"),
        (np.ones((4, 4), ml_dtypes.uint4), "q is (4, 4) of uint4 and must be (..., K, N) of integers"),
        (np.ma.ones((4, 4), int), "q is MaskedArray and must be an array of NumPy"),
        (np.ones((4, 4), np.float32), "q is (4, 4) of float32 and must be (..., K, N) of integers"),
        (np.ones(4, int), "q is (4,) of int64 and must be"),
        (np.ones((0, 4), int), "q is (0, 4) of int64 and must be"),
        ([[1]], "q is list and must be an array of NumPy, CuPy or torch"),
    ],
    ids=str,
)
def test_what_is_no_int4_is_refused(q, message):
    with pytest.raises(ProblemError) as raised:
        pack_int4(q)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "packed", [np.ones((32, 4), np.uint8), np.ones((16, 4), np.int8), np.ones(16, np.uint8)], ids=str
)
def test_what_is_not_packed_is_refused(packed):
    with pytest.raises(ProblemError, match=r"k=20 rows are uint8 \(..., 16, N\)"):
        unpack_int4(packed, 20)


@pytest.mark.parametrize("k", [32.0, True, "32", 0, -5])
def test_rows_are_an_integer(k):
    with pytest.raises(ProblemError, match=r"^k=.* must be an integer of at least 1: the rows that were packed"):
        unpack_int4(np.ones((16, 4), np.uint8), k)
