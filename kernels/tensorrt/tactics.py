"""TensorRT's tactics: the configurations that the tuning database, the prediction and the default have for a case.

Of what a call from Python would run, those that TensorRT can launch, best evidence first. All have been compiled for
the device before TensorRT hears of them, so none is refused later.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

from tilewright.kernels.compile import compile_launch, over_limits
from tilewright.kernels.device import WARP_SIZE, Device
from tilewright.kernels.lookup import Choice, shortlist
from tilewright.kernels.problem import Config
from tilewright.kernels.tensorrt.case import Case
from tilewright.kernels.tensorrt.expressions import minimum, to_plain
from tilewright.kernels.tensorrt.plans import LaunchPlan
from tilewright.kernels.tensorrt.ptx import assembled_isa, check_readable, isa_for, prepared
from tilewright.tuning_db.errors import CompileError, ProblemError, UnsupportedError

MOST = 8
"""Tactics of one case: TensorRT times each of them, and those beyond are predicted to be the slower."""


@dataclass(frozen=True, slots=True)
class Tactic:
    """One tactic: its number to TensorRT, the configuration, what speaks for it, and what TensorRT is given."""

    number: int
    choice: Choice
    plan: LaunchPlan


def number_of(config: Config, plan: LaunchPlan) -> int:
    """The number of a tactic: a hash of its configuration, its kernel and how it is launched, from 1 to 2**31 - 1.

    TensorRT writes numbers into timing caches, and takes a kernel for that of its number whatever the profile: so the
    same number is the same kernel in every process, whatever else was asked and tuned there.
    """
    launch = [to_plain(number) for number in (*plan.grid, *(number for _, number in plan.scalars))]
    content = f"{config.to_json()} {plan.name} {json.dumps(launch)}"
    return int.from_bytes(sha256(content.encode()).digest()[:4], "big") % (2**31 - 1) + 1


def tactics(case: Case, device: Device, folder: Path, *, cuda: str, most: int = MOST) -> list[Tactic]:
    """Up to `most` tactics of a case on a device, best evidence first. The last place is the default configuration's,
    if TensorRT can launch it and there are two places.

    Evidence is that of the problem at the optimum of the profile, then of its largest and smallest, as far as it is of
    configurations that TensorRT can launch; `cuda` is the version of the driver that shall run the engine.

    Raises:
        UnsupportedError: no configuration can serve the case ahead of time; the message says why not the default.
        ProblemError, UsageError: the case is not valid.
    """
    case.check()
    default = case.kernel.default(case.problem(case.profile.opt), device)
    reason = case.refusal(default, device) or ""
    reserved = most > 1 and not reason
    found: list[Tactic] = []
    seen: set[Config] = set()
    numbers: set[int] = set()
    for choice in _evidence(case, device, folder, max(most, MOST)):
        full = reserved and len(found) >= most - 1 and default not in seen and choice.config != default
        if full or len(found) >= most or choice.config in seen:
            continue
        seen.add(choice.config)
        try:
            plan = launch_plan(case, choice.config, device, cuda=cuda)
        except (UnsupportedError, CompileError) as error:
            reason = str(error)
            continue
        number = number_of(choice.config, plan)
        if number not in numbers:  # two in 2**31 may be the same
            numbers.add(number)
            found.append(Tactic(number, choice, plan))
    if not found:
        raise UnsupportedError(
            f"{case.variant.name} {case.problem(case.profile.opt)} has no tactic on {device.board}: {reason}"
        )
    return found


def _evidence(case: Case, device: Device, folder: Path, count: int) -> Iterator[Choice]:
    """Choices for the case that TensorRT can launch, best evidence first, up to `count` records; some come twice."""

    @functools.cache
    def usable(config: Config) -> bool:
        return case.refusal(config, device) is None

    problems = [case.problem(case.profile.opt)]
    yield from shortlist(case.kernel, problems[0], device, folder, count, usable)
    for sizes in (case.profile.max, case.profile.min):
        problem = case.problem(sizes)
        if problem not in problems:
            problems.append(problem)
            yield from islice(shortlist(case.kernel, problem, device, folder, 1, usable), 1)
    try:
        general = case.kernel.default(case.problem(case.general), device)
    except ProblemError:
        return  # `refusal` says so of every configuration
    if usable(general):
        yield Choice(general, None, "the default of sizes that nothing divides")


def launch_plan(case: Case, config: Config, device: Device, *, cuda: str) -> LaunchPlan:
    """What TensorRT is given of one configuration.

    Raises:
        UnsupportedError: it can't be launched by TensorRT, or takes more than the device has.
        CompileError: Triton or ptxas refused it.
        UsageError: no PTX that the driver reads knows the device.
    """
    launch = case.launch(config)
    isa = min(isa_for(device.arch, cuda), assembled_isa(device.arch))
    binary = compile_launch(launch, device.arch, ptx_isa=isa)
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
