"""Three transformers: an encoder like BERT-base, a decoder like GPT's with Llama's layers and a key-value cache, and a
vision transformer like ViT-B/16. Each is written as PyTorch's exporters write it, of fixed shapes and batch 1.

They differ in what exporters differ in: how scores are scaled (Div behind the product; Mul behind it; Mul by the root
on both factors), masked (from an input; a constant; not at all), and how heads come about (three projections; grouped
ones; one projection that is taken apart).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from benchmarks.models.layers import BRANCH_STD, MASKED, SCORE_STD, Network
from benchmarks.models.parameters import Kind, Parameter

LOGITS_STD = 2.0
KEY_STD = math.sqrt(SCORE_STD)
"""Of queries and keys: the product of two such, over √D, has SCORE_STD."""


@dataclass(frozen=True, slots=True)
class EncoderSize:
    """Of `encoder`; the numbers of BERT-base by default."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    inner: int = 3072
    sequence: int = 128
    vocabulary: int = 30522
    labels: int = 150


@dataclass(frozen=True, slots=True)
class DecoderSize:
    """Of `decoder`: `sequence` new tokens behind `past` that are in the cache."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    kv_heads: int = 12
    inner: int = 2048
    sequence: int = 64
    past: int = 64
    vocabulary: int = 32000


@dataclass(frozen=True, slots=True)
class VisionSize:
    """Of `vision`; the numbers of ViT-B/16 by default."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    inner: int = 3072
    image: int = 224
    patch: int = 16
    classes: int = 1000


