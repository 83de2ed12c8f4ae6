from __future__ import annotations

from collections import Counter

import pytest

from tests.kernels.compiling import compiled, described
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.registry import KERNELS, find_kernel
from tilewright.tuner.suites import SUITES, Workload, find_suite
from tilewright.tuner.suites.workload import distinct
from tilewright.tuning_db.errors import UnknownSuiteError

MODELS = [name for name in SUITES if name not in ("default", "all")]
ARCHS = (80, 86, 89, 90, 100, 120)


@pytest.mark.smoke
def test_the_default_suite_has_every_op_and_is_small() -> None:
    workloads = SUITES["default"]
    # Five minutes on 2 cores, 12 trials each.
    assert 20 <= len(workloads) <= 30
    assert {workload.op for workload in workloads} == {workload.op for workload in SUITES["all"]}
    assert set(workloads) <= set(SUITES["all"])
    for model in ("llama3-8b", "bert-base", "bert-large", "vit-b", "resnet50", "mobilenet-v2", "convnext-t"):
        assert any(workload.name.startswith(model) for workload in workloads), model


@pytest.mark.smoke
def test_all_is_every_distinct_problem_of_the_models() -> None:
    # Half an hour on 2 cores, 12 trials each.
    assert 150 <= len(SUITES["all"]) <= 260
    assert {w.problem for w in SUITES["all"]} == {w.problem for model in MODELS for w in SUITES[model]}
    for model in MODELS:
        assert {w.op for w in SUITES[model]} <= {kernel.name for kernel in KERNELS}


@pytest.mark.smoke
@pytest.mark.parametrize("suite", SUITES)
def test_names_and_problems_are_there_once(suite: str) -> None:
    workloads = find_suite(suite)
    for values in ([w.name for w in workloads], [w.problem for w in workloads]):
        assert [value for value, count in Counter(values).items() if count > 1] == []
    assert all(workload.count >= 1 for workload in workloads)


@pytest.mark.smoke
@pytest.mark.parametrize("suite", MODELS)
def test_workloads_are_problems_that_read_back(suite: str) -> None:
    for workload in SUITES[suite]:
        assert type(workload.problem).parse(str(workload.problem)) == workload.problem
        assert type(workload.problem).from_json(workload.problem.to_json()) == workload.problem


@pytest.mark.smoke
@pytest.mark.parametrize("arch", ARCHS)
def test_every_workload_runs_on_every_arch(arch: int) -> None:
    device = resolve_device(f"sm_{arch}")
    for workload in SUITES["all"]:
        kernel, problem = find_kernel(workload.op), workload.problem
        assert kernel.supported(problem, device) is None, workload.name
        kernel.space.check(problem, kernel.default(problem, device), device)


@pytest.mark.smoke
def test_the_default_suite_runs_without_tensor_cores() -> None:
    device = resolve_device("sm_75")
    for workload in SUITES["default"]:
        kernel, problem = find_kernel(workload.op), workload.problem
        assert kernel.supported(problem, device) is None, workload.name
        kernel.space.check(problem, kernel.default(problem, device), device)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("suite", MODELS)
def test_every_default_compiles_within_limits_and_without_spills(suite: str, arch: int) -> None:
    replies = compiled(arch, [(workload.op, workload.problem, None) for workload in SUITES[suite]])
    assert len(replies) == len(SUITES[suite])
    for reply in replies:
        for launch in (reply, *reply["more"]):
            assert "error" not in launch, f"{described(reply)}: {launch['error']}"
            assert not launch["over"], f"{described(reply)}: {launch['over']}"
            assert launch["resources"]["spill_bytes"] == 0, described(reply)


@pytest.mark.smoke
def test_one_problem_of_two_models_is_tuned_once() -> None:
    first, second = SUITES["bert-base"][0], SUITES["bert-large"][0]
    again = Workload("again", first.problem, count=2)
    merged = distinct((first, second, again))
    assert [workload.name for workload in merged] == [first.name, second.name]
    assert [workload.count for workload in merged] == [first.count + 2, second.count]


@pytest.mark.smoke
def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(UnknownSuiteError, match=r"unknown suite 'bert-bas'; did you mean bert-base\?"):
        find_suite("bert-bas")
    with pytest.raises(UnknownSuiteError, match=r"unknown suite 'resnet'; did you mean resnet50\?"):
        find_suite("resnet")
