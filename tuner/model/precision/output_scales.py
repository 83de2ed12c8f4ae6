"""Layers that give their result quantised, so that no step between them has to do it.

Where everything that reads a value quantises it with one scale, the layer that makes it can write the integers itself:
`out_scale` is an input of the plugins. The same holds across operators that only move numbers or take the largest:
rounding to a grid is monotone and element by element, so `Quantise(MaxPool(x)) = MaxPool(Quantise(x))`, exactly. Such
operators then work on 8 bits, too. The integers are the same, but for a base of half precision: there the value is no
longer rounded to 16 bits on the way, and an element at the very middle of two integers may become the other one.

A group of such operators is taken over only if fewer elements are quantised by steps of their own afterwards, or as
many with data of a byte moved instead of more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.kernels.activations import activation_name
from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import (
    DTYPES,
    constant,
    dtype_name,
    elements,
    is_constant,
    is_fused,
    make_fused,
    op_of,
    plugin_inputs,
    plugin_settings,
    static_shape,
)
from tilewright.tuner.model.precision.steps import QUANTISE, Grid, dequantised, drop_pairs, grid_of, quantise_step
from tilewright.tuner.model.precision.zeros import LOWEST

MOVED: Mapping[str, frozenset[str]] = {
    "int8": frozenset(
        ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Concat", "Slice", "Gather")
    ),
    "fp8e4m3": frozenset(("Reshape", "Transpose", "Identity")),
}
"""Operators that commute with quantisation, by the type that ONNX's schema and ONNX Runtime have them for. (Relu
commutes as well, but is in the layer already where there is one.)"""

PRODUCERS = ("gemm", "conv2d", "rmsnorm")
"""Ops whose plugins take `out_scale`."""


class _Folding:
    def __init__(self, model: ir.Model, types: Collection[str]) -> None:
        self.types = types
        self.edit = Editor(model)
        self.graph = model.graph
        self.opset = model.opset_imports[""]
        self.biases: set[ir.Value] = set()
        self._wanted: dict[ir.Value, Grid | None] = {}

    def _step_to(self, node: ir.Node) -> Grid | None:
        """The grid of a quantise step that layers, and operators on integers, can give; None of any other node."""
        grid = grid_of(node) if node.op_type == QUANTISE else None
        return grid if grid is not None and grid.dtype in MOVED and grid.dtype in self.types else None

    def wanted(self, value: ir.Value) -> Grid | None:
        """The one grid on which everything that reads a value wants it, if there is one."""
        if value not in self._wanted:
            grids: set[Grid | None] = set()
            if value.is_graph_output() or dtype_name(value) != "fp32":
                grids.add(None)
            for node, index in value.uses():
                grids.add(self._through(node, index))
            self._wanted[value] = grids.pop() if len(grids) == 1 else None
        return self._wanted[value]

    def _through(self, node: ir.Node, index: int) -> Grid | None:
        """The grid on which a node wants an input."""
        if node.graph is not self.graph:
            return None
        if node.op_type == QUANTISE:
            return self._step_to(node) if index == 0 else None
        if node.domain != "" or len(node.outputs) != 1 or (index > 0 and node.op_type != "Concat"):
            return None
        grid = self.wanted(node.outputs[0])
        return grid if grid is not None and node.op_type in MOVED[grid.dtype] else None

    def look(self) -> None:
        """Finds the grids of all values anew, from the end on: asked from the start `wanted` would call itself once for
        each operator of a chain."""
        self._wanted.clear()
        for node in reversed(list(self.graph)):
            for value in node.outputs:
                self.wanted(value)

    def movers(self) -> list[list[ir.Node]]:
        """Operators whose result is wanted on a grid, in groups of those that share values, each in the graph's
        order."""
        self.look()
        nodes = [node for node in self.graph if len(node.outputs) == 1 and self._moves(node)]
        group = {node: node for node in nodes}

        def find(node: ir.Node) -> ir.Node:
            while group[node] is not node:
                node = group[node]
            return node

        first: dict[tuple[ir.Value, Grid | None], ir.Node] = {}
        for node in nodes:
            grid = self.wanted(node.outputs[0])
            for value in (*data_of(node), node.outputs[0]):
                other = first.setdefault((value, grid), node)
                group[find(node)] = find(other)
        groups: dict[ir.Node, list[ir.Node]] = {}
        for node in nodes:
            groups.setdefault(find(node), []).append(node)
        return list(groups.values())

    def _moves(self, node: ir.Node) -> bool:
        grid = self.wanted(node.outputs[0]) if node.domain == "" else None
        return grid is not None and node.op_type in MOVED[grid.dtype]

    def pays(self, group: list[ir.Node]) -> bool:
        """Whether fewer elements are quantised by steps of their own when a group works on integers."""
        inner = {node.outputs[0] for node in group}
        before = sum(elements(value) or 0 for value in inner if any(self._step_to(node) for node, _ in value.uses()))
        after = 0
        for value in {value for node in group for value in data_of(node)} - inner:
            grid = self.wanted(group[0].outputs[0])
            shared = any(self._step_to(node) == grid for node, _ in value.uses())
            if not self.folds(value, grid) and not shared:
                after += elements(value) or 0
        return after < before or (after == before and any(node.op_type not in _FREE for node in group))

    def folds(self, value: ir.Value, grid: Grid | None) -> bool:
        """Whether what makes a value can give it on the grid: a layer, or a step that has it from there."""
        node, known = value.producer(), dequantised(value)
        if known is not None and known[1] == grid:
            return True
        if grid is None or node is None or not is_fused(node) or self.wanted(value) != grid:
            return False
        if op_of(node) not in PRODUCERS or "out_scale" in plugin_inputs(node):
            return False
        return grid.zero == 0 or _can_shift_to(node, grid)

    def take_over(self, group: list[ir.Node]) -> None:
        """Lets the operators of a group work on integers."""
        grid = self.wanted(group[0].outputs[0])
        assert grid is not None
        inner = {node.outputs[0] for node in group}
        for node in group:
            for index, value in enumerate(node.inputs):
                if value in data_of(node) and value not in inner:
                    assert value is not None
                    node.replace_input_with(index, self._on_grid(value, grid))
        for node in group:
            out = node.outputs[0]
            out.type = ir.TensorType(DTYPES[grid.dtype])  # a new one: values may share theirs
            self._drop_steps(out)

    def _on_grid(self, value: ir.Value, grid: Grid) -> ir.Value:
        """The integers of a value: those that it was made of, of a step that is there already, or of a new one; layers
        are folded later."""
        known = dequantised(value)
        if known is not None and known[1] == grid:
            return known[0]
        for node, index in value.uses():
            if index == 0 and self._step_to(node) == grid:
                return node.outputs[0]
        return quantise_step(self.edit, value, grid, self.opset).outputs[0]

    def _drop_steps(self, value: ir.Value) -> None:
        """Removes the steps that quantise a value, which is on their grid now."""
        for node in {node for node, _ in value.uses() if node.op_type == QUANTISE and node.domain == ""}:
            node.outputs[0].replace_all_uses_with(value)
            self.graph.remove(node, safe=True)

    def fold(self, node: ir.Node) -> None:
        """Lets a layer give its result on the grid that all its readers want, if they want one."""
        out = node.outputs[0]
        steps = {user for user, _ in out.uses()}
        grids = {self._step_to(user) for user in steps}
        if not steps or len(grids) != 1 or None in grids or out.is_graph_output():
            return
        grid = grids.pop()
        assert grid is not None
        if not self.folds(out, grid):
            return
        scale = self.edit.constant(_fp32(grid.scale), f"{node.name}_out_scale")
        settings = {**plugin_settings(node), "out_dtype": grid.dtype}
        inputs = {**plugin_inputs(node), "out_scale": scale}
        if grid.zero:
            # Behind ReLU -128 stands for 0, and what is below becomes that: saturation is the ReLU.
            settings["activation"] = "none"
            own = constant(inputs.get("bias"))
            shape = static_shape(out) or ()
            channels = shape[1 if op_of(node) == "conv2d" else -1]
            base = np.zeros(channels) if own is None else own.astype(np.float64)
            moved = (base + grid.zero * np.float64(grid.scale)).astype(np.float32)
            inputs["bias"] = self.edit.constant(moved, f"{node.name}_bias")
            self.biases.add(inputs["bias"])
        outputs = [ir.Value() for _ in node.outputs]
        fused = make_fused(op_of(node), inputs, settings, name=node.name or "", outputs=outputs)
        fused.metadata_props.update(node.metadata_props)
        fused.outputs[0].type = ir.TensorType(DTYPES[grid.dtype])
        self.edit.replace(node, fused)
        self._drop_steps(fused.outputs[0])


_FREE = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"))
"""Operators that cost nothing, whatever the data type."""


def data_of(node: ir.Node) -> tuple[ir.Value, ...]:
    """The inputs of a moving operator whose numbers it moves."""
    given = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return tuple(value for value in given if value is not None)


def _fp32(number: float) -> np.ndarray[Any, Any]:
    return np.asarray(number, np.float32)


def _layers(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in list(graph):
        if is_fused(node) and op_of(node) in PRODUCERS:
            yield node


def shiftable(node: ir.Node, scale: float) -> bool:
    """Whether a layer can give its result shifted by 128 steps of a scale: behind ReLU, or a clamp that ends where the
    integers do, with nothing added to that, and with a constant bias or none."""
    settings = plugin_settings(node)
    if "activation" not in settings:
        return False  # a norm
    word, *parameters = activation_name(settings["activation"]).split(":")
    cut = word == "clamp" and float(parameters[0]) == 0 and float(parameters[1]) >= 255 * scale * (1 - 2.0**-20)
    if settings.get("gated", "none") != "none" or settings.get("residual_last", 0) or not (word == "relu" or cut):
        return False
    return can_shift(node)


def can_shift(node: ir.Node) -> bool:
    """Whether a layer has, or can be given, a constant bias for each output channel."""
    bias = plugin_inputs(node).get("bias")
    return bias is None or (is_constant(bias) and len(bias.shape or ()) == 1)


def _can_shift_to(node: ir.Node, grid: Grid) -> bool:
    """Whether a layer can give its result on a grid with a zero point: nothing but a bias comes before rounding."""
    if grid.zero == LOWEST and shiftable(node, grid.scale):
        return True
    settings = plugin_settings(node)
    plain = settings.get("activation") == "none" and settings.get("gated", "none") == "none"
    return plain and can_shift(node)


def fold_output_scales(model: ir.Model, types: Collection[str] = tuple(MOVED)) -> set[ir.Value]:
    """Takes quantise steps to data types into the layers before them, in place. Values that are quantised must be fp32.

    Gives the biases that have a shift in them now, which half precision would round too coarsely.
    """
    drop_pairs(model)
    folding = _Folding(model, types)
    for group in folding.movers():
        if folding.pays(group):
            folding.take_over(group)
    folding.look()
    for node in _layers(model.graph):
        folding.fold(node)
    folding.edit.tidy()
    return folding.biases
