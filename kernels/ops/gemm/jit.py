# mypy: ignore-errors
"""Device code of the fused GEMM: which tile a program works on, and how its parts go together."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.ops.gemm.mainloop import described_sums, matrix_descriptor, sums, upright
from tilewright.kernels.ops.gemm.tail import store_in_pieces
from tilewright.kernels.ops.gemm.weights import weight_sums
from tilewright.kernels.partials import last_to_arrive, store_partial, sum_of_partials
from tilewright.kernels.specialise import behind_barriers


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of the pid-th tile, walking GROUP_M rows at a time so that neighbours share panels in L2."""
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first_m + within % rows, within // rows


@triton.jit
def group_of(tile_m, offsets_ptr, M, GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Group of a tile row, its first row, and the end of the group: equal or beyond for tile rows that are not used.

    Group g is the rows offsets[g] to offsets[g + 1]; tiles never span two. There are M // BLOCK_M + GROUPS tile rows,
    as many as any offsets can need.
    """
    index = tl.arange(0, SLOTS)
    present = index < GROUPS
    starts = tl.maximum(tl.load(offsets_ptr + index, mask=present, other=0), 0)
    ends = tl.minimum(tl.load(offsets_ptr + index + 1, mask=present, other=0), M)
    tiles = (tl.maximum(ends - starts, 0) + BLOCK_M - 1) // BLOCK_M
    group = tl.sum((tl.cumsum(tiles, 0) <= tile_m).to(tl.int32), 0)
    before = tl.sum(tl.where(index < group, tiles, 0), 0)
    here = index == group  # nowhere, for a tile row that is not used: it starts at the end, which is 0
    start = tl.sum(tl.where(here, starts, 0), 0)
    end = tl.sum(tl.where(here, ends, 0), 0)
    return tl.minimum(group, GROUPS - 1), start + (tile_m - before) * BLOCK_M, end


@triton.jit
def leading(stride, rows, columns, COLUMN_MAJOR: tl.constexpr):
    """Elements from row to row, or column to column, of a matrix: the stride argument, or a row's (column's) length."""
    # Offsets wrap silently in 32 bits: widen before a stride multiplies.
    if stride is None:
        stride = rows if COLUMN_MAJOR else columns
    return stride.to(tl.int64)


@triton.jit
def gemm_kernel(
    # inputs
    a_ptr,
    b_ptr,
    a_scale_ptr,  # one fp32, (batch, M) for rows, or None
    b_scale_ptr,  # one fp32, (N,) for columns, (K / GROUP_SIZE, N) for groups; one such per group of rows; or None
    b_zero_ptr,  # (K / GROUP_SIZE, N) or (1, N) of B's dtype, uint8 for int4; one such per group of rows; or None
    bias_ptr,  # (N,), (GROUPS, N), (M,) along M, or None
    residual_ptr,  # (batch, M, N), for gated pairs (batch, M, N / 2), or None
    alpha_ptr,  # one fp32 element, or None for 1
    out_scale_ptr,  # one fp32 element, or None for a result that is not quantised
    offsets_ptr,  # int32, (GROUPS + 1,): group g is the rows offsets[g] to offsets[g + 1]; or None
    # sizes
    M,
    N,
    K,
    batch,  # None for 1, and where the grid says it
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
    workspace_ptr,  # partial tiles of split-K, fp32 or int32, or None
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
    A_SCALE: tl.constexpr,  # tensor, row or None
    B_SCALE: tl.constexpr,  # tensor, column, group or None
    BIAS_AXIS: tl.constexpr,
    GATED: tl.constexpr,  # halves, interleaved or None
    ACTIVATION: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,  # behind the activation; of gated pairs it always is
    WEIGHTS: tl.constexpr,  # int8 or int4 under wider activations, or None
    GROUP_SIZE: tl.constexpr,  # rows of B that share a scale; 0 for all
    GROUPS: tl.constexpr,  # of rows, each with a B of its own; 0 for none
    SLOTS: tl.constexpr,  # GROUPS, rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PERSISTENT: tl.constexpr,  # a program goes on to tiles that are a whole grid further
    FLATTEN: tl.constexpr,  # and starts to load the next tile while it finishes one
    WARP_SPECIALIZE: tl.constexpr,  # one warp group copies, two multiply: see `work.SPECIALIZED_WARPS`
    STAGES: tl.constexpr,  # of its copies: `num_stages`
    TMA: tl.constexpr,  # operands come by tensor descriptors
    PIECES: tl.constexpr,  # of a tile's columns, for the epilogue: see `store_in_pieces`
    PAIRS: tl.constexpr,  # weights are unpacked two at a time, by inline PTX
):
    """out = activation(alpha · scales · (A·B) + bias + residual), with RESIDUAL_LAST activation(… + bias) + residual;
    with GATED, [g|u] = alpha · scales · (A·B) + bias and out = activation(g) · u + residual. One output tile, or one
    split of its K, a program."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = M // BLOCK_M + GROUPS if GROUPS > 0 else tl.cdiv(M, BLOCK_M)
    if PERSISTENT:
        tiles = tiles_m * tiles_n if batch is None else tiles_m * tiles_n * batch
        a_descriptor = None
        b_descriptor = None
        if TMA:
            COLUMNS: tl.constexpr = BLOCK_N // 2 if GATED == "halves" else BLOCK_N
            a_ld = leading(a_stride, M, K, A_COLUMN_MAJOR)
            b_ld = leading(b_stride, K, N, B_COLUMN_MAJOR)
            a_descriptor = matrix_descriptor(a_ptr, M, K, a_ld, A_COLUMN_MAJOR, BLOCK_M, BLOCK_K)
            b_descriptor = matrix_descriptor(b_ptr, K, N, b_ld, B_COLUMN_MAJOR, BLOCK_K, COLUMNS)
        start = tl.program_id(0)
        if WARP_SPECIALIZE:
            start = behind_barriers(start, STAGES)
        for tile in tl.range(start, tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
            gemm_tile(
                tile, tiles_m, tiles_n, a_descriptor, b_descriptor, a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, b_zero_ptr,
                bias_ptr, residual_ptr, alpha_ptr, out_scale_ptr, offsets_ptr, M, N, K, a_stride, b_stride,
                residual_stride, a_batch_stride, b_batch_stride, residual_batch_stride, out_stride, out_batch_stride,
                out_ptr, workspace_ptr, counters_ptr, A_COLUMN_MAJOR, B_COLUMN_MAJOR, A_BROADCAST, B_BROADCAST,
                RESIDUAL_BROADCAST, EVEN_M, EVEN_N, EVEN_K, PRECISION, FP8_SUM, A_SCALE, B_SCALE, BIAS_AXIS, GATED,
                ACTIVATION, RESIDUAL_LAST, WEIGHTS, GROUP_SIZE, GROUPS, SLOTS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                SPLIT_K, TMA, WARP_SPECIALIZE, PIECES, PAIRS,
            )  # fmt: skip
    else:
        gemm_tile(
            tl.program_id(0), tiles_m, tiles_n, None, None, a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, b_zero_ptr,
            bias_ptr, residual_ptr, alpha_ptr, out_scale_ptr, offsets_ptr, M, N, K, a_stride, b_stride, residual_stride,
            a_batch_stride, b_batch_stride, residual_batch_stride, out_stride, out_batch_stride, out_ptr,
            workspace_ptr, counters_ptr, A_COLUMN_MAJOR, B_COLUMN_MAJOR, A_BROADCAST, B_BROADCAST, RESIDUAL_BROADCAST,
            EVEN_M, EVEN_N, EVEN_K, PRECISION, FP8_SUM, A_SCALE, B_SCALE, BIAS_AXIS, GATED, ACTIVATION, RESIDUAL_LAST,
            WEIGHTS, GROUP_SIZE, GROUPS, SLOTS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, TMA, False, PIECES, PAIRS,
        )  # fmt: skip


@triton.jit
def gemm_tile(
    tile,
    tiles_m,
    tiles_n,
    a_descriptor,  # of the only matrix, or None: made here, of this tile's
    b_descriptor,
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    b_zero_ptr,
    bias_ptr,
    residual_ptr,
    alpha_ptr,
    out_scale_ptr,
    offsets_ptr,
    M,
    N,
    K,
    a_stride,
    b_stride,
    residual_stride,
    a_batch_stride,
    b_batch_stride,
    residual_batch_stride,
    out_stride,
    out_batch_stride,
    out_ptr,
    workspace_ptr,
    counters_ptr,
    A_COLUMN_MAJOR: tl.constexpr,
    B_COLUMN_MAJOR: tl.constexpr,
    A_BROADCAST: tl.constexpr,
    B_BROADCAST: tl.constexpr,
    RESIDUAL_BROADCAST: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8_SUM: tl.constexpr,
    A_SCALE: tl.constexpr,
    B_SCALE: tl.constexpr,
    BIAS_AXIS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PIECES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The tile of that number, or the split of its K that is the program's."""
    HALVES: tl.constexpr = GATED == "halves"
    COLUMNS: tl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N
    split = tl.program_id(1)
    tile_m, tile_n = tile_of(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    k_blocks = tl.cdiv(K, BLOCK_K)
    blocks_per_split = tl.cdiv(k_blocks, SPLIT_K)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, k_blocks)
    if GROUPS > 0:
        group, row, end_m = group_of(tile_m, offsets_ptr, M, GROUPS, SLOTS, BLOCK_M)
        last = tl.where(row < end_m, last, first)
        matrix = (tile_m * 0).to(tl.int64)
        b_matrix = group.to(tl.int64)
    else:
        row = tile_m * BLOCK_M
        end_m = M
        matrix = (tile // (tiles_m * tiles_n)).to(tl.int64)
        b_matrix = matrix
    column = tile_n * COLUMNS
    end_n = N // 2 if HALVES else N
    # Triton gives each of two warp groups half of a tile's rows by moving the range, and the `row` that descriptors
    # read at. The epilogue's must be another value to the compiler, as this one is, or it is moved twice.
    offsets_m = (tl.minimum(row, M) if WARP_SPECIALIZE else row) + tl.arange(0, BLOCK_M)
    offsets_n = column + tl.arange(0, COLUMNS)

    rows_m = M.to(tl.int64)
    columns_n = N.to(tl.int64)
    depth_k = K.to(tl.int64)
    depth_b = tl.cdiv(depth_k, 32) * 16 if WEIGHTS == "int4" else depth_k
    columns_out = columns_n if GATED is None else columns_n // 2
    a_ld = leading(a_stride, rows_m, depth_k, A_COLUMN_MAJOR)
    b_ld = leading(b_stride, depth_b, columns_n, B_COLUMN_MAJOR)
    out_ld = leading(out_stride, rows_m, columns_out, False)
    if a_stride is None:
        a_batch = 0 if A_BROADCAST else rows_m * depth_k
        b_batch = 0 if B_BROADCAST else columns_n * depth_b
        out_batch = rows_m * columns_out
    else:
        a_batch = a_batch_stride.to(tl.int64)
        b_batch = b_batch_stride.to(tl.int64)
        out_batch = out_batch_stride.to(tl.int64)
    residual_base = None
    residual_ld = None
    if residual_ptr is not None:
        residual_ld = leading(residual_stride, rows_m, columns_out, False)
        if residual_stride is None:
            residual_base = residual_ptr + (0 if RESIDUAL_BROADCAST else matrix * (rows_m * columns_out))
        else:
            residual_base = residual_ptr + matrix * residual_batch_stride.to(tl.int64)
    if A_SCALE == "row" and not A_BROADCAST:
        a_scale_ptr += matrix * rows_m
    if GROUPS > 0:
        groups_n = tl.cdiv(depth_k, GROUP_SIZE) * columns_n if GROUP_SIZE > 0 else columns_n
        if B_SCALE == "column" or B_SCALE == "group":
            b_scale_ptr += b_matrix * groups_n
        if b_zero_ptr is not None:
            b_zero_ptr += b_matrix * groups_n
        if bias_ptr is not None and BIAS_AXIS == "n":
            bias_ptr += b_matrix * columns_n

    a_base = a_ptr + matrix * a_batch
    b_base = b_ptr + b_matrix * b_batch
    if WEIGHTS is not None:
        x, second = weight_sums(
            a_base, b_base, b_scale_ptr, b_zero_ptr, a_ld, b_ld, offsets_m, offsets_n, end_m, end_n, K, N, first, last,
            WEIGHTS == "int4", GROUP_SIZE, A_COLUMN_MAJOR, B_COLUMN_MAJOR, EVEN_M, EVEN_N, EVEN_K, HALVES, PAIRS,
            BLOCK_M, COLUMNS, BLOCK_K,
        )  # fmt: skip
    elif TMA:
        if a_descriptor is None:
            a_descriptor = matrix_descriptor(a_base, M, K, a_ld, A_COLUMN_MAJOR, BLOCK_M, BLOCK_K)
            b_descriptor = matrix_descriptor(b_base, K, N, b_ld, B_COLUMN_MAJOR, BLOCK_K, COLUMNS)
        x, second = described_sums(
            a_descriptor, b_descriptor, row, column, end_n, first, last, a_ptr.dtype.element_ty == tl.int8,
            A_COLUMN_MAJOR, B_COLUMN_MAJOR, HALVES, PRECISION, FP8_SUM, BLOCK_M, COLUMNS, BLOCK_K,
        )  # fmt: skip
    else:
        x, second = sums(
            a_base, b_base, a_ld, b_ld, offsets_m, offsets_n, end_m, end_n, K, first, last, A_COLUMN_MAJOR,
            B_COLUMN_MAJOR, EVEN_M, EVEN_N, EVEN_K, HALVES, PRECISION, FP8_SUM, BLOCK_M, COLUMNS, BLOCK_K,
        )  # fmt: skip

    x = upright(x, BLOCK_M)
    second = upright(second, BLOCK_M)
    out_base = out_ptr + matrix * out_batch
    if SPLIT_K > 1:
        PARTS: tl.constexpr = 2 if HALVES else 1
        place = tile.to(tl.int64) * (SPLIT_K * PARTS)
        inside = offsets_m < end_m
        store_partial(x, workspace_ptr, place + split * PARTS, inside, EVEN_M, BLOCK_M, COLUMNS)
        if HALVES:
            store_partial(second, workspace_ptr, place + split * PARTS + 1, inside, EVEN_M, BLOCK_M, COLUMNS)
        if last_to_arrive(counters_ptr, tile, SPLIT_K):
            x = sum_of_partials(workspace_ptr, place, inside, SPLIT_K, PARTS, EVEN_M, BLOCK_M, COLUMNS)
            if HALVES:
                second = sum_of_partials(workspace_ptr, place + 1, inside, SPLIT_K, PARTS, EVEN_M, BLOCK_M, COLUMNS)
            store_in_pieces(
                x, second, offsets_m, column, end_m, end_n, alpha_ptr, a_scale_ptr, b_scale_ptr, bias_ptr,
                residual_base, residual_ld, out_scale_ptr, out_base, out_ld, A_SCALE, B_SCALE, BIAS_AXIS, GATED,
                EVEN_M, EVEN_N, ACTIVATION, RESIDUAL_LAST, PIECES,
            )  # fmt: skip
    else:
        store_in_pieces(
            x, second, offsets_m, column, end_m, end_n, alpha_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, residual_base,
            residual_ld, out_scale_ptr, out_base, out_ld, A_SCALE, B_SCALE, BIAS_AXIS, GATED, EVEN_M, EVEN_N,
            ACTIVATION, RESIDUAL_LAST, PIECES,
        )  # fmt: skip
