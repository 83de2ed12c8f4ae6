"""The plugins there are, and what their attributes are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from tilewright.kernels.tensorrt.attention import AttentionPlugin
from tilewright.kernels.tensorrt.conv2d import Conv2dPlugin
from tilewright.kernels.tensorrt.gemm import GemmPlugin
from tilewright.kernels.tensorrt.operation import PluginOperation, PluginVariant
from tilewright.kernels.tensorrt.rmsnorm import RmsNormPlugin
from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.text import did_you_mean

NAMESPACE = "tilewright"
VERSION = "1"

OPERATIONS: tuple[PluginOperation, ...] = (GemmPlugin(), Conv2dPlugin(), AttentionPlugin(), RmsNormPlugin())


@functools.cache
def plugins() -> Mapping[str, PluginVariant]:
    """Every plugin by its name."""
    return {variant.name: variant for operation in OPERATIONS for variant in operation.variants()}


def find_plugin(name: str) -> PluginVariant:
    """The plugin of a name.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name in plugins():
        return plugins()[name]
    raise UsageError(f"there is no plugin {name!r}{did_you_mean(name, plugins())}")


def plugin_name(op: str, *inputs: str) -> str:
    """The name of an op's plugin that takes these optional inputs: `plugin_name("gemm", "bias")` is `FusedGemmBias`.

    Raises:
        UsageError: there is no such op, or no plugin of it with these inputs.
    """
    ops = {operation.kernel.name: operation for operation in OPERATIONS}
    if op not in ops:
        raise UsageError(f"there are no plugins of {op!r}; there are of {', '.join(ops)}")
    for variant in ops[op].variants():
        if set(variant.optional) == set(inputs) and len(set(inputs)) == len(inputs):
            return variant.name
    known = ", ".join(" and ".join(group) for group in ops[op].optional)
    raise UsageError(f"no plugin of {op} takes {', '.join(inputs) or 'these inputs'}: the optional inputs are {known}")


def plugin_attributes(name: str, **given: Any) -> dict[str, Any]:
    """All attributes of a plugin, in order, for an ONNX node or a call of `tensorrt.plugin.op`: those given, and for
    the others what leaves them out.

    Raises:
        UsageError: no such plugin or attribute, or a value of another type.
    """
    declared = {attribute.name: attribute for attribute in find_plugin(name).operation.attributes}
    for key in given:
        if key not in declared:
            raise UsageError(f"{name} has no attribute {key!r}; it has {', '.join(declared)}")
    return {
        key: typed(name, key, attribute.type, given.get(key, attribute.default)) for key, attribute in declared.items()
    }


def typed(plugin: str, name: str, kind: type, value: Any) -> Any:
    """An attribute's value as Python has it.

    Raises:
        UsageError: it is of another type; an int will do for a float.
    """
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UsageError(
                f"{plugin}: {name} is an integer of {value.bit_length()} bits and must be a float, at most 1.8e308"
            ) from None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{plugin}: {name}={value!r} must be {kind.__name__}, not {type(value).__name__}")
    return value
