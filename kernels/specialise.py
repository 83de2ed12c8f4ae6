# mypy: ignore-errors
"""What kernels whose loops are warp-specialised share: what Triton leaves out of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def reuses_barriers():
    """Whether Triton puts operands where barriers are that it makes and never uses."""
    # A function and no constant: the hash of the code has its text, not what this Triton makes of it, for a pack serves
    # under every Triton. Keys of records, and of Triton's own cache, have the version beside that hash.
    version = triton.__version__
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) < (3, 8)


@triton.jit
def behind_barriers(program, STAGES: tl.constexpr):
    """`program`, as a value that no copy of the tensor memory accelerator can need before shared memory is its own.

    For each stage Triton initialises barriers that it never uses, and up to 3.7 gives their place, the first in shared
    memory, to operands. The unit that keeps barriers has a cache of them, which `mbarrier.inval` takes one out of
    (`SYNCS.CCTL.IV`), as PTX asks for before that memory is used for anything else (PTX ISA, `mbarrier.inval`). Without
    it, on an H200, up to every tenth block had the bits of a barrier in a row of its first tile, some of them NaN.

    Thread 0 made the barriers, and its warp starts the copies, behind this; the other groups don't wait for it.
    """
    if reuses_barriers():
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
    return program
