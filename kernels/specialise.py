# mypy: ignore-errors
"""What kernels whose loops are warp-specialised share: what Triton leaves out of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def behind_barriers(program):
    """`program`, as a value that no copy of the tensor memory accelerator can need before the barriers are ready.

    Triton (3.6 and 3.9) makes more barriers than it uses, puts those in the place of operands that come later, and has
    no fence between initialising one by ordinary stores and copying over it. On an H200 every tenth block or so then
    had the bits of a barrier in a row of its first tile, some of them NaN. (PTX ISA, "Async proxy": accesses across
    proxies need a proxy fence.)
    """
    return tl.inline_asm_elementwise(
        "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [program], dtype=tl.int32, is_pure=False, pack=1
    )
