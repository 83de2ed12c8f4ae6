"""Whisper large-v3: 30 seconds of sound through the encoder, and one step of the decoder with 5 beams.

The configuration file of whisper-large-v3 (Radford et al. 2022, arXiv:2212.04356): 32 layers each, width 1280, MLP
5120, 20 heads, 128 mel bins, 1500 positions of sound and 448 of text, 51866 tokens. 5 beams are openai/whisper's
default.
"""

from __future__ import annotations

from typing import Any

from tilewright.tuner.suites.workload import attention, conv, distinct, linear

LAYERS, WIDTH, MLP, HEADS = 32, 1280, 5120, 20
SOUND, TEXT, VOCABULARY, BEAMS = 1500, 448, 51866, 5

POSITIONS: dict[str, Any] = {"residual": "fp16", "residual_last": True}

WHISPER = distinct(
    (
        # 1-D: one row of 3000 frames. The positions are added behind the second's activation.
        conv("whisper conv1", 1, (1, 2 * SOUND), 128, WIDTH, (1, 3), activation="gelu_erf"),
        conv("whisper conv2", 1, (1, 2 * SOUND), WIDTH, WIDTH, (1, 3), stride=2, activation="gelu_erf", **POSITIONS),
        # Keys have no bias: zeros, in a projection of all three.
        linear("whisper encoder qkv", SOUND, WIDTH, 3 * WIDTH, count=LAYERS, bias="fp16"),
        attention("whisper encoder attention", 1, HEADS, SOUND, SOUND, WIDTH // HEADS, count=LAYERS),
        linear("whisper encoder attention output", SOUND, WIDTH, WIDTH, count=LAYERS, bias="fp16", residual="fp16"),
        linear("whisper encoder up", SOUND, WIDTH, MLP, count=LAYERS, bias="fp16", activation="gelu_erf"),
        linear("whisper encoder down", SOUND, MLP, WIDTH, count=LAYERS, bias="fp16", residual="fp16"),
        # Once per piece of sound, for all steps.
        linear("whisper decoder cross kv", SOUND, WIDTH, 2 * WIDTH, count=LAYERS, bias="fp16"),
        linear("whisper decoder qkv", BEAMS, WIDTH, 3 * WIDTH, count=LAYERS, bias="fp16"),
        attention("whisper decoder attention", BEAMS, HEADS, 1, TEXT, WIDTH // HEADS, count=LAYERS),
        linear("whisper decoder attention output", BEAMS, WIDTH, WIDTH, count=LAYERS, bias="fp16", residual="fp16"),
        linear("whisper decoder cross q", BEAMS, WIDTH, WIDTH, count=LAYERS, bias="fp16"),
        attention("whisper decoder cross attention", BEAMS, HEADS, 1, SOUND, WIDTH // HEADS, count=LAYERS),
        linear(
            "whisper decoder cross attention output",
            BEAMS,
            WIDTH,
            WIDTH,
            count=LAYERS,
            bias="fp16",
            residual="fp16",
        ),
        linear("whisper decoder up", BEAMS, WIDTH, MLP, count=LAYERS, bias="fp16", activation="gelu_erf"),
        linear("whisper decoder down", BEAMS, MLP, WIDTH, count=LAYERS, bias="fp16", residual="fp16"),
        linear("whisper decoder logits", BEAMS, WIDTH, VOCABULARY),
    )
)
