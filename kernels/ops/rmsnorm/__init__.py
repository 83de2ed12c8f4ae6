"""Fused RMSNorm. Read in this order: problem, jit, space, launch, features, api."""
