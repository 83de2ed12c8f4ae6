"""The plugins' other implementation: Python launches, at run time, on TensorRT's stream.

Every shape runs the configuration that `lookup` has for it, as a call from Python would, with split-K, descriptors and
all; the tactic counts for nothing. Arrays are TensorRT's own: nothing is copied, and nothing allocated after a shape's
first call.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tilewright.kernels.arrays import require_cupy
from tilewright.kernels.dispatch import MOST_PLANS, call_cache, plan_for
from tilewright.kernels.problem import Problem
from tilewright.kernels.runtime import Plan
from tilewright.kernels.tensorrt.operation import PluginVariant, Tensor
from tilewright.kernels.tensorrt.types import canonical
from tilewright.tuning_db.errors import ProblemError

ALIGNMENT = 16
"""Bytes that kernels load at once from arrays that start at a multiple of so many."""

_plans = call_cache()
_lock = threading.Lock()


def enqueue(
    variant: PluginVariant,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    attributes: Mapping[str, Any],
    stream: int,
) -> None:
    """Puts the op on the stream. `inputs` and `outputs` are `tensorrt.plugin.Tensor`s, or alike.

    Raises:
        ProblemError, UsageError, UnsupportedError: the tensors don't make a problem, or not one for this GPU.
        CompileError, LaunchError: the compiler or the driver refused the default configuration.
    """
    tensors = (*inputs, *outputs)
    aligned = all(tensor.data_ptr % ALIGNMENT == 0 for tensor in tensors)
    ordinal = int(require_cupy().cuda.runtime.getDevice())
    described = tuple((tuple(tensor.shape), tensor.dtype, tensor.format) for tensor in tensors)
    key = (variant.name, described, tuple(attributes.items()), aligned, ordinal)
    plan = _plans.get(key)
    if plan is None:
        with _lock:
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            plan = _plans[key] = _prepared(variant, inputs, outputs, attributes, aligned, ordinal)
    names = (*variant.inputs, *variant.outputs)
    plan.run({f"{name}_ptr": tensor.data_ptr for name, tensor in zip(names, tensors, strict=True)}, {}, stream)


def problem_of(
    variant: PluginVariant, inputs: Sequence[Any], outputs: Sequence[Any], attributes: Mapping[str, Any], aligned: bool
) -> Problem:
    """The problem of tensors whose shapes are known.

    Raises:
        ProblemError, UsageError, UnsupportedError: there is none, or the outputs are not its results.
    """
    tensors = {
        name: Tensor(name, tuple(map(int, tensor.shape)), canonical(tensor.dtype, name), tensor.format.name)
        for name, tensor in zip(variant.inputs, inputs, strict=True)
    }
    problem = variant.operation.problem(tensors, attributes)
    for tensor, given in zip(variant.operation.outputs(tensors, attributes), outputs, strict=True):
        if tensor.shape != tuple(given.shape) or tensor.dtype != canonical(given.dtype, tensor.name):
            raise ProblemError(
                f"{variant.name}: {tensor.name} is {tuple(given.shape)} of {canonical(given.dtype, tensor.name)} and "
                f"must be {tensor.shape} of {tensor.dtype}"
            )
    if aligned:
        return problem
    changed = {"aligned": False} | ({"end_aligned": False} if hasattr(problem, "end_aligned") else {})
    return replace(problem, **changed)  # type: ignore[type-var]  # every op's problem is a dataclass


def _prepared(
    variant: PluginVariant,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    attributes: Mapping[str, Any],
    aligned: bool,
    ordinal: int,
) -> Plan:
    problem = problem_of(variant, inputs, outputs, attributes, aligned)
    tensors = {
        name: Tensor(name, tuple(map(int, tensor.shape)), canonical(tensor.dtype, name))
        for name, tensor in zip(variant.inputs, inputs, strict=True)
    }
    constants = variant.operation.constants(tensors, attributes)
    plan, _ = plan_for(variant.operation.kernel, problem, ordinal, constants=constants)
    return plan
