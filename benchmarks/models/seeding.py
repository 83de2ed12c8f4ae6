"""Numbers for a model's parameters that make an error in any layer visible at its outputs.

Careless ones hide errors. Weights drawn at random with the statistics of another network make activations that are
the same for every input (a cosine of 0.9998 between the logits of different images was seen), and a convolution of
zeros then passes any comparison. Here

- weights are normal with variance 2 / fan-in (K. He et al., "Delving deep into rectifiers", 2015);
- the mean and variance of every BatchNormalization are those of its input, over structured samples;
- where there is none, the weights of a layer are scaled so that its output has a given standard deviation over the
  samples (D. Mishkin, J. Matas, "All you need is a good init", 2016), in convolutional networks channel by channel
  and with a bias that takes the mean away (T. Salimans, D. P. Kingma, "Weight normalization", 2016, section 3);
- convolutions are tuned to their inputs a little (`TUNED`), so that rounding errors fade as in trained networks.

A layer is settled before the next one sees its output, so one pass over the graph is enough.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from benchmarks.models.operators import Array, Feed, Operators, Samples, shape_of, walk
from benchmarks.models.parameters import Kind, Parameter

SAMPLES = 16
"""Inputs that statistics are taken over: the mean of a fully connected layer's output has a sampling error of 1/4
standard deviation then, that of a convolution less."""

OUTLIER = 8.0
"""Size of a large channel of a gain. Trained transformers have a few channels whose activations are many times as large
as the rest (T. Dettmers et al., "LLM.int8()", 2022; G. Xiao et al., "SmoothQuant", 2023)."""

TUNED = 5.0
LARGEST_SHARE = 0.3
"""Share of a filter's variance that is the difference between two places of its input: TUNED over the filter's inputs,
at most LARGEST_SHARE. Filters drawn blindly pass rounding noise on as loudly as the signal, and a Relu makes it louder
against the signal, its power by a quarter where inputs have unit variance and mean 0.5. In ResNet-50 fp16's was 0.9 %
of the logits, RMS, against 0.24 % now. Filters of trained networks answer to what their inputs have; so do these, a
little. A share of 5 % for all left most models' logits one or two directions to vary in."""

SMALLEST_GAIN = 0.1
SMALLEST_STD = 1e-3
"""A channel that varies less is left unscaled rather than made of noise."""


def seed_parameters(
    model: ir.Model, parameters: Mapping[str, Parameter], feeds: Sequence[Feed], seed: int
) -> dict[str, Array]:
    """Gives every initializer that `parameters` doesn't call constant its data, in place; returns them by name."""
    seeder = Seeder(model, parameters, seed)
    walk(model, feeds, seeder)
    return seeder.arrays


def put_parameters(model: ir.Model, arrays: Mapping[str, Array]) -> None:
    """Gives initializers their data."""
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)


