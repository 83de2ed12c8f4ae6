"""What forms are told of the node and of the values around it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from tilewright.tuner.model.graph import Names
from tilewright.tuner.model.reading.contrib.inference import Inference, Type
from tilewright.tuner.model.reading.contrib.writer import Surroundings, UnsupportedError, Writer


def around(**more: Any) -> Surroundings:
    types: dict[str, Type] = {
        "x": (TensorProto.FLOAT16, (2, None)),
        "w": (TensorProto.FLOAT, (3, 4)),
        "unranked": (TensorProto.FLOAT, None),
    }
    weights: dict[str, ir.TensorProtocol] = {"w": ir.tensor(np.ones((3, 4), np.float32))}
    constants = {"c": numpy_helper.from_array(np.arange(3), "c")}
    values = Inference(types, constants, [helper.make_opsetid("", 21)])
    return Surroundings(values, weights, Names({"x", "w", "c", "y", "y/Add"}), 21, **more)


def writer(*inputs: str, **attributes: Any) -> Writer:
    return Writer(helper.make_node("Gelu", list(inputs), ["y", "", "z"], name="n", **attributes), around())


def test_nodes_are_named_after_the_result() -> None:
    write = writer("x", "", "w")
    first = write("Add", "x", None)
    assert (first, write("Add", first, "w")) == ("y/Add_2", "y/Add_3")
    assert [(node.name, list(node.input)) for node in write.nodes] == [("n/Add", ["x", ""]), ("n/Add", [first, "w"])]
    assert len(write("Split", "x", outputs=3, axis=None)) == 3
    assert not write.nodes[-1].attribute


def test_inputs_and_outputs_may_be_left_out() -> None:
    write = writer("x", "", "w")
    assert (write.input(0), write.optional(1), write.optional(7)) == ("x", None, None)
    assert [write.wants(place) for place in range(4)] == [True, False, True, False]
    with pytest.raises(UnsupportedError, match="its input 1 is missing"):
        write.input(1)


def test_attributes_have_their_own_types() -> None:
    write = writer("x", alpha=0.5, axes=[1, 2], activation="Relu", strange=b"\xff")
    kinds = {"alpha": float, "axes": list, "activation": str, "other": int}
    assert [write.attribute(name, None, kind) for name, kind in kinds.items()] == [0.5, [1, 2], "Relu", None]
    assert isinstance(write.attribute("strange", ""), str)


@pytest.mark.parametrize(
    ("given", "default", "message"),
    [
        ("a", 0.5, "its attribute alpha is 'a', not of the kind float"),
        (2, 0.5, "its attribute alpha is 2, not of the kind float"),
        (2.0, 1, "its attribute alpha is 2.0, not of the kind int"),
        ([1, 2], 1, "its attribute alpha is [1, 2], not of the kind int"),
        ([1, 2], "", "its attribute alpha is [1, 2], not of the kind str"),
        (["a", "b"], [], "its attribute alpha is [b'a', b'b'], not of the kind list"),
    ],
)
def test_attributes_of_another_kind(given: Any, default: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        writer("x", alpha=given).attribute("alpha", default)


def test_what_is_known_of_values() -> None:
    write = writer("x")
    assert (write.rank("x"), write.dtype("x"), write.shape("w")) == (2, ir.DataType.FLOAT16, (3, 4))
    for ask, name, message in (
        (write.shape, "x", "the shape of 'x' is not known"),
        (write.rank, "unranked", "the rank of 'unranked' is not known"),
        (write.rank, "other", "the rank of 'other' is not known"),
        (write.dtype, "other", "the data type of 'other' is not known"),
        (write.constant, "x", "'x' is not a constant"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            ask(name)
    assert write.constant("w").sum() == 12
    assert list(write.constant("c")) == [0, 1, 2]


def test_constants_and_weights() -> None:
    write = writer("x")
    like = write.number(1.5, "x")
    assert [node.op_type for node in write.nodes] == ["Constant", "CastLike"]
    assert like == "y/CastLike"
    write.integers(1, 2)
    assert list(numpy_helper.to_array(write.nodes[-1].attribute[0].t)) == [1, 2]
    name = write.weight(ir.tensor(np.zeros((5, 2), np.int8)))
    assert write.around.weights[name].shape == (5, 2)
    (added,) = write.around.added
    assert (added.name, added.type.tensor_type.elem_type) == (name, TensorProto.INT8)


def test_what_is_withdrawn_is_as_if_it_had_not_been() -> None:
    surroundings = around()
    kept = Writer(helper.make_node("Gelu", ["x"], ["k"]), surroundings)
    stays = kept.weight(ir.tensor(np.zeros(2, np.float32)))
    gone = Writer(helper.make_node("Gelu", ["x"], ["y"]), surroundings)
    gone("Add", "x", "x")
    gone.shared(np.ones(3, np.float32), "part")
    gone.withdraw()
    assert set(surroundings.weights) == {"w", stays}
    assert [value.name for value in surroundings.added] == [stays]
    assert surroundings.names.taken == {"x", "w", "c", "y", "y/Add", stays}
    with pytest.raises(UnsupportedError):
        kept.rank("part")
    # Shared again, it is made again.
    assert kept.shared(np.ones(3, np.float32), "part") in surroundings.weights


def test_weights_are_shared_by_what_is_in_them() -> None:
    """Whatever the first one of their name is."""
    write = writer("x")
    arrays = [np.arange(6, dtype=np.float32), np.ones(6, np.float32), np.ones((2, 3), np.float32), np.ones(6, np.int32)]
    first = [write.shared(array, "part") for array in arrays]
    assert first == ["part", "part_2", "part_3", "part_4"]
    assert [write.shared(array.copy(), "other") for array in arrays] == first
    assert len(write.around.added) == 4


def test_what_is_shared_is_bounded_in_all() -> None:
    surroundings = around()
    surroundings.shared.left = 100
    for round_ in range(2):  # what is withdrawn is free again
        write = Writer(helper.make_node("Gelu", ["x"], ["y"]), surroundings)
        write.shared(np.ones(15, np.float32), "mask")
        with pytest.raises(UnsupportedError, match=re.escape("'mask' has 44 bytes: of the 2147483648 for such")):
            write.shared(np.ones(11, np.float32), "mask")
        write.shared(np.ones(15, np.float32), "mask")
        assert surroundings.shared.left == 40
        if not round_:
            write.withdraw()
    assert (surroundings.shared.left, len(surroundings.added)) == (40, 1)
