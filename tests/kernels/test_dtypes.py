"""Canonical data-type names against what NumPy, ml_dtypes and Triton make of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import triton.language as tl

from tilewright.kernels.dtypes import DTYPES, dtype, dtype_name, wanted_dtype
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UsageError

NAMES = ("fp16", "bf16", "fp32", "int8", "int32", "uint8", "fp8e4m3", "fp8e5m2", "int4")


def test_the_canonical_names():
    assert tuple(DTYPES) == NAMES
    assert all(dtype(name).name == name for name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "int4"])
def test_sizes_are_numpys_and_the_array_name_comes_back(name):
    numpy_dtype = np.dtype(DTYPES[name].numpy)
    assert DTYPES[name].bytes == numpy_dtype.itemsize
    assert dtype_name(numpy_dtype) == name
    assert dtype_name(np.zeros(1, numpy_dtype).dtype) == name


def test_the_largest_numbers():
    found = {name: DTYPES[name].largest for name in NAMES}
    assert (found["int8"], found["uint8"], found["int4"], found["int32"]) == (127, 255, 7, 2**31 - 1)
    assert (found["fp8e4m3"], found["fp8e5m2"], found["fp16"]) == (448, 57344, 65504)
    for name in set(NAMES) - {"int4"}:
        kind = np.dtype(DTYPES[name].numpy)
        assert float(np.array(found[name]).astype(kind)) == found[name]


@pytest.mark.parametrize(
    ("name", "triton"),
    [
        ("fp16", tl.float16),
        ("bf16", tl.bfloat16),
        ("fp32", tl.float32),
        ("fp8e4m3", tl.float8e4nv),
        ("fp8e5m2", tl.float8e5),
    ],
)
def test_triton_names_are_tritons(name, triton):
    assert DTYPES[name].triton == str(triton)
    assert DTYPES[name].bits == triton.primitive_bitwidth


def test_fp8_types_are_the_ones_without_and_with_infinity():
    assert float(ml_dtypes.finfo(DTYPES["fp8e4m3"].numpy).max) == 448
    assert float(ml_dtypes.finfo(DTYPES["fp8e5m2"].numpy).max) == 57344


def test_int4_is_half_a_byte_and_travels_packed():
    assert dtype("int4").bytes == 0.5
    assert dtype("int4").numpy is None


class Named:
    """A dtype of a library that is not here."""

    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("torch.float16", "fp16"),
        ("torch.bfloat16", "bf16"),
        ("torch.float8_e4m3fn", "fp8e4m3"),
        ("torch.float8_e5m2", "fp8e5m2"),
        ("float32", "fp32"),
        ("int8", "int8"),
    ],
)
def test_other_libraries_spellings(text, name):
    assert dtype_name(Named(text)) == name


@pytest.mark.parametrize("text", ["float64", "int64", "torch.float8_e4m3fnuz", "torch.uint16", ">f2", "bool", "object"])
def test_arrays_of_other_types_are_refused(text):
    with pytest.raises(UnsupportedError, match=f"arrays of dtype {text.removeprefix('torch.')} are not supported; use"):
        dtype_name(Named(text))


@pytest.mark.parametrize("name", ["float16", "FP16", "", None, np.float16])
def test_unknown_names_are_refused(name):
    with pytest.raises(ProblemError, match=r"^unknown dtype .*; the names are fp16, bf16, fp32, int8, int32"):
        dtype(name)


class Text(str):
    """As enumerations of texts are."""


class Odd:
    """A class that NumPy asks for its dtype."""

    dtype = property(lambda self: "odd")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, None),
        ("fp16", "fp16"),
        (Text("bf16"), "bf16"),
        (np.str_("fp16"), "fp16"),
        (np.float16, "fp16"),
        (np.dtype(ml_dtypes.bfloat16), "bf16"),
        (ml_dtypes.float8_e4m3fn, "fp8e4m3"),
    ],
)
def test_results_dtypes_are_named_or_given_as_libraries_have_them(value, name):
    found = wanted_dtype(value)
    assert found == name
    assert type(found) in (str, type(None))


@pytest.mark.parametrize("value", [5, np.float64, Odd, ["fp16"], object()])
def test_what_is_no_dtype_of_a_result(value):
    with pytest.raises(UsageError, match=r"^out_dtype=.* must be a name, as 'fp16', or a library's dtype: float16, "):
        wanted_dtype(value)
