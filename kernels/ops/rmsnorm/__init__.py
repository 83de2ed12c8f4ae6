"""The fused RMSNorm. Read in this order: problem, jit, space, work, launch, features, api."""
