"""From TensorRT's descriptions of tensors to a `Case`, and from a launch plan to TensorRT's launch parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tilewright.kernels.tensorrt.case import Case, Profile
from tilewright.kernels.tensorrt.expressions import Number, Sizes, dimension, lowered
from tilewright.kernels.tensorrt.operation import PluginVariant, Tensor
from tilewright.kernels.tensorrt.plans import LaunchPlan
from tilewright.kernels.tensorrt.types import canonical, member
from tilewright.tuning_db.errors import ProblemError


def symbolic(
    variant: PluginVariant, descriptions: Sequence[Any]
) -> tuple[dict[str, Tensor], dict[tuple[str, int], Any]]:
    """The inputs, and TensorRT's expression of each of their dimensions, while shapes are worked out: constants are
    known, if not even they are hidden yet."""
    tensors, dims = {}, {}
    for name, description in zip(variant.inputs, descriptions, strict=True):
        sizes: list[Number] = []
        for axis, expression in enumerate(description.shape_expr):
            known = not expression.is_fake and expression.is_constant
            sizes.append(int(expression.constant_value()) if known else dimension(name, axis))
            dims[name, axis] = expression
        tensors[name] = Tensor(name, tuple(sizes), canonical(description.dtype, name))
    return tensors, dims


def described_outputs(
    variant: PluginVariant, descriptions: Sequence[Any], attributes: Mapping[str, Any], tensorrt: Any, plugin: Any
) -> tuple[Any, ...]:
    """The outputs' `TensorDesc`s.

    Raises:
        ProblemError, UsageError: ranks, dtypes or attributes that can't be.
    """
    tensors, dims = symbolic(variant, descriptions)
    return tuple(
        plugin.from_shape_expr(tuple(lowered(dim, dims, plugin) for dim in tensor.dims), member(tensorrt, tensor.dtype))
        for tensor in variant.operation.outputs(tensors, attributes)
    )


def case_of(
    variant: PluginVariant,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    attributes: Mapping[str, Any],
    formats: Sequence[str] | None = None,
) -> Case:
    """The case of descriptions with shapes; `formats` are those to take instead of their own.

    Raises:
        ProblemError, UsageError, UnsupportedError: they make none.
    """
    network = []  # as `described_outputs` saw them, before there was a profile
    ranges: dict[str, dict[tuple[str, int], int]] = {"min": {}, "opt": {}, "max": {}}
    for name, description in zip(variant.inputs, inputs, strict=True):
        sizes: list[Number] = []
        for axis, size in enumerate(description.shape):
            sizes.append(int(size) if size >= 0 else dimension(name, axis))
            if size < 0:
                for which, found in ranges.items():
                    found[name, axis] = int(getattr(description.shape, which)[axis])
        network.append(Tensor(name, tuple(sizes), canonical(description.dtype, name)))
    # What is dynamic in the network may be one size in this profile.
    fast = {place for place, size in ranges["min"].items() if size == ranges["max"][place]}
    tensors = [tensor.with_known({place: ranges["opt"][place] for place in fast}) for tensor in network]
    results = variant.operation.outputs({tensor.name: tensor for tensor in tensors}, attributes)
    if fast:
        promised = variant.operation.outputs({tensor.name: tensor for tensor in network}, attributes)
        for result, known in zip(results, promised, strict=True):
            _check_result(variant, result, known, ranges)
    varying = {which: {place: sizes[place] for place in sizes.keys() - fast} for which, sizes in ranges.items()}
    formats = formats or [description.format.name for description in (*inputs, *outputs)]
    placed = [replace(tensor, format=name) for tensor, name in zip((*tensors, *results), formats, strict=True)]
    count = len(tensors)
    return Case(variant, tuple(placed[:count]), tuple(placed[count:]), dict(attributes), Profile(**varying))


def _check_result(variant: PluginVariant, result: Tensor, promised: Tensor, ranges: Mapping[str, Sizes]) -> None:
    """Does nothing for an output of the shape that TensorRT was told of before there was a profile.

    Raises:
        ProblemError: it is of another, and would be written past.
    """
    for sizes in ranges.values():
        shape, wanted = promised.at(sizes).dims, result.at(sizes).dims
        if shape != wanted:
            raise ProblemError(
                f"{variant.name}: {result.name} is {shape} to TensorRT and {wanted} to the kernel: make the leading "
                "dimensions static, in which the inputs differ"
            )


def launch_parameters(plan: LaunchPlan, variant: PluginVariant, inputs: Sequence[Any], plugin: Any) -> tuple[Any, Any]:
    """The plan's `KernelLaunchParams` and `SymIntExprs`."""
    dims = {
        (name, axis): expression
        for name, description in zip(variant.inputs, inputs, strict=True)
        for axis, expression in enumerate(description.shape_expr)
    }
    parameters = plugin.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y, parameters.grid_z = (lowered(number, dims, plugin) for number in plan.grid)
    parameters.block_x = plan.threads
    parameters.shared_mem = plan.shared_bytes
    scalars = plugin.SymIntExprs(len(plan.scalars))
    for index, (_, number) in enumerate(plan.scalars):
        scalars[index] = plugin.SymInt32(lowered(number, dims, plugin))
    return parameters, scalars
