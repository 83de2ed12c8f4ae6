"""Indices of random data stay within the tables that they look up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from tilewright.tuner.model.calibration.data import load_data
from tilewright.tuner.model.calibration.random_data import index_bound
from tilewright.tuner.model.session import run
from tilewright.tuning_db.errors import ModelError


def model(*nodes: tuple[str, list[str], dict[str, object]], **tables: np.ndarray) -> ir.Model:
    """A model of int64 ids of shape (2, 6); each node's output is named by its place."""
    made = [
        helper.make_node(kind, given, [f"v{number}"], **attributes)
        for number, (kind, given, attributes) in enumerate(nodes)
    ]
    graph = helper.make_graph(
        made,
        "lookups",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [2, 6])],
        [helper.make_empty_tensor_value_info(made[-1].output[0])],
        [numpy_helper.from_array(array, name) for name, array in tables.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def table(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


CASES = {
    "gather": (model(("Gather", ["t", "ids"], {}), t=table(11, 3)), 11),
    "another axis": (model(("Gather", ["t", "ids"], {"axis": 1}), t=table(11, 3)), 3),
    "the shorter of two": (
        model(("Gather", ["t", "ids"], {}), ("Gather", ["u", "ids"], {}), t=table(11, 3), u=table(7, 3)),
        7,
    ),
    "through casts and shapes": (
        model(
            ("Cast", ["ids"], {"to": TensorProto.INT32}),
            ("Reshape", ["v0", "flat"], {}),
            ("Concat", ["v1", "v1"], {"axis": 0}),
            ("Gather", ["t", "v2"], {}),
            flat=np.array([-1]),
            t=table(5, 3),
        ),
        5,
    ),
    "positions that begin at 2": (
        model(("Add", ["two", "ids"], {}), ("Gather", ["t", "v0"], {}), two=np.array(2), t=table(12, 3)),
        10,
    ),
    "one-hot": (
        model(("OneHot", ["ids", "depth", "ends"], {}), depth=np.array([9]), ends=np.array([0, 1], np.float32)),
        9,
    ),
    "a mask": (model(("Cast", ["ids"], {"to": TensorProto.FLOAT})), None),
    "what is added and is no number": (
        model(("Cast", ["ids"], {"to": TensorProto.FLOAT}), ("Add", ["v0", "low"], {}), low=np.float32([-np.inf])),
        None,
    ),
    "what is looked up in": (
        model(("Gather", ["ids", "last"], {"axis": 1}), ("Gather", ["t", "v0"], {}), last=np.array([5]), t=table(4, 3)),
        4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bounds(case: str) -> None:
    given, bound = CASES[case]
    assert index_bound(given.graph.inputs[0]) == bound
    samples = load_data("random", given, count=20)
    ids = np.stack([feed["ids"] for feed in samples.feeds])
    if bound is None:
        assert (ids == 1).all()
    else:
        assert set(ids.flat) == set(range(bound))
    # None is refused: ONNX Runtime looks at every index.
    assert len(list(run(given, samples.feeds))) == 20


def test_a_table_without_entries() -> None:
    empty = model(("Gather", ["t", "ids"], {}), t=table(0, 3))
    with pytest.raises(ModelError, match="input 'ids' is an index into a table of no entries"):
        load_data("random", empty, count=1)


def test_a_one_hot_without_a_depth_bounds_nothing() -> None:
    odd = model(("OneHot", ["ids", "depth", "ends"], {}), depth=np.zeros(0, np.int64), ends=np.float32([0, 1]))
    assert index_bound(odd.graph.inputs[0]) is None


def test_operators_of_other_domains_are_not_followed() -> None:
    odd = model(("Add", ["ids", "one", "one"], {"domain": "own"}), one=np.array(1))
    assert index_bound(odd.graph.inputs[0]) is None
