"""Integers for activations that are never negative.

int8 kernels have no zero points. A value that is never negative, as behind ReLU, would use half of the 256 integers.
Shifted by 128 it uses all of them, q = round(x / s) - 128, which halves the step and takes 6 dB off the noise. What a
layer computes from it is put right by its bias, for in

    s·s_w[n]·Σ_k (q_k + 128)·w[n, k] = s·s_w[n]·Σ_k q_k·w[n, k] + 128·s·s_w[n]·Σ_k w[n, k]

the last term is the same for all inputs. (A zero point of -128 in the sense of Jacob et al., arXiv:1712.05877, section
2.3, of which this is the constant part.) What is negative becomes 0, so it must be a value that ReLU or a clamp has cut
off there. Convolutions with padding are left out: their kernel pads with 0, which would stand for 128 steps.

While layers are rewritten a shifted step is a `QuantizeLinear` with a zero point. TensorRT takes none but 0, so at the
end those of our steps that no layer has taken over become `Sub` of 128·s and a step without one: the same integers, but
for ties.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import scalar

LOWEST = -128
"""The integer that 0 becomes."""

SHIFTED = "tilewright.shifted"
"""Mark of quantise steps with that zero point that are ours, in `metadata_props`, while layers are rewritten."""


def shift_by_bias(bias: np.ndarray | None, scales: np.ndarray, sums: np.ndarray, zero: int) -> np.ndarray:
    """A layer's bias in fp32 with the constant part of a zero point: bias[n] - zero · scales[n] · Σ_k w[n, k].

    `scales` is the product of all scales of the layer, of each output channel, and `sums` are those of its integers.
    """
    own = np.zeros(sums.shape) if bias is None else bias.astype(np.float64)
    return np.asarray(own - zero * scales.astype(np.float64) * sums, np.float32)


def spell_out(model: ir.Model) -> list[str]:
    """Turns the steps that are marked `SHIFTED` into a subtraction and a step without a zero point, in place.

    Gives the names of the subtractions: they must be computed in fp32.
    """
    edit = Editor(model)
    names = []
    for node in list(model.graph):
        if node.metadata_props.pop(SHIFTED, None) is None:
            continue  # a step of the model's own may have any zero point
        x, scale = node.inputs[0], scalar(node.inputs[1])
        assert x is not None
        assert scale is not None
        amount = edit.constant(np.asarray(np.float32(-LOWEST) * np.float32(scale), np.float32), f"{x.name}_shift")
        subtraction = edit.node("Sub", [x, amount], x, ir.DataType.FLOAT, base=f"{x.name}_shifted")
        edit.after(x, subtraction)
        node.replace_input_with(0, subtraction.outputs[0])
        node.resize_inputs(2)
        names.append(subtraction.name or "")
    edit.tidy()
    return names