def generator(seed: int, name: str) -> np.random.Generator:
    """Of one parameter: the order in which they are drawn doesn't matter."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


class Seeder:
    """A step of `walk` that settles the parameters of a node when its inputs are known."""

    def __init__(self, model: ir.Model, parameters: Mapping[str, Parameter], seed: int) -> None:
        self.arrays: dict[str, Array] = {}
        self._parameters = parameters
        self._operators = Operators(model.graph.opset_imports)
        self._seed = seed
        for value in model.graph.initializers.values():
            parameter = parameters[value.name or ""]
            if parameter.kind is not Kind.CONSTANT:
                self._put(value, draw(parameter, shape_of(value), generator(seed, value.name or "")))

    def _put(self, value: ir.Value, array: Array) -> None:
        self.arrays[value.name or ""] = array
        value.const_value = ir.Tensor(array, name=value.name)

    def __call__(self, node: ir.Node, inputs: list[Samples | None]) -> list[Samples]:
        """The node's outputs with its parameters settled."""
        if node.op_type == "BatchNormalization":
            inputs = [*inputs[:3], *self._statistics(node, inputs[0] or [])]
        elif node.op_type in ("Conv", "Gemm", "MatMul") and (weight := origin(node.inputs[1])) is not None:
            parameter = self._parameters.get(weight.name or "")
            if parameter is not None and parameter.tuned:
                self._tune(node, inputs[0] or [], weight)
            if parameter is not None and parameter.kind is Kind.WEIGHT:
                return [self._scaled(node, inputs, weight, parameter)]
        return self._operators(node, inputs)

    def _tune(self, node: ir.Node, samples: Samples, weight: ir.Value) -> None:
        """Adds to each filter of a convolution the difference between two random places of its input."""
        array = self.arrays[weight.name or ""]
        outputs, channels, *window = array.shape
        groups = node.attributes.get_int("group", 1)
        share = min(TUNED / (channels * math.prod(window)), LARGEST_SHARE)
        random = generator(self._seed, f"{weight.name}/places")
        last = [length - tap for length, tap in zip(samples[0].shape[2:], window, strict=True)]
        if min(last) < 0:
            return  # the window is larger than its input
        for index in range(outputs):
            first = index * groups // outputs * channels
            patches = []
            for _ in range(2):
                sample, y, x = random.integers([len(samples), last[0] + 1, last[1] + 1])
                patches.append(samples[sample][0, first : first + channels, y : y + window[0], x : x + window[1]])
            difference = patches[0] - patches[1]
            norm = np.linalg.norm(difference)
            if norm > SMALLEST_STD:
                array[index] *= np.float32(math.sqrt(1 - share))
                array[index] += np.float32(math.sqrt(2 * share) / norm) * difference

    def _statistics(self, node: ir.Node, samples: Samples) -> list[Samples]:
        """Sets the mean and variance of a BatchNormalization to those of its input."""
        settled: list[Samples] = []
        for value, array in zip(node.inputs[3:5], moments(samples, axis=1), strict=True):
            assert value is not None
            array = array.astype(np.float32)
            self._put(value, array)
            settled.append([array])
        return settled

    def _scaled(self, node: ir.Node, inputs: list[Samples | None], weight: ir.Value, parameter: Parameter) -> Samples:
        """The output of a layer whose weights, and bias, are set to bring it to where it should be."""
        array = self.arrays[weight.name or ""]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        shift = None if bias is None else self.arrays[bias.name or ""]
        outputs = self._operators(node, inputs if shift is None else [*inputs[:2], [np.zeros_like(shift)]])[0]
        mean, variance = moments(outputs, axis=1 if parameter.channels else None)
        random = generator(self._seed, f"{weight.name}/std")
        wanted = parameter.std * spread(random, mean.size, parameter.spread).reshape(mean.shape)
        scale = (wanted / np.maximum(np.sqrt(variance), SMALLEST_STD)).astype(np.float32)
        array *= along(scale, parameter.axis, array.ndim)
        if shift is None:
            return [along(scale, 1, output.ndim) * output for output in outputs]
        if parameter.channels:
            shift -= (scale * mean).astype(np.float32)
        return [along(scale, 1, output.ndim) * output + along(shift, 1, output.ndim) for output in outputs]


def along(array: Array, axis: int, ndim: int) -> Array:
    """A vector laid along one of `ndim` axes; a single number as it is."""
    return array.reshape([-1 if index == axis else 1 for index in range(ndim)]) if array.ndim else array


def origin(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a weight is, or is a Reshape or Transpose of; None if it is an activation."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Reshape", "Transpose"):
            return None
        value = node.inputs[0]
    return value if value is not None and value.is_initializer() else None


def moments(samples: Samples, axis: int | None = None) -> tuple[Array, Array]:
    """Mean and variance in fp64 over all samples and all axes but one."""
    kept = samples[0].ndim + 1 if axis is None else axis
    axes = tuple(index for index in range(samples[0].ndim) if index != kept)
    means = np.stack([sample.mean(axes, dtype=np.float64) for sample in samples])
    squares = np.stack([sample.var(axes, dtype=np.float64) for sample in samples])
    # Samples are of one size: the variance is that within a sample and that between them.
    return np.asarray(means.mean(0)), np.asarray(squares.mean(0) + means.var(0))


def draw(parameter: Parameter, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """The first numbers of a parameter, fp32; statistics and scales come with the data."""
    if parameter.kind in (Kind.WEIGHT, Kind.NORMED):
        array = random.standard_normal(shape, np.float32)
        array *= np.float32(math.sqrt(2 * shape[parameter.axis] / array.size))
        return array
    if parameter.kind is Kind.GAIN:
        gains = parameter.mean * spread(random, math.prod(shape), parameter.std / parameter.mean)
        large = max(1, round(parameter.outliers * gains.size)) if parameter.outliers else 0
        gains[random.choice(gains.size, large, replace=False)] *= OUTLIER
        return gains.reshape(shape).astype(np.float32)
    if parameter.kind is Kind.MEAN:
        return np.zeros(shape, np.float32)
    if parameter.kind is Kind.VARIANCE:
        return np.ones(shape, np.float32)
    return (parameter.mean + parameter.std * random.standard_normal(shape, np.float32)).astype(np.float32)


def spread(random: np.random.Generator, count: int, std: float) -> Array:
    """Factors around 1."""
    return np.maximum(1 + std * random.standard_normal(count), SMALLEST_GAIN)
