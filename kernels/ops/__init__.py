"""The fused ops, a folder each: problem, configuration, device code, space, and the function people call."""
