"""The library's ways compute what ours do: each against the kernel's own reference, small, on a processor."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import numpy as np
import pytest

from benchmarks import contenders, torch_board
from benchmarks.cases import INT8, WEIGHTS, Case, cases, computes_all, smaller
from benchmarks.contenders import CHECK, Contender, arrays_of, checks, libraries
from benchmarks.torch_board import Timed, checked, difference, never_eager
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


def test_packed_weights_are_checked_against_dequantised_ones(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "CHECKED_COLUMNS", 24)
    case = smaller(next(each for each in cases() if each.family is WEIGHTS))
    torch.manual_seed(0)
    arrays = arrays_of(torch, case, "cpu")
    assert len(arrays["b_scale"].unique()) > 1
    named = {"a": arrays["a"][None], "b": arrays["packed"][None], "b_scale": arrays["b_scale"][None]}
    inputs = {name: (array.float() if array.is_floating_point() else array).numpy() for name, array in named.items()}
    wanted = find_kernel(case.op).reference(case.problem, inputs)["out"][0]
    (check,) = checks(torch, case)
    assert check.role == CHECK
    assert np.abs(check.call(arrays).numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert not [each for other in cases() if other.family is not WEIGHTS for each in checks(torch, other)]


def test_each_is_called_once_and_held_against_the_first(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = next(each for each in cases() if each.family is WEIGHTS)

    def refused(arrays: Any) -> Any:
        raise RuntimeError("not\nhere")

    ways = {
        "ours": ("ours", lambda arrays: arrays["a"]),
        "product": ("library", lambda arrays: 3 * arrays["a"]),  # of other weights: of another function
        "refused": ("separate", refused),
        "cut": ("separate", lambda arrays: arrays["a"][:1]),
        "check": (CHECK, lambda arrays: 1.25 * arrays["a"]),
    }
    called = [Contender(name, role, call) for name, (role, call) in ways.items()]
    assert checked(torch, case, called, {"a": torch.tensor([1.0, -4.0])}) == {
        "ours": Timed(difference=0.0),
        "product": Timed(),
        "refused": Timed(error="RuntimeError: not here"),
        "cut": Timed(error="ValueError: a result of (1,), where ours is of (2,)"),
        "check": Timed(difference=0.25),
    }


def test_results_are_compared_to_the_last_element(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_board, "COMPARED", 4)
    nan, inf = float("nan"), float("inf")
    ours = torch.tensor([1.0, -8.0, 2.0, 0.5, nan, 3.0, inf, 4.0, 5.0, -1.0])
    assert difference(ours, ours.clone()) == 0.0
    for place, value, apart in (
        *((9, 1.0, 0.25), (0, 5.0, 0.5), (9, -1.5, 0.0625)),
        *((9, nan, inf), (4, 0.0, inf), (9, -inf, inf), (6, 4.0, inf), (6, -inf, inf), (6, nan, inf)),
    ):
        other = ours.clone()
        other[place] = value
        assert difference(ours, other) == apart, (place, value)
    zeros = torch.zeros(6)
    assert (difference(zeros, zeros), difference(zeros, zeros + 1)) == (0.0, inf)
    images = torch.arange(24.0).view(1, 2, 3, 4)
    assert difference(images.permute(0, 2, 3, 1).reshape(12, 2), images) == 0.0
