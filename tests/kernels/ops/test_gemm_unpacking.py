"""What inline PTX makes of packed weights: every weight by every zero point, to the bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.ptx import halves, run, word_of
from tilewright.kernels.ops.gemm.weights import BF16_BYTES, BF16_PAIRS, FP16_BYTES, FP16_PAIRS

KINDS = [(np.float16, FP16_PAIRS, FP16_BYTES, 1024), (ml_dtypes.bfloat16, BF16_PAIRS, BF16_BYTES, 128)]
IDS = ("fp16", "bf16")


def twice(number: int, kind: type) -> int:
    return word_of(np.full(2, number, kind))


@pytest.mark.parametrize(("kind", "pairs", "whole", "offset"), KINDS, ids=IDS)
@pytest.mark.parametrize("zero", range(16))
def test_every_pair_of_nibbles(kind, pairs, whole, offset, zero):
    add = twice(-offset - zero, kind)
    for start in range(0, 256, 4):
        packed = np.arange(start, start + 4, dtype=np.uint8)
        words = run(pairs.value, [int.from_bytes(packed.tobytes(), "little"), add, add], outputs=4)
        low, high = (np.concatenate([halves(word, kind) for word in two]) for two in (words[:2], words[2:]))
        np.testing.assert_array_equal(low.astype(int), (packed & 15).astype(int) - zero)
        np.testing.assert_array_equal(high.astype(int), (packed >> 4).astype(int) - zero)


@pytest.mark.parametrize("zero", [-128, -1, 0, 1, 100, 127])
def test_every_byte_in_fp16(zero):
    add = twice(-1152 - zero, np.float16)
    for start in range(-128, 128, 4):
        weights = np.arange(start, start + 4, dtype=np.int8)
        words = run(FP16_BYTES.value, [int.from_bytes(weights.tobytes(), "little"), add, add], outputs=2)
        found = np.concatenate([halves(word, np.float16) for word in words])
        np.testing.assert_array_equal(found.astype(int), weights.astype(int) - zero)


def test_every_byte_in_bf16():
    for start in range(-128, 128, 4):
        weights = np.arange(start, start + 4, dtype=np.int8)
        words = run(BF16_BYTES.value, [int.from_bytes(weights.tobytes(), "little")], outputs=2)
        found = np.concatenate([halves(word, ml_dtypes.bfloat16) for word in words])
        np.testing.assert_array_equal(found.astype(int), weights.astype(int))
