"""Benchmarks: each prints a table, and writes JSON with the environment it was made in."""
