"""`attention`: the fused attention as people call it, on arrays of any library."""

from __future__ import annotations

import math
from typing import Any

from tilewright.kernels.arrays import View
from tilewright.kernels.call import New, Operation, Prepared
from tilewright.kernels.constants import checked_constant
from tilewright.kernels.dtypes import wanted_dtype
from tilewright.kernels.epilogue import FLOATS, sums_dtype
from tilewright.kernels.ops.attention.launch import ATTENTION
from tilewright.kernels.ops.attention.operands import SCALARS, Options, dense_strides, problem_of, strides_of
from tilewright.kernels.ops.attention.problem import SOFTCAP, strides
from tilewright.kernels.ops.attention.space import AttentionConfig
from tilewright.kernels.options import flag, integer
from tilewright.tuning_db.errors import UsageError


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Any = None,
    kv_lens: Any = None,
    return_lse: bool = False,
    out_dtype: Any = None,
    out: Any = None,
    lse: Any = None,
    config: AttentionConfig | None = None,
) -> Any:
    """Fused attention: `softmax(softcap · tanh(scale · Q·Kᵀ / softcap) + bias - slope · |distance|) · V` of every query
    head, over the keys that its query sees.

    Query i of a sequence stands at key i + keys - queries: the last at the last. Scores and sums are fp32. A query that
    sees no key gives 0, and -inf as its log-sum-exp. The configuration is the tuned one for these shapes on this GPU,
    where there is one; see docs/tuning-database.md. The call returns as soon as the work is on the caller's current
    stream.

    Args:
        q: (batch, heads, queries, head dim), of fp16, fp32, (sm_80 on) bf16, fp8e5m2 or (sm_89 on) fp8e4m3. Head
            dims are 16 to 256, of fp8 32 to 256. With `cu_seqlens_q`: (tokens, heads, head dim), sequence after
            sequence.
        k, v: (batch, key heads, keys, head dim), of the same dtype; each key head serves heads / key heads query heads
            that follow each other, and the head dim of v may be another. With `cu_seqlens_k`: (tokens, key heads, head
            dim). With `block_table`: (blocks, block size, key heads, head dim).
        causal: a query sees no key behind its own place.
        scale: factor on Q·Kᵀ, above 0; by default 1/√(head dim). Compiled in, as `softcap` is: once for each value.
        window: (left, right): a query sees so many keys before and behind its own place; None is no limit.
        softcap: scores become `softcap · tanh(score / softcap)`, before `bias` and `alibi_slopes`.
        bias: (batch or 1, heads or 1, queries or 1, keys), fp16, bf16, fp32 or fp8: added to the scores. -inf masks.
        alibi_slopes: (heads,), fp32: `slope · |distance|` is taken off a score (Press et al., arXiv:2108.12409).
        sinks: (heads,), fp32: one more score of each head, in the denominator (and log-sum-exp) alone.
        q_scale, k_scale, v_scale: what fp8 q, k and v are to be multiplied by: a number above 0, or an fp32 array of
            one element on the GPU, of 0 or more.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32: where each sequence begins, and the number of tokens.
        max_seqlen_q, max_seqlen_k: the longest sequence, or a number above; needed with `cu_seqlens_q` and
            `cu_seqlens_k`, for to read it from the GPU would mean waiting. Queries beyond it are not computed.
        block_table: (batch, most blocks of a sequence), int32: which block holds each stretch of a sequence's keys.
        kv_lens: (batch,), int32: keys of each sequence, in its blocks or at the beginning of a longer k and v.
        return_lse: also return the log-sum-exp of the scores.
        out_dtype: the result's dtype, by its canonical name or as a library has it; by default that of `q`, bf16 for
            fp8.
        out: array to write to, shaped as `q` but for the head dim, which is that of `v`.
        lse: fp32 array to write the log-sum-exp to: (batch, heads, queries), or (tokens, heads).
        config: a configuration to use instead of the tuned one.

    Returns:
        `out`, or a new array of the library that `q` is of; with `return_lse` or `lse`, that and the log-sum-exp.

    Head dims must be contiguous; otherwise any strides will do: slices of one wide projection, and (batch, tokens,
    heads, head dim) with its axes swapped.

    Raises:
        ProblemError: shapes, dtypes or forms that don't go together; the message has them.
        UnsupportedError: strides or a dtype that kernels, or this GPU, can't take.
        IllegalConfigError: `config` breaks a limit of the problem or the GPU.
        UsageError: an option that can't be.
        MissingDependencyError: CuPy or a GPU is needed and absent.
        CompileError, LaunchError: the compiler or the driver refused the configuration.
        PackError, NotPackedError: this process's pack can't be used, or lacks the problem (docs/packs.md).
    """
    if config is not None and not isinstance(config, AttentionConfig):
        raise UsageError(f"config must be an AttentionConfig, not {config!r}")
    if q_scale is not None or k_scale is not None or v_scale is not None:
        # All or none: a factor of 1 costs a load.
        q_scale, k_scale, v_scale = (1.0 if scale is None else scale for scale in (q_scale, k_scale, v_scale))
    options = Options(
        flag("causal", causal),
        _window(window),
        _constant("scale", scale),
        _constant("softcap", softcap),
        _size("max_seqlen_q", max_seqlen_q),
        _size("max_seqlen_k", max_seqlen_k),
        flag("return_lse", return_lse) or lse is not None,
        wanted_dtype(out_dtype),
        config,
    )
    inputs = (
        q, k, v, bias, alibi_slopes, sinks, q_scale, k_scale, v_scale, cu_seqlens_q, cu_seqlens_k, block_table, kv_lens,
    )  # fmt: skip
    result, sums = _ATTENTION.run(inputs, (out, lse), options)
    return (result, sums) if options.return_lse else result


