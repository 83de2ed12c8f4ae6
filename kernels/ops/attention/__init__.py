"""The fused attention. Read in this order: problem, reference, jit, mainloop, combine, space, work, default, launch, api."""
