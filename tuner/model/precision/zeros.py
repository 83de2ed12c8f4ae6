"""Integers for activations that are never negative.

int8 kernels have no zero points. A value that is never negative, as behind ReLU, would use half of the 256 integers.
Shifted by 128 it uses all of them, q = round(x / s) - 128, which halves the step and takes 6 dB off the noise. What a
layer computes from it is put right by its bias, for in

    s·s_w[n]·Σ_k (q_k + 128)·w[n, k] = s·s_w[n]·Σ_k q_k·w[n, k] + 128·s·s_w[n]·Σ_k w[n, k]

the last term is the same for all inputs. (A zero point of -128 in the sense of Jacob et al., arXiv:1712.05877, section
2.3, of which this is the constant part.) What is negative becomes 0, so it must be a value that ReLU or a clamp has cut
off there. Convolutions with padding are left out: their kernel pads with 0, which would stand for 128 steps.

A model that came quantised may have any zero point, and what a layer of it computes is put right in the same way
(`given.py`).
"""

from __future__ import annotations

import numpy as np

LOWEST = -128
"""The integer that 0 becomes."""


def shift_by_bias(bias: np.ndarray | None, scales: np.ndarray, sums: np.ndarray, zero: int) -> np.ndarray:
    """A layer's bias in fp32 with the constant part of a zero point: bias[n] - zero · scales[n] · Σ_k w[n, k].

    `scales` is the product of all scales of the layer, of each output channel, and `sums` are those of its integers.
    """
    own = np.zeros(sums.shape) if bias is None else bias.astype(np.float64)
    return np.asarray(own - zero * scales.astype(np.float64) * sums, np.float32)
