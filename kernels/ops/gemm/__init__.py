"""The fused GEMM.

Read in this order: problem, reference, weights, mainloop, tail, jit, space, work, default, launch, features,
operands, api, grouped, packing.
"""
