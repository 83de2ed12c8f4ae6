"""The support table: in step with the code, and every mark in it true in the interpreter and of the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compiling import compiled, described
from tests.kernels.conformance import Guarded, check
from tilewright.kernels import KERNELS, resolve_device
from tilewright.kernels.runtime import InterpretedPlan
from tilewright.kernels.support import ARCHS, mark, table, tried, works
from tilewright.tuning_db.env import compiling_environment

ROOT = Path(__file__).parent.parent.parent
FEATURES = [(kernel, problem, config) for kernel in KERNELS for _, problem, config in kernel.feature_cases]
NAMES = [f"{kernel.name}: {name}" for kernel in KERNELS for name in kernel.features]


def test_the_page_is_what_the_code_says():
    assert (ROOT / "docs" / "kernels.md").read_text() == table(), (
        "run python -m tilewright.kernels.support > docs/kernels.md"
    )


def test_the_command_prints_the_page():
    command = [sys.executable, "-m", "tilewright.kernels.support"]
    done = subprocess.run(command, env=compiling_environment(), capture_output=True, text=True, check=True)
    assert done.stdout == table()


def test_what_has_no_effect_on_an_arch_is_marked_so():
    cells = {
        (kernel.name, name): [mark(kernel, problem, config, f"sm_{arch}") for arch in ARCHS]
        for kernel in KERNELS
        for name, problem, config in kernel.feature_cases
    }
    from_90 = ["(✓)"] * 4 + ["✓"] * 3
    on_90 = ["(✓)"] * 4 + ["✓"] + ["(✓)"] * 2
    bracketed = {names: marks for names, marks in cells.items() if "(✓)" in marks}
    assert bracketed == {
        ("gemm", "tensor descriptors"): from_90,
        ("gemm", "tensor descriptors, persistent"): from_90,
        ("gemm", "warp-specialised"): on_90,
        ("gemm", "warp-specialised, gated halves"): on_90,
        ("attention", "values multiplied during the next softmax"): on_90,
        ("attention", "warp-specialised"): on_90,
        ("attention", "warp-specialised, persistent"): on_90,
        ("attention", "tensor descriptors"): on_90,
    }


def test_every_kernel_has_features_and_every_problem_another_one():
    for kernel in KERNELS:
        assert len(kernel.features) >= 3
        cases = {(problem, config) for _, problem, config in kernel.feature_cases}
        assert len(cases) == len(kernel.features)
        assert all(isinstance(problem, kernel.problem) for problem, _ in cases)


@pytest.mark.parametrize(("kernel", "problem", "config"), FEATURES, ids=NAMES)
def test_a_feature_equals_its_reference(kernel, problem, config):
    config = config or kernel.default(problem, resolve_device("h200"))
    plan = InterpretedPlan(kernel.launches(problem, config))
    strides = {}
    if kernel.strides is not None:
        arrays = problem.inputs(0) | {output: guarded.array for output, guarded in Guarded.of(problem).items()}
        elements = {each: tuple(step // array.itemsize for step in array.strides) for each, array in arrays.items()}
        strides = kernel.strides(problem, elements)

    def run(arrays, outs):
        plan.run({f"{each}_ptr": array for each, array in {**arrays, **outs}.items()}, strides, 0)

    check(kernel, problem, run, Guarded.of(problem))


def compiles(arch, features):
    claimed = [feature for feature in features if works(*feature, f"sm_{arch}")]
    replies = compiled(arch, [(kernel.name, problem, config) for kernel, problem, config in claimed])
    for feature, reply in zip(claimed, replies, strict=True):
        for launch in (reply, *reply["more"]):
            assert "error" not in launch, f"{described(reply)}: {launch.get('error')}"
            # What no tuner tries there may spill: its mark is in brackets.
            assert launch["over"] is None or not tried(*feature, f"sm_{arch}"), f"{described(reply)}: {launch['over']}"


@pytest.mark.parametrize("arch", [86, 90, 100])
def test_features_compile_without_spills(arch):
    """A fifteenth of the features for one arch in turn; the whole matrix is marked slow."""
    compiles(arch, FEATURES[(86, 90, 100).index(arch) :: 15])


PARTS = 8


@pytest.mark.slow
@pytest.mark.parametrize("part", [pytest.param(0, marks=pytest.mark.smoke), *range(1, PARTS)])
def test_every_feature_compiles_without_spills_for_the_arch_that_gpu_tests_run_on(part):
    """`tests/gpu/test_features.py` runs each there. Spills come and go with Triton's version: the selection on the
    oldest, which is a GPU's more often than the newest, has a part of these, slow as they are; before the tests of a
    GPU run, all of them are to be run on its Triton."""
    compiles(90, FEATURES[part::PARTS])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_mark_compiles_without_spills(arch):
    compiles(arch, FEATURES)