def encoder(size: EncoderSize, opset: int) -> tuple[ir.Model, dict[str, Parameter]]:
    """A post-norm encoder that classifies its first token.

    Inputs `input_ids`, `attention_mask` (1: token, 0: padding), `token_type_ids`, int64 (1, S); output `logits` fp32
    (1, labels).
    """
    net = Network("encoder", opset)
    op, s, h = net.op, size.sequence, size.hidden
    ids, mask, kinds = (
        net.input(name, ir.DataType.INT64, 1, s) for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    seen = op.Cast(op.Unsqueeze(op.Unsqueeze(mask, [1]), [2]), to=ir.DataType.FLOAT)
    bias = op.Mul(op.Sub(1.0, seen), MASKED)
    if net.operators:  # exporters expand the mask for it, and ONNX Runtime wants a row for each query
        bias = op.Expand(bias, [1, 1, s, s])
    with net.scope("embeddings"):
        words = net.parameter("word_embeddings.weight", (size.vocabulary, h), Parameter(Kind.EMBEDDING))
        types = net.parameter("token_type_embeddings.weight", (2, h), Parameter(Kind.EMBEDDING, 0.3))
        places = net.parameter("position_embeddings", (1, s, h), Parameter(Kind.EMBEDDING, 0.5))
        x = op.Add(op.Add(op.Gather(words, ids), op.Gather(types, kinds)), places)
        x = net.layer_norm("LayerNorm", x, h)
    for layer in range(size.layers):
        with net.scope(f"encoder.layer.{layer}"):
            with net.scope("attention"):
                q, k = (net.linear(name, x, (h, h), std=KEY_STD) for name in ("query", "key"))
                mixed = encoder_attention(net, q, k, net.linear("value", x, (h, h)), bias, size)
                mixed = net.linear("output.dense", mixed, (h, h), std=BRANCH_STD)
                x = net.layer_norm("output.LayerNorm", op.Add(mixed, x), h)
            inner = net.gelu(net.linear("intermediate.dense", x, (h, size.inner)))
            out = net.linear("output.dense", inner, (size.inner, h), std=BRANCH_STD)
            x = net.layer_norm("output.LayerNorm", op.Add(out, x), h)
    pooled = op.Tanh(net.gemm("pooler.dense", op.Gather(x, 0, axis=1), (h, h)))
    net.output(net.gemm("classifier", pooled, (h, size.labels), std=LOGITS_STD), "logits", 1, size.labels)
    return net.model(), net.parameters


def encoder_attention(
    net: Network, q: ir.Value, k: ir.Value, v: ir.Value, bias: ir.Value, size: EncoderSize
) -> ir.Value:
    """softmax(Q·Kᵀ / √D + bias) · V of (1, S, hidden) each."""
    op, width = net.op, size.hidden // size.heads
    q, v = (net.heads(x, size.sequence, size.heads, width) for x in (q, v))
    if net.operators:
        k = net.heads(k, size.sequence, size.heads, width)
        mixed = op.Attention(q, k, v, bias)
    else:
        k = op.Transpose(op.Reshape(k, [1, size.sequence, size.heads, width]), perm=[0, 2, 3, 1])
        scores = op.Add(op.Div(op.MatMul(q, k), math.sqrt(width)), bias)
        mixed = op.MatMul(op.Softmax(scores, axis=-1), v)
    return net.merged(mixed, size.sequence, size.hidden)


def decoder(size: DecoderSize, opset: int) -> tuple[ir.Model, dict[str, Parameter]]:
    """A pre-norm decoder with RMSNorm, rotary positions, a SiLU-gated MLP and a key-value cache.

    Inputs `input_ids`, `position_ids`, int64 (1, S), and for each layer i `past_key_values.i.key` and `.value`, fp32
    (1, kv_heads, past, D); outputs `logits` fp32 (1, S, vocabulary), `present.i.key` and `.value`
    (1, kv_heads, past + S, D).
    """
    net = Network("decoder", opset)
    op, s, h, width = net.op, size.sequence, size.hidden, size.hidden // size.heads
    ids, positions = (net.input(name, ir.DataType.INT64, 1, s) for name in ("input_ids", "position_ids"))
    cache = [
        tuple(
            net.input(f"past_key_values.{layer}.{name}", ir.DataType.FLOAT, 1, size.kv_heads, size.past, width)
            for name in ("key", "value")
        )
        for layer in range(size.layers)
    ]
    later = np.arange(size.past + s) > size.past + np.arange(s)[:, None]
    mask = net.constant("causal_mask", np.where(later, MASKED, 0).astype(np.float32)[None, None])
    tables = rotary_tables(net, positions, size.past + s, width)
    with net.scope("model"):
        words = net.parameter("embed_tokens.weight", (size.vocabulary, h), Parameter(Kind.EMBEDDING))
        x = op.Gather(words, ids)
    presents = []
    for layer, past in enumerate(cache):
        with net.scope(f"model.layers.{layer}"):
            normed = net.rms_norm("input_layernorm", x, h)
            with net.scope("self_attn"):
                q = net.linear("q_proj", normed, (h, h), std=KEY_STD, bias=False)
                k = net.linear("k_proj", normed, (h, size.kv_heads * width), std=KEY_STD, bias=False)
                v = net.linear("v_proj", normed, (h, size.kv_heads * width), bias=False)
                q = net.rotary(net.heads(q, s, size.heads, width), positions, tables, width)
                k = net.rotary(net.heads(k, s, size.kv_heads, width), positions, tables, width)
                mixed, *present = decoder_attention(net, q, k, net.heads(v, s, size.kv_heads, width), mask, past, size)
                presents.append(present)
                out = net.linear("o_proj", net.merged(mixed, s, h), (h, h), std=BRANCH_STD, bias=False)
            x = op.Add(x, out)
            normed = net.rms_norm("post_attention_layernorm", x, h)
            with net.scope("mlp"):
                gate = net.silu(net.linear("gate_proj", normed, (h, size.inner), bias=False))
                up = net.linear("up_proj", normed, (h, size.inner), bias=False)
                out = net.linear("down_proj", op.Mul(gate, up), (size.inner, h), std=BRANCH_STD, bias=False)
            x = op.Add(x, out)
    x = net.rms_norm("model.norm", x, h)
    logits = net.linear("lm_head", x, (h, size.vocabulary), std=LOGITS_STD, bias=False)
    net.output(logits, "logits", 1, s, size.vocabulary)
    for layer, present in enumerate(presents):
        for name, value in zip(("key", "value"), present, strict=True):
            net.output(value, f"present.{layer}.{name}", 1, size.kv_heads, size.past + s, width)
    return net.model(), net.parameters


def rotary_tables(net: Network, positions: ir.Value, length: int, width: int) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines as `Network.rotary` takes them."""
    angles = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, width, 2) / width)
    if not net.operators:
        angles = np.concatenate([angles, angles], axis=1)
    tables = (net.constant(f.__name__ + "_cached", f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    cosines, sines = tables if net.operators else (net.op.Unsqueeze(net.op.Gather(t, positions), [1]) for t in tables)
    return cosines, sines


def decoder_attention(
    net: Network,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value,
    past: tuple[ir.Value, ...],
    size: DecoderSize,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """softmax(Q·[past K, K]ᵀ / √D + mask) · [past V, V], with the keys and values that it saw."""
    op, width, repeats = net.op, size.hidden // size.heads, size.heads // size.kv_heads
    if net.operators:
        mixed, keys, values = net.several("Attention", 3, q, k, v, mask, *past)
        return mixed, keys, values
    keys, values = (op.Concat(before, new, axis=2) for before, new in zip(past, (k, v), strict=True))
    k, v = keys, values
    if repeats > 1:
        length = size.past + size.sequence
        k, v = (
            op.Reshape(
                op.Expand(op.Unsqueeze(x, [2]), [1, size.kv_heads, repeats, length, width]),
                [1, size.heads, length, width],
            )
            for x in (k, v)
        )
    scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), 1 / math.sqrt(width))
    return op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), v), keys, values


def vision(size: VisionSize, opset: int) -> tuple[ir.Model, dict[str, Parameter]]:
    """A pre-norm encoder of image patches that classifies its class token.

    Input `pixel_values` fp32 (1, 3, image, image); output `logits` fp32 (1, classes).
    """
    net = Network("vision", opset)
    op, h, count = net.op, size.hidden, (size.image // size.patch) ** 2
    pixels = net.input("pixel_values", ir.DataType.FLOAT, 1, 3, size.image, size.image)
    with net.scope("patch_embed.proj"):
        weight = net.parameter("weight", (h, 3, size.patch, size.patch), Parameter(Kind.WEIGHT, channels=True))
        bias = net.parameter("bias", (h,), Parameter(Kind.BIAS, 0.2))
        patches = op.Conv(pixels, weight, bias, kernel_shape=[size.patch] * 2, strides=[size.patch] * 2)
    x = op.Transpose(op.Reshape(patches, [1, h, count]), perm=[0, 2, 1])
    token = net.parameter("cls_token", (1, 1, h), Parameter(Kind.EMBEDDING))
    places = net.parameter("pos_embed", (1, count + 1, h), Parameter(Kind.EMBEDDING, 0.5))
    x = op.Add(op.Concat(token, x, axis=1), places)
    for layer in range(size.layers):
        with net.scope(f"blocks.{layer}"):
            mixed = vision_attention(net, net.layer_norm("norm1", x, h), count + 1, size)
            x = op.Add(x, net.linear("attn.proj", mixed, (h, h), std=BRANCH_STD))
            inner = net.gelu(net.linear("mlp.fc1", net.layer_norm("norm2", x, h), (h, size.inner)))
            x = op.Add(x, net.linear("mlp.fc2", inner, (size.inner, h), std=BRANCH_STD))
    first = op.Gather(net.layer_norm("norm", x, h), 0, axis=1)
    net.output(net.gemm("head", first, (h, size.classes), std=LOGITS_STD), "logits", 1, size.classes)
    return net.model(), net.parameters


def vision_attention(net: Network, x: ir.Value, tokens: int, size: VisionSize) -> ir.Value:
    """softmax(Q·Kᵀ / √D) · V of one projection of x, (1, tokens, hidden)."""
    op, width = net.op, size.hidden // size.heads
    both = net.linear("attn.qkv", x, (size.hidden, 3 * size.hidden), std=KEY_STD)
    if net.operators:
        q, k, v = net.several("Split", 3, both, num_outputs=3, axis=-1)
        return op.Attention(q, k, v, q_num_heads=size.heads, kv_num_heads=size.heads)
    apart = op.Transpose(op.Reshape(both, [1, tokens, 3, size.heads, width]), perm=[2, 0, 3, 1, 4])
    q, k, v = (op.Gather(apart, index, axis=0) for index in range(3))
    root = width**-0.25
    scores = op.MatMul(op.Mul(q, root), op.Mul(op.Transpose(k, perm=[0, 1, 3, 2]), root))
    return net.merged(op.MatMul(op.Softmax(scores, axis=-1), v), tokens, size.hidden)
