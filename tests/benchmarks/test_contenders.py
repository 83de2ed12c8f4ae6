"""The library's ways compute what ours do: each against the kernel's own reference, small, on a processor."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import numpy as np
import pytest

from benchmarks import contenders
from benchmarks.cases import INT8, Case, cases, computes_all, smaller
from benchmarks.contenders import arrays_of, libraries
from benchmarks.torch_board import never_eager
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.registry import find_kernel

CASES = list({str(each.problem): each for each in map(smaller, cases())}.values())
ON_GPU_ONLY = ("fp8e4m3", "int8")
"""Data types whose products torch has on a GPU, or of these sizes, alone."""


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", exc_type=ImportError)


def as_inputs(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays under the names and in the shapes of the problem's inputs, in float64."""
    named = {name: array.double().numpy() for name, array in arrays.items()}
    if isinstance(case.problem, GemmProblem):
        named["a"], named["b"] = named["a"][None], named.pop("w").T[None]
        if "residual" in named:
            named["residual"] = named["residual"][None]
    elif isinstance(case.problem, Conv2dProblem):
        named |= {name: named[name].transpose(0, 2, 3, 1) for name in ("x", "w", "residual") if name in named}
    return named


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.problem}")
def test_every_way_is_right(torch: Any, case: Case) -> None:
    if case.problem.dtype in ON_GPU_ONLY or getattr(case.problem, "b_dtype", None):  # type: ignore[attr-defined]
        pytest.skip(f"torch multiplies {case.problem} on a GPU alone")  # type: ignore[attr-defined]
    torch.manual_seed(0)
    arrays = arrays_of(torch, case, "cpu")
    kernel = find_kernel(case.op)
    wanted = kernel.reference(case.problem, as_inputs(case, arrays))["out"]
    # Between product and epilogue the library rounds to the result's type, of 8 or 11 bits.
    near = np.abs(wanted).max() * (0.02 if case.problem.dtype == "bf16" else 0.003)  # type: ignore[attr-defined]
    ran = 0
    for contender in libraries(torch, case):
        elsewhere = contender.name in ("cuBLASLt", "torch, cuDNN attention", "torch, efficient attention")
        if elsewhere or not computes_all(case, contender.role):
            continue
        result = contender.call(arrays)
        if result.dim() == 4 and case.op != "attention":
            result = result.permute(0, 2, 3, 1)
        found = result.double().numpy().reshape(wanted.shape)
        assert np.abs(found - wanted).max() <= near, contender.name
        ran += 1
    assert ran


def test_every_epilogue_of_a_run_is_compiled_for_its_sizes(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole cases in their order, as in a run, without memory and without code: Dynamo decides all the same."""
    compiled = contenders._compiled.__wrapped__  # other tests' have been left as they are, and are kept
    graphs: list[tuple[Any, ...]] = []

    def without_kernels(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(tuple(inputs))
        return graph.forward

    @functools.cache
    def without_code(torch: Any, activation: str, gated: bool) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch, "compile", partial(torch.compile, backend=without_kernels))
            return compiled(torch, activation, gated)

    monkeypatch.setattr(contenders, "_compiled", without_code)
    torch._dynamo.reset()
    # Both are put back at the end, whatever they were set to.
    limits = {"recompile_limit": 8, "accumulated_recompile_limit": 8, "fail_on_recompile_limit_hit": False}
    with torch._dynamo.config.patch(limits), torch.no_grad():
        never_eager(torch)
        for case in cases():
            arrays = arrays_of(torch, case, "meta")
            for contender in libraries(torch, case):
                if "compiled elementwise" in contender.name:
                    contender.call(arrays)
    torch._dynamo.reset()
    assert len(graphs) > 8, "torch's own limit would have done"
    sizes = {type(size) for graph in graphs for each in graph for size in getattr(each, "shape", [each])}
    assert sizes == {int}, "sizes are arguments of a kernel"


def test_scales_are_applied_within_the_compiled_kernel(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(each for each in cases() if each.family is INT8)
    given: list[Any] = []
    monkeypatch.setattr(contenders, "_compiled", lambda torch, activation, gated: lambda *parts: given.extend(parts))
    arrays = arrays_of(torch, case, "meta")
    (way,) = (each for each in libraries(torch, case) if "compiled elementwise" in each.name)
    way.call(arrays)
    _, bias, _, scales, kind = given
    assert (bias, scales, kind) == (arrays["bias"], (arrays["a_scale"], arrays["b_scale"]), torch.bfloat16)


def test_products_of_int8_are_scaled(torch: Any) -> None:
    case = smaller(next(each for each in cases() if each.family is INT8))
    problem: Any = case.problem
    torch.manual_seed(0)
    sums = torch.randint(-9999, 9999, (problem.M, problem.N), dtype=torch.int32)
    a_scale, b_scale, bias = torch.rand(()) / 4096, torch.rand(problem.N), torch.randn(problem.N)
    epilogue = contenders._compiled(torch, problem.activation, False)
    found = epilogue(sums, bias, None, (a_scale, b_scale), torch.float32)
    whole = sums.double() * a_scale.double() * b_scale.double() + bias.double()
    wanted = torch.nn.functional.gelu(whole, approximate="tanh")
    assert float((found - wanted).abs().max()) < 1e-5
