from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from tests.tuner.model.files import RELU, assert_refused, node, proto, refusal, saved, tensor, value
from tilewright.tuner.model.reading.read import read_model


def declared(dims: Sequence[int], kind: int = TensorProto.FLOAT, **fields: Any) -> onnx.ModelProto:
    return proto([node("Add", "x w", "y")], tensors=[TensorProto(name="w", dims=dims, data_type=kind, **fields)])


WRONG: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "two initializers": (
        lambda: proto([node("Add", "x w", "y")], tensors=[tensor("w", [1.0]), tensor("w", [2.0])]),
        r"two initializers are called 'w'",
    ),
    "10^12 elements": (lambda: declared([10**6, 10**6]), r"tensor 'w' holds 0 numbers, but its dims .* need 10{12}"),
    "10^36 elements": (lambda: declared([10**18, 10**18], raw_data=bytes(8)), r"holds 8 bytes"),
    "negative dim": (lambda: declared([-1, 3]), r"tensor 'w' has a negative dimension: \[-1, 3\]"),
    "too many numbers": (lambda: declared([3], float_data=[1] * 4), r"holds 4 numbers, but its dims \[3\] need 3"),
    "strings": (lambda: declared([1], TensorProto.STRING, string_data=[b"a"]), r"tensor 'w' holds strings"),
    "no such type": (lambda: declared([1], 99), r"tensor 'w' has the unknown data type 99"),
    "NaN": (
        lambda: proto([node("Add", "x w", "y")], tensors=[tensor("w", np.float32([1, np.nan, np.nan]))]),
        r"tensor 'w' has 2 NaN among its 3 elements",
    ),
    "infinite": (
        lambda: proto([node("Add", "x w", "y")], tensors=[tensor("w", np.full((2000, 3), np.inf, np.float32))]),
        r"tensor 'w' has 6000 infinities among its 6000 elements",
    ),
    "NaN of bf16 in a node": (
        lambda: proto(
            [node("Constant", "", "w", value=helper.make_tensor("", TensorProto.BFLOAT16, [2], [np.nan, 1.0])), RELU]
        ),
        r"tensor 'w' has 1 NaN",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_models(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    assert_refused(make(), message, tmp_path)


def test_sparse_tensors(tmp_path: Path) -> None:
    model = proto([node("Add", "x w", "y")])
    sparse = helper.make_sparse_tensor(tensor("w", np.float32([1])), tensor("i", np.int64([0])), [3])
    model.graph.sparse_initializer.append(sparse)
    assert "tensor 'w' is sparse" in refusal(saved(model, tmp_path / "m.onnx"))
    held = proto([helper.make_node("Constant", [], ["w"], name="c", sparse_value=sparse), node("Add", "x w", "y")])
    assert "node 'c' has a sparse tensor" in refusal(saved(held, tmp_path / "m.onnx"))


@pytest.mark.parametrize("mask", [[0, -np.inf, 0], [-np.inf], [np.inf]])
def test_infinities_that_mask_are_let_through(mask: list[float], tmp_path: Path) -> None:
    read_model(saved(proto([node("Add", "x w", "y")], tensors=[tensor("w", np.float32(mask))]), tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    "kind",
    [
        "FLOAT",
        "FLOAT16",
        "BFLOAT16",
        "DOUBLE",
        "INT8",
        "UINT8",
        "INT32",
        "INT64",
        "BOOL",
        "FLOAT8E4M3FN",
        "INT4",
        "UINT4",
    ],
)
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("count", [7, 8191])
def test_weights_of_every_type(kind: str, raw: bool, count: int, tmp_path: Path) -> None:
    dtype = ir.DataType[kind]
    array = np.arange(count).reshape(1, count).astype(np.float32) % 2
    held = helper.make_tensor("w", int(dtype), [1, count], array.astype(dtype.numpy()).reshape(-1))
    if raw:
        held = ir.to_proto(ir.tensor(array.astype(dtype.numpy()), name="w", dtype=dtype))
    model = proto([node("Cast", "w", "y", to=TensorProto.FLOAT)], tensors=[held], outputs=[value("y", None)])
    path = saved(model, tmp_path / "m.onnx")
    result = read_model(path).graph.initializers["w"].const_value
    assert result is not None
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.numpy().astype(np.float32), array)
