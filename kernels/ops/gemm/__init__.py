"""The fused GEMM. Read in this order: problem, jit, space, launch, operands, api."""
