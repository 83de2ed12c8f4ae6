"""TensorRT's descriptions of tensors as cases; launch parameters are held against its own in `test_registration`."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest

from tilewright.kernels import GemmProblem
from tilewright.kernels.tensorrt.catalogue import find_plugin, plugin_attributes
from tilewright.kernels.tensorrt.descriptions import case_of, symbolic
from tilewright.kernels.tensorrt.expressions import dimension
from tilewright.tuning_db.errors import UnsupportedError

DataType = Enum("DataType", "FLOAT HALF BF16 INT8 INT32 FP8 FP4")
Format = Enum("Format", "LINEAR HWC8")
GEMM = find_plugin("FusedGemm")


class Size:
    """A dimension: known, not known, or of no consequence yet."""

    def __init__(self, value=None, fake=False):
        self.value, self.is_fake = value, fake

    @property
    def is_constant(self):
        assert not self.is_fake
        return self.value is not None

    def constant_value(self):
        return self.value


class Shape(tuple):
    min, opt, max = (1, 64), (128, 64), (4096, 64)


def described(shape, dtype=DataType.HALF):
    return SimpleNamespace(shape=Shape(shape), dtype=dtype, format=Format.LINEAR)


def test_shapes_while_they_are_worked_out():
    a = SimpleNamespace(shape_expr=[Size(), Size(64)], dtype=DataType.HALF)
    b = SimpleNamespace(shape_expr=[Size(64), Size(fake=True)], dtype=DataType.HALF)
    tensors, dims = symbolic(GEMM, [a, b])
    assert tensors["a"].dims == (dimension("a", 0), 64)
    assert tensors["b"].dims == (64, dimension("b", 1))
    assert dims["a", 0] is a.shape_expr[0]
    assert tensors["a"].dtype == "fp16"


def test_a_case_has_the_range_of_what_is_dynamic():
    found = case_of(
        GEMM, [described((-1, 64)), described((64, 32))], [described((-1, 32))], plugin_attributes("FusedGemm")
    )
    assert found.profile.max == {("a", 0): 4096}
    assert found.problem(found.profile.opt) == GemmProblem(M=128, N=32, K=64)
    assert [tensor.format for tensor in (*found.inputs, *found.outputs)] == ["LINEAR"] * 3
    formats = ["HWC8", "LINEAR", "HWC8"]
    found = case_of(
        GEMM, [described((-1, 64)), described((64, 32))], [described((-1, 32))], plugin_attributes("FusedGemm"), formats
    )
    assert [tensor.format for tensor in (*found.inputs, *found.outputs)] == formats


def test_a_dimension_that_the_profile_holds_fast_is_static():
    rows, depth = described((-1, 64)), described((-1, -1))
    depth.shape.min, depth.shape.opt, depth.shape.max = (1, 64), (128, 64), (4096, 64)
    given = plugin_attributes("FusedGemm")
    found = case_of(GEMM, [depth, described((64, 32))], [described((-1, 32))], given)
    assert found == case_of(GEMM, [rows, described((64, 32))], [described((-1, 32))], given)
    assert found.inputs[0].dims == (dimension("a", 0), 64)


def test_data_types_that_kernels_lack():
    with pytest.raises(UnsupportedError, match="a is FP4, which is not supported"):
        case_of(GEMM, [described((8, 64), DataType.FP4), described((64, 32))], [], plugin_attributes("FusedGemm"))
