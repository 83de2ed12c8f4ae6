"""The fused GEMM. Read in this order: problem, jit, space, work, default, launch, operands, api."""
