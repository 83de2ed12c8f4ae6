from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.tuner.model.files import RELU, assert_refused, function, node, own, proto, refusal, saved, tensor, value
from tilewright.tuner.model.reading.read import read_model


def many(count: int) -> list[onnx.FunctionProto]:
    """Functions that each call the next one twice: 2^count nodes."""
    last = function(f"f{count}", [helper.make_node("Neg", ["a"], ["b"])])
    return [function(f"f{n}", [own(f"f{n + 1}", "a", "t"), own(f"f{n + 1}", "t", "b")]) for n in range(count)] + [last]


def called(name: str, functions: Sequence[onnx.FunctionProto]) -> onnx.ModelProto:
    return proto([own(name, "x", "y")], domains=["own"], functions=functions)


WRONG: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "cyclic": (
        lambda: proto([node("Add", "x b", "a"), node("Neg", "a", "b"), node("Relu", "b", "y")]),
        r"the graph is cyclic: node '(Add_a' → node 'Neg_b' → node 'Add_a|Neg_b' → node 'Add_a' → node 'Neg_b)'$",
    ),
    "of itself": (lambda: proto([node("Add", "x y", "y")]), r"the graph is cyclic: node 'Add_y' → node 'Add_y'"),
    "never defined": (
        lambda: proto([node("Add", "x gone", "y")]),
        r"node 'Add_y' uses the value 'gone', which is never",
    ),
    "no output": (lambda: proto([RELU], outputs=[value("z", None)]), r"the output 'z' is never defined"),
    "made twice": (lambda: proto([node("Neg", "x", "y"), RELU]), r"two values are called 'y': .* node 'Relu_y'"),
    "unknown domain": (
        lambda: proto([helper.make_node("Gizmo", ["x"], ["y"], name="g", domain="acme")], domains=["acme"]),
        r"node 'g' has operator 'Gizmo' of domain 'acme', which is neither a function .* nor known to ONNX Runtime",
    ),
    "recursive function": (lambda: called("f", [function("f", [own("f", "a", "b")])]), r"in a circle: 'f', 'f'"),
    "mutually recursive": (
        lambda: called("f", [function("f", [own("g", "a", "b")]), function("g", [own("f", "a", "b")])]),
        r"functions call each other in a circle: '[fg]', '[fg]', '[fg]'",
    ),
    "2^60 nodes": (lambda: called("f0", many(60)), r"1.15292e\+18 nodes with its functions inlined"),
    "control characters": (lambda: proto([node("Add", "x \x1b[31m\x07", "y")]), r"'\\x1b\[31m\\x07', which is never"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_models(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    assert_refused(make(), message, tmp_path)


def test_text_that_is_no_text(tmp_path: Path) -> None:
    content = proto([node("Add", "x weight", "y")], tensors=[tensor("weight", np.float32([1]))]).SerializeToString()
    for old, message in ((b"Add_y", "the field name of a NodeProto is not UTF-8"), (b"weight", "not UTF-8 text")):
        (tmp_path / "m.onnx").write_bytes(content.replace(old, b"\xff" * len(old)))
        assert message in refusal(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(content[::-1].replace(b"thgiew", b"\xff" * 6, 1)[::-1])
    assert "a tensor's name or external data is not UTF-8" in refusal(tmp_path / "m.onnx")


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    model = read_model(saved(proto([node("Neg", "e", "y"), node("Exp", "x", "e")]), tmp_path / "m.onnx"))
    assert [node.op_type for node in model.graph] == ["Exp", "Neg"]


def test_operators_of_onnx_runtime_pass(tmp_path: Path) -> None:
    gelu = helper.make_node("Gelu", ["x"], ["g"], domain="com.microsoft")
    model = read_model(saved(proto([gelu, node("Relu", "g", "y")], domains=["com.microsoft"]), tmp_path / "m.onnx"))
    assert [node.op_type for node in model.graph] == ["Gelu", "Relu"]
