"""Cases of plugins without TensorRT, and what must be true of every one: it is launched as this package launches it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.interpreter import interpret
from tilewright.kernels.kernel import Launch
from tilewright.kernels.problem import Problem
from tilewright.kernels.runtime import INTERPRETED_SMS, PLAIN
from tilewright.kernels.tensorrt.case import Case, Profile
from tilewright.kernels.tensorrt.catalogue import find_plugin, plugin_attributes
from tilewright.kernels.tensorrt.expressions import dimension, evaluate
from tilewright.kernels.tensorrt.operation import Tensor
from tilewright.tuner.gate import compare

Dim = int | list[int]
Inputs = Sequence[tuple[Sequence[Dim], str]]


def case(plugin: str, inputs: Inputs, *, formats: Sequence[str] = (), **attributes: Any) -> Case:
    """The case of tensors whose dynamic dimensions are lists: least, best and largest."""
    variant = find_plugin(plugin)
    assert len(inputs) == len(variant.inputs), variant.inputs
    ranges: list[dict[tuple[str, int], int]] = [{}, {}, {}]
    tensors = []
    for name, (dims, dtype) in zip(variant.inputs, inputs, strict=True):
        for axis, dim in enumerate(dims):
            if isinstance(dim, list):
                for place, size in zip(ranges, dim, strict=True):
                    place[name, axis] = size
        sizes = tuple(dimension(name, axis) if isinstance(dim, list) else dim for axis, dim in enumerate(dims))
        tensors.append(Tensor(name, sizes, dtype))
    given = plugin_attributes(plugin, **attributes)
    outputs = variant.operation.outputs({tensor.name: tensor for tensor in tensors}, given)
    names = formats or ["LINEAR"] * (len(tensors) + len(outputs))
    placed = [
        Tensor(tensor.name, tensor.dims, tensor.dtype, name)
        for tensor, name in zip((*tensors, *outputs), names, strict=True)
    ]
    return Case(variant, tuple(placed[: len(tensors)]), tuple(placed[len(tensors) :]), given, Profile(*ranges))


def check_launches(
    found: Case,
    problem: Callable[..., Problem],
    sizes: Sequence[tuple[int, ...]],
    *,
    board: str = "rtx3090",
    most: int = 60,
) -> int:
    """The grid, the scalars and what is compiled agree with the launcher's for every size, of up to `most`
    configurations spread over the space; gives how many there were. `problem` is made without the code under test."""
    device = resolve_device(board)
    found.check()
    places = list(found.profile.opt)
    kernel = found.kernel
    best = found.problem(found.profile.opt)
    configs = kernel.space.configs(best, device)
    chosen = [kernel.default(best, device), *itertools.islice(configs, 0, None, max(1, len(configs) // most))]
    checked = 0
    for config in dict.fromkeys(chosen):
        if found.refusal(config, device) is not None:
            continue
        checked += 1
        general = found.launch(config)
        for values in sizes:
            at = dict(zip(places, values, strict=True))
            expected = problem(*values)
            assert found.problem(at) == expected
            special = kernel.launches(expected, config)[0].with_constants(
                found.variant.operation.constants(found.tensors, found.attributes)
            )
            assert (evaluate(found.grid(config), at), 1, 1) == special.grid, config
            scalars = [evaluate(number, at) for _, number in found.scalars(general)]
            assert scalars == [a.value for a in special.arguments if a.type is not None and not a.is_pointer]
            _check_general(general, special)
            for tensor in found.outputs:
                shape = [evaluate(dim, at) for dim in tensor.dims]
                output = expected.outputs()[tensor.name]
                assert (_product(shape), tensor.dtype) == (_product(output.shape), output.dtype)
    return checked


def check_results(
    found: Case, problem: Callable[..., Problem], sizes: Sequence[tuple[int, ...]], config: Any, *, board: str = "a100"
) -> None:
    """The code for all sizes gives the reference's results for each, in the interpreter, with the grid and the scalars
    that TensorRT works out."""
    assert found.refusal(config, resolve_device(board)) is None
    kernel, launch = found.kernel, found.launch(config).with_constants(PLAIN)
    scalars = dict(found.scalars(launch))
    for values in sizes:
        at = dict(zip(found.profile.opt, values, strict=True))
        expected = problem(*values)
        arrays = expected.inputs(0)
        outputs = {
            name: np.full(output.shape, 7, DTYPES[output.dtype].numpy) for name, output in expected.outputs().items()
        }
        arguments: dict[str, Any] = dict(launch.constexprs)
        for argument in launch.arguments:
            if argument.type is None:
                arguments[argument.name] = None
            elif argument.is_pointer:
                arguments[argument.name] = (arrays | outputs)[argument.name.removesuffix("_ptr")]
            else:
                arguments[argument.name] = evaluate(scalars[argument.name], at)
        grid = min(evaluate(found.grid(config), at), launch.blocks_per_sm * INTERPRETED_SMS or 2**31)
        interpret(launch.fn, (grid, 1, 1), arguments)
        wanted, tolerances = kernel.reference(expected, arrays), kernel.tolerance(expected)
        for name, output in outputs.items():
            assert compare(output, wanted[name], tolerances[name]) is None, (str(expected), name)


def _check_general(general: Launch, special: Launch) -> None:
    """What is compiled for all sizes holds for the special ones."""
    assert (general.fn, general.num_warps, general.num_stages) == (special.fn, special.num_warps, special.num_stages)
    assert [a.type for a in general.arguments] == [a.type for a in special.arguments]
    for mine, theirs in zip(general.arguments, special.arguments, strict=True):
        assert theirs.aligned or not mine.aligned, mine
    for (name, mine), (_, theirs) in zip(general.constexprs, special.constexprs, strict=True):
        if name.startswith("EVEN"):
            assert theirs or not mine, name
        elif name == "RUN":
            assert theirs % mine == 0
        elif name in ("MASKS", "PADDED"):
            assert mine or not theirs, name
        else:
            assert mine == theirs, name


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