def _window(window: Any) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise UsageError(f"window={window!r} must be (left, right), each a number of keys or None")
    left, right = (_size("window", size, least=0) for size in window)
    return left, right


def _size(name: str, value: Any, *, least: int = 1) -> int | None:
    size = integer(name, value)
    if size is not None and size < least:
        raise UsageError(f"{name}={size} must be at least {least}, or None")
    return size


def _constant(name: str, value: Any) -> float | None:
    return None if value is None else checked_constant(name, value)


def _prepare(views: dict[str, View], options: tuple[Any, ...]) -> Prepared:
    """Everything about a call that its arrays' signatures decide."""
    wanted = Options(*options)
    problem = problem_of(views, wanted)
    shapes = {name: output.shape for name, output in problem.outputs().items()}
    if problem.varlen:
        shapes = {name: (views["q"].shape[0], *shape[1:]) for name, shape in shapes.items()}
    values: dict[str, int] = {}
    if problem.strided:
        new = {name: dense_strides(shape) for name, shape in shapes.items()}
        values = strides(problem, new | strides_of(views))
    constants: list[tuple[str, float]] = []
    if wanted.scale not in (None, 1 / math.sqrt(problem.D)):
        constants.append(("SCALE", wanted.scale))
    if wanted.softcap not in (None, SOFTCAP):
        constants.append(("SOFTCAP", wanted.softcap))
    return _ATTENTION.planned(
        problem, views, shapes=shapes, strides=values, config=wanted.config, constants=tuple(constants)
    )


def _results(views: dict[str, View], options: tuple[Any, ...]) -> tuple[New, ...]:
    wanted = Options(*options)
    rows = views["q"].shape[:-1]
    kind = wanted.out_dtype or sums_dtype(views["q"].dtype, fused=True)
    return New((*rows, views["v"].shape[-1]), kind), New(rows, "fp32")


INPUTS = (
    "q",
    "k",
    "v",
    "bias",
    "alibi_slopes",
    "sinks",
    *SCALARS,
    "cu_seqlens_q",
    "cu_seqlens_k",
    "block_table",
    "kv_lens",
)

OPTIONS = {
    "causal": "bool",
    "window": "window",
    **dict.fromkeys(("scale", "softcap"), "float?"),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), "int?"),
    "return_lse": "bool",
    "out_dtype": "str?",
    "config": "config",
}
"""The fields of `Options`."""

_ATTENTION = Operation(
    "attention",
    ATTENTION,
    INPUTS,
    OPTIONS,
    _prepare,
    _results,
    outputs=("out", "lse"),
    scalars=SCALARS,
    required=("q", "k", "v"),
    optional={"lse": "return_lse"},
    dtypes=dict.fromkeys(("q", "k", "v", "bias", "out"), FLOATS)
    | dict.fromkeys(("alibi_slopes", "sinks", "lse"), ("fp32",))
    | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "block_table", "kv_lens"), ("int32",)),
)
