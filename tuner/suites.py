"""Named workloads of real models: what the tuner tunes by default, and what tests and benchmarks run.

A GEMM of a linear layer is (tokens, in features) × (in features, out features): M is the tokens of one step. Weights
are stored as PyTorch does, (out features, in features), so B is column-major. Dimensions are those of the models' own
configuration files, named beside each.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.problem import Problem
from tilewright.tuning_db.errors import UnknownKernelError


@dataclass(frozen=True, slots=True)
class Workload:
    """A problem with the name of where it comes from."""

    name: str
    problem: Problem

    @property
    def op(self) -> str:
        """The kernel that runs it."""
        return self.problem.op


def _linear(name: str, tokens: int, features_in: int, features_out: int, **options: Any) -> Workload:
    return Workload(name, GemmProblem(M=tokens, N=features_out, K=features_in, b_layout="col", **options))


def _llama3_8b(tokens: int) -> tuple[Workload, ...]:
    # hidden 4096, intermediate 14336, 32 query and 8 key-value heads of 128; no biases (Meta-Llama-3-8B config.json)
    stage = {1: "decode", 16: "decode batch 16", 2048: "prefill 2048"}[tokens]
    return (
        _linear(f"llama3-8b qkv, {stage}", tokens, 4096, 4096 + 2 * 8 * 128),
        _linear(f"llama3-8b attention output, {stage}", tokens, 4096, 4096, residual="fp16"),
        _linear(f"llama3-8b gate-up, {stage}", tokens, 4096, 2 * 14336),
        _linear(f"llama3-8b down, {stage}", tokens, 14336, 4096, residual="fp16"),
    )


LLAMA3_8B = (*_llama3_8b(1), *_llama3_8b(16), *_llama3_8b(2048))

# hidden 768, intermediate 3072 (bert-base-uncased config.json); batch 8 of 128 tokens
BERT_BASE = (
    _linear("bert-base qkv", 1024, 768, 3 * 768, bias="fp16"),
    _linear("bert-base attention output", 1024, 768, 768, bias="fp16", residual="fp16"),
    _linear("bert-base up", 1024, 768, 3072, bias="fp16", activation="gelu_erf"),
    _linear("bert-base down", 1024, 3072, 768, bias="fp16", residual="fp16"),
)

# hidden 1024, intermediate 4096 (bert-large-uncased config.json); batch 8 of 128 tokens
BERT_LARGE = (
    _linear("bert-large qkv", 1024, 1024, 3 * 1024, bias="fp16"),
    _linear("bert-large attention output", 1024, 1024, 1024, bias="fp16", residual="fp16"),
    _linear("bert-large up", 1024, 1024, 4096, bias="fp16", activation="gelu_erf"),
    _linear("bert-large down", 1024, 4096, 1024, bias="fp16", residual="fp16"),
)

# hidden 768, MLP 3072, 197 tokens of a 224×224 image (Dosovitskiy et al. 2020, arXiv:2010.11929, table 1); batch 32
VIT_B = (
    _linear("vit-b/16 mlp up", 32 * 197, 768, 3072, bias="fp16", activation="gelu_erf"),
    _linear("vit-b/16 mlp down", 32 * 197, 3072, 768, bias="fp16", residual="fp16"),
)

SUITES: dict[str, tuple[Workload, ...]] = {
    "default": (*LLAMA3_8B, *BERT_BASE, *BERT_LARGE, *VIT_B),
    "llama3-8b": LLAMA3_8B,
    "bert-base": BERT_BASE,
    "bert-large": BERT_LARGE,
    "vit-b": VIT_B,
}


def find_suite(name: str) -> tuple[Workload, ...]:
    """The workloads of a suite.

    Raises:
        UnknownKernelError: there is none of that name; the message names the nearest.
    """
    if name in SUITES:
        return SUITES[name]
    near = difflib.get_close_matches(name, SUITES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnknownKernelError(f"unknown suite {name!r}{hint} (suites: {', '.join(SUITES)})")
