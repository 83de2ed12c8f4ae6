"""How an attention configuration becomes launches, and the `Kernel` object that ties the op together."""

from __future__ import annotations

import math

from tilewright.kernels.dtypes import dtype
from tilewright.kernels.kernel import Argument, Kernel, Launch, Scratch
from tilewright.kernels.ops.attention import combine, jit, persistent, problem, reference, space, work
from tilewright.kernels.ops.attention.default import default
from tilewright.kernels.ops.attention.features import FEATURES
from tilewright.kernels.ops.attention.problem import SOFTCAP, STEPS, AttentionProblem
from tilewright.kernels.ops.attention.space import (
    AttentionConfig,
    head_blocks,
    key_blocks,
    tile_heads,
    tiles,
    value_blocks,
)

COMBINE_ELEMENTS = 4096
"""Partial results that one block of the second launch adds up at once: 32 registers of a thread."""


def launches(problem: AttentionProblem, config: AttentionConfig) -> tuple[Launch, ...]:
    """The forward pass and, with splits of the keys, their sum. With `strided`, stride arguments are left to be bound
    to the arrays."""
    if config.PERSISTENT:
        return (_persistent(problem, config),)
    heads = tile_heads(problem, config)
    rows = problem.B * problem.H * problem.Sq
    split = config.SPLIT_KV > 1
    block_d, tail_d = head_blocks(problem.D, config.BLOCK_M, problem.smallest_dim)
    block_dv, tail_dv = value_blocks(problem, config)
    windows = problem.window_left is not None or problem.right is not None
    scratch = (
        Scratch("partial", "float32", rows * config.SPLIT_KV * problem.dim_v),
        Scratch("partial_lse", "float32", rows * config.SPLIT_KV),
    )
    forward = Launch(
        fn=jit.attention_kernel,
        grid=(tiles(problem, config), config.SPLIT_KV, 1),
        arguments=(
            _pointer(problem, "q_ptr", problem.dtype),
            _pointer(problem, "k_ptr", problem.dtype),
            _pointer(problem, "v_ptr", problem.dtype),
            _pointer(problem, "bias_ptr", problem.bias),
            _array("alibi_slopes_ptr", "*fp32", problem.alibi),
            _array("sinks_ptr", "*fp32", problem.sinks),
            *(_array(f"{name}_scale_ptr", "*fp32", problem.scales) for name in "qkv"),
            _array("cu_seqlens_q_ptr", "*i32", problem.varlen),
            _array("cu_seqlens_k_ptr", "*i32", problem.varlen and not problem.page_size),
            _array("block_table_ptr", "*i32", bool(problem.page_size)),
            _array("kv_lens_ptr", "*i32", problem.kv_lens),
            _size("H", problem.H),
            _size("Sq", problem.Sq),
            _size("Skv", problem.Skv),
            _size("window_left", problem.window_left),
            _size("window_right", None if problem.causal else problem.window_right),
            _size("split_blocks", math.ceil(key_blocks(problem, config) / config.SPLIT_KV) if split else None),
            *(_stride(f"{name}_{step}_stride", problem.strided) for name in "qkv" for step in STEPS),
            *(_stride(f"bias_{step}_stride", problem.strided and problem.bias is not None) for step in STEPS),
            _stride("block_table_stride", problem.strided and bool(problem.page_size)),
            *(_stride(f"out_{step}_stride", problem.strided and not split) for step in STEPS),
            _pointer(problem, "out_ptr", None if split else problem.output_dtype),
            _array("lse_ptr", "*fp32", problem.lse and not split),
            Argument("partial_ptr", "*fp32" if split else None, aligned=True),
            Argument("partial_lse_ptr", "*fp32" if split else None, aligned=True),
        ),
        constexprs=(
            ("SCALE", 1 / math.sqrt(problem.D)),
            ("SOFTCAP", SOFTCAP if problem.softcap else 0.0),
            ("CAUSAL", problem.causal),
            ("GROUP", problem.H // problem.kv_heads),
            ("PAGE", problem.page_size),
            ("BIAS_BATCH", problem.bias_batch),
            ("BIAS_HEADS", problem.bias_heads),
            ("BIAS_ROWS", problem.bias_rows),
            ("DIM", problem.D),
            ("DIM_V", problem.dim_v),
            ("BLOCK_D", block_d),
            ("TAIL_D", tail_d),
            ("BLOCK_DV", block_dv),
            ("TAIL_DV", tail_dv),
            ("ALIGNED", problem.aligned),
            ("EVEN_M", not problem.varlen and problem.Sq * heads % config.BLOCK_M == 0),
            ("MASKS", windows or problem.varlen or problem.kv_lens or problem.Skv % config.BLOCK_N != 0),
            ("BLOCK_M", config.BLOCK_M),
            ("BLOCK_N", config.BLOCK_N),
            ("SPLIT_KV", config.SPLIT_KV),
            ("OVERLAP", config.OVERLAP),
            ("TMA", config.TMA),
            ("WARP_SPECIALIZE", config.WARP_SPECIALIZE),
            ("STAGES", config.num_stages if config.WARP_SPECIALIZE else 0),
            ("GROUP_H", config.GROUP_H),
            ("PACK", heads > 1),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        scratch=scratch if split else (),
    )
    if not split:
        return (forward,)
    whole = 2 ** math.ceil(math.log2(problem.dim_v))
    columns = min(whole, max(16, COMBINE_ELEMENTS // config.SPLIT_KV))
    second = Launch(
        fn=combine.combine_kernel,
        grid=(rows, math.ceil(problem.dim_v / columns), 1),
        arguments=(
            Argument("partial_ptr", "*fp32", aligned=True),
            Argument("partial_lse_ptr", "*fp32", aligned=True),
            _array("cu_seqlens_q_ptr", "*i32", problem.varlen),
            _size("H", problem.H),
            _size("Sq", problem.Sq),
            *(_stride(f"out_{step}_stride", problem.strided) for step in STEPS),
            _pointer(problem, "out_ptr", problem.output_dtype),
            _array("lse_ptr", "*fp32", problem.lse),
        ),
        constexprs=(
            ("SPLIT_KV", config.SPLIT_KV),
            ("DIM_V", problem.dim_v),
            ("BLOCK_DV", columns),
            ("ALIGNED", problem.aligned),
        ),
        num_warps=max(1, min(4, config.SPLIT_KV * columns // 512)),
        num_stages=1,
        scratch=scratch,
    )
    return forward, second


def _persistent(problem: AttentionProblem, config: AttentionConfig) -> Launch:
    """The launch of blocks that go on from tile to tile, one for each SM."""
    return Launch(
        fn=persistent.persistent_kernel,
        grid=(tiles(problem, config), 1, 1),
        arguments=(
            *(_pointer(problem, f"{name}_ptr", problem.dtype) for name in "qkv"),
            _array("alibi_slopes_ptr", "*fp32", problem.alibi),
            _array("sinks_ptr", "*fp32", problem.sinks),
            _size("B", problem.B),
            _size("H", problem.H),
            _size("Sq", problem.Sq),
            _size("Skv", problem.Skv),
            _size("window_left", problem.window_left),
            _size("window_right", None if problem.causal else problem.window_right),
            _pointer(problem, "out_ptr", problem.output_dtype),
            _array("lse_ptr", "*fp32", problem.lse),
        ),
        constexprs=(
            ("SCALE", 1 / math.sqrt(problem.D)),
            ("SOFTCAP", SOFTCAP if problem.softcap else 0.0),
            ("CAUSAL", problem.causal),
            ("GROUP", problem.H // problem.kv_heads),
            ("DIM", problem.D),
            ("DIM_V", problem.dim_v),
            ("MASKS", problem.window_left is not None or problem.right is not None),
            ("BLOCK_M", config.BLOCK_M),
            ("BLOCK_N", config.BLOCK_N),
            ("WARP_SPECIALIZE", config.WARP_SPECIALIZE),
            ("STAGES", config.num_stages if config.WARP_SPECIALIZE else 0),
            ("GROUP_H", config.GROUP_H),
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        blocks_per_sm=1,
    )


def _pointer(problem: AttentionProblem, name: str, kind: str | None) -> Argument:
    return Argument(name, kind and "*" + dtype(kind).triton, aligned=problem.aligned)


def _array(name: str, kind: str, present: bool) -> Argument:
    return Argument(name, kind if present else None)


def _size(name: str, value: int | None) -> Argument:
    return Argument(name, None if value is None else "i32", value, aligned=value is not None and value % 16 == 0)


def _stride(name: str, present: bool) -> Argument:
    return Argument(name, "i64" if present else None)


ATTENTION: Kernel[AttentionProblem, AttentionConfig] = Kernel(
    name="attention",
    problem=AttentionProblem,
    space=space.SPACE,
    jit_functions=(jit.attention_kernel, persistent.persistent_kernel, combine.combine_kernel),
    default=default,
    launches=launches,
    reference=reference.reference,
    tolerance=reference.tolerance,
    estimate=work.estimate,
    work=work.work,
    near=problem.near,
    supported=problem.supported,
    ragged=space.ragged,
    strides=problem.strides,
    features=FEATURES,
    constants=lambda problem: ("SCALE", "SOFTCAP") if problem.softcap else ("SCALE",),
)
