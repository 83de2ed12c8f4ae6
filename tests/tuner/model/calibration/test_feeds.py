"""What a model is fed: numbers keep their value, and sequences of feeds are sequences."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from tilewright.tuner.model.calibration.feeds import Feed, Feeds, Input, conform, model_inputs, spread
from tilewright.tuning_db.errors import ModelError

TYPES = {
    "float": np.float32,
    "half": np.float16,
    "brain": ml_dtypes.bfloat16,
    "int": np.int64,
    "short": np.int32,
    "bool": np.bool_,
}


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        ("float", np.array([[0.1, -2.0]], np.float64), np.array([[0.1, -2.0]], np.float32)),
        ("float", np.array([[0, 255]], np.uint8), np.array([[0, 255]], np.float32)),
        ("float", np.array([[True, False]]), np.array([[1, 0]], np.float32)),
        ("half", np.array([[0.1, 6e4]], np.float32), np.array([[0.1, 6e4]], np.float16)),
        ("brain", np.array([[0.1, 3e38]], np.float32), np.array([[0.1, 3e38]], ml_dtypes.bfloat16)),
        ("brain", np.array([[0.1, 2]], ml_dtypes.bfloat16), np.array([[0.1, 2]], ml_dtypes.bfloat16)),
        ("brain", np.array([[1, 2]], ml_dtypes.bfloat16).view("V2"), np.array([[1, 2]], ml_dtypes.bfloat16)),
        ("int", np.zeros((0, 2), np.int32), np.zeros((0, 2), np.int64)),
        ("float", np.zeros((0, 2)), np.zeros((0, 2), np.float32)),
        ("int", np.array([[-5, 2**31 - 1]], np.int32), np.array([[-5, 2**31 - 1]], np.int64)),
        ("short", np.array([[-5, 2**31 - 1]], np.int64), np.array([[-5, 2**31 - 1]], np.int32)),
        ("bool", np.array([[True, False]]), np.array([[True, False]])),
    ],
)
def test_types_that_go_over_into_the_inputs(kind: str, given: np.ndarray, wanted: np.ndarray) -> None:
    got = conform(given, Input("x", (1, 2), np.dtype(TYPES[kind])), "data.npz")
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)
    assert not np.shares_memory(got, given)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("int", np.array([[1.0, 2.0]]), "'x' is float64 and must be int64"),
        ("bool", np.array([[1, 0]]), "'x' is int64 and must be bool"),
        ("short", np.array([[1, 2**31]]), "'x' is int64 and must be int32, in which there is no 2147483648"),
        ("short", np.array([[1, 2**64 - 1]], np.uint64), "in which there is no 18446744073709551615"),
        ("float", np.array([[1, 2**24 + 1]]), "'x' is int64 and must be float32, in which there is no 16777217"),
        ("half", np.array([[1, 1e5]]), r"'x' is float64 and must be float16, in which there is no 100000"),
        ("float", np.array([["a", "b"]]), "'x' is <U1 and must be float32"),
        ("float", np.array([[1j, 2]]), "'x' is complex128 and must be float32"),
        ("float", np.array([[1, np.nan]]), r"'x' has 1 NaN or infinite of 2 numbers, the first at \(0, 1\)"),
        ("half", np.array([[-np.inf, np.nan]], np.float32), r"'x' has 2 NaN or infinite of 2 numbers"),
        ("brain", np.array([[1, np.nan]], ml_dtypes.bfloat16), r"'x' has 1 NaN or infinite"),
    ],
)
def test_types_and_numbers_that_do_not_fit(kind: str, given: np.ndarray, words: str) -> None:
    with pytest.raises(ModelError, match=f"^data.npz: .*{words}"):
        conform(given, Input("x", (1, 2), np.dtype(TYPES[kind])), "data.npz")


class Numbers(Feeds):
    """Feeds that are their number."""

    def feed(self, number: int) -> Feed:
        return {"x": np.array(number)}


def test_feeds_are_a_sequence() -> None:
    feeds = Numbers(5)

    def numbers(some: object) -> list[int]:
        return [int(feed["x"]) for feed in some]  # type: ignore[attr-defined]

    assert len(feeds) == 5
    assert numbers(feeds) == [0, 1, 2, 3, 4]
    assert numbers(feeds[1:4]) == [1, 2, 3]
    assert numbers(feeds[::-2][1:]) == [2, 0]
    assert feeds[-1]["x"] == 4
    with pytest.raises(IndexError):
        feeds[5]


@pytest.mark.parametrize(("total", "count"), [(1, 1), (5, 5), (10, 3), (1000, 256), (7, 4)])
def test_spread(total: int, count: int) -> None:
    chosen = spread(total, count)
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < total
    steps = np.diff(chosen)
    assert steps.size == 0 or steps.max() - steps.min() <= 1
    assert abs(chosen[0] - (total - 1 - chosen[-1])) <= 1


def test_model_inputs() -> None:
    kinds = [ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BFLOAT16]
    values = [
        ir.Value(name=f"i{number}", type=ir.TensorType(kind), shape=ir.Shape([2, 3][:number]))
        for number, kind in enumerate(kinds)
    ]
    model = ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 21}), ir_version=10)
    assert model_inputs(model) == [
        Input("i0", (), np.dtype(np.float32)),
        Input("i1", (2,), np.dtype(np.int64)),
        Input("i2", (2, 3), np.dtype(ml_dtypes.bfloat16)),
    ]
    assert [each.batch for each in model_inputs(model)] == [1, 2, 2]
    values[1].dtype = ir.DataType.INT4
    with pytest.raises(ModelError, match="input 'i1' is int4: a model with such an input can't be run"):
        model_inputs(model)
    values[1].shape = None
    with pytest.raises(ModelError, match="input 'i1' has shape None: give its dimensions with --shape"):
        model_inputs(model)
