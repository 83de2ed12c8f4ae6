"""The tests of the fused GEMM, put to the test: seeded defects, each of which some problem must show."""

from __future__ import annotations

import pytest

from tests.kernels.defects import exposed, seeded
from tests.kernels.ops.gemm_cases import conforms
from tilewright.kernels import GemmConfig, GemmProblem, partials
from tilewright.kernels.ops.gemm import jit, mainloop, tail, weights

DEFECTS = {
    "K tail dropped": ("k_blocks = tl.cdiv(K, BLOCK_K)", "k_blocks = K // BLOCK_K"),
    "a read past K": (
        "mask_m, offsets_k[None, :] < K, EVEN_M, EVEN_K)\n        b =",
        "mask_m, offsets_k[None, :] < K, EVEN_M, True)\n        b =",
    ),
    "b read past K": (
        "b = load_tile(b_pointers, offsets_k[:, None] < K, mask_n, EVEN_K, EVEN_N)",
        "b = load_tile(b_pointers, offsets_k[:, None] < K, mask_n, True, EVEN_N)",
    ),
    "last column not written": (
        "mask=mask_m & mask_n)\n",
        "mask=mask_m & (out_columns[None, :] < end_out - 1))\n",
    ),
    "written past M": (
        "tl.store(out_pointers, y, mask=mask_m & mask_n)",
        "tl.store(out_pointers, y, mask=mask_n)",
    ),
    "activation skipped": ("finish(x, residual, ACTIVATION,", 'finish(x, residual, "none",'),
    "residual before the activation": ("ACTIVATION, RESIDUAL_LAST, out_scale_ptr", "ACTIVATION, False, out_scale_ptr"),
    "bias skipped": (
        "other=0.0).to(tl.float32)[None, :]\n    return x",
        "other=0.0).to(tl.float32)[None, :] * 0\n    return x",
    ),
    "alpha skipped": ("x *= tl.load(alpha_ptr)", "x *= 1.0"),
    "residual of the first batch": ("else matrix * (rows_m * columns_out))", "else matrix * 0)"),
    "a of the first batch": ("a_base = a_ptr + matrix * a_batch", "a_base = a_ptr"),
    "out of the first batch": ("out_base = out_ptr + matrix * out_batch", "out_base = out_ptr"),
    "row stride ignored": ("    if stride is None:\n", "    if True:\n"),
    "broadcast ignored": (
        "b_batch = 0 if B_BROADCAST else columns_n * depth_b",
        "b_batch = columns_n * depth_b",
    ),
    "tiles repeated": ("within // rows", "within // GROUP_M"),
    "one split lost": ("for split in range(SPLITS):", "for split in range(SPLITS - 1):"),
    "added up before the last split is there": ("== SPLITS - 1", "== SPLITS - 2"),
    "first split twice": ("place + split * STEP", "place + split // 2 * STEP"),
    "last row's partial sums left out": ("inside = offsets_m < end_m", "inside = offsets_m < end_m - 1"),
    "split overlaps the next": (
        "last = tl.minimum(first + blocks_per_split, k_blocks)",
        "last = tl.minimum(first + blocks_per_split + 1, k_blocks)",
    ),
    "summed in fp16": (
        "second, PRECISION, FP8_SUM)\n        a_pointers",
        "second, PRECISION, FP8_SUM)\n        x = x.to(tl.float16).to(x.dtype)\n        a_pointers",
    ),
    "operands in tf32": ("input_precision=PRECISION", 'input_precision="tf32"'),
    "rounded to bf16 first": (
        "y = finish(x, residual",
        "y = finish(x.to(tl.bfloat16).to(tl.float32), residual",
    ),
    # int8, scales, gates, quantised results
    "row scale of other rows": ("a_scale_ptr + rows, mask", "a_scale_ptr + rows // 2, mask"),
    "row scale of the first batch": ("a_scale_ptr += matrix * rows_m", "a_scale_ptr += matrix * 0"),
    "column scale skipped": ('elif B_SCALE == "column":', 'elif B_SCALE == "columns":'),
    "tensor scale of B skipped": ("x *= tl.load(b_scale_ptr)", "x *= 1.0"),
    "bias along the wrong axis": ('if BIAS_AXIS == "m":', 'if BIAS_AXIS == "M":'),
    "scale after the bias": ("x *= tl.load(a_scale_ptr)\n", "x *= 1.0\n"),
    "gate and up swapped": ("y = finish_gated(x, second,", "y = finish_gated(second, x,"),
    "bias of the gate on the up half": ("second, rows, columns + end_n, end_m", "second, rows, columns, end_m"),
    "up half from the gate's columns": ("b = load_tile(b_pointers + up,", "b = load_tile(b_pointers,"),
    "up half of the first split": (
        "sum_of_partials(workspace_ptr, place + 1,",
        "sum_of_partials(workspace_ptr, place,",
    ),
    "pairs taken for halves": ("out_columns = column // 2 +", "out_columns = column +"),
    # weights
    "high nibbles under the wrong rows": ("held // 16 * (16 * PER_BYTE) + held % 16", "held"),
    "low nibbles twice": (
        "high_nibbles(q, zero[None, :], kind), total",
        "low_nibbles(q, zero[None, :], kind), total",
    ),
    "zero point of int4 taken for 0": ("8.0 if INT4 else 0.0", "0.0"),
    "scale of the next group": ("block * BLOCK_K // GROUP_SIZE,", "(block + 1) * BLOCK_K // GROUP_SIZE,"),
    "scale of the first group": (
        "scale, zero = next_scale, next_zero\n        if HALVES",
        "zero = next_zero\n        if HALVES",
    ),
    "zero point of the first group": (
        "scale, zero = next_scale, next_zero\n        if HALVES",
        "scale = next_scale\n        if HALVES",
    ),
    "weights past K": (
        "offsets_k[None, :] + 16 < K, EVEN_M, EVEN_K)",
        "offsets_k[None, :] < K, EVEN_M, EVEN_K)",
    ),
    "weights rounded": (
        "total = x + total * (",
        "scale = scale.to(tl.float16).to(tl.float32)\n        total = x + total * (",
    ),
    # tiles of eight rows
    "scale of another column of eight rows": (
        "scale[:, None] if TRANSPOSED",
        "tl.broadcast_to(tl.max(scale, 0), scale.shape)[:, None] if TRANSPOSED",
    ),
    # groups of rows, persistent blocks, descriptors
    "B of the first group": ("b_matrix = group.to(tl.int64)", "b_matrix = matrix"),
    "rows of the next group": ("end = tl.sum(tl.where(here, ends, 0), 0)", "end = M"),
    "empty groups counted as one": ("<= tile_m).to(tl.int32), 0)", "< tile_m).to(tl.int32), 0)"),
    "scale of the first group of rows": ("b_scale_ptr += b_matrix * groups_n", "b_scale_ptr += b_matrix * 0"),
    "bias of the first group of rows": ("bias_ptr += b_matrix * columns_n", "bias_ptr += b_matrix * 0"),
    "only the first tile of a block": (
        "tl.range(start, tiles,",
        "tl.range(start, tl.num_programs(0),",
    ),
    "batch left out of the walk": ("else tiles_m * tiles_n * batch", "else tiles_m * tiles_n"),
    "descriptor of the first batch": ("matrix_descriptor(b_base,", "matrix_descriptor(b_ptr,"),
    "described up half from the gate's": ("column + up, B_COLUMN_MAJOR", "column, B_COLUMN_MAJOR"),
}

