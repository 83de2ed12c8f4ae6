"""Attention of as many heads of keys as of queries: `MultiHeadAttention`, and `Attention` with its projection.

All are written out, as two products with a softmax between: any reader has those operators, and fusing knows what they
are. Scores of half precision are masked, and their softmax taken, in fp32, as ONNX Runtime has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.reading.contrib.writer import UnsupportedError, Writer

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

LARGEST_MASK = 1 << 28
"""Elements of a causal mask, 16384²: beyond that, the constant would be most of the model."""

_MIDDLE = [0, 2, 1, 3]  # (B, S, H, D) ↔ (B, H, S, D)
_FLOAT, _BOOL = int(ir.DataType.FLOAT), int(ir.DataType.BOOL)
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NUMBERS = (*_HALF, ir.DataType.FLOAT, ir.DataType.DOUBLE)
_LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys or values as (B, H, S, D): a value, and its shape."""

    name: str
    shape: Shape

    @property
    def length(self) -> int:
        """Places of the sequence."""
        return self.shape[2]


def split(write: Writer, name: str, shape: Shape, heads: int, norm: tuple[str, float] | None = None) -> Heads:
    """(B, S, H·D) as heads; with weights (D) and an epsilon, the RMS norm of each, its mean in fp32."""
    batch, length, hidden = shape
    apart = write("Reshape", name, write.integers(batch, length, heads, hidden // heads))
    if norm is not None:
        weights, epsilon = norm
        wide = write("Cast", apart, to=_FLOAT)
        mean = write("ReduceMean", write("Mul", wide, wide), write.integers(-1))
        normal = write("Div", wide, write("Sqrt", write("Add", mean, write.array(np.array(epsilon, np.float32)))))
        apart = write("Mul", write("CastLike", normal, weights), weights)
    return Heads(write("Transpose", apart, perm=_MIDDLE), (batch, heads, length, hidden // heads))


def attend(
    write: Writer,
    q: Heads,
    k: Heads,
    v: Heads,
    *,
    softcap: float = 0.0,
    added: Sequence[str] = (),
    seen: Array | str | None = None,
    never: bool = False,
) -> str:
    """softmax(masks(q · kᵀ · scale)) · v as (B, S, H·D), of keys and values with a divisor of the heads of queries.

    `added`: values that broadcast and are added to the scores, of fp32 or of the queries' type. `seen`: which keys
    queries see, of (S, T) as a constant, or a value of booleans that broadcasts. That comes last: what is added, as of
    padding, may be as low as what is put for hidden keys, and would bring them back. With `never` they have no part
    even in rows whose other scores are -∞, which give 0.

    Raises:
        UnsupportedError: queries are no floats.
    """
    kind = write.dtype(write.input(0))
    if kind not in _NUMBERS:
        raise UnsupportedError(f"its query is of {kind.name.lower()}")
    scale = float(write.attribute("scale", 0.0)) or 1 / math.sqrt(q.shape[3])
    times = q.shape[1] // k.shape[1]
    scaled = write("Mul", q.name, write.array(np.array(scale, kind.numpy())))
    scores = write("MatMul", scaled, write("Transpose", _repeated(write, k, times), perm=[0, 1, 3, 2]))
    if kind in _HALF:
        scores = write("Cast", scores, to=_FLOAT)
    numbers = np.float64 if kind == ir.DataType.DOUBLE else np.float32
    if softcap:
        cap = write.array(np.array(softcap, numbers))
        scores = write("Mul", write("Tanh", write("Div", scores, cap)), cap)
    for each in added:
        scores = write("Add", scores, each)
    if seen is not None:
        shown = seen if isinstance(seen, str) else write.shared(seen, f"seen_{'x'.join(map(str, seen.shape))}")
        scores = write("Where", shown, scores, write.array(np.array(-math.inf if never else _LOWEST, numbers)))
    weights = write("Softmax", scores, axis=-1)
    if never and added:
        weights = write("Where", write("IsNaN", weights), write.array(np.zeros((), numbers)), weights)
    if kind in _HALF:
        weights = write("Cast", weights, to=int(kind))
    out = write("Transpose", write("MatMul", weights, _repeated(write, v, times)), perm=_MIDDLE)
    return str(write("Reshape", out, write.integers(q.shape[0], q.length, q.shape[1] * v.shape[3])))


def causal(queries: int, keys: int, window: int = 0) -> Array | None:
    """Which keys each query sees, of shape (S, T), the last query standing at the last key: those up to its own, the
    last `window` of them. None if that is all.

    Raises:
        UnsupportedError: it would be too large.
    """
    if queries == 1 and not 0 < window < keys:
        return None
    if queries * keys > LARGEST_MASK:
        raise UnsupportedError(f"its causal mask would have {queries} x {keys} elements: {LARGEST_MASK} are the most")
    seen = np.tri(queries, keys, keys - queries, dtype=bool)
    return seen & ~np.tri(queries, keys, keys - queries - window, dtype=bool) if window > 0 else seen


def bias_of_scores(write: Writer, place: int, scores: Shape) -> str | None:
    """The input that is added to scores (B, H, S, T), in fp32 where it is of half precision.

    Raises:
        UnsupportedError: it doesn't broadcast to them.
    """
    name = write.optional(place)
    if name is None:
        return None
    shape = write.shape(name)
    if len(shape) != 4 or any(size not in (1, wanted) for size, wanted in zip(shape, scores, strict=True)):
        raise UnsupportedError(f"its attention_bias has the shape {shape}, and its scores {scores}")
    return str(write("Cast", name, to=_FLOAT)) if write.dtype(name) in _HALF else name


def head_count(write: Writer, attribute: str) -> int:
    """An attribute that says how many heads there are.

    Raises:
        UnsupportedError: it isn't there, or no count.
    """
    heads = write.attribute(attribute, None, int)
    if not isinstance(heads, int) or heads < 1:
        raise UnsupportedError(f"its attribute {attribute} is {heads}")
    return heads


def is_positive(*shapes: Shape) -> None:
    """
    Raises:
        UnsupportedError: a dimension is 0.
    """
    if any(0 in shape for shape in shapes):
        raise UnsupportedError(f"it has empty inputs: {', '.join(map(str, shapes))}")


def joined(write: Writer, past: str | None, new: Heads) -> Heads:
    """The heads of a cache (B, H, P, D), if there is one and it is not empty, and the new ones behind them.

    Raises:
        UnsupportedError: it has another shape.
    """
    if past is None:
        return new
    shape = write.shape(past)
    batch, heads, length, dim = new.shape
    if len(shape) != 4 or (*shape[:2], shape[3]) != (batch, heads, dim):
        raise UnsupportedError(f"its cache has the shape {shape}: it must be {(batch, heads, '...', dim)}")
    if shape[2] == 0:
        return new
    return Heads(write("Concat", past, new.name, axis=2), (batch, heads, shape[2] + length, dim))


def multi_head_attention(write: Writer) -> list[str | None]:
    """`MultiHeadAttention`: queries (B, S, H·D), keys and values as those or (B, H, L, D), or packed as (B, L, H, 2, D)
    or all three as (B, S, H, 3, D)."""
    for place, name in ((8, "past_sequence_length"), (9, "cache_indirection")):
        if write.optional(place):
            raise UnsupportedError(f"it has the input {name}: its cache is a buffer longer than what is in it")
    heads = head_count(write, "num_heads")
    q, k, v = _operands(write, heads)
    new = k.length
    pasts = write.optional(6), write.optional(7)
    if (pasts[0] is None) != (pasts[1] is None):
        raise UnsupportedError("it has one of past_key and past_value, and not the other")
    if pasts[0] is not None and not write.wants(1):
        raise UnsupportedError("it has a past and gives no present: ONNX Runtime's own kernel leaves the past out then")
    k, v = joined(write, pasts[0], k), joined(write, pasts[1], v)
    if k.length != v.length:
        raise UnsupportedError(f"it has {k.length} keys and {v.length} values")
    scores = (q.shape[0], heads, q.length, k.length)
    seen = _unidirectional(write, q, k, new)
    added = _masks(write, write.optional(4), scores, counts=(q.shape[0], 3 * q.shape[0] + 2))
    bias = bias_of_scores(write, 5, scores)
    out = attend(write, q, k, v, seen=seen, added=[*added, *([bias] if bias else [])])
    return [out, k.name, v.name]


def attention(write: Writer) -> list[str | None]:
    """`Attention`: of x (B, S, E), with the projection x · weights + bias to queries, keys and values."""
    if write.attribute("do_rotary", 0):
        raise UnsupportedError("it turns queries and keys itself (do_rotary)")
    if write.attribute("past_present_share_buffer", 0) or write.optional(6):
        raise UnsupportedError("its cache is a buffer longer than what is in it (past_present_share_buffer)")
    x, heads = write.input(0), head_count(write, "num_heads")
    shape, weights = write.shape(x), write.shape(write.input(1))
    is_positive(shape, weights)
    if len(shape) != 3 or len(weights) != 2 or shape[2] != weights[0]:
        raise UnsupportedError(f"its input has the shape {shape}, and its weights {weights}")
    sizes = [int(size) for size in write.attribute("qkv_hidden_sizes", [])] or [weights[1] // 3] * 3
    if (
        len(sizes) != 3
        or sum(sizes) != weights[1]
        or sizes[0] != sizes[1]
        or any(size < 1 or size % heads for size in sizes)
    ):
        raise UnsupportedError(f"its weights of shape {weights} are not {sizes} for {heads} heads (qkv_hidden_sizes)")
    name = write.optional(2)
    if name is not None and write.shape(name) != (weights[1],):
        raise UnsupportedError(f"its bias has the shape {write.shape(name)}: it must be {(weights[1],)}")
    product = write("MatMul", x, write.input(1))
    bias = None if name is None else write.constant_or_none(name)
    if name is not None and (bias is None or bias.any()):
        product = write("Add", product, name)
    q, k, v = _parted(write, product, shape, sizes, heads)
    new = k.length
    past = write.optional(4)
    if past is not None:
        cached = write.shape(past)
        if len(cached) != 5 or cached[0] != 2:
            raise UnsupportedError(f"its past has the shape {cached}: it must be (2, batch, heads, length, dim)")
        if cached[3]:
            k, v = (_behind(write, past, cached, place, each) for place, each in enumerate((k, v)))
    scores = (q.shape[0], heads, q.length, k.length)
    seen = _unidirectional(write, q, k, new)
    added = _masks(write, write.optional(3), scores, counts=(shape[0], 2 * shape[0], 3 * shape[0] + 2))
    more = bias_of_scores(write, 5, scores)
    present = None
    if write.wants(1):
        if k.shape != v.shape:
            raise UnsupportedError(f"its output present is of keys {k.shape} and of values {v.shape}")
        present = write("Concat", *(write("Unsqueeze", each.name, write.integers(0)) for each in (k, v)), axis=0)
    return [attend(write, q, k, v, seen=seen, added=[*added, *([more] if more else [])]), present]


def _parted(write: Writer, product: str, shape: Shape, sizes: Sequence[int], heads: int) -> list[Heads]:
    """Queries, keys and values of one projection."""
    if len(set(sizes)) == 1:
        dim = sizes[0] // heads
        apart = write("Reshape", product, write.integers(*shape[:2], 3, heads, dim))
        return _gathered(write, write("Transpose", apart, perm=[2, 0, 3, 1, 4]), (shape[0], heads, shape[1], dim), 3)
    parts = write("Split", product, write.integers(*sizes), outputs=3, axis=-1)
    return [split(write, part, (*shape[:2], size), heads) for part, size in zip(parts, sizes, strict=True)]


def _gathered(write: Writer, packed: str, shape: Shape, count: int) -> list[Heads]:
    """The places of a first axis, each of a shape."""
    return [Heads(write("Gather", packed, write.array(np.array(place)), axis=0), shape) for place in range(count)]


def _behind(write: Writer, past: str, cached: Shape, place: int, new: Heads) -> Heads:
    batch, heads, length, dim = new.shape
    if cached != (2, batch, heads, cached[3], dim):
        raise UnsupportedError(f"its past has the shape {cached}: it must be {(2, batch, heads, '...', dim)}")
    own = write("Gather", past, write.array(np.array(place)), axis=0)
    return Heads(write("Concat", own, new.name, axis=2), (batch, heads, cached[3] + length, dim))


def _operands(write: Writer, heads: int) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values, with their bias."""
    names = [write.input(0), write.optional(1), write.optional(2)]
    shapes = [() if name is None else write.shape(name) for name in names]
    bias = write.optional(3)
    is_positive(*shapes)
    described = f"its query, key and value have the shapes {', '.join(map(str, shapes))}, for {heads} heads"
    ranks = tuple(map(len, shapes))
    batch, length = shapes[0][:2] if len(shapes[0]) > 1 else (0, 0)
    if ranks == (5, 0, 0):
        dim = shapes[0][4]
        if shapes[0] != (batch, length, heads, 3, dim):
            raise UnsupportedError(described)
        packed = write("Transpose", names[0], perm=[3, 0, 2, 1, 4])
        if bias is not None:
            if write.shape(bias) != (3 * heads * dim,):
                raise UnsupportedError(f"its bias has the shape {write.shape(bias)}; {described}")
            packed = write("Add", packed, write("Reshape", bias, write.integers(3, 1, heads, 1, dim)))
        q, k, v = _gathered(write, packed, (batch, heads, length, dim), 3)
        return q, k, v
    if ranks[0] != 3 or shapes[0][2] % heads:
        raise UnsupportedError(described)
    if ranks == (3, 0, 0):
        # As three in one, which ONNX Runtime lets only its decoder have.
        raise UnsupportedError(described)
    hidden = shapes[0][2]
    if ranks[1:] == (5, 0):
        if shapes[1] != (batch, shapes[1][1], heads, 2, hidden // heads) or bias is not None:
            raise UnsupportedError(described + (", with a bias" if bias is not None else ""))
        packed = write("Transpose", names[1], perm=[3, 0, 2, 1, 4])
        k, v = _gathered(write, packed, (batch, heads, shapes[1][1], hidden // heads), 2)
        return split(write, write.input(0), shapes[0], heads), k, v
    if ranks[1:] == (4, 4):
        if shapes[1] != (batch, heads, shapes[1][2], hidden // heads) or shapes[2][:3] != shapes[1][:3]:
            raise UnsupportedError(described)
        sizes = hidden, hidden, heads * shapes[2][3]  # of the bias, though keys and values have theirs already
        q = split(write, _biased(write, bias, sizes, 1)[0] if bias else write.input(0), shapes[0], heads)
        return q, Heads(write.input(1), shapes[1]), Heads(write.input(2), shapes[2])
    if (
        ranks[1:] != (3, 3)
        or shapes[1] != (batch, shapes[1][1], hidden)
        or shapes[2][:2] != shapes[1][:2]
        or shapes[2][2] % heads
    ):
        raise UnsupportedError(described)
    biased = [write.input(place) for place in range(3)]
    if bias is not None:
        biased = _biased(write, bias, (hidden, hidden, shapes[2][2]), 3)
    q, k, v = (split(write, name, shape, heads) for name, shape in zip(biased, shapes, strict=True))
    return q, k, v


def _biased(write: Writer, bias: str, sizes: Sequence[int], count: int) -> list[str]:
    """So many of the first inputs, each with its part of a bias of parts of some sizes."""
    if write.shape(bias) != (sum(sizes),):
        raise UnsupportedError(f"its bias has the shape {write.shape(bias)}: it must be {(sum(sizes),)}")
    inputs = [write.input(place) for place in range(count)]
    array = write.constant_or_none(bias)
    if array is not None and not array.any():
        return inputs
    ends = np.cumsum(sizes).tolist()
    made = []
    for name, low, high in zip(inputs, [0, *ends], ends, strict=False):
        if array is not None:
            part = write.shared(array[low:high], f"{bias}_{low}_to_{high}")
        else:
            part = write("Slice", bias, write.integers(low), write.integers(high), write.integers(0))
        made.append(write("Add", name, part))
    return made


def _unidirectional(write: Writer, q: Heads, k: Heads, new: int) -> Array | None:
    if not write.attribute("unidirectional", 0):
        return None
    if q.length not in (1, new):
        raise UnsupportedError(f"it is unidirectional, with {q.length} queries and {new} new keys")
    return causal(q.length, k.length)


def _masks(write: Writer, name: str | None, scores: Shape, counts: Sequence[int]) -> list[str]:
    """What a mask of integers adds to scores (B, H, S, T): 0 where it is above 0, else `mask_filter_value`.

    It is of keys (B, T), of scores (B, S, T), or of all places of the longest sequence (B, 1, M, M); or it counts the
    keys of each sequence, and is of so many numbers as `counts` say: B, 2·B with the first place of each behind them,
    or 3·B + 2 with the sums of all before each.
    """
    if name is None:
        return []
    shape = write.shape(name)
    if write.dtype(name) != ir.DataType.INT32:
        raise UnsupportedError(f"its mask is of {write.dtype(name).name.lower()}: it must be of int32")
    batch, _, queries, keys = scores
    if shape in ((batch, 1), (1, 1)) and shape != (batch, keys):
        return []  # the same for all keys
    if shape == (batch, keys):
        shown = write("Unsqueeze", _above(write, name), write.integers(1, 2))
    elif shape == (batch, queries, keys):
        shown = write("Unsqueeze", _above(write, name), write.integers(1))
    elif len(shape) == 1 and shape[0] in counts:
        places = write.array(np.arange(keys, dtype=np.int32))
        shown = write("Less", places, _counts(write, name, 0, batch))
        if shape == (2 * batch,):
            shown = write("And", shown, write("GreaterOrEqual", places, _counts(write, name, batch, batch)))
    elif len(counts) == 3 and shape == (batch, 1, shape[-1], shape[-1]) and shape[-1] >= keys:
        if write.attribute("unidirectional", 0):
            raise UnsupportedError(f"it is unidirectional, with a mask of the shape {shape}")
        starts, ends = write.integers(keys - queries, 0), write.integers(keys, keys)
        shown = _above(write, write("Slice", name, starts, ends, write.integers(2, 3)))
    else:
        raise UnsupportedError(f"its mask has the shape {shape}, and its scores {scores}")
    fill = float(write.attribute("mask_filter_value", -10000.0))
    kind = np.float64 if write.dtype(write.input(0)) == ir.DataType.DOUBLE else np.float32
    numbers = [write.array(np.array(number, kind)) for number in (0, fill)]
    return [write("Where", shown, *numbers)]


def _above(write: Writer, name: str) -> str:
    """Where integers are above 0."""
    return str(write("Greater", name, write.array(np.zeros((), np.int32))))


def _counts(write: Writer, name: str, start: int, count: int) -> str:
    """So many numbers of a vector, one for each sequence."""
    if write.shape(name) != (count,):
        name = write("Slice", name, write.integers(start), write.integers(start + count), write.integers(0))
    return str(write("Reshape", name, write.integers(count, 1, 1, 1)))


def _repeated(write: Writer, heads: Heads, times: int) -> str:
    """Each head so many times in a row."""
    if times == 1:
        return heads.name
    batch, count, length, dim = heads.shape
    apart = write("Unsqueeze", heads.name, write.integers(2))
    spread = write("Expand", apart, write.integers(batch, count, times, length, dim))
    return str(write("Reshape", spread, write.integers(batch, count * times, length, dim)))
