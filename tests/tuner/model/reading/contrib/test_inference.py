"""What follows for values from the nodes between two operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from tilewright.tuner.model.reading.contrib import inference
from tilewright.tuner.model.reading.contrib.inference import Inference, constants_of, types_of

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def nodes(text: str) -> list[onnx.NodeProto]:
    return list(parser.parse_graph(f"g () => () {{ {text} }}").node)


def values(**constants: Any) -> Inference:
    types: dict[str, inference.Type] = {"x": (FLOAT, (2, 3, 4)), "part": (FLOAT, (2, None)), "rankless": (FLOAT, None)}
    held = {name: numpy_helper.from_array(np.asarray(array)) for name, array in constants.items()}  # without a name
    types |= {name: (tensor.data_type, tuple(tensor.dims)) for name, tensor in held.items()}
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return Inference(types, held, imports)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many nodes each model has that is inferred."""
    sizes = []
    infer = onnx.shape_inference.infer_shapes

    def counted(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
        sizes.append(len(model.graph.node))
        return infer(model, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", counted)
    return sizes


def test_nodes_are_looked_at_once_and_when_they_are_asked_for(models: list[int]) -> None:
    known = values()
    known.passed(nodes("a = Transpose<perm = [2, 0, 1]>(x)"))
    known.passed(nodes("b = Cast<to = 7>(a)"))
    assert known.type_of("x") == (FLOAT, (2, 3, 4))
    assert models == []
    assert known.type_of("b") == (INT64, (4, 2, 3))
    assert (known.type_of("a"), known.type_of("other")) == ((FLOAT, (4, 2, 3)), None)
    known.passed(nodes("c = Neg(a)"))
    assert known.type_of("c") == (FLOAT, (4, 2, 3))
    assert models == [2, 1]


def test_nodes_of_which_all_is_known_are_passed_over(models: list[int]) -> None:
    known = values()
    known.types["a"] = FLOAT, (2, 3, 4)
    known.passed(nodes("a = Neg(x)"))
    assert known.type_of("other") is None
    assert models == []


def test_shapes_may_follow_from_arithmetic_and_from_constants() -> None:
    known = values(zero=np.array([0]), one=np.array([1]), minus=np.array([-1]))
    known.passed(nodes("p = Neg(x)"), written=True)
    known.passed(nodes("s = Shape(p)  f = Slice(s, zero, one)  t = Concat<axis = 0>(f, minus)  r = Reshape(p, t)"))
    assert known.type_of("r") == (FLOAT, (2, 12))
    held = known.constant("t")
    assert held is not None
    assert numpy_helper.to_array(held).tolist() == [2, -1]
    # It is a constant to what comes later.
    known.passed(nodes("again = Reshape(x, t)"))
    assert known.type_of("again") == (FLOAT, (2, 12))


def test_sizes_behind_new_nodes_are_constants() -> None:
    known = values(one=np.array(1))
    known.types["s"] = INT64, (3,)  # all that inference says of it
    known.passed(nodes("p = Neg(x)"), written=True)
    known.passed(nodes("s = Shape(p)  n = Gather(s, one)"))
    held = known.constant("n")
    assert held is not None
    assert int(numpy_helper.to_array(held)) == 3
    assert known.constant("x") is None


def test_large_arrays_are_not_folded() -> None:
    known = values(shape=np.array([2000, 2000]))
    known.passed(nodes("c = ConstantOfShape(shape)  s = Shape(c)"))
    assert known.type_of("c") == (FLOAT, (2000, 2000))
    assert known.constant("c") is None


def test_what_can_not_be_inferred_is_unknown() -> None:
    """Nodes of other domains, those behind what isn't known, and those with a fault, which the whole model's tells."""
    known = values()
    known.passed(nodes("o = com.microsoft.Other(x)  n = Neg(o)  m = Neg(x)"))
    assert [known.type_of(name) for name in "onm"] == [None, None, (FLOAT, (2, 3, 4))]
    known.passed(nodes("w = And(x, x)"))
    assert known.type_of("w") is None
    known.passed(nodes("r = Neg(rankless)  p = Neg(part)"))
    assert [known.type_of(name) for name in "rp"] == [(FLOAT, None), (FLOAT, (2, None))]


def test_subgraphs_see_what_is_around_them() -> None:
    known = values()
    known.types["c"] = TensorProto.BOOL, ()
    known.passed(
        nodes(
            """y = If(c) <then_branch = t () => (float[L, M, N] a) { a = Neg(x) },
            else_branch = e () => (float[L, M, N] b) { b = Abs(x) }>"""
        )
    )
    assert known.type_of("y") == (FLOAT, (2, 3, 4))


def test_types_and_constants_of_a_graph() -> None:
    graph = parser.parse_graph(
        """g (float[2, N] x) => (float[2, N] y) <float[1] w = {2.0}>
        { c = Constant<value = int64[1] {7}>()  y = Mul(x, w) }"""
    )
    assert types_of(graph) == {"x": (FLOAT, (2, None)), "y": (FLOAT, (2, None)), "w": (FLOAT, (1,))}
    held = constants_of(graph)
    assert {name: numpy_helper.to_array(each).tolist() for name, each in held.items()} == {"w": [2.0], "c": [7]}
