"""Whose fault it is that what was made of a model can't be compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import onnx_ir as ir
import pytest
from onnx import TensorProto

from tests.tuner.model.files import node, proto, value
from tests.tuner.model.graphs import normal
from tilewright.tuner.model.verify.judge import Judge
from tilewright.tuning_db.errors import ModelError, RunError

FEEDS = [{"x": normal(index, 2, 4)} for index in range(2)]


def model(*operators: str, shape: Sequence[int] | None = (2, 4), kind: int = TensorProto.FLOAT) -> ir.Model:
    """One operator after the other, from x to y, which has this shape."""
    names = ["x", *(f"v{index}" for index in range(len(operators) - 1)), "y"]
    nodes = [node(each, *ends) for each, ends in zip(operators, pairwise(names), strict=True)]
    return ir.from_proto(proto(nodes, inputs=[value("x", (2, 4))], outputs=[value("y", shape, kind)]))


def test_what_goes_together_is_compared() -> None:
    with Judge(model("Relu"), FEEDS) as judge:
        assert judge.compare(model("Neg", "Neg", "Relu")).outputs[0].exact


def test_what_was_made_is_at_fault() -> None:
    other = model("Relu")
    other.graph.outputs[0].name = "z"
    with Judge(model("Relu"), FEEDS) as judge:
        with pytest.raises(
            RunError, match=r"a defect of Tilewright: the changed model has no output 'y': .*; no model was"
        ):
            judge.compare(other)
        with pytest.raises(RunError, match=r"a defect of Tilewright: 'y' is \(2, 4\) in the original and \(4, 2\) in"):
            judge.compare(model("Relu", "Transpose", shape=(4, 2)))


def test_a_model_that_does_not_run_is_at_fault_itself() -> None:
    with (
        Judge(model("Relu"), [{"other": normal(0, 2, 4)}]) as judge,
        pytest.raises(ModelError, match=r"^model .*: its input 'x' is not fed"),
    ):
        judge.compare(model("Relu"))


@pytest.mark.parametrize(
    ("lowered", "advice"), [(True, "use --precision fp32, .*"), (False, "at no precision can it be fused")]
)
def test_a_size_that_depends_on_values_is_no_fault(lowered: bool, advice: str) -> None:
    said = rf"^'y' is \(2, \d\) in .* model, as rounding changes its size: {advice}; no model was written$"
    places = {"shape": None, "kind": TensorProto.INT64}
    with Judge(model("Relu", "NonZero", **places), FEEDS) as judge, pytest.raises(RunError, match=said):
        judge.compare(model("Neg", "Relu", "NonZero", **places), lowered=lowered)
