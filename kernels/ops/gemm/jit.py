"""Device code of the fused GEMM."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.epilogue import finish


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of the pid-th tile, walking GROUP_M rows at a time so that neighbours share panels in L2."""
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first_m + within % rows, within // rows


@triton.jit
def load_tile(pointers, mask_rows, mask_columns, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A tile with zeros out of bounds; a dimension known to divide evenly costs no mask."""
    if EVEN_ROWS and EVEN_COLUMNS:
        tile = tl.load(pointers)
    elif EVEN_ROWS:
        tile = tl.load(pointers, mask=mask_columns, other=0.0)
    elif EVEN_COLUMNS:
        tile = tl.load(pointers, mask=mask_rows, other=0.0)
    else:
        tile = tl.load(pointers, mask=mask_rows & mask_columns, other=0.0)
    return tile


@triton.jit
def gemm_kernel(
    # inputs
    a_ptr,
    b_ptr,
    bias_ptr,  # (N,), or None
    residual_ptr,  # (batch, M, N), or None
    alpha_ptr,  # one fp32 element, or None for 1
    out_scale_ptr,  # one fp32 element, or None for a result that is not quantised
    # sizes
    M,
    N,
    K,
    # strides in elements, between rows of a row-major operand and columns of a column-major one; None where dense
    a_stride,
    b_stride,
    residual_stride,
    a_batch_stride,
    b_batch_stride,
    residual_batch_stride,
    out_stride,
    out_batch_stride,
    # outputs
    out_ptr,
    workspace_ptr,  # fp32 partial tiles of split-K, or None
    counters_ptr,  # int32 per tile: blocks that have arrived; zero before and after; None without split-K
    # constexprs
    A_COLUMN_MAJOR: tl.constexpr,
    B_COLUMN_MAJOR: tl.constexpr,
    A_BROADCAST: tl.constexpr,  # one matrix for the whole batch
    B_BROADCAST: tl.constexpr,
    RESIDUAL_BROADCAST: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8_SUM: tl.constexpr,  # fp8 products that tensor cores may add up before the sum goes to fp32; 0 for other types
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """out = activation(alpha · A·B + bias + residual): one output tile, or one split of its K, a program."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    batch = (tile // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = tile_of(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)

    # Offsets wrap silently in 32 bits: widen before a stride multiplies.
    rows_m = M.to(tl.int64)
    columns_n = N.to(tl.int64)
    depth_k = K.to(tl.int64)
    if a_stride is None:
        a_ld = rows_m if A_COLUMN_MAJOR else depth_k
        a_batch = 0 if A_BROADCAST else rows_m * depth_k
    else:
        a_ld = a_stride.to(tl.int64)
        a_batch = a_batch_stride.to(tl.int64)
    if b_stride is None:
        b_ld = depth_k if B_COLUMN_MAJOR else columns_n
        b_batch = 0 if B_BROADCAST else columns_n * depth_k
    else:
        b_ld = b_stride.to(tl.int64)
        b_batch = b_batch_stride.to(tl.int64)
    if out_stride is None:
        out_ld = columns_n
        out_batch = rows_m * columns_n
    else:
        out_ld = out_stride.to(tl.int64)
        out_batch = out_batch_stride.to(tl.int64)

    offsets_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_blocks = tl.cdiv(K, BLOCK_K)
    blocks_per_split = tl.cdiv(k_blocks, SPLIT_K)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, k_blocks)
    offsets_k = first * BLOCK_K + tl.arange(0, BLOCK_K)

    a_base = a_ptr + batch * a_batch
    b_base = b_ptr + batch * b_batch
    if A_COLUMN_MAJOR:
        a_pointers = a_base + offsets_m[:, None] + offsets_k[None, :].to(tl.int64) * a_ld
        a_step = BLOCK_K * a_ld
    else:
        a_pointers = a_base + offsets_m[:, None].to(tl.int64) * a_ld + offsets_k[None, :]
        a_step = BLOCK_K
    if B_COLUMN_MAJOR:
        b_pointers = b_base + offsets_k[:, None] + offsets_n[None, :].to(tl.int64) * b_ld
        b_step = BLOCK_K
    else:
        b_pointers = b_base + offsets_k[:, None].to(tl.int64) * b_ld + offsets_n[None, :]
        b_step = BLOCK_K * b_ld

    mask_m = offsets_m[:, None] < M
    mask_n = offsets_n[None, :] < N
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(first, last):
        # Both operands are zero beyond K: one alone would let a NaN of the other's padding through.
        a = load_tile(a_pointers, mask_m, offsets_k[None, :] < K, EVEN_M, EVEN_K)
        b = load_tile(b_pointers, offsets_k[:, None] < K, mask_n, EVEN_K, EVEN_N)
        if FP8_SUM > 0:
            accumulator = tl.dot(a, b, accumulator, max_num_imprecise_acc=FP8_SUM)
        else:
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        a_pointers += a_step
        b_pointers += b_step
        offsets_k += BLOCK_K

    if SPLIT_K > 1:
        # Every block leaves its partial tile; the one that arrives last adds them up in the order of the splits, so
        # the result does not depend on who that was.
        inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partials = workspace_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N)
        tl.store(partials + split * (BLOCK_M * BLOCK_N) + inside, accumulator)
        # All threads' stores come before the one thread's release below.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLIT_K - 1:
            tl.debug_barrier()
            accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for s in range(SPLIT_K):
                # Written by other SMs during this launch: read from L2, where they are.
                accumulator += tl.load(partials + s * (BLOCK_M * BLOCK_N) + inside, cache_modifier=".cg")
            tl.store(counters_ptr + tile, 0)
            store_tile(
                accumulator, bias_ptr, residual_ptr, alpha_ptr, out_scale_ptr, M, N, residual_stride,
                residual_batch_stride, out_ptr,
                out_ld, out_batch, batch, offsets_m, offsets_n, RESIDUAL_BROADCAST, EVEN_M, EVEN_N, ACTIVATION,
            )  # fmt: skip
    else:
        store_tile(
            accumulator, bias_ptr, residual_ptr, alpha_ptr, out_scale_ptr, M, N, residual_stride, residual_batch_stride,
            out_ptr,
            out_ld, out_batch, batch, offsets_m, offsets_n, RESIDUAL_BROADCAST, EVEN_M, EVEN_N, ACTIVATION,
        )  # fmt: skip


