"""Stable Diffusion XL: one image of 1024×1024.

Podell et al. 2023 (arXiv:2307.01952), table 1, and sd_xl_base.yaml of Stability-AI/generative-models. The UNet: 320
channels times 1, 2, 4, two residual blocks a level (three on the way up), 0, 2 and 10 transformer blocks, heads of 64,
a context of 77 tokens of 2048; it sees two latent images of 128×128 at a time, one without the text
(classifier-free guidance). The VAE: 128 channels times 1, 2, 4, 4, two residual blocks a level (three in the decoder),
attention with one head in the middle.

Listed are the convolutions, the attention and the gated MLPs of the UNet and the decoder, and what the encoder has no
like of there. Normalisation and SiLU stand before a convolution, not behind it, and are no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tilewright.tuner.suites.workload import Workload, attention, conv, distinct, linear

LATENT = 128
"""Rows and columns of the latent image, an eighth of the image's."""

CHANNELS, TRANSFORMERS = (320, 640, 1280), (0, 2, 10)
CONTEXT, CONTEXT_WIDTH, HEAD_DIM = 77, 2048, 64

VAE_CHANNELS = (128, 256, 512, 512)
LATENT_CHANNELS = 4


def unet(images: int) -> tuple[Workload, ...]:
    """Every layer that multiplies, each distinct one once; but for those of a few rows, which embed time and size."""
    return distinct(_unet(images))


def vae(*, encoder: bool) -> tuple[Workload, ...]:
    """Every layer of one half of the VAE that multiplies, each distinct one once."""
    return distinct(_encoder() if encoder else _decoder())


def _unet(images: int) -> Iterator[Workload]:
    size, channels = LATENT, CHANNELS[0]
    yield conv("sdxl unet conv_in", images, size, LATENT_CHANNELS, channels, 3)
    skipped = [channels]
    for level, (width, depth) in enumerate(zip(CHANNELS, TRANSFORMERS, strict=True)):
        for block in range(2):
            name = f"sdxl unet down.{level}.{block}"
            yield from _residual(name, images, size, channels, width)
            yield from _transformer(name, images, size, width, depth)
            channels = width
            skipped.append(channels)
        if level < len(CHANNELS) - 1:
            yield conv(f"sdxl unet down.{level} downsample", images, size, width, width, 3, stride=2)
            size //= 2
            skipped.append(channels)
    yield from _residual("sdxl unet mid.0", images, size, channels, channels)
    yield from _transformer("sdxl unet mid", images, size, channels, TRANSFORMERS[-1])
    yield from _residual("sdxl unet mid.1", images, size, channels, channels)
    for level, (width, depth) in enumerate(zip(reversed(CHANNELS), reversed(TRANSFORMERS), strict=True)):
        for block in range(3):
            name = f"sdxl unet up.{level}.{block}"
            yield from _residual(name, images, size, channels + skipped.pop(), width)
            yield from _transformer(name, images, size, width, depth)
            channels = width
        if level < len(CHANNELS) - 1:
            size *= 2
            yield conv(f"sdxl unet up.{level} upsample", images, size, width, width, 3)
    yield conv("sdxl unet conv_out", images, size, channels, LATENT_CHANNELS, 3)


def _residual(name: str, images: int, size: int, channels: int, width: int) -> Iterator[Workload]:
    yield conv(f"{name} conv1", images, size, channels, width, 3)
    if channels != width:
        yield conv(f"{name} shortcut", images, size, channels, width, 1)
    yield conv(f"{name} conv2", images, size, width, width, 3, residual="fp16")


