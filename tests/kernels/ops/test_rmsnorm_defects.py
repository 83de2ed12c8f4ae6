"""The tests of the fused RMSNorm, put to the test: seeded defects, each of which some problem must show."""

from __future__ import annotations

import pytest

from tests.kernels.defects import exposed, seeded
from tests.kernels.ops.rmsnorm_cases import WALKS, conforms, near, norm, random_array
from tilewright.kernels import RmsNormConfig, RmsNormProblem, rmsnorm
from tilewright.kernels.ops.rmsnorm import jit

DEFECTS = {
    "residual not added": ("h += tl.load(residual_rows", "h += 0.0 * tl.load(residual_rows"),
    "weight skipped": ("        y *= factor", "        y *= 1.0"),
    "offset skipped": ("(weight + WEIGHT_OFFSET)", "(weight + 0.0)"),
    "eps skipped": ("/ N.to(tl.float32) + EPS)", "/ N.to(tl.float32))"),
    "eps outside the mean": ("total / N.to(tl.float32) + EPS", "(total + EPS) / N.to(tl.float32)"),
    "mean over the tile": ("total / N.to(tl.float32)", "total / (N // 16 * 16).to(tl.float32)"),
    "read past N": ("        inside = columns < N\n", "        inside = columns < N + 1\n"),
    "last column left out": ("        inside = columns < N\n", "        inside = columns < N - 1\n"),
    "written past M": ("mask = mask & (rows[:, None] < M)", "mask = mask"),
    "scale written past M": ("scale, mask=rows < M)", "scale)"),
    "row stride ignored": ("N.to(tl.int64) if stride is None else stride.to(tl.int64)", "N.to(tl.int64)"),
    "first rows only": ("tl.program_id(0) * BLOCK_M", "0 * BLOCK_M"),
    "sum rounded first": (
        "        h += tl.load(residual_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)",
        "        h += tl.load(residual_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)\n"
        "        h = h.to(tl.float16).to(tl.float32)",
    ),
    "y rounded before the weight": ("    y = h * root\n", "    y = (h * root).to(tl.float16).to(tl.float32)\n"),
    "sum not written": ("h.to(residual_out_rows.dtype.element_ty)", "(h - h).to(residual_out_rows.dtype.element_ty)"),
    "first walk a tile short": (
        "        for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):\n"
        "            columns, inside, mask = bounds(start, rows, M, N, EVEN_M, EVEN_N, BLOCK_M, BLOCK_N)\n"
        "            h = load_sum(x_rows, residual_rows, columns, mask)\n"
        "            squares",
        "        for start in tl.range(0, N - BLOCK_N, BLOCK_N, num_stages=STAGES):\n"
        "            columns, inside, mask = bounds(start, rows, M, N, EVEN_M, EVEN_N, BLOCK_M, BLOCK_N)\n"
        "            h = load_sum(x_rows, residual_rows, columns, mask)\n"
        "            squares",
    ),
    "scale without the weight": ("tl.abs(h) if factor is None else tl.abs(h * factor)", "tl.abs(h)"),
    "scale of the largest, not of its size": (
        "tl.abs(h) if factor is None else tl.abs(h * factor)",
        "h if factor is None else h * factor",
    ),
    "scale of the last tile": ("heights = tl.maximum(heights, height(h, factor))", "heights = height(h, factor)"),
    "scale of a row of next to nothing": ("(scale < 1e-30) | ", ""),
    "scale by which the root can't be divided": (" | (root > scale * 3.4028233e38)", ""),
    "not divided by the scale": ("root = tl.math.div_rn(root, scale)", "root = root * 1.0"),
    "out_scale ignored": ("to_output(y, out_scale_ptr,", "to_output(y, None,"),
}  # fmt: skip

EXPOSING = (
    (RmsNormProblem(M=5, N=33, dtype="fp32", weight="fp32"), RmsNormConfig(2, 64)),
    (RmsNormProblem(M=3, N=40, dtype="fp32", weight="fp32", strided=True, aligned=False), RmsNormConfig(4, 16)),
    (
        RmsNormProblem(M=3, N=37, weight="fp16", residual="fp16", residual_out=True, out_dtype="fp32"),
        RmsNormConfig(2, 16, num_stages=2),
    ),
    (RmsNormProblem(M=3, N=37, weight="fp16", out_dtype="int8", row_scale=True), RmsNormConfig(2, 16)),
    (RmsNormProblem(M=3, N=37, weight="fp16", out_dtype="int8", row_scale=True), RmsNormConfig(2, 64)),
    (RmsNormProblem(M=2, N=16, weight="fp16", out_dtype="int8", out_scale=True), RmsNormConfig(2, 16)),
)


def special_numbers(config):
    """Small rows, other constants, a row of zeros: what random inputs and the default eps don't show."""
    x, w = 0.01 * random_array((4, 50)), random_array((50,))
    x[2] = 0
    near(rmsnorm(x, w, eps=1e-2, weight_offset=0.5, config=config), norm(x, 1e-2) * (0.5 + w))
    out, scale = rmsnorm(x, w, out_dtype="int8", out_scale="row", config=config)
    assert (out[2] == 0).all()
    assert scale[2] == 1
    # The scale is below `LEAST_SCALE`; and it is not, but what h would be multiplied by passes fp32.
    for tiny, light, eps in ((1e-32, 1, 1e-6), (1e-16, 1e-22, 0.0)):
        out, scale = rmsnorm(tiny * x, light * w, eps=eps, out_dtype="int8", out_scale="row", config=config)
        assert (out[:2] == 0).all()
        assert (scale[:2] == 1).all()


def shown():
    """Whether anything is wrong with the kernel."""
    return exposed(conforms, EXPOSING) or exposed(special_numbers, ((config,) for config in WALKS))


def test_the_kernel_itself_shows_no_defect():
    assert not shown()


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_would_be_seen(defect):
    with seeded((jit,), *DEFECTS[defect]):
        assert shown()
