"""What of a database belongs to this installation: its kernels, its toolchain, its protocols."""

from __future__ import annotations

import functools
from dataclasses import replace

from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.compile import ptxas_version, triton_version
from tilewright.kernels.device import Device
from tilewright.kernels.lookup import TIMING_PROTOCOL, code_hash, config_defaults, prediction_protocol
from tilewright.kernels.prediction import MODEL
from tilewright.kernels.problem import Config
from tilewright.kernels.registry import KERNELS
from tilewright.tuning_db import lookup
from tilewright.tuning_db.errors import ProblemError
from tilewright.tuning_db.record import Provenance, Record, Status
from tilewright.tuning_db.upkeep import Revision

_KERNELS = {kernel.name: kernel for kernel in KERNELS}
_BOARDS = {device.board: device for device in CATALOGUE}
_PREDICTIONS = MODEL.partition("-")[0] + "-"  # how protocols of predictions begin, whatever their revision


def is_current(revision: Revision, arch: int) -> bool:
    """Whether a search or a lookup for sm_<arch> asks for records of this revision as its own.

    Raises:
        CompileError: Triton's ptxas can't be asked for its version.
    """
    kernel = _KERNELS.get(revision.op)
    return (
        kernel is not None
        and revision.kernel_hash == code_hash(kernel)
        and (revision.triton, revision.ptxas) == (triton_version(), ptxas_version(arch))
        and revision.protocol in (TIMING_PROTOCOL, prediction_protocol(kernel))
    )


def is_of_this_code(revision: Revision) -> bool:
    """Whether records of this revision are answered as measured, where the toolchain is theirs."""
    kernel = _KERNELS.get(revision.op)
    return kernel is not None and (revision.kernel_hash, revision.protocol) == (code_hash(kernel), TIMING_PROTOCOL)


def default_text(op: str, problem: str, device: Device) -> str | None:
    """The default configuration of a problem on a device, all in canonical JSON; None of a problem of another revision,
    whose fields nobody here knows."""
    kernel = _KERNELS.get(op)
    if kernel is None:
        return None
    try:
        default: Config = kernel.default(kernel.problem.from_json(problem), device)
    except ProblemError:
        return None
    return default.to_json()


def present_form(op: str, config: str) -> str:
    """The text of an op's configuration as the present revision writes it, by which a lookup knows it again."""
    kernel = _KERNELS.get(op)
    return config if kernel is None else lookup.present_form(config, config_defaults(kernel))


def is_answerable(record: Record) -> bool:
    """Whether a record may be answered (`schema.ANSWERABLE`): it has a time, and its code spills nothing."""
    return record.status is Status.OK and record.resources is not None and not record.resources.spill_bytes


def objection(record: Record) -> str | None:
    """Why a record from elsewhere can't be one of its board, or of these kernels; None for one that can. Fields of
    problems and configurations of another revision nobody here knows."""
    key, device = record.key, _device(record.key.device)
    if device is not None and key.arch != device.arch:
        return f"arch={key.arch} must be {device.arch}, as {key.device} is"
    measured = record.provenance is Provenance.MEASURED
    if key.protocol == TIMING_PROTOCOL if not measured else key.protocol.startswith(_PREDICTIONS):
        other = Provenance.PREDICTED if measured else Provenance.MEASURED
        return f"provenance={record.provenance} must be {other}, as protocol={key.protocol} is"
    kernel = _KERNELS.get(key.op)
    if kernel is None or key.kernel_hash != code_hash(kernel):
        return None
    try:
        problem = kernel.problem.from_json(key.problem)
        config = kernel.space.config.from_json(record.config)
    except ProblemError as error:
        return str(error)
    for name, text, value in (("problem", key.problem, problem), ("config", record.config, config)):
        if value.to_json() != text:
            return f"{name}={text} is not written out: {value.to_json()}"
    if record.status is not Status.OK:
        return None
    if not is_answerable(record):
        resources = record.resources
        lack = "it has no resources" if resources is None else f"{resources.spill_bytes} B a thread spill"
        return f"status=ok can't be answered: {lack}"
    axes = kernel.space.axes
    if device is None or all(value in axes.get(name, (value,)) for name, value in config.to_dict().items()):
        return None  # what fits may be less one day than it was when this ran
    limit = kernel.space.fits(problem, config, device)
    return None if limit is None else f"status=ok can't be of {key.device}: {limit}"


@functools.lru_cache(maxsize=8)
def _device(key: str) -> Device | None:
    """The device of a key, such as `h200-132sm`, or a slice of it, which has other SMs; None of a board that nobody
    here knows."""
    board, _, sms = key.rpartition("-")
    known = _BOARDS.get(board)
    count = sms.removesuffix("sm")
    return known if known is None or not count.isdecimal() else replace(known, sms=int(count))