SMALL = GemmConfig(16, 32, 32)
# In the order in which defects are seen soonest: most of them need but one or two of these.
EXPOSING = (
    (GemmProblem(17, 32, 32, dtype="fp32", a_scale="tensor", b_scale="tensor", bias="fp32"), SMALL),
    (GemmProblem(17, 48, 49, dtype="bf16", b_dtype="int4", b_layout="col", out_dtype="fp32"), GemmConfig(16, 32, 64)),
    (
        GemmProblem(17, 48, 65, dtype="fp32", gated="halves", bias="fp32", activation="silu"),
        GemmConfig(16, 32, 32, SPLIT_K=2),
    ),
    (GemmProblem(17, 64, 32, dtype="fp32", batch=2, gated="halves"), GemmConfig(16, 32, 32, TMA=True)),
    (
        GemmProblem(57, 48, 33, dtype="fp32", groups=5, b_scale="column", bias="fp32"),
        GemmConfig(16, 32, 32, PERSISTENT=True),
    ),
    (
        GemmProblem(5, 48, 160, b_layout="col", b_dtype="int4", b_scale="group", group_size=32, out_dtype="fp32"),
        GemmConfig(8, 16, 32, num_warps=2, SPLIT_K=2),
    ),
    (GemmProblem(32, 32, 33, dtype="fp16", out_dtype="fp32", batch=2, alpha=True, bias="fp16"), GemmConfig(32, 16, 16)),
    (GemmProblem(17, 80, 33, dtype="fp32", gated="interleaved", activation="silu"), SMALL),
    (
        GemmProblem(33, 48, 65, dtype="int8", batch=2, a_scale="row", b_scale="column", bias="fp32", bias_axis="m"),
        GemmConfig(16, 32, 32),
    ),
    (
        GemmProblem(33, 33, 33, dtype="fp32", activation="relu", residual="fp32", residual_last=True),
        GemmConfig(16, 16, 32),
    ),
    (GemmProblem(33, 64, 32, dtype="fp32", batch=3), GemmConfig(16, 32, 32, PERSISTENT=True)),
    (GemmProblem(33, 33, 150, dtype="fp32", strided=True, aligned=False), GemmConfig(16, 32, 16, GROUP_M=4, SPLIT_K=4)),
    (
        GemmProblem(
            33,
            48,
            65,
            dtype="fp32",
            batch=3,
            b_broadcast=True,
            a_layout="col",
            bias="fp32",
            residual="fp32",
            alpha=True,
        ),
        GemmConfig(16, 16, 16, GROUP_M=2),
    ),
    (
        GemmProblem(17, 48, 165, b_dtype="int4", b_scale="group", group_size=32, b_zero=True, out_dtype="fp32"),
        SMALL,
    ),
)


def test_the_kernel_itself_shows_no_defect():
    assert not exposed(conforms, EXPOSING)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_would_be_seen(defect):
    with seeded((partials, mainloop, weights, tail, jit), *DEFECTS[defect]):
        assert exposed(conforms, EXPOSING)
