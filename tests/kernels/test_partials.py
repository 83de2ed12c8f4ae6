"""Tiles that several blocks share. Whole kernels are held to it by `check_splits` and by seeded defects."""

from __future__ import annotations

import numpy as np
import pytest
import triton
import triton.language as tl

from tilewright.kernels.interpreter import interpret
from tilewright.kernels.partials import last_to_arrive, store_partial, sum_of_partials

TILES, SPLITS, STEP, ROWS, COLUMNS = 3, 4, 2, 8, 16


@triton.jit
def sum_kernel(
    parts_ptr,
    workspace_ptr,
    counters_ptr,
    out_ptr,
    rows,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[tile] = the sum of parts[tile, split] over the splits, of the first `rows` rows."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    within = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    part = tl.load(parts_ptr + (tile * SPLITS + split) * ROWS * COLUMNS + within)
    place = tile * SPLITS * STEP
    store_partial(part, workspace_ptr, place + split * STEP, row < rows, EVEN, ROWS, COLUMNS)
    if last_to_arrive(counters_ptr, tile, SPLITS):
        total = sum_of_partials(workspace_ptr, place, row < rows, SPLITS, STEP, EVEN, ROWS, COLUMNS)
        tl.store(out_ptr + tile * ROWS * COLUMNS + within, total)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("rows", [ROWS, 5])
def test_the_last_block_of_a_tile_adds_its_parts_up(kind: type[np.generic], rows: int) -> None:
    parts = (np.random.default_rng(0).standard_normal((TILES, SPLITS, ROWS, COLUMNS)) * 100).astype(kind)
    workspace = np.full(TILES * SPLITS * STEP * ROWS * COLUMNS, 7, kind)
    counters, out = np.zeros(TILES, np.int32), np.full((TILES, ROWS, COLUMNS), 9, kind)
    arguments = {"parts_ptr": parts, "workspace_ptr": workspace, "counters_ptr": counters, "out_ptr": out, "rows": rows}
    sizes = {"SPLITS": SPLITS, "STEP": STEP, "EVEN": rows == ROWS, "ROWS": ROWS, "COLUMNS": COLUMNS}
    for _ in range(2):  # the counters are ready for the next launch
        interpret(sum_kernel, (TILES, SPLITS, 1), arguments | sizes)
        expected = np.zeros_like(out)
        for split in range(SPLITS):
            expected[:, :rows] += parts[:, split, :rows]
        np.testing.assert_array_equal(out, expected)
        assert not counters.any()
    left = workspace.reshape(TILES, SPLITS, STEP, ROWS, COLUMNS)
    assert (left[:, :, 1] == 7).all()  # the places between
    assert (left[:, :, 0, rows:] == 7).all()
