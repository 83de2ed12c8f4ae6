"""ViT-B/16 on images of 224×224, batch 32.

Dosovitskiy et al. 2020 (arXiv:2010.11929), table 1: 12 layers, hidden 768, MLP 3072, 12 heads; 14×14 patches and a
class token are 197 tokens.
"""

from __future__ import annotations

from tilewright.tuner.suites.workload import attention, conv, linear

IMAGES, TOKENS = 32, 14 * 14 + 1
LAYERS, HIDDEN, MLP, HEADS = 12, 768, 3072, 12
ROWS = IMAGES * TOKENS

VIT_B = (
    conv("vit-b/16 patches", IMAGES, 224, 3, HIDDEN, 16, stride=16),
    linear("vit-b/16 qkv", ROWS, HIDDEN, 3 * HIDDEN, count=LAYERS, bias="fp16"),
    attention("vit-b/16 attention", IMAGES, HEADS, TOKENS, TOKENS, HIDDEN // HEADS, count=LAYERS),
    linear("vit-b/16 attention output", ROWS, HIDDEN, HIDDEN, count=LAYERS, bias="fp16", residual="fp16"),
    linear("vit-b/16 mlp up", ROWS, HIDDEN, MLP, count=LAYERS, bias="fp16", activation="gelu_erf"),
    linear("vit-b/16 mlp down", ROWS, MLP, HIDDEN, count=LAYERS, bias="fp16", residual="fp16"),
    linear("vit-b/16 head", IMAGES, HIDDEN, 1000, bias="fp16"),
)
