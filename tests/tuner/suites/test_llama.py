from __future__ import annotations

import pytest

from tests.tuner.suites.totals import multiply_adds, weights
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuner.suites import SUITES, Workload
from tilewright.tuner.suites.llama import MODEL_8B, MODEL_70B, SHARED_70B

pytestmark = pytest.mark.smoke

EMBEDDINGS = 128256  # times the hidden size; one such matrix for the tokens, one for the logits


def linears(suite: str, tokens: int, b_dtype: str | None = None) -> list[Workload]:
    found = []
    for workload in SUITES[suite]:
        problem = workload.problem
        if isinstance(problem, GemmProblem) and (problem.M, problem.b_dtype) == (tokens, b_dtype):
            found.append(workload)
    return found


def test_8b_covers_its_linear_layers_at_each_batch() -> None:
    # (K, N) of the fused linear layers: hidden 4096, MLP 14336, 32 query and 8 key-value heads of 128.
    layers = {(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)}
    for tokens, b_dtype in ((1, None), (16, None), (2048, None), (1, "int4")):
        found = {(w.problem.K, w.problem.N) for w in linears("llama3-8b", tokens, b_dtype)}
        assert found - {(4096, EMBEDDINGS)} == layers


def test_parameters_add_up() -> None:
    # As published: 8.03 and 70.55 billion.
    assert weights(linears("llama3-8b", 1)) + EMBEDDINGS * 4096 == pytest.approx(8.03e9, rel=0.001)
    whole = weights(linears("llama3-70b", 1, "int4")) + 2 * EMBEDDINGS * 8192
    assert whole == pytest.approx(70.55e9, rel=0.001)
    # Eight GPUs have all of it between them, each the whole embedding of tokens.
    shared = weights(linears("llama3-70b", 16))
    assert 8 * shared + EMBEDDINGS * 8192 == whole


def test_a_token_costs_two_operations_a_parameter() -> None:
    assert multiply_adds(linears("llama3-8b", 1)) == pytest.approx(8.03e9 - EMBEDDINGS * 4096, rel=0.001)
    assert multiply_adds(linears("llama3-8b", 2048)) == 2048 * 32 * (4096 * (6144 + 4096 + 3 * 14336))


def test_gate_and_up_are_one_product_with_swiglu_behind() -> None:
    for suite in ("llama3-8b", "llama3-70b"):
        gated = [w.problem for w in SUITES[suite] if "gate-up" in w.name]
        assert len(gated) >= 3
        for problem in gated:
            assert isinstance(problem, GemmProblem)
            assert (problem.gated, problem.activation) == ("halves", "silu")


def test_weights_of_4_bits_have_a_scale_for_128() -> None:
    for suite in ("llama3-8b", "llama3-70b"):
        for workload in linears(suite, 1, "int4"):
            problem = workload.problem
            assert isinstance(problem, GemmProblem)
            assert problem.shapes()["b"] == (1, problem.K // 2, problem.N)
            assert problem.shapes()["b_scale"] == (problem.K // 128, problem.N)


def test_a_shared_layer_leaves_the_residual_to_the_sum_over_gpus() -> None:
    names = ("attention output", "down")
    for model, residual in ((MODEL_8B, "fp16"), (MODEL_70B, "fp16"), (SHARED_70B, None)):
        layers = [w.problem for w in model.linears(16, "x") if w.name.removesuffix(", x").endswith(names)]
        assert [problem.to_dict()["residual"] for problem in layers] == [residual, residual]


def test_attention_spans_prefill_and_keys_from_1k_to_128k() -> None:
    for suite, heads, kv_heads in (("llama3-8b", 32, 8), ("llama3-70b", 8, 1)):
        problems = [w.problem for w in SUITES[suite] if isinstance(w.problem, AttentionProblem)]
        assert {(p.H, p.Hkv, p.D) for p in problems} == {(heads, kv_heads, 128)}
        prefill = [p for p in problems if p.Sq > 1]
        assert prefill
        assert all(p.causal and p.Sq == p.Skv for p in prefill)
        keys = {p.Skv for p in problems if p.Sq == 1}
        assert (min(keys), max(keys)) == (1024, 131072)
        paged = [p for p in problems if p.page_size]
        assert {(p.B, p.Sq, p.kv_lens) for p in paged} == {(16, 1, True)}
