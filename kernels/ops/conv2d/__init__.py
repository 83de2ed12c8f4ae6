"""The fused 2-D convolution. Read in this order: problem, jit, space, work, default, launch, operands, api."""
