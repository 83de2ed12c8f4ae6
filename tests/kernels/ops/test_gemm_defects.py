"""The tests of the fused GEMM, put to the test: seeded defects, each of which some problem must show."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from tests.kernels.ops.gemm_cases import conforms
from tilewright.kernels import GemmConfig, GemmProblem
from tilewright.kernels.dispatch import forget_plans
from tilewright.kernels.ops.gemm import jit
from tilewright.tuning_db.errors import RunError

ROOM = "tilewright.kernels.ops.gemm"
FILES = ("mainloop", "weights", "tail", "jit")
"""Device code, in the order of imports."""

DEFECTS = {
    "K tail dropped": ("jit", "k_blocks = tl.cdiv(K, BLOCK_K)", "k_blocks = K // BLOCK_K"),
    "a read past K": (
        "mainloop",
        "mask_m, offsets_k[None, :] < K, EVEN_M, EVEN_K)",
        "mask_m, offsets_k[None, :] < K, EVEN_M, True)",
    ),
    "b read past K": (
        "mainloop",
        "b = load_tile(b_pointers, offsets_k[:, None] < K, mask_n, EVEN_K, EVEN_N)",
        "b = load_tile(b_pointers, offsets_k[:, None] < K, mask_n, True, EVEN_N)",
    ),
    "last column not written": (
        "tail",
        "mask=mask_m & mask_n)\n",
        "mask=mask_m & (out_columns[None, :] < end_out - 1))\n",
    ),
    "written past M": (
        "tail",
        "tl.store(out_pointers, y, mask=mask_m & mask_n)",
        "tl.store(out_pointers, y, mask=mask_n)",
    ),
    "activation skipped": ("tail", "finish(x, residual, ACTIVATION,", 'finish(x, residual, "none",'),
    "bias skipped": (
        "tail",
        "other=0.0).to(tl.float32)[None, :]\n    return x",
        "other=0.0).to(tl.float32)[None, :] * 0\n    return x",
    ),
    "alpha skipped": ("tail", "x *= tl.load(alpha_ptr)", "x *= 1.0"),
    "residual of the first batch": ("jit", "else matrix * (rows_m * columns_out))", "else matrix * 0)"),
    "a of the first batch": ("jit", "a_base = a_ptr + matrix * a_batch", "a_base = a_ptr"),
    "out of the first batch": ("jit", "out_base = out_ptr + matrix * out_batch", "out_base = out_ptr"),
    "row stride ignored": ("jit", "    if stride is None:\n", "    if True:\n"),
    "broadcast ignored": (
        "jit",
        "b_batch = 0 if B_BROADCAST else columns_n * depth_b",
        "b_batch = columns_n * depth_b",
    ),
    "tiles repeated": ("jit", "within // rows", "within // GROUP_M"),
    "one split lost": ("tail", "for s in range(SPLIT_K):", "for s in range(SPLIT_K - 1):"),
    "first split twice": ("tail", "place + s * PARTS", "place + s // 2 * PARTS"),
    "split overlaps the next": (
        "jit",
        "last = tl.minimum(first + blocks_per_split, k_blocks)",
        "last = tl.minimum(first + blocks_per_split + 1, k_blocks)",
    ),
    "summed in fp16": (
        "mainloop",
        "        a_pointers += a_step",
        "        x = x.to(tl.float16).to(x.dtype)\n        a_pointers += a_step",
    ),
    "operands in tf32": ("mainloop", "input_precision=PRECISION", 'input_precision="tf32"'),
    "rounded to bf16 first": (
        "tail",
        "y = finish(x, residual",
        "y = finish(x.to(tl.bfloat16).to(tl.float32), residual",
    ),
    # int8, scales, gates, quantised results
    "row scale of other rows": ("tail", "a_scale_ptr + rows, mask", "a_scale_ptr + rows // 2, mask"),
    "row scale of the first batch": ("jit", "a_scale_ptr += matrix * rows_m", "a_scale_ptr += matrix * 0"),
    "column scale skipped": ("tail", 'elif B_SCALE == "column":', 'elif B_SCALE == "columns":'),
    "tensor scale of B skipped": ("tail", "x *= tl.load(b_scale_ptr)", "x *= 1.0"),
    "bias along the wrong axis": ("tail", 'if BIAS_AXIS == "m":', 'if BIAS_AXIS == "M":'),
    "scale after the bias": ("tail", "x *= tl.load(a_scale_ptr)\n", "x *= 1.0\n"),
    "gate and up swapped": ("tail", "y = finish_gated(x, second,", "y = finish_gated(second, x,"),
    "bias of the gate on the up half": ("tail", "second, rows, columns + end_n, end_m", "second, rows, columns, end_m"),
    "up half from the gate's columns": ("mainloop", "b = load_tile(b_pointers + up,", "b = load_tile(b_pointers,"),
    "up half of the first split": (
        "jit",
        "sum_of_partials(workspace_ptr, place + 1,",
        "sum_of_partials(workspace_ptr, place,",
    ),
    "pairs taken for halves": ("tail", "out_columns = column // 2 +", "out_columns = column +"),
    # weights
    "high nibbles under the wrong rows": ("weights", "held // 16 * (16 * PER_BYTE) + held % 16", "held"),
    "low nibbles twice": (
        "weights",
        "high_nibbles(q, zero[None, :], kind), total)",
        "low_nibbles(q, zero[None, :], kind), total)",
    ),
    "zero point of int4 taken for 0": ("weights", "8.0 if INT4 else 0.0", "0.0"),
    "scale of the next group": ("weights", "block * BLOCK_K // GROUP_SIZE,", "(block + 1) * BLOCK_K // GROUP_SIZE,"),
    "scale of the first group": (
        "weights",
        "scale, zero = next_scale, next_zero\n        if HALVES",
        "zero = next_zero\n        if HALVES",
    ),
    "zero point of the first group": (
        "weights",
        "scale, zero = next_scale, next_zero\n        if HALVES",
        "scale = next_scale\n        if HALVES",
    ),
    "weights past K": (
        "weights",
        "offsets_k[None, :] + 16 < K, EVEN_M, EVEN_K)",
        "offsets_k[None, :] < K, EVEN_M, EVEN_K)",
    ),
    "weights rounded": (
        "weights",
        "return x + total * scale[None, :] if SCALED",
        "return x + total * scale.to(tl.float16).to(tl.float32)[None, :] if SCALED",
    ),
    # groups of rows, persistent blocks, descriptors
    "B of the first group": ("jit", "b_matrix = group.to(tl.int64)", "b_matrix = matrix"),
    "rows of the next group": ("jit", "end = tl.sum(tl.where(here, ends, 0), 0)", "end = M"),
    "empty groups counted as one": ("jit", "<= tile_m).to(tl.int32), 0)", "< tile_m).to(tl.int32), 0)"),
    "scale of the first group of rows": ("jit", "b_scale_ptr += b_matrix * groups_n", "b_scale_ptr += b_matrix * 0"),
    "bias of the first group of rows": ("jit", "bias_ptr += b_matrix * columns_n", "bias_ptr += b_matrix * 0"),
    "only the first tile of a block": (
        "jit",
        "tl.range(start, tiles,",
        "tl.range(start, tl.num_programs(0),",
    ),
    "batch left out of the walk": ("jit", "else tiles_m * tiles_n * batch", "else tiles_m * tiles_n"),
    "descriptor of the first batch": ("jit", "matrix_descriptor(b_base,", "matrix_descriptor(b_ptr,"),
    "described up half from the gate's": ("mainloop", "column + up, B_COLUMN_MAJOR", "column, B_COLUMN_MAJOR"),
}

SMALL = GemmConfig(16, 32, 32)
EXPOSING = (
    (GemmProblem(33, 33, 33, dtype="fp32", activation="relu"), GemmConfig(16, 16, 32)),
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
    (GemmProblem(33, 33, 150, dtype="fp32", strided=True, aligned=False), GemmConfig(16, 32, 16, GROUP_M=4, SPLIT_K=4)),
    (GemmProblem(32, 32, 33, dtype="fp16", out_dtype="fp32", batch=2, alpha=True, bias="fp16"), GemmConfig(32, 16, 16)),
    (
        GemmProblem(33, 48, 65, dtype="int8", batch=2, a_scale="row", b_scale="column", bias="fp32", bias_axis="m"),
        GemmConfig(16, 32, 32),
    ),
    (GemmProblem(17, 32, 32, dtype="fp32", a_scale="tensor", b_scale="tensor", bias="fp32"), SMALL),
    (
        GemmProblem(17, 48, 65, dtype="fp32", gated="halves", bias="fp32", activation="silu"),
        GemmConfig(16, 32, 32, SPLIT_K=2),
    ),
    (GemmProblem(17, 80, 33, dtype="fp32", gated="interleaved", activation="silu"), SMALL),
    (
        GemmProblem(17, 48, 165, b_dtype="int4", b_scale="group", group_size=32, b_zero=True, out_dtype="fp32"),
        SMALL,
    ),
    (GemmProblem(17, 48, 49, dtype="bf16", b_dtype="int4", b_layout="col", out_dtype="fp32"), GemmConfig(16, 32, 64)),
    (
        GemmProblem(57, 48, 33, dtype="fp32", groups=5, b_scale="column", bias="fp32"),
        GemmConfig(16, 32, 32, PERSISTENT=True),
    ),
    (GemmProblem(33, 64, 32, dtype="fp32", batch=3), GemmConfig(16, 32, 32, PERSISTENT=True)),
    (GemmProblem(17, 64, 32, dtype="fp32", batch=2, gated="halves"), GemmConfig(16, 32, 32, TMA=True)),
)


def exposed(problem, config):
    try:
        conforms(problem, config)
    except (AssertionError, RunError):
        return True
    return False


def test_the_kernel_itself_shows_no_defect():
    assert not any(itertools.starmap(exposed, EXPOSING))


@pytest.fixture
def fresh():
    """No plan of the right kernel, nor afterwards of the wrong one."""
    forget_plans()
    yield
    forget_plans()


def loaded(name, source, folder, monkeypatch):
    """A module of that source in place of the real one, for those that are loaded after it."""
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{ROOM}.{name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"{ROOM}.{name}", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_would_be_seen(defect, tmp_path, monkeypatch, fresh):
    file, right, wrong = DEFECTS[defect]
    folder = Path(importlib.util.find_spec(f"{ROOM}.jit").origin).parent
    with monkeypatch.context() as while_loading:
        for name in FILES:
            source = (folder / f"{name}.py").read_text()
            if name == file:
                assert source.count(right) == 1, f"{file} no longer has {right!r}: put the defect where it is now"
                source = source.replace(right, wrong)
            module = loaded(name, source, tmp_path, while_loading)
    monkeypatch.setattr(jit, "gemm_kernel", module.gemm_kernel)
    assert any(itertools.starmap(exposed, EXPOSING))
