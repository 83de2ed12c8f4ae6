"""How large the values of a model become on calibration data: what fp16 has no room for shows there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.calibration.calibrate import grouped
from tilewright.tuner.model.calibration.feeds import Array, Feed
from tilewright.tuner.model.graph import dtype_name, is_constant
from tilewright.tuner.model.session import run


def largest_magnitudes(model: ir.Model, feeds: Sequence[Feed]) -> dict[str, float]:
    """The largest finite magnitude of every fp32 value of the main graph that is computed or fed, by name.

    Raises:
        ModelError, RunError: see `session.run`.
    """
    computed = [value for node in model.graph for value in node.outputs]
    values = [value for value in (*model.graph.inputs, *computed) if not is_constant(value)]
    names = [value.name for value in values if value.name and dtype_name(value) == "fp32"]
    found = dict.fromkeys(names, 0.0)
    for group in grouped(model, names):
        for results in run(model, feeds, group):
            for name, array in results.items():
                found[name] = max(found[name], _largest(array))
    return found


def _largest(array: Array) -> float:
    if not array.size:
        return 0.0
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        return _largest(array[np.isfinite(array)])
    return max(high, -low)
