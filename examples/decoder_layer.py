"""A decoder layer of a language model from fused kernels, checked against plain NumPy.

    python examples/decoder_layer.py            # on a GPU, with CuPy: fp16; else in Triton's interpreter: fp32

Seven calls: two norms, the product for queries, keys and values, attention, and three products with what follows them.
Then it says which problems those were, and on what evidence each got its configuration.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

try:
    import cupy
except ImportError:
    cupy = None
if cupy is not None and not cupy.is_available():
    cupy = None
if cupy is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton

from tilewright.kernels import attention, called, gemm, rmsnorm

BATCH, TOKENS, HEADS, KV_HEADS, DIM, HIDDEN = 2, 24, 4, 2, 32, 192
WIDTH = HEADS * DIM
Array = Any  # of NumPy or CuPy


def weights(rng: np.random.Generator) -> dict[str, Array]:
    """Of each product (in, out), of each norm (width,)."""
    shapes = {
        "qkv": (WIDTH, (HEADS + 2 * KV_HEADS) * DIM),
        "out": (WIDTH, WIDTH),
        "gate_up": (WIDTH, 2 * HIDDEN),  # all of the gate, then all of the other
        "down": (HIDDEN, WIDTH),
    }
    products = {name: rng.standard_normal(shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    return products | {name: 1 + 0.1 * rng.standard_normal(WIDTH) for name in ("norm", "norm_2")}


def split(qkv: Array) -> list[Array]:
    """Queries, keys and values as (batch, heads, tokens, dim): views, which `attention` reads as they lie."""
    heads = qkv.reshape(BATCH, TOKENS, HEADS + 2 * KV_HEADS, DIM).transpose(0, 2, 1, 3)
    return [heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]]


def layer(x: Array, w: dict[str, Array]) -> Array:
    """x of (batch · tokens, width)."""
    q, k, v = split(gemm(rmsnorm(x, w["norm"]), w["qkv"]))
    seen = attention(q, k, v, causal=True).transpose(0, 2, 1, 3).reshape(x.shape)
    x = gemm(seen, w["out"], residual=x)
    h = gemm(rmsnorm(x, w["norm_2"]), w["gate_up"], gated="halves", activation="silu")
    return gemm(h, w["down"], residual=x)


def plain(x: Array, w: dict[str, Array]) -> Array:
    """The same in NumPy."""

    def norm(x: Array, weight: Array) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight

    q, k, v = split(norm(x, w["norm"]) @ w["qkv"])
    k, v = (each.repeat(HEADS // KV_HEADS, axis=1) for each in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / DIM**0.5
    scores[..., np.triu_indices(TOKENS, 1)[0], np.triu_indices(TOKENS, 1)[1]] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    seen = (shares / shares.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    x = x + seen @ w["out"]
    gate, up = np.split(norm(x, w["norm_2"]) @ w["gate_up"], 2, axis=-1)
    return x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]


def main() -> None:
    """Runs both, and says how far they are apart."""
    rng = np.random.default_rng(0)
    w, x = weights(rng), rng.standard_normal((BATCH * TOKENS, WIDTH))
    expected = plain(x, w)
    if cupy is None:
        found = layer(x.astype(np.float32), {name: each.astype(np.float32) for name, each in w.items()})
    else:
        on_gpu = {name: cupy.asarray(each, cupy.float16) for name, each in w.items()}
        found = cupy.asnumpy(layer(cupy.asarray(x, cupy.float16), on_gpu))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"largest difference from NumPy: {difference:.1e} of the largest value")
    for call in called():
        print(call)
    if cupy is not None:
        print("To tune what this called: TILEWRIGHT_CALLS=calls.txt python examples/decoder_layer.py")
        print("                          autotune --device cuda:0 --calls calls.txt")


if __name__ == "__main__":
    main()
