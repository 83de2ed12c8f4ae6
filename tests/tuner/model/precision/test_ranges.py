"""The least and largest numbers of values."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.tuner.model.graphs import model_of
from tilewright.tuner.model.calibration import calibrate
from tilewright.tuner.model.precision.ranges import extremes

node = helper.make_node


@pytest.mark.parametrize("group_bytes", [1, calibrate.GROUP_BYTES])
def test_extremes(group_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "GROUP_BYTES", group_bytes)
    nodes = [
        node("Mul", ["x", "c"], ["m"]),
        node("Log", ["x"], ["l"]),  # of 0 it is -inf, of -3 NaN
        node("Cast", ["m"], ["i"], to=TensorProto.INT32),
        node("Relu", ["l"], ["y"]),
    ]
    model = model_of(nodes, {"x": (3,)}, ["y", "m"], {"c": np.array(-2, np.float32)})
    feeds = [{"x": np.array(each, np.float32)} for each in ([0, 1, 2], [-3, 1, 2], [1, 1, 1])]
    found = extremes(model, feeds)
    assert set(found) == {"x", "m", "l", "y"}
    assert (found["x"], found["m"]) == ((-3, 2), (-4, 6))
    assert found["l"] == (0, pytest.approx(np.log(2)))


def test_sequences_have_none() -> None:
    nodes = [node("SequenceConstruct", ["x", "x"], ["s"]), node("SequenceAt", ["s", "i"], ["y"])]
    model = model_of(nodes, {"x": (3,)}, ["y"], {"i": np.array(1)})
    assert extremes(model, [{"x": np.array([1, -2, 3], np.float32)}]) == {"x": (-2, 3), "y": (-2, 3)}
