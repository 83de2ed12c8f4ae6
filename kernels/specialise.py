# mypy: ignore-errors
"""What kernels whose loops are warp-specialised share: what Triton leaves out of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def behind_barriers(program, STAGES: tl.constexpr):
    """`program`, as a value that no copy of the tensor memory accelerator can need before shared memory is its own.

    For each stage Triton (3.6 and 3.9) initialises a barrier that it never uses, and gives the operands that place. The
    unit that keeps barriers has a cache of them, which `mbarrier.inval` takes one out of (`SYNCS.CCTL.IV`), as PTX asks
    for "before using the memory for any other purpose" (PTX ISA, `mbarrier.inval`). Without it, on an H200, up to every
    tenth block had the bits of a barrier in a row of its first tile, some of them NaN.

    Those barriers are the first things in shared memory: tests look at the code that comes out.
    """
    for stage in tl.static_range(STAGES):
        program = tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread, place;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            mov.u32 place, global_smem;
            add.u32 place, place, $2;
            @first mbarrier.inval.shared::cta.b64 [place];
            mov.b32 $0, $1;
            }""",
            "=r,r,r",
            [program, 8 * stage],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return tl.inline_asm_elementwise(
        "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [program], dtype=tl.int32, is_pure=False, pack=1
    )
