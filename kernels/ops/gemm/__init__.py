"""The fused GEMM. Read in this order: problem, jit, space, default, launch, operands, api."""
