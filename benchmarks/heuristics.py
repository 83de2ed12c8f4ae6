"""What NVIDIA's `nvidia-matmul-heuristics` suggests for a GEMM, as configurations of ours.

    python -m benchmarks.heuristics --preset hopper --device h200 --out FILE.json

It is asked for its Triton target, which knows tiles, warps, stages, splits and a swizzle, and runs on the processor
alone. A suggestion becomes that configuration of our space which is nearest: the fewest doublings of tile, warps and
split, then the nearest number of stages, then the nearest GROUP_M. It knows neither PERSISTENT nor TMA, so neither is
used. The file is for `benchmarks.landscape --first`, so that the suggestions are measured on a machine that has not
got the package. `pip install -e '.[bench]'` installs it (NVIDIA's own licence).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from benchmarks.landscape import PRESETS, chosen_workloads
from benchmarks.measuring import Mistake
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.problem import Problem
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import MissingDependencyError, TilewrightError, UsageError

COUNT = 16

ASKED = 64
"""Several suggestions become one configuration of ours, as those of 6, 7 and 8 stages do."""

BOARDS = {
    "a100": "A100_SXM_80GB",
    "a10": "A10_PCIE",
    "a30": "A30_PCIE",
    "a40": "A40_PCIE",
    "rtx3090": "RTX_3090",
    "a6000": "RTX_A6000",
    "l4": "L4",
    "l40s": "L40S",
    "rtx4090": "RTX_4090",
    "h100": "H100_SXM",
    "h100-pcie": "H100_PCIE",
    "h200": "H200_SXM",
    "b200": "B200",
    "rtx5090": "RTX_5090",
    "rtxpro6000": "RTX_PRO_6000",
}
"""Names that it has for boards of ours."""

PRECISIONS = {"fp16": "HSH", "bf16": "TST"}
"""Operands, sums and result, in cuBLAS's letters."""


def installed() -> bool:
    """Whether the package is here."""
    return find_spec("nvMatmulHeuristics") is not None


def suggestions(problem: Problem, device: Device) -> list[GemmConfig] | None:
    """Configurations of ours for what it suggests, in its order, none twice, at most `COUNT`.

    None for what it isn't asked about: other ops, other operands than fp16 and bf16, groups, and boards that it has no
    name for.

    Raises:
        MissingDependencyError: the package isn't installed.
    """
    if not isinstance(problem, GemmProblem) or device.board not in BOARDS:
        return None
    if problem.dtype not in PRECISIONS or problem.b_dtype is not None or problem.groups:
        return None
    if not installed():
        raise MissingDependencyError("nvidia-matmul-heuristics is not installed: pip install -e '.[bench]'")
    interface, library = _interface(BOARDS[device.board])
    layout = library.boolsToNvMatmulHeuristicsLayout(problem.a_layout == "col", problem.b_layout == "col")
    asked = interface.makeNvMatmulHeuristicsProblem(problem.M, problem.N, problem.K, layout, problem.batch)
    found = [each["kernel"] for each in interface.get(asked, ASKED, precision=PRECISIONS[problem.dtype])]
    plain = [config for config in GEMM.space.configs(problem, device) if not (config.PERSISTENT or config.TMA)]
    return list(dict.fromkeys(nearest(wanted(kernel), plain) for kernel in found))[:COUNT]


def _interface(board: str) -> tuple[Any, Any]:
    # Not kept: one that lives to the end of the process fails as it goes, for ctypes has gone before.
    from nvMatmulHeuristics import nvMatmulHeuristics as library  # noqa: N813 - a module

    interface = library.NvMatmulHeuristicsInterfaceEx(
        backend=library.NvMatmulHeuristicsTarget.TRITON,
        flags=library.NvMatmulHeuristicsFlags.PERF_MODEL_BASED_AUTO_TUNING,
        gpu=library.NvMatmulHeuristicsNvidiaGpu[board],
    )
    return interface, library


def wanted(kernel: Any) -> GemmConfig:
    """A suggestion in our words; it need not be in our space."""
    warps = math.prod(
        getattr(kernel, f"cta_tile_{axis}") // getattr(kernel, f"warp_tile_{axis}") for axis in ("m", "n", "k")
    )
    return GemmConfig(
        BLOCK_M=kernel.cta_tile_m,
        BLOCK_N=kernel.cta_tile_n,
        BLOCK_K=kernel.cta_tile_k,
        GROUP_M=kernel.swizzle_factor,
        SPLIT_K=kernel.split_k,
        num_warps=warps,
        num_stages=kernel.stages,
    )


def nearest(config: GemmConfig, configs: Sequence[GemmConfig]) -> GemmConfig:
    """The configuration of a list that differs least from one."""

    def doublings(other: GemmConfig, *names: str) -> float:
        return sum(abs(math.log2(getattr(config, name) / getattr(other, name))) for name in names)

    return min(
        configs,
        key=lambda other: (
            doublings(other, "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "SPLIT_K"),
            abs(config.num_stages - other.num_stages),
            doublings(other, "GROUP_M"),
        ),
    )


@click.command()
@click.option("--op", "ops", multiple=True, help="Of the problems: one for all, or one each; gemm if left out.")
@click.option("--problem", "problems", multiple=True, help="As M=4096,N=4096,K=4096,dtype=bf16; repeatable.")
@click.option("--workload", "names", multiple=True, help="A workload of the suites by its name; repeatable.")
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)), help="A list of workloads.")
@click.option("--device", "device_name", required=True, help="The board to ask for; it need not be here.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file.")
def main(
    ops: tuple[str, ...],
    problems: tuple[str, ...],
    names: tuple[str, ...],
    presets: tuple[str, ...],
    device_name: str,
    out: Path,
) -> None:
    """Writes what nvidia-matmul-heuristics suggests, for `benchmarks.landscape --first`."""
    try:
        device = resolve_device(device_name)
        if device.board not in BOARDS:
            raise UsageError(f"nvidia-matmul-heuristics has no name for {device.board}; it knows {', '.join(BOARDS)}")
        document = []
        for workload in chosen_workloads(ops, problems, names, presets):
            found = suggestions(workload.problem, device)
            if found is not None:
                configs = [config.to_dict() for config in found]
                document.append({"op": workload.op, "problem": workload.problem.to_dict(), "configs": configs})
            print(f"{workload.name}: {'not asked' if found is None else f'{len(found)} configurations'}")
        with whole_file(out) as stream:
            stream.write(json.dumps(document, indent=1).encode() + b"\n")
    except TilewrightError as error:
        raise Mistake(str(error)) from None


if __name__ == "__main__":
    main()
