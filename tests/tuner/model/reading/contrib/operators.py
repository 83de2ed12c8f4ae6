"""Models of one operator of ONNX Runtime's own, and what it, what is read of it, and what is fused of that compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper

from tests.tuner.model.graphs import relative_error, results
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import fused_nodes
from tilewright.tuner.model.reading.contrib.rewrite import DOMAIN
from tilewright.tuner.model.reading.read import LEFT, read_model

Feeds = Mapping[str, np.ndarray]


class Operator:
    """A model of one node: `given` are its inputs in their order, None for one that is left out. Those named in
    `constants` are weights, all others inputs of the model."""

    def __init__(
        self,
        operator: str,
        given: Mapping[str, np.ndarray | None],
        outputs: Sequence[str] = ("out",),
        constants: Sequence[str] = (),
        before: Sequence[onnx.NodeProto] = (),
        **attributes: Any,
    ) -> None:
        self.feeds = {
            name: array for name, array in given.items() if array is not None and name not in constants and array.size
        }
        node = helper.make_node(
            operator,
            [name if array is not None else "" for name, array in given.items()],
            list(outputs),
            name="it",
            domain=DOMAIN,
            **attributes,
        )
        made = {name for each in before for name in each.output}
        self.feeds = {name: array for name, array in self.feeds.items() if name not in made}
        kind = helper.np_dtype_to_tensor_dtype(next(array for array in given.values() if array is not None).dtype)
        graph = helper.make_graph(
            [*before, node],
            "model",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                for name, array in self.feeds.items()
            ],
            [helper.make_tensor_value_info(name, kind, None) for name in outputs if name],
            [numpy_helper.from_array(given[name], name) for name in constants],  # type: ignore[arg-type]
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        self.proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def with_feeds(self, **feeds: np.ndarray) -> Operator:
        """The same, for nodes in front of it, whose inputs these are."""
        graph = self.proto.graph
        for name, array in feeds.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
        self.feeds = {**self.feeds, **feeds}
        return self

    def read(self, folder: Path) -> ir.Model:
        """What is read of it."""
        path = folder / "operator.onnx"
        path.write_bytes(self.proto.SerializeToString())
        return read_model(path)

    def wanted(self) -> list[np.ndarray]:
        """What ONNX Runtime computes."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            self.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, dict(self.feeds)))


def held(
    operator: Operator, folder: Path, wanted: Sequence[np.ndarray] | None = None, within: float = 2e-5
) -> list[ir.Node]:
    """The fused nodes of a model; fails unless what is read, and what is fused, compute what the operator does."""
    expected = operator.wanted() if wanted is None else wanted
    model = operator.read(folder)
    assert not model.meta[LEFT]
    assert all(node.domain == "" for node in model.graph)
    compare(results(model, operator.feeds), expected, within)
    fold(model)
    fuse(model)
    compare(results(model, operator.feeds), expected, within)
    return fused_nodes(model)


def compare(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray], within: float) -> None:
    """Fails where results differ."""
    for one, other in zip(got, wanted, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert relative_error(one, other) <= within


def left(operator: Operator, folder: Path) -> str:
    """Why the operator stays as it is."""
    model = operator.read(folder)
    assert [node.op_type for node in model.graph if node.domain == DOMAIN] == [operator.proto.graph.node[-1].op_type]
    reasons: dict[str, str] = model.meta[LEFT]
    assert len(model.graph.initializers) <= len(operator.proto.graph.initializer) + 8
    return reasons["it"]
