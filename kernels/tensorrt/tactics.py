"""TensorRT's tactics: the configurations that the tuning database, the prediction and the default have for a case.

Tactic 1 is what a call from Python would run; the others follow by evidence. All have been compiled for the device
before TensorRT hears of them, so none is refused later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tilewright.kernels.compile import compile_launch, over_limits
from tilewright.kernels.device import WARP_SIZE, Device
from tilewright.kernels.lookup import Choice, shortlist
from tilewright.kernels.problem import Config
from tilewright.kernels.tensorrt.case import Case
from tilewright.kernels.tensorrt.expressions import minimum
from tilewright.kernels.tensorrt.plans import LaunchPlan
from tilewright.kernels.tensorrt.ptx import check_readable, isa_for, prepared
from tilewright.tuning_db.errors import CompileError, UnsupportedError

MOST = 8
"""Tactics of one case: TensorRT times each of them, and those beyond are predicted to be the slower."""


@dataclass(frozen=True, slots=True)
class Tactic:
    """One tactic: its number to TensorRT, the configuration, what speaks for it, and what TensorRT is given."""

    number: int
    choice: Choice
    plan: LaunchPlan


def tactics(case: Case, device: Device, folder: Path, *, cuda: str, most: int = MOST) -> list[Tactic]:
    """The tactics of a case on a device, numbered from 1, best evidence first; the default configuration is among them.

    Evidence is that of the problem at the optimum of the profile, then of its largest and smallest; `cuda` is the
    version of the driver that shall run the engine.

    Raises:
        UnsupportedError: no configuration can serve the case ahead of time; the message says why not the default.
        ProblemError, UsageError: the case is none.
    """
    case.check()
    found: list[Tactic] = []
    seen: set[Config] = set()
    reason = ""
    default = case.kernel.default(case.problem(case.profile.opt), device)
    for choice in _evidence(case, device, folder):
        # The last place is the default's, wherever it stands.
        full = len(found) >= most - 1 and default not in seen and choice.config != default
        if full or len(found) >= most or choice.config in seen:
            continue
        seen.add(choice.config)
        refusal = case.refusal(choice.config, device)
        try:
            if refusal is not None:
                raise UnsupportedError(refusal)
            found.append(Tactic(len(found) + 1, choice, launch_plan(case, choice.config, device, cuda=cuda)))
        except (UnsupportedError, CompileError) as error:
            reason = str(error)
    if not found:
        raise UnsupportedError(
            f"{case.variant.name} {case.problem(case.profile.opt)} has no tactic on {device.board}: {reason}"
        )
    return found


def _evidence(case: Case, device: Device, folder: Path) -> Iterator[Choice]:
    """Choices for the case, best evidence first; some may come twice."""
    problems = [case.problem(case.profile.opt)]
    yield from shortlist(case.kernel, problems[0], device, folder, MOST)
    for sizes in (case.profile.max, case.profile.min):
        problem = case.problem(sizes)
        if problem not in problems:
            problems.append(problem)
            yield next(shortlist(case.kernel, problem, device, folder, 1))
    general = case.kernel.default(case.problem(case.profile.general), device)
    yield Choice(general, None, "the default of sizes that nothing divides")


def launch_plan(case: Case, config: Config, device: Device, *, cuda: str) -> LaunchPlan:
    """What TensorRT is given of one configuration.

    Raises:
        UnsupportedError: it can't be launched by TensorRT, or takes more than the device has.
        CompileError: Triton or ptxas refused it.
        UsageError: no PTX that the driver reads knows the device.
    """
    launch = case.launch(config)
    binary = compile_launch(launch, device.arch, ptx_isa=isa_for(device.arch, cuda))
    limit = over_limits(binary.resources, device, binary.num_warps)
    if limit is not None:
        raise UnsupportedError(f"{config} can't run on {device.board}: {limit}")
    scalars = case.scalars(launch)
    name, ptx = prepared(binary, len(case.inputs) + len(scalars) + len(case.outputs))
    check_readable(ptx, cuda)
    grid = case.grid(config)
    if launch.blocks_per_sm:
        grid = minimum(grid, launch.blocks_per_sm * device.sms)
    return LaunchPlan(
        name=name,
        ptx=ptx,
        grid=(grid, 1, 1),
        threads=binary.num_warps * WARP_SIZE,
        shared_bytes=binary.shared_bytes,
        inputs=tuple(tensor.name for tensor in case.inputs),
        scalars=scalars,
        outputs=tuple(tensor.name for tensor in case.outputs),
        origin={
            "plugin": case.variant.name,
            "op": case.kernel.name,
            "attributes": dict(case.attributes),
            "config": config.to_dict(),
            "arch": device.arch,
            "problem": case.problem(case.profile.opt).to_dict(),
        },
    )
