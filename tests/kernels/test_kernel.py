"""Contracts that every registered kernel keeps."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Kernel, Launch
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.rmsnorm.problem import RmsNormProblem
from tilewright.kernels.registry import KERNELS, find_kernel
from tilewright.tuning_db.errors import UsageError

pytestmark = pytest.mark.smoke

LARGE: dict[str, list[Any]] = {
    "gemm": [
        GemmProblem(M=1, N=1, K=1),
        GemmProblem(M=129, N=127, K=33, dtype="fp32", bias="fp32", residual="fp32", activation="silu", alpha=True),
        GemmProblem(M=2048, N=4096, K=4096, b_layout="col"),
        GemmProblem(M=64, N=64, K=64, batch=3, strided=True, residual="fp16", b_broadcast=True),
    ],
    "conv2d": [Conv2dProblem(N=32, H=56, W=56, C=64, K=64, R=3, S=3, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1)],
    "attention": [
        AttentionProblem(B=1, H=32, Hkv=8, Sq=2048, Skv=2048, D=128, causal=True),
        AttentionProblem(B=1, H=64, Hkv=8, Sq=1, Skv=131072, D=128),
    ],
    "rmsnorm": [RmsNormProblem(M=2048, N=4096, weight="fp16")],
}
"""Beside the features of each op, which are small problems."""

CASES = [
    (kernel, problem)
    for kernel in KERNELS
    for problem in (*LARGE[kernel.name], *dict.fromkeys(problem for _, problem, _ in kernel.feature_cases))
]
NAMES = [f"{kernel.name} {problem}" for kernel, problem in CASES]


def launches_of(kernel: Kernel[Any, Any], problem: Any) -> tuple[Launch, ...]:
    return kernel.launches(problem, kernel.default(problem, resolve_device("a100")))


@pytest.mark.parametrize(("kernel", "problem"), CASES, ids=NAMES)
def test_a_launch_names_every_parameter_of_its_function_once_and_in_order(
    kernel: Kernel[Any, Any], problem: Any
) -> None:
    for launch in launches_of(kernel, problem):
        arguments = [argument.name for argument in launch.arguments]
        constexprs = [name for name, _ in launch.constexprs]
        parameters = list(inspect.signature(launch.fn.fn).parameters)
        assert arguments == parameters[: len(arguments)]
        assert sorted(constexprs) == sorted(parameters[len(arguments) :])


@pytest.mark.parametrize(("kernel", "problem"), CASES, ids=NAMES)
def test_arguments_come_inputs_then_scalars_then_outputs(kernel: Kernel[Any, Any], problem: Any) -> None:
    """The order in which TensorRT passes them."""
    written: set[str] = set()
    for launch in launches_of(kernel, problem):
        kinds = ["p" if argument.name.endswith("_ptr") else "s" for argument in launch.arguments]
        order = "".join(kinds)
        assert order == "p" * order.index("s") + "s" * order.count("s") + "p" * (len(order) - order.rindex("s") - 1)
        trailing = [each.name for each in launch.arguments[order.rindex("s") + 1 :] if each.type is not None]
        written.update(trailing)
        # The op's own outputs before scratch memory, which another launch of the op may have in their place.
        own = [name for name in trailing if name.removesuffix("_ptr") in problem.outputs()]
        assert trailing[: len(own)] == own
    assert written.issuperset(f"{name}_ptr" for name in problem.outputs())


@pytest.mark.parametrize(("kernel", "problem"), CASES, ids=NAMES)
def test_the_specialization_leaves_out_grid_and_values(kernel: Kernel[Any, Any], problem: Any) -> None:
    for launch in launches_of(kernel, problem):
        assert replace(launch, grid=(9, 9, 9)).specialization == launch.specialization
        assert replace(launch, num_warps=2 * launch.num_warps).specialization != launch.specialization
        assert replace(launch, num_stages=9).specialization != launch.specialization
        assert replace(launch, constexprs=launch.constexprs[1:]).specialization != launch.specialization
        hash(launch.specialization)


@pytest.mark.parametrize("device", CATALOGUE, ids=lambda device: device.board)
def test_the_default_fits_on_the_board_for_every_problem_that_it_can_run(device: Any) -> None:
    for kernel, problem in CASES:
        if kernel.supported(problem, device) is None:
            # It raises what breaks a limit, with the values.
            kernel.space.check(problem, kernel.default(problem, device), device)


SMALL = [(kernel, problem) for kernel, problem in CASES if problem.flops() < 1e8]


@pytest.mark.parametrize(("kernel", "problem"), SMALL, ids=[f"{kernel.name} {problem}" for kernel, problem in SMALL])
def test_references_are_float64_and_of_the_output_shape(kernel: Kernel[Any, Any], problem: Any) -> None:
    inputs = problem.inputs(0)
    results = kernel.reference(problem, inputs)
    assert {name: (result.dtype, result.shape) for name, result in results.items()} == {
        name: (np.dtype(np.float64), output.shape) for name, output in problem.outputs().items()
    }
    assert kernel.tolerance(problem).keys() == results.keys()
    for name, array in problem.inputs(0).items():
        assert array.tobytes() == inputs[name].tobytes()


def test_a_problem_is_no_further_from_itself_than_from_another() -> None:
    kernel = find_kernel("gemm")
    one, near, far = (GemmProblem(M=m, N=4096, K=4096) for m in (16, 32, 4096))
    assert kernel.distance(one, one) == 0
    assert kernel.distance(one, near) == kernel.distance(near, one) == 1
    assert kernel.distance(one, far) is None
    assert kernel.distance(one, replace(near, activation="relu")) is None


def test_tiles_of_few_rows_are_not_for_many() -> None:
    kernel = find_kernel("gemm")
    few, many = (GemmProblem(M=m, N=4096, K=4096, b_layout="col") for m in (8, 16))
    assert kernel.distance(many, few) is None
    assert kernel.distance(few, many) == 1
    rows = [replace(problem, b_layout="row") for problem in (many, few)]  # which have no such tiles
    assert kernel.distance(*rows) == 1
    grouped = [replace(problem, groups=2) for problem in (many, few)]  # eight rows a group at the most
    assert kernel.distance(*grouped) == 1


# Of each op a problem, in which every size that may differ is there.
PLACES = [
    ("gemm", "M=64,N=256,K=1024,batch=4,a_layout=col"),
    ("conv2d", "N=8,H=56,W=56,C=64,K=128,R=3,S=3,pad_top=1"),
    ("conv2d", "N=8,H=56,W=56,C=64,K=128,R=3,S=3,groups=2"),
    ("conv2d", "N=8,H=56,W=56,C=64,K=128,R=3,S=3,groups=64"),
    ("attention", "B=4,H=32,Sq=2048,Skv=4096,D=128,Hkv=8,window_left=300,window_right=200,page_size=16,kv_lens=true"),
    ("rmsnorm", "M=64,N=4096,weight=fp16"),
]


@pytest.mark.parametrize(("op", "text"), PLACES, ids=str)
def test_what_may_differ_between_near_problems(op: str, text: str) -> None:
    kernel = find_kernel(op)
    problem = kernel.problem.parse(text)
    near = kernel.near(problem)
    values = problem.to_dict()
    for name in near.sizes:
        other = kernel.problem(**{**values, name: 2 * values[name]})
        if not (name == "C" and values["groups"] > 2):  # another number of channels is then another number of groups
            assert kernel.distance(problem, other) == kernel.distance(other, problem) == 1, name
    for name in values.keys() - {*near.sizes, *near.free}:
        for value in [2 * values[name] if isinstance(values[name], int) else None, 1, 2, True, "fp32", "col", "relu"]:
            with contextlib.suppress(UsageError):
                other = kernel.problem(**{**values, name: value})
                if other != problem:
                    assert kernel.distance(problem, other) is None, (name, value)


def test_depthwise_layers_are_near_each_other_alone() -> None:
    conv = find_kernel("conv2d")
    slim, wide = (Conv2dProblem(N=1, H=56, W=56, C=c, K=c, R=3, S=3, groups=c) for c in (64, 128))
    assert conv.distance(slim, wide) == conv.distance(wide, slim) == 2
    for groups in (1, 2, 32):
        other = Conv2dProblem(N=1, H=56, W=56, C=64, K=64, R=3, S=3, groups=groups)
        assert conv.distance(slim, other) is conv.distance(other, slim) is None
    # 16 filters for each channel are stored 16 bytes at a time, 8 are not.
    many = [Conv2dProblem(N=1, H=56, W=56, C=64, K=64 * each, R=3, S=3, groups=64) for each in (1, 2, 16)]
    assert conv.distance(many[0], many[1]) == 1
    assert conv.distance(many[1], many[2]) is conv.distance(many[2], many[1]) is None


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_numbers_that_a_caller_chooses_are_constexprs_of_a_launch(kernel: Kernel[Any, Any]) -> None:
    device = resolve_device("h100")
    for name, problem, config in kernel.feature_cases:
        launches = kernel.launches(problem, config or kernel.default(problem, device))
        defaults = dict(pair for launch in launches for pair in launch.constexprs)
        for constant in kernel.constants(problem):
            assert isinstance(defaults[constant], float), (name, constant)
