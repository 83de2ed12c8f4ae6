"""Token inputs for the transformers: made rather than stored, with the frequencies of words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.models.transformers import KEY_STD, DecoderSize, EncoderSize

Array = np.ndarray[Any, Any]

PADDING = 0
OFFSET = 2.7


def text(random: np.random.Generator, length: int, vocabulary: int) -> Array:
    """`length` tokens, int64: the r-th most frequent comes with probability ~ 1 / (r + 2.7), which is Mandelbrot's form
    of Zipf's law for English. Token 0 is padding and does not come."""
    # The integral of the density up to rank r is ln((r + 2.7) / 2.7): ranks are its inverse.
    exponent = random.uniform(0, math.log((vocabulary - 1 + OFFSET) / OFFSET), length)
    return 1 + np.floor(OFFSET * np.expm1(exponent)).astype(np.int64).clip(0, vocabulary - 2)


def encoder_feed(random: np.random.Generator, size: EncoderSize) -> dict[str, Array]:
    """One sentence, or two, of at least half the length that there is room for; padding behind."""
    length = int(random.integers(size.sequence // 2, size.sequence + 1))
    start = int(random.integers(1, length + 1))
    place = np.arange(size.sequence)
    seen = place < length
    return {
        "input_ids": np.where(seen, text(random, size.sequence, size.vocabulary), PADDING)[None],
        "attention_mask": seen.astype(np.int64)[None],
        "token_type_ids": (seen & (place >= start)).astype(np.int64)[None],
    }


def decoder_feed(random: np.random.Generator, size: DecoderSize) -> dict[str, Array]:
    """New tokens, and a cache of keys and values as seeding sizes them."""
    feed = {
        "input_ids": text(random, size.sequence, size.vocabulary)[None],
        "position_ids": np.arange(size.past, size.past + size.sequence)[None],
    }
    shape = (1, size.kv_heads, size.past, size.hidden // size.heads)
    for layer in range(size.layers):
        for name, std in (("key", KEY_STD), ("value", 1.0)):
            feed[f"past_key_values.{layer}.{name}"] = np.float32(std) * random.standard_normal(shape, np.float32)
    return feed
