"""Llama-3 8B and 70B: prefill and decode.

The configuration files of Meta-Llama-3-8B and Meta-Llama-3-70B; heads are of 128, nothing has a bias. Contexts beyond
8192 tokens are those of Llama 3.1, which has the same layers and 131072.

The 8B model is one GPU's. The 70B model's 141 GB of fp16 are not: it is listed as one of eight GPUs sees it that
share each layer (Shoeybi et al. 2019, arXiv:1909.08053: heads, the MLP and the vocabulary are cut in eight, the results
of attention output and down are added up across GPUs, and the residual after that); and the linear layers as one GPU
runs them with weights of 4 bits, 35 GB.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tilewright.kernels.ops.rmsnorm.problem import RmsNormProblem
from tilewright.tuner.suites.workload import Workload, attention, linear

HEAD_DIM, VOCABULARY = 128, 128256

INT4 = {"b_dtype": "int4", "b_scale": "group", "b_scale_dtype": "fp16", "group_size": 128}
"""Weights of 4 bits with a scale for every 128: the customary size of GPTQ's and AWQ's groups."""


class Model(NamedTuple):
    """What a configuration file says, or one GPU's part of it."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = VOCABULARY
    gpus: int = 1  # that share each layer

    def shared(self, gpus: int) -> Model:
        """One GPU's part."""
        return self._replace(
            name=f"{self.name} 1/{gpus}",
            intermediate=self.intermediate // gpus,
            heads=self.heads // gpus,
            kv_heads=self.kv_heads // gpus,
            vocabulary=self.vocabulary // gpus,
            gpus=gpus,
        )

    def linears(self, tokens: int, stage: str, **weights: Any) -> tuple[Workload, ...]:
        """The linear layers of one step of so many tokens. SwiGLU is in the epilogue of gate-up."""
        residual = "fp16" if self.gpus == 1 else None
        width = self.heads * HEAD_DIM
        each: dict[str, Any] = {"count": self.layers, **weights}
        gated: dict[str, Any] = {"gated": "halves", "activation": "silu"}
        return (
            linear(f"{self.name} qkv, {stage}", tokens, self.hidden, width + 2 * self.kv_heads * HEAD_DIM, **each),
            linear(f"{self.name} attention output, {stage}", tokens, width, self.hidden, residual=residual, **each),
            linear(f"{self.name} gate-up, {stage}", tokens, self.hidden, 2 * self.intermediate, **gated, **each),
            linear(f"{self.name} down, {stage}", tokens, self.intermediate, self.hidden, residual=residual, **each),
        )

    def head(self, sequences: int, stage: str) -> Workload:
        """The logits of each sequence's last token."""
        return linear(f"{self.name} logits, {stage}", sequences, self.hidden, self.vocabulary)

    def norm(self, tokens: int, stage: str) -> Workload:
        """The norms of one step: two a layer, and a last one. On one GPU the residual is in the epilogue before them;
        where layers are shared, what they add up to is known only here."""
        options: dict[str, Any] = {} if self.gpus == 1 else {"residual": "fp16", "residual_out": True}
        problem = RmsNormProblem(M=tokens, N=self.hidden, weight="fp16", **options)
        return Workload(f"{self.name} norm, {stage}", problem, 2 * self.layers + 1)

    def attention(self, sequences: int, queries: int, keys: int, **options: Any) -> Workload:
        """Causal attention of one step."""
        step = f"prefill {queries}" if queries > 1 else f"decode, {keys} keys"
        form = f", paged batch {sequences}" if "page_size" in options else ""
        return attention(
            f"{self.name} attention, {step}{form}",
            sequences,
            self.heads,
            queries,
            keys,
            HEAD_DIM,
            count=self.layers,
            Hkv=self.kv_heads,
            causal=True,
            **options,
        )

    def paged(self, sequences: int, keys: int) -> Workload:
        """Decoding of sequences of different lengths, their keys in blocks of 16, as servers keep them (vLLM's
        `block_size`; Kwon et al. 2023, arXiv:2309.06180)."""
        return self.attention(sequences, 1, keys, page_size=16, kv_lens=True)


MODEL_8B = Model("llama3-8b", layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8)
MODEL_70B = Model("llama3-70b", layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8)
SHARED_70B = MODEL_70B.shared(8)

LLAMA3_8B = (
    *MODEL_8B.linears(1, "decode"),
    MODEL_8B.head(1, "decode"),
    *MODEL_8B.linears(16, "decode batch 16"),
    *MODEL_8B.linears(2048, "prefill 2048"),
    *MODEL_8B.linears(1, "decode int4", **INT4),
    MODEL_8B.norm(1, "decode"),
    MODEL_8B.norm(2048, "prefill 2048"),
    *(MODEL_8B.attention(1, tokens, tokens) for tokens in (2048, 8192)),
    *(MODEL_8B.attention(1, 1, keys) for keys in (1024, 4096, 16384, 32768, 131072)),
    *(MODEL_8B.paged(16, keys) for keys in (1024, 4096)),
)

LLAMA3_70B = (
    *SHARED_70B.linears(16, "decode batch 16"),
    SHARED_70B.head(16, "decode batch 16"),
    *SHARED_70B.linears(2048, "prefill 2048"),
    SHARED_70B.norm(16, "decode batch 16"),
    SHARED_70B.norm(2048, "prefill 2048"),
    SHARED_70B.attention(1, 8192, 8192),
    *(SHARED_70B.attention(1, 1, keys) for keys in (4096, 32768, 131072)),
    *(SHARED_70B.paged(16, keys) for keys in (1024, 16384)),
    *MODEL_70B.linears(1, "decode int4", **INT4),
)