def _transformer(name: str, images: int, size: int, width: int, depth: int) -> Iterator[Workload]:
    """The two of self-attention, cross-attention and a gated MLP; `depth` times."""
    if depth == 0:
        return
    rows, heads = images * size * size, width // HEAD_DIM
    yield linear(f"{name} proj_in", rows, width, width, bias="fp16")
    yield linear(f"{name} qkv", rows, width, 3 * width, count=depth)
    yield attention(f"{name} self-attention", images, heads, size * size, size * size, HEAD_DIM, count=depth)
    yield linear(f"{name} attention output", rows, width, width, count=2 * depth, bias="fp16", residual="fp16")
    yield linear(f"{name} cross q", rows, width, width, count=depth)
    yield linear(f"{name} cross kv", images * CONTEXT, CONTEXT_WIDTH, 2 * width, count=depth)
    yield attention(f"{name} cross-attention", images, heads, size * size, CONTEXT, HEAD_DIM, count=depth)
    geglu: dict[str, Any] = {"bias": "fp16", "gated": "halves", "activation": "gelu_erf"}
    yield linear(f"{name} gate-up", rows, width, 8 * width, count=depth, **geglu)
    yield linear(f"{name} down", rows, 4 * width, width, count=depth, bias="fp16", residual="fp16")
    yield linear(f"{name} proj_out", rows, width, width, bias="fp16", residual="fp16")


def _decoder() -> Iterator[Workload]:
    size, channels = LATENT, VAE_CHANNELS[-1]
    yield conv("sdxl vae post_quant", 1, size, LATENT_CHANNELS, LATENT_CHANNELS, 1)
    yield conv("sdxl vae decoder conv_in", 1, size, LATENT_CHANNELS, channels, 3)
    yield from _middle("sdxl vae decoder mid", size, channels)
    for level, width in enumerate(reversed(VAE_CHANNELS)):
        name = f"sdxl vae decoder up.{level}"
        for block in range(3):
            yield from _residual(f"{name}.{block}", 1, size, channels, width)
            channels = width
        if level < len(VAE_CHANNELS) - 1:
            size *= 2
            yield conv(f"{name} upsample", 1, size, width, width, 3)
    yield conv("sdxl vae decoder conv_out", 1, size, channels, 3, 3)


def _encoder() -> Iterator[Workload]:
    size, channels = 8 * LATENT, VAE_CHANNELS[0]
    yield conv("sdxl vae encoder conv_in", 1, size, 3, channels, 3)
    for level, width in enumerate(VAE_CHANNELS):
        name = f"sdxl vae encoder down.{level}"
        for block in range(2):
            yield from _residual(f"{name}.{block}", 1, size, channels, width)
            channels = width
        if level < len(VAE_CHANNELS) - 1:
            # Padded at the bottom and on the right only.
            yield conv(f"{name} downsample", 1, size, width, width, 3, stride=2, padding=(0, 0, 1, 1))
            size //= 2
    yield from _middle("sdxl vae encoder mid", size, channels)
    yield conv("sdxl vae encoder conv_out", 1, size, channels, 2 * LATENT_CHANNELS, 3)
    yield conv("sdxl vae quant", 1, size, 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)


def _middle(name: str, size: int, width: int) -> Iterator[Workload]:
    """Its one head has 512 dimensions, more than `attention` takes: two GEMMs, and a softmax between them."""
    pixels = size * size
    yield from _residual(f"{name}.0", 1, size, width, width)
    yield linear(f"{name} qkv", pixels, width, 3 * width, bias="fp16")
    yield linear(f"{name} attention scores", pixels, width, pixels, alpha=True, strided=True)
    yield linear(f"{name} attention values", pixels, pixels, width, b_layout="row", strided=True)
    yield linear(f"{name} attention output", pixels, width, width, bias="fp16", residual="fp16")
    yield from _residual(f"{name}.1", 1, size, width, width)


PLAIN = ("proj_in", "proj_out", "qkv", "cross q", "cross kv", "attention output", "down")
"""Linear layers that the suites of language models have the like of."""

_OF_EACH_IMAGE = tuple(workload for workload in (*unet(2), *vae(encoder=False)) if not workload.name.endswith(PLAIN))
_LISTED = {workload.problem for workload in _OF_EACH_IMAGE}

# The encoder is for an image that is there already: of it, the convolutions that the rest has not.
SDXL = (
    *_OF_EACH_IMAGE,
    *(each for each in vae(encoder=True) if each.op == "conv2d" and each.problem not in _LISTED),
)
