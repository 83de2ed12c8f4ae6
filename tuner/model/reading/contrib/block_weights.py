"""`MatMulNBits`: a product whose weights are integers of 4 or 8 bits, with a scale for each block of rows.

The form in which tools for language models on ONNX Runtime give weights. The integers stay as they are stored.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.reading.contrib.writer import UnsupportedError, Writer

BLOCKWISE_FROM = 21
"""The opset in which `DequantizeLinear` has blocks, and types of 4 bits."""

Array = np.ndarray[Any, Any]
_KINDS = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def matmul_nbits(write: Writer) -> list[str]:
    """`MatMulNBits`: A @ dequantised(B)ᵀ + bias, of B (N, ⌈K/block⌉, block · bits / 8) packed, the earlier number in
    the lower bits, with `scales` (N, ⌈K/block⌉) and `zero_points`, or 2^(bits-1) for those."""
    k, n, bits, block = (int(write.attribute(name, 0)) for name in ("K", "N", "bits", "block_size"))
    bits = bits or 4
    if bits not in _KINDS:
        raise UnsupportedError(f"its weights have {bits} bits: 4 and 8 are known")
    if k < 1 or n < 1 or block < 1 or block * bits % 8:
        raise UnsupportedError(f"its attributes are K={k}, N={n}, bits={bits}, block_size={block}")
    if write.around.opset < BLOCKWISE_FROM:
        raise UnsupportedError(f"the model has opset {write.around.opset}: blocks are from {BLOCKWISE_FROM} on")
    blocks = math.ceil(k / block)
    groups = write.optional(4)
    order = None if groups is None else write.constant(groups).reshape(-1)
    if order is not None and not (len(order) == k and np.array_equal(order, np.arange(k) // block)):
        raise UnsupportedError("its rows are in an order of their own (g_idx)")
    scales = _sized(write.constant(write.input(2)), n * blocks, "scales").reshape(n, blocks)
    zeros = _zeros(write, n, blocks, bits)  # first, for they may be what is not known, and the integers are large
    parts = [_integers(write, k, n, bits, blocks * block), ir.tensor(np.ascontiguousarray(scales)), zeros]
    weights = write("DequantizeLinear", *map(write.weight, parts), axis=1, block_size=block)
    product = write("MatMul", write.input(0), write("Transpose", weights, perm=[1, 0]))
    bias = write.optional(5)
    return [write("Add", product, bias) if bias else product]


def _integers(write: Writer, k: int, n: int, bits: int, padded: int) -> ir.TensorProtocol:
    """The weights (N, K)."""
    stored = _sized(write.constant(write.input(1)), n * padded * bits // 8, "B")
    if stored.dtype != np.uint8:
        raise UnsupportedError(f"its B is of {stored.dtype}: it must be of uint8")
    if bits == 8:
        return ir.Tensor(np.ascontiguousarray(stored.reshape(n, padded)[:, :k]), dtype=_KINDS[bits])
    if padded != k:
        columns = _nibbles(stored.reshape(n, -1))[:, :k]
        if k % 2:
            return ir.Tensor(columns.astype(ml_dtypes.uint4), dtype=_KINDS[bits])
        stored = columns[:, ::2] | columns[:, 1::2] << 4
    return ir.PackedTensor(np.ascontiguousarray(stored).reshape(-1), _KINDS[bits], shape=ir.Shape((n, k)))


def _zeros(write: Writer, n: int, blocks: int, bits: int) -> ir.TensorProtocol:
    """What of the integers stands for 0 (N, blocks)."""
    name = write.optional(3)
    if name is None:
        zeros = np.full((n, blocks), 1 << bits - 1, np.uint8)
    else:
        given = write.constant(name)
        if given.dtype != np.uint8:
            if np.iscomplexobj(given):
                raise UnsupportedError(f"its zero_points are of {given.dtype}")
            # As numbers, one for each block: they are integers more often than not.
            given = _sized(given, n * blocks, "zero_points").astype(np.float64)
            if not (np.array_equal(given, np.rint(given)) and given.min() >= 0 and given.max() < 1 << bits):
                raise UnsupportedError("its zero points are no integers")
            zeros = given.astype(np.uint8).reshape(n, blocks)
        else:
            row = math.ceil(blocks * bits / 8)
            packed = _sized(given, n * row, "zero_points").reshape(n, row)
            zeros = packed if bits == 8 else _nibbles(packed)[:, :blocks]
    if bits == 8:
        return ir.Tensor(np.ascontiguousarray(zeros), dtype=_KINDS[bits])
    return ir.Tensor(zeros.astype(ml_dtypes.uint4), dtype=_KINDS[bits])


def _nibbles(packed: Array) -> Array:
    """Rows of bytes as rows of twice as many numbers from 0 to 15, the lower bits first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _sized(array: Array, size: int, what: str) -> Array:
    if array.size != size:
        raise UnsupportedError(f"its {what} has {array.size} elements: {size} belong to its attributes")
    return array.reshape(-1)
