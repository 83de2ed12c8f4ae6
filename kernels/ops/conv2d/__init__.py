"""The fused convolution.

Read in this order: problem, jit, depthwise, space, work, default, launch, features, operands, api.
"""
