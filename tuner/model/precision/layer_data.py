"""What a layer multiplies: rows of its input as its matrix product sees them, and its weights as a matrix.

A convolution is a matrix product of patches, C/groups·R·S numbers for each output pixel, in every group of channels. So
both ops have the same form here: rows (groups, count, depth) and weights (groups, channels of a group, depth).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.graph import DTYPES, constant, op_of, plugin_inputs, plugin_settings, static_shape
from tilewright.tuner.model.precision.quantise import ACTIVATIONS, LARGEST, QUANTISED, WEIGHTS, LayerPrecision, depth_of

Array = np.ndarray[Any, Any]


def activation_of(node: ir.Node) -> ir.Value:
    """The activation of a layer that has weights."""
    return plugin_inputs(node)[ACTIVATIONS[op_of(node)][0]]


def rounded(x: Array, scale: float, kind: str, zero: int = 0) -> Array:
    """scale · Q(x / scale) in fp32: what a quantised layer computes with instead of x. `zero` is the integer that 0
    becomes."""
    over = x.astype(np.float32) / np.float32(scale)
    if kind == "int8":
        return np.asarray(np.clip(np.rint(over), -128 - zero, 127 - zero) * np.float32(scale))
    bound = LARGEST[kind]
    return np.asarray(np.clip(over, -bound, bound).astype(DTYPES[QUANTISED[kind]].numpy()).astype(np.float32)) * scale


def layer_input(x: Array, op: str, precision: LayerPrecision) -> Array:
    """What a layer of a plan computes with instead of x."""
    name = ACTIVATIONS[op][0]
    return rounded(x, precision.scales[name], precision.kind, precision.zeros.get(name, 0))


class LayerData:
    """How the input of one layer becomes rows, and its weights a matrix."""

    def __init__(self, node: ir.Node) -> None:
        self.op = op_of(node)
        self.settings = plugin_settings(node)
        self.weight = plugin_inputs(node)[WEIGHTS[self.op]]
        shape = static_shape(self.weight)
        assert shape is not None
        self.shape = shape
        self.depth = depth_of(node)
        self.groups = self.settings["groups"] if self.op == "conv2d" else 1

    @property
    def is_matrix(self) -> bool:
        """Whether the weights are one matrix, or one for each group, and not one for each place of a batch."""
        return self.op == "conv2d" or all(length == 1 for length in self.shape[:-2])

    @property
    def channels(self) -> int:
        """Output channels, of all groups."""
        if self.op == "conv2d":
            return self.shape[0]
        return self.shape[-2 if self.settings["trans_b"] else -1]

    def matrix(self, weights: Array | None = None) -> Array:
        """The weights, or others of their shape, as (groups, channels of a group, depth)."""
        array = constant(self.weight) if weights is None else weights
        assert array is not None
        if self.op == "conv2d":
            return array.reshape(self.groups, -1, self.depth)
        flat = array.reshape(array.shape[-2:])
        return (flat if self.settings["trans_b"] else flat.T)[None]

    def weights(self, matrix: Array) -> Array:
        """The weights that a matrix is of: the reverse of `matrix`."""
        if self.op == "gemm" and not self.settings["trans_b"]:
            matrix = matrix[0].T
        return np.ascontiguousarray(matrix).reshape(self.shape)

    def rows(self, x: Array, count: int, random: np.random.Generator) -> Array:
        """`count` rows of an input, or all if it has no more, as (groups, rows, depth)."""
        if self.op == "gemm":
            flat = (x.swapaxes(-1, -2) if self.settings["trans_a"] else x).reshape(-1, self.depth)
            if len(flat) > count:
                flat = flat[random.choice(len(flat), count, replace=False)]
            return flat[None]
        return self._patches(x, count, random)

    def mean_row(self, x: Array) -> Array:
        """The mean of all rows of an input, (groups, depth), in float64."""
        if self.op == "gemm":
            flat = (x.swapaxes(-1, -2) if self.settings["trans_a"] else x).reshape(-1, self.depth)
            return np.asarray(flat.mean(axis=0, dtype=np.float64)[None])
        x, (rows, columns) = self._padded(x)
        settings, (_, _, taps_h, taps_w) = self.settings, self.shape
        result = np.empty((x.shape[1], taps_h, taps_w))
        for r in range(taps_h):
            top = r * settings["dilation_h"]
            of_rows = x[:, :, top : top + (rows - 1) * settings["stride_h"] + 1 : settings["stride_h"]].mean(
                axis=(0, 2), dtype=np.float64
            )
            for s in range(taps_w):
                left = s * settings["dilation_w"]
                end = left + (columns - 1) * settings["stride_w"] + 1
                result[:, r, s] = of_rows[:, left : end : settings["stride_w"]].mean(axis=1)
        return result.reshape(self.groups, self.depth)

    def _padded(self, x: Array) -> tuple[Array, tuple[int, int]]:
        """An input with its padding, and how many rows and columns of output pixels it makes."""
        settings = self.settings
        pads = [(settings[f"pad_{one}"], settings[f"pad_{two}"]) for one, two in (("top", "bottom"), ("left", "right"))]
        x = np.pad(x, ((0, 0), (0, 0), *pads))
        rows, columns = (
            (size - (taps - 1) * settings[f"dilation_{axis}"] - 1) // settings[f"stride_{axis}"] + 1
            for size, taps, axis in ((x.shape[2], self.shape[2], "h"), (x.shape[3], self.shape[3], "w"))
        )
        return x, (rows, columns)

    def _patches(self, x: Array, count: int, random: np.random.Generator) -> Array:
        settings = self.settings
        x, (rows, columns) = self._padded(x)
        images = len(x)
        total = images * rows * columns
        chosen = random.choice(total, count, replace=False) if total > count else np.arange(total)
        image, row, column = np.unravel_index(chosen, (images, rows, columns))
        r = (row * settings["stride_h"])[:, None] + np.arange(self.shape[2]) * settings["dilation_h"]
        s = (column * settings["stride_w"])[:, None] + np.arange(self.shape[3]) * settings["dilation_w"]
        # (count, R, S, C): indices in front of and behind the slice, so the channels come last
        patches = x[image[:, None, None], :, r[:, :, None], s[:, None, :]]
        patches = patches.transpose(0, 3, 1, 2).reshape(len(chosen), self.groups, self.depth)
        return np.ascontiguousarray(patches.transpose(1, 0, 2))
