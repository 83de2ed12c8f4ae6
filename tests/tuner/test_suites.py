from __future__ import annotations

import pytest

from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuner.suites import SUITES, find_suite
from tilewright.tuning_db.errors import UnknownKernelError

pytestmark = pytest.mark.smoke


def test_the_default_suite_names_each_model() -> None:
    names = [workload.name for workload in SUITES["default"]]
    assert len(names) >= 12
    assert len(set(names)) == len(names)
    for model in ("llama3-8b", "bert-base", "bert-large", "vit-b"):
        assert any(name.startswith(model) for name in names)


def test_llama_covers_its_linear_layers_at_each_batch() -> None:
    # (K, N) of Llama-3-8B's fused linear layers: hidden 4096, MLP 14336, 32 query and 8 key-value heads of 128.
    layers = {(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)}
    for tokens in (1, 16, 2048):
        found = {(w.problem.K, w.problem.N) for w in SUITES["llama3-8b"] if w.problem.to_dict()["M"] == tokens}
        assert found == layers


def test_parameters_of_the_models_add_up() -> None:
    """The layers' weights, times the number of layers, are the models' published parameter counts less embeddings."""

    def weights(suite: str, tokens: int) -> int:
        return sum(w.problem.K * w.problem.N for w in SUITES[suite] if w.problem.to_dict()["M"] == tokens)

    # 32 layers of 218.1 M: 6.98 of the 8.03 billion; the two embeddings of 128256 × 4096 are the rest (1.05 billion).
    assert 32 * weights("llama3-8b", 1) + 2 * 128256 * 4096 == pytest.approx(8.03e9, rel=0.001)
    # 110 M and 340 M as published (Devlin et al. 2018), of which 24 M and 32 M are embeddings and pooler.
    assert 12 * weights("bert-base", 1024) == pytest.approx(85e6, rel=0.01)
    assert 24 * weights("bert-large", 1024) == pytest.approx(302e6, rel=0.01)


@pytest.mark.parametrize("suite", SUITES)
def test_workloads_are_problems_that_read_back(suite: str) -> None:
    for workload in find_suite(suite):
        assert isinstance(workload.problem, GemmProblem)
        assert workload.op == "gemm"
        assert GemmProblem.parse(str(workload.problem)) == workload.problem


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(UnknownKernelError, match=r"unknown suite 'bert-bas'; did you mean bert-base\?"):
        find_suite("bert-bas")
