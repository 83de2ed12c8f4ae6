"""Warp-specialised loops, launched hundreds of times: each launch gives the bits of the first, and those are right.

Their one known fault, which Triton up to 3.7 has and `kernels/specialise.py` cures, showed in the first tile of up to
every tenth block of a launch among hundreds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from tests.gpu.conforming import on_host, to_gpu
from tests.kernels.calls import call
from tests.kernels.compiling import assert_clean, assert_specialised, compiled
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.registry import find_kernel
from tilewright.tuner.gate import compare

LAUNCHES = 300
CONFIGS = 5  # of each problem, drawn from its space

PROBLEMS = {
    "few steps": GemmProblem(8192, 1024, 512, dtype="bf16"),
    "int8 and gelu": GemmProblem(
        4096, 4096, 1024, dtype="int8", b_layout="col", a_scale="tensor", b_scale="column", bias="fp16",
        out_dtype="fp16", activation="gelu_tanh",
    ),
    "fp8": GemmProblem(4096, 4096, 1024, dtype="fp8e4m3", b_layout="col", out_dtype="bf16"),
    "attention": AttentionProblem(2, 16, 4096, 4096, 128, dtype="bf16"),
}  # fmt: skip


def specialised(problem: Any, board: Device, runs: Callable[[Any, Any], bool]) -> Iterator[Any]:
    """Distinct configurations of the problem's space, those that run: the default first, if it is one, then others in
    random order. How tiles are grouped changes no machine code."""
    kernel = find_kernel(problem.op)
    found = [config for config in kernel.space.configs(problem, board) if config.WARP_SPECIALIZE]
    distinct = list(dict.fromkeys(map(_ungrouped, found)))
    random.Random(str(problem)).shuffle(distinct)
    default = kernel.default(problem, board)
    if default.WARP_SPECIALIZE:
        distinct = [default, *(config for config in distinct if config != _ungrouped(default))]
    return (config for config in distinct if runs(problem, config))


def _ungrouped(config: Any) -> Any:
    return replace(config, **dict.fromkeys({"GROUP_M", "GROUP_H"} & set(config.to_dict()), 1))


def compiles_clean(problem: Any, config: Any) -> bool:
    """Whether it runs when it is asked for by name. Which spill, a space can't say: that depends on the compiler."""
    (reply,) = compiled(90, [(problem.op, problem, config)])
    return not any(launch.get("error") or launch["over"] for launch in (reply, *reply["more"]))


def plain(problem: Any, board: Device) -> Any:
    """The default, made one that does without."""
    return replace(find_kernel(problem.op).default(problem, board), **_PLAIN[problem.op])


_PLAIN: dict[str, dict[str, Any]] = {
    "gemm": {"WARP_SPECIALIZE": False, "num_warps": 8},
    "attention": {
        "BLOCK_N": 64,
        "WARP_SPECIALIZE": False,
        "PERSISTENT": False,
        "TMA": False,
        "num_warps": 8,
        "num_stages": 2,
    },
}


@pytest.fixture
def drawn(board: Device, name: str, index: int) -> Any:
    """A configuration of a problem, once those before it have been compiled, for as long as that takes."""
    problem = PROBLEMS[name]
    if board.arch // 10 != 9 or find_kernel(problem.op).supported(problem, board) is not None:
        pytest.skip(f"{board.sm} has no warp-specialised loops")
    return next(islice(specialised(problem, board, compiles_clean), index, None))


@pytest.mark.gpu
@pytest.mark.timeout(60, func_only=True)  # barriers that don't meet wait for ever
@pytest.mark.parametrize("index", range(CONFIGS))
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_launch_gives_the_same_bits_and_they_are_right(
    cupy: Any, board: Device, drawn: Any, name: str, index: int
) -> None:
    problem, config = PROBLEMS[name], drawn
    kernel = find_kernel(problem.op)
    moved = {each: to_gpu(cupy, array) for each, array in problem.inputs(0).items()}
    (first,) = call(problem, moved, None, config).values()
    (wanted,) = call(problem, moved, None, plain(problem, board)).values()
    bits = f"u{first.dtype.itemsize}"
    out = first.copy()
    others = cupy.zeros((), cupy.int64)
    for _ in range(LAUNCHES):
        out.fill(0)
        call(problem, moved, {"out": out}, config)
        others += (out.view(bits) != first.view(bits)).any()
    assert int(others) == 0, f"{int(others)} of {LAUNCHES} launches gave other bits with {config}"
    tolerance = kernel.tolerance(problem)["out"]
    reason = compare(on_host(cupy, first), on_host(cupy, wanted).astype("float64"), tolerance)
    assert reason is None, f"{config}: {reason}"


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_does_not_run_is_not_drawn_and_nothing_twice(name: str) -> None:
    problem, board = PROBLEMS[name], resolve_device("h200")
    tried: list[Any] = []

    def every_other(problem: Any, config: Any) -> bool:
        tried.append(config)
        return len(tried) % 2 == 0

    assert list(islice(specialised(problem, board, every_other), CONFIGS)) == tried[1::2]
    assert len({_ungrouped(config) for config in tried}) == len(tried) == 2 * CONFIGS


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_as_many_as_are_drawn_compile_clean(name: str) -> None:
    problem, board = PROBLEMS[name], resolve_device("h200")
    drawn = list(islice(specialised(problem, board, compiles_clean), CONFIGS))
    assert len(drawn) == CONFIGS
    for reply in compiled(90, [(problem.op, problem, config) for config in drawn]):
        assert_specialised(reply)
    assert_clean(compiled(90, [(problem.op, problem, plain(problem, board))]))