@triton.jit
def store_tile(
    accumulator,
    bias_ptr,
    residual_ptr,
    alpha_ptr,
    out_scale_ptr,
    M,
    N,
    residual_stride,
    residual_batch_stride,
    out_ptr,
    out_ld,
    out_batch,
    batch,
    offsets_m,
    offsets_n,
    RESIDUAL_BROADCAST: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The epilogue of one tile and its only store."""
    mask_m = offsets_m[:, None] < M
    mask_n = offsets_n[None, :] < N
    if alpha_ptr is not None:
        accumulator *= tl.load(alpha_ptr)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offsets_n, mask=offsets_n < N, other=0.0)
        accumulator += bias.to(tl.float32)[None, :]
    residual = None
    if residual_ptr is not None:
        if residual_stride is None:
            residual_ld = N.to(tl.int64)
            residual_batch = 0 if RESIDUAL_BROADCAST else M.to(tl.int64) * residual_ld
        else:
            residual_ld = residual_stride.to(tl.int64)
            residual_batch = residual_batch_stride.to(tl.int64)
        residual_pointers = (
            residual_ptr + batch * residual_batch + offsets_m[:, None].to(tl.int64) * residual_ld + offsets_n[None, :]
        )
        residual = load_tile(residual_pointers, mask_m, mask_n, EVEN_M, EVEN_N)
    y = finish(accumulator, residual, ACTIVATION, out_scale_ptr, out_ptr.dtype.element_ty)
    out_pointers = out_ptr + batch * out_batch + offsets_m[:, None].to(tl.int64) * out_ld + offsets_n[None, :]
    if EVEN_M and EVEN_N:
        tl.store(out_pointers, y)
    else:
        tl.store(out_pointers, y, mask=mask_m & mask_n)
