"""How large the values of a model become on calibration data: what fp16 has no room for shows there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.calibration.calibrate import grouped
from tilewright.tuner.model.calibration.feeds import Array, Feed
from tilewright.tuner.model.graph import dtype_name, is_constant
from tilewright.tuner.model.session import run


def extremes(model: ir.Model, feeds: Sequence[Feed]) -> dict[str, tuple[float, float]]:
    """The least and the largest finite number of every fp32 tensor of the main graph that is computed or fed, by name;
    0 is counted in.

    Raises:
        ModelError, RunError: see `session.run`.
    """
    computed = [value for node in model.graph for value in node.outputs]
    values = [value for value in (*model.graph.inputs, *computed) if not is_constant(value)]
    tensors = [value for value in values if isinstance(value.type, ir.TensorType)]  # no sequences
    names = [value.name for value in tensors if value.name and dtype_name(value) == "fp32"]
    found = dict.fromkeys(names, (0.0, 0.0))
    for group in grouped(model, names):
        for results in run(model, feeds, group):
            for name, array in results.items():
                low, high = _finite(array)
                found[name] = min(found[name][0], low), max(found[name][1], high)
    return found


def _finite(array: Array) -> tuple[float, float]:
    if not array.size:
        return 0.0, 0.0
    low, high = float(array.min()), float(array.max())
    return (low, high) if np.isfinite(low) and np.isfinite(high) else _finite(array[np.isfinite(array)])
