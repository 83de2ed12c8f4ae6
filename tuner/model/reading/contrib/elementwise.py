"""Activations, with what is added before them."""

from __future__ import annotations

from tilewright.tuner.model.reading.contrib.writer import Writer


def gelu(write: Writer) -> list[str]:
    """`Gelu`: with the error function."""
    return [write("Gelu", write.input(0))]


def bias_gelu(write: Writer) -> list[str]:
    """`BiasGelu`: Gelu(a + b), with the error function."""
    return [write("Gelu", write("Add", write.input(0), write.input(1)))]


def fast_gelu(write: Writer) -> list[str]:
    """`FastGelu`: Gelu(x + bias), with tanh."""
    x, bias = write.input(0), write.optional(1)
    return [write("Gelu", write("Add", x, bias) if bias else x, approximate="tanh")]


def quick_gelu(write: Writer) -> list[str]:
    """`QuickGelu`: x · sigmoid(alpha · x)."""
    x = write.input(0)
    scaled = write("Mul", x, write.number(write.attribute("alpha", 1.702), x))
    return [write("Mul", x, write("Sigmoid", scaled))]


def bias_add(write: Writer) -> list[str]:
    """`BiasAdd`: x + bias + skip."""
    return [write("Add", write("Add", write.input(0), write.input(1)), write.input(2))]


def bias_split_gelu(write: Writer) -> list[str]:
    """`BiasSplitGelu`: of x + bias, the first half of the last axis times Gelu of the second."""
    biased = write("Add", write.input(0), write.input(1))
    left, right = write("Split", biased, outputs=2, axis=-1, num_outputs=2)
    return [write("Mul", left, write("Gelu", right))]
