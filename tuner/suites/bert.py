"""BERT base and large: batch 8 of 128 tokens.

The configuration files of bert-base-uncased and bert-large-uncased (Devlin et al. 2018, arXiv:1810.04805).
"""

from __future__ import annotations

from tilewright.tuner.suites.workload import Workload, attention, linear

SEQUENCES, LENGTH = 8, 128


def bert(name: str, layers: int, hidden: int, intermediate: int, heads: int) -> tuple[Workload, ...]:
    """The layers of the encoder."""
    tokens = SEQUENCES * LENGTH
    return (
        linear(f"{name} qkv", tokens, hidden, 3 * hidden, count=layers, bias="fp16"),
        attention(f"{name} attention", SEQUENCES, heads, LENGTH, LENGTH, hidden // heads, count=layers),
        linear(f"{name} attention output", tokens, hidden, hidden, count=layers, bias="fp16", residual="fp16"),
        linear(f"{name} up", tokens, hidden, intermediate, count=layers, bias="fp16", activation="gelu_erf"),
        linear(f"{name} down", tokens, intermediate, hidden, count=layers, bias="fp16", residual="fp16"),
    )


BERT_BASE = bert("bert-base", layers=12, hidden=768, intermediate=3072, heads=12)
BERT_LARGE = bert("bert-large", layers=24, hidden=1024, intermediate=4096, heads=16)
