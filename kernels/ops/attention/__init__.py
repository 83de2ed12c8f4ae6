"""The fused attention. Read in this order: problem, jit, space, launch, operands, api."""
