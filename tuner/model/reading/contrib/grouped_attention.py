"""`GroupQueryAttention`: the attention of language models, with fewer heads of keys than of queries, and a cache.

The operator is told the length of each sequence when it runs. Here that is known beforehand: all shapes are. Where the
lengths of several sequences differ, one new place of each is put where its sequence ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.reading.contrib.attention import (
    Array,
    Heads,
    Shape,
    attend,
    bias_of_scores,
    causal,
    head_count,
    is_positive,
    joined,
    split,
)
from tilewright.tuner.model.reading.contrib.rotary import Angles, angles, caches, consecutive
from tilewright.tuner.model.reading.contrib.writer import UnsupportedError, Writer

_STRANGE = ((11, "head_sink"), (12, "k_scale"), (13, "v_scale"), (16, "query_seqlens"))
_SETTINGS = {"smooth_softmax": 0, "sliding_window_cache": 0, "kv_cache_bit_width": 0}
_UNQUANTISED = {"k_quant_type": "NONE", "v_quant_type": "NONE"}


@dataclass(frozen=True, slots=True)
class Lengths:
    """What is cached.

    Attributes:
        past: places of each sequence before the new ones, where that is known.
        total: of the longest one, with the new ones.
        buffer: of the cache that comes out.
        ends: a value (B), the place of the one new key of each sequence, where those differ.
    """

    past: int
    total: int
    buffer: int
    ends: str | None = None


def group_query_attention(write: Writer) -> list[str | None]:
    """`GroupQueryAttention`: of queries (B, S, H·D) and keys and values (B, S, H'·D), or all in one, and a cache
    (B, H', P, D) of each."""
    _known_parts(write)
    heads, kv_heads = head_count(write, "num_heads"), head_count(write, "kv_num_heads")
    if heads % kv_heads:
        raise UnsupportedError(f"it has {heads} heads of queries and {kv_heads} of keys")
    names, shapes = _operands(write, heads, kv_heads)
    batch, length, hidden = shapes[0]
    pasts = write.optional(3), write.optional(4)
    if (pasts[0] is None) != (pasts[1] is None):
        raise UnsupportedError("it has one of past_key and past_value, and not the other")
    cache = (batch, kv_heads, 0, hidden // heads)
    for past in pasts:
        if past is not None:
            given = write.shape(past)
            if len(given) != 4 or (*given[:2], 0, given[3]) != cache or (pasts[0] and given != write.shape(pasts[0])):
                raise UnsupportedError(f"its cache has the shape {given}: it must be {(*cache[:2], '...', cache[3])}")
            cache = given if past is pasts[1] else cache
    lengths = _lengths(write, batch, length, cache[2])
    window = int(write.attribute("local_window_size", -1))
    is_causal = bool(write.attribute("causal", 1))
    if not is_causal and (window > 0 or lengths.ends):
        raise UnsupportedError(f"causal is 0, and local_window_size {window}")
    seen = causal(length, lengths.total, window) if is_causal and lengths.ends is None else None
    scores = (batch, heads, length, lengths.total)
    bias = bias_of_scores(write, 10, scores)
    norms = _norm_weights(write, cache[3])
    turned = _angles(write, shapes, lengths, cache[3]) if write.attribute("do_rotary", 0) else None

    q, k, v = (
        split(write, name, shape, count, norm)
        for name, shape, count, norm in zip(
            names or _unpacked(write, shapes), shapes, (heads, kv_heads, kv_heads), norms, strict=True
        )
    )
    if turned is not None:
        q, k = (Heads(turned.turn(write, each.name, each.shape), each.shape) for each in (q, k))
    if lengths.ends is not None:
        ends = write("Reshape", lengths.ends, write.integers(batch, 1, 1, 1))
        present = [
            _placed(write, past, cache[2], each, lengths, ends) for past, each in zip(pasts, (k, v), strict=True)
        ]
        shown: Array | str | None = _shown(write, lengths, ends, window)
        asked = [_first(write, each, lengths.total) for each in present]
    else:
        asked = [_cached(write, past, cache[2], each, lengths) for past, each in zip(pasts, (k, v), strict=True)]
        present = [_padded(write, each, lengths.buffer) for each in asked]
        shown = seen if is_causal else _counted(write, batch, lengths)
    softcap = float(write.attribute("softcap", 0.0))
    out = attend(write, q, *asked, softcap=softcap, added=[bias] if bias else [], seen=shown, never=True)
    return [out, *(each.name for each in present)]


def _counted(write: Writer, batch: int, lengths: Lengths) -> str | None:
    """Which keys all queries of a sequence see, as (B, 1, 1, T): as many as it has; None if that is all.

    Raises:
        UnsupportedError: its number is not one for each sequence.
    """
    counted = write.constant_or_none(write.input(5))
    if lengths.past or (counted is not None and (counted == lengths.total - 1).all()):
        return None
    if math.prod(write.shape(write.input(5))) != batch:
        raise UnsupportedError(f"its seqlens_k has the shape {write.shape(write.input(5))}, in a batch of {batch}")
    return _shown(write, lengths, write("Reshape", write.input(5), write.integers(batch, 1, 1, 1)), 0)


def _known_parts(write: Writer) -> None:
    for place, name in _STRANGE:
        if write.optional(place):
            raise UnsupportedError(f"it has the input {name}")
    for name, usual in (_SETTINGS | _UNQUANTISED).items():
        found = write.attribute(name, usual)
        if found != usual and found != "":
            raise UnsupportedError(f"its attribute {name} is {found}")
    softcap = write.attribute("softcap", 0.0)
    if softcap < 0:
        raise UnsupportedError(f"its attribute softcap is {softcap}")


def _operands(write: Writer, heads: int, kv_heads: int) -> tuple[list[str] | None, list[Shape]]:
    """Queries, keys and values of three dimensions, None where they are one value, and their shapes."""
    names = [write.input(0), write.optional(1), write.optional(2)]
    shapes = [() if name is None else write.shape(name) for name in names]
    is_positive(*shapes)
    described = f"its query, key and value have the shapes {', '.join(map(str, shapes))}"
    described += f", for {heads} heads of queries and {kv_heads} of keys"
    if tuple(map(len, shapes)) not in ((3, 0, 0), (3, 3, 3)):
        raise UnsupportedError(described)
    batch, length, hidden = shapes[0]
    if len(shapes[1]) == 0:
        dim = hidden // (heads + 2 * kv_heads)
        if hidden % (heads + 2 * kv_heads):
            raise UnsupportedError(described)
        return None, [(batch, length, count * dim) for count in (heads, kv_heads, kv_heads)]
    dim = hidden // heads
    if hidden % heads or shapes[1] != (batch, length, kv_heads * dim) or shapes[2] != shapes[1]:
        raise UnsupportedError(described)
    return [name for name in names if name is not None], shapes


def _norm_weights(write: Writer, dim: int) -> list[tuple[str, float] | None]:
    """Weights and epsilon of the RMS norms of each head of queries, of keys and of values, None where there is none."""
    names = write.optional(14), write.optional(15)
    if (names[0] is None) != (names[1] is None):
        raise UnsupportedError("it has one of q_norm_weight and k_norm_weight, and not the other")
    made: list[tuple[str, float] | None] = []
    for which, name in zip("qk", names, strict=True):
        if name is not None and write.shape(name) != (dim,):
            raise UnsupportedError(f"its {which}_norm_weight has the shape {write.shape(name)}: it must be {(dim,)}")
        epsilon = write.attribute(f"{which}_norm_epsilon", write.attribute("qk_norm_epsilon", 1e-6))
        made.append(None if name is None else (name, epsilon))
    return [*made, None]


def _unpacked(write: Writer, shapes: Sequence[Shape]) -> list[str]:
    sizes = write.integers(*(shape[2] for shape in shapes))
    return list(write("Split", write.input(0), sizes, outputs=3, axis=-1))


def _lengths(write: Writer, batch: int, length: int, past: int) -> Lengths:
    """
    Raises:
        UnsupportedError: they are not known, or don't go together.
    """
    counted, name = write.constant_or_none(write.input(5)), write.input(6)
    found = write.constant_or_none(name)
    if found is None or found.size != 1 or found.dtype.kind != "i":
        raise UnsupportedError(
            f"its total_sequence_length {name!r} is not known before it runs: it must be a constant, or follow from "
            f"shapes, as that of attention_mask, with --shape total_sequence_length=..."
        )
    total = int(found.reshape(-1)[0])
    if total < length:
        raise UnsupportedError(f"its total_sequence_length is {total}, and it has {length} new places")
    if total != past + length and total > past:
        fitting = f"{total - length}, or {total}" if total > length else f"{total}"
        raise UnsupportedError(
            f"its cache has {past} places, and with {length} new ones total_sequence_length is {total}: give --shape "
            f"past_sequence_length={fitting} for a buffer that all fit in"
        )
    if length == total:  # a prompt: nothing in the cache counts
        return Lengths(0, total, max(total, past))
    if counted is not None and (counted.size != batch or (counted != total - 1).any()):
        raise UnsupportedError(
            f"its seqlens_k is {counted.reshape(-1).tolist()}: with total_sequence_length={total} it must be "
            f"{total - 1}"
        )
    lengths = Lengths(total - length, total, max(total, past))
    if batch == 1 or counted is not None:
        return lengths
    if length != 1:
        raise UnsupportedError(
            f"it has a batch of {batch} with {length} new places each, and a cache: give --shape batch_size=1, or "
            f"sequence_length=1, or sequence_length={total} for a prompt"
        )
    return Lengths(total - length, total, max(total, past), write.input(5))


def _angles(write: Writer, shapes: Sequence[Shape], lengths: Lengths, dim: int) -> Angles:
    """
    Raises:
        UnsupportedError: the caches, or the positions, have other shapes.
    """
    batch, length, _ = shapes[0]
    cos, sin = write.input(7), write.input(8)
    width = caches(write, cos, sin, lengths.total)
    if width > dim:
        raise UnsupportedError(f"its caches are for {width} numbers of each head: it has {dim}")
    interleaved = bool(write.attribute("rotary_interleaved", 0))
    places: Array | str = np.arange(lengths.past, lengths.total)[None]
    given = write.optional(9)
    if given is not None:
        shape = write.shape(given)
        if shape != (batch, length) or write.dtype(given) != ir.DataType.INT64:
            kind = write.dtype(given).name.lower()
            raise UnsupportedError(
                f"its position_ids are of {kind} with the shape {shape}: they must be int64 of {(batch, length)}"
            )
        # Of a prompt the first number counts, for all sequences.
        places = consecutive(write, given, length) if length == lengths.total else given
    elif lengths.ends is not None:
        places = write("Reshape", lengths.ends, write.integers(batch, 1))
    return angles(write, cos, sin, places, interleaved=interleaved)


def _cached(write: Writer, past: str | None, size: int, new: Heads, lengths: Lengths) -> Heads:
    """Keys or values, behind those in the cache that count."""
    if past is None or not lengths.past:
        return new
    if lengths.past < size:
        past = write("Slice", past, write.integers(0), write.integers(lengths.past), write.integers(2))
        shape = (*new.shape[:2], lengths.past + new.length, new.shape[3])
        return Heads(write("Concat", past, new.name, axis=2), shape)
    return joined(write, past, new)


def _padded(write: Writer, heads: Heads, length: int) -> Heads:
    """With so many places, the last ones 0."""
    missing = length - heads.length
    if not missing:
        return heads
    ends = write.integers(0, 0, 0, 0, 0, 0, missing, 0)
    return Heads(write("Pad", heads.name, ends), (*heads.shape[:2], length, heads.shape[3]))


def _first(write: Writer, heads: Heads, length: int) -> Heads:
    if heads.length == length:
        return heads
    kept = write("Slice", heads.name, write.integers(0), write.integers(length), write.integers(2))
    return Heads(kept, (*heads.shape[:2], length, heads.shape[3]))


def _placed(write: Writer, past: str | None, size: int, new: Heads, lengths: Lengths, ends: str) -> Heads:
    """A cache with one new place for each sequence where that ends, and 0 behind it."""
    assert past is not None
    shape = (*new.shape[:2], lengths.buffer, new.shape[3])
    whole = _padded(write, Heads(past, (*new.shape[:2], size, new.shape[3])), lengths.buffer)
    places = write.array(np.arange(lengths.buffer, dtype=np.int32)[:, None])
    none = write.array(np.zeros((), write.dtype(write.input(0)).numpy()))
    old = write("Where", write("Less", places, ends), whole.name, none)
    return Heads(write("Where", write("Equal", places, ends), new.name, old), shape)


def _shown(write: Writer, lengths: Lengths, ends: str, window: int) -> str:
    """Which keys the one query of each sequence sees, as (B, 1, 1, T)."""
    places = write.array(np.arange(lengths.total, dtype=np.int32))
    shown = write("LessOrEqual", places, ends)
    if window > 0:
        shown = write(
            "And", shown, write("Greater", places, write("Sub", ends, write.array(np.array(window, np.int32))))
        )
    return str(shown)
