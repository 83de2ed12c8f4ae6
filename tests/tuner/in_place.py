"""A tiny op that overwrites its input: x = x / 2 + 1. Two runs in a row give other numbers than one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import triton
import triton.language as tl

from tilewright.kernels.kernel import Argument, Launch, Tolerance
from tilewright.kernels.problem import Config, Output, Problem
from tilewright.kernels.work import Panel, Work

Array = np.ndarray[Any, Any]


@triton.jit
def halve_kernel(N, x_ptr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < N, other=0.0)
    tl.store(x_ptr + places, x * 0.5 + 1.0, mask=places < N)


@triton.jit
def lazy_kernel(N, x_ptr, BLOCK: tl.constexpr):
    """Leaves every second element as it is."""
    places = 2 * (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    x = tl.load(x_ptr + places, mask=places < N, other=0.0)
    tl.store(x_ptr + places, x * 0.5 + 1.0, mask=places < N)


@dataclass(frozen=True, slots=True)
class HalveProblem(Problem):
    op: ClassVar[str] = "halve"
    N: int

    def inputs(self, seed: int) -> dict[str, Array]:
        return {"x": np.random.default_rng(seed).standard_normal(self.N, np.float32)}

    def outputs(self) -> dict[str, Output]:
        return {"x": Output((self.N,), "fp32")}

    def flops(self) -> int:
        return 2 * self.N

    def bytes_moved(self) -> int:
        return 8 * self.N

    @property
    def unit(self) -> str:
        return "fp32"


@dataclass(frozen=True, slots=True)
class HalveConfig(Config):
    BLOCK: int = 32


def launches(problem: HalveProblem, config: HalveConfig, fn: Any = halve_kernel) -> tuple[Launch, ...]:
    arguments = (Argument("N", "i32", problem.N), Argument("x_ptr", "*fp32", aligned=True))
    grid = (triton.cdiv(problem.N, config.BLOCK), 1, 1)
    return (Launch(fn, grid, arguments, (("BLOCK", config.BLOCK),), num_warps=1, num_stages=1),)


def reference(problem: HalveProblem, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {"x": arrays["x"].astype(np.float64) / 2 + 1}


def work(problem: HalveProblem, config: HalveConfig) -> Work:
    whole, nothing = Panel(4.0 * config.BLOCK), Panel(0.0)
    return Work(
        tiles_m=triton.cdiv(problem.N, config.BLOCK),
        tiles_n=1,
        splits=1,
        batch=1,
        group_m=1,
        iterations=1,
        tile_m=config.BLOCK,
        tile_n=1,
        tile_k=0,
        num_warps=1,
        num_stages=1,
        unit="fp32",
        operand_bytes=4,
        load_bytes=4.0 * config.BLOCK,
        vector_bytes=16,
        panel_a=whole,
        panel_b=nothing,
        epilogue_bytes=4.0 * config.BLOCK,
        workspace_bytes=0,
    )


HALVE: Any = SimpleNamespace(  # what measuring asks of a kernel
    name="halve",
    problem=HalveProblem,
    space=SimpleNamespace(config=HalveConfig, check=lambda problem, config, device: None),
    default=lambda problem, device: HalveConfig(),
    launches=launches,
    reference=reference,
    tolerance=lambda problem: {"x": Tolerance(relative=2.0**-22, absolute=0.0)},
    ragged=lambda problem, config: HalveProblem(2 * config.BLOCK - 1),
    strides=None,
    work=work,
)
