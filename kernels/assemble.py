"""Machine code without the line numbers that profilers read: for what leaves the machine that compiled it."""

from __future__ import annotations

from dataclasses import replace

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from tilewright.kernels.compile import Binary, read_resources
from tilewright.kernels.device import WARP_SIZE
from tilewright.tuning_db.errors import CompileError


def without_line_info(binary: Binary) -> Binary:
    """The same kernel without sections for debuggers, which hold paths of this machine, or of the one that filled
    Triton's cache: about a third of the bytes, and the same wherever they are made.

    Its PTX is assembled once more. Were Triton told to leave line numbers out from the start
    (`TRITON_DISABLE_LINE_INFO`), LLVM would order instructions otherwise, of 9 kernels in 32 with Triton 3.9, and what
    runs would not be what was measured; ptxas makes the same of the same PTX.

    Raises:
        CompileError: ptxas failed.
    """
    backend = make_backend(GPUTarget("cuda", binary.arch, WARP_SIZE))
    options = backend.parse_options({"enable_fp_fusion": True})  # all else is written in the PTX
    try:
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True
            cubin = backend.make_cubin(binary.ptx, {}, options, binary.arch)
    except Exception as error:
        raise CompileError(f"ptxas can't assemble {binary.name} once more: {type(error).__name__}") from error
    return replace(binary, cubin=cubin, resources=read_resources(cubin, binary.shared_bytes))
