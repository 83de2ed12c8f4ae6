"""The fused attention.

Read in this order: problem, reference, samples, tiles, mainloop, jit, persistent, combine, space, work, default,
launch, features, operands, api.
"""
