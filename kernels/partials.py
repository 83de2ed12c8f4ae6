"""Device code of tiles whose sums several blocks share (split-K): every block leaves its part in a workspace, and the
one that arrives last adds them up in the order of the splits, so that the result does not depend on who that was.

The workspace has a place for each part of each tile, of as many sums as a tile has; the counters, one for each tile,
are 0 before a launch and after it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointers_of(workspace_ptr, place, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of the tile of sums at a place in the workspace."""
    inside = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return workspace_ptr + place * (ROWS * COLUMNS) + inside


@triton.jit
def store_partial(x, workspace_ptr, place, inside, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Leaves a tile of sums at a place in the workspace: all rows if EVEN, else those that are `inside` the result."""
    pointers = pointers_of(workspace_ptr, place, ROWS, COLUMNS)
    if EVEN:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=inside[:, None])


@triton.jit
def last_to_arrive(counters_ptr, tile, SPLITS: tl.constexpr):
    """Whether every block of a tile has left what it stored: true in one of its SPLITS blocks alone."""
    # All threads' stores come before the one thread's release below.
    tl.debug_barrier()
    last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.debug_barrier()
        tl.store(counters_ptr + tile, 0)
    return last


@triton.jit
def sum_of_partials(
    workspace_ptr,
    place,
    inside,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of SPLITS tiles, STEP places apart, in their order; 0 in rows that aren't `inside`, unless EVEN."""
    total = tl.zeros((ROWS, COLUMNS), dtype=workspace_ptr.dtype.element_ty)
    for split in range(SPLITS):
        # Written by other SMs during this launch: read from L2, where they are.
        pointers = pointers_of(workspace_ptr, place + split * STEP, ROWS, COLUMNS)
        if EVEN:
            total += tl.load(pointers, cache_modifier=".cg")
        else:
            total += tl.load(pointers, mask=inside[:, None], other=0.0, cache_modifier=".cg")
    return total
