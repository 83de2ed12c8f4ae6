"""Inputs of a model, and the ranges that its activations have on them."""
