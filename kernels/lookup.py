"""Which configuration a problem gets on a device, and on what evidence. Never tunes, never writes.

The order: the caller's own configuration; the pack, if this process has one (`pack`), which is where it ends for a
frozen one; a record (`tuning_db`); this module's prediction; the default; what is lighter than that. Of records, what
was measured here or shipped with the package is weighed with what earlier revisions and other toolchains measured; then
come near shapes, other boards, and what a tuning run predicted that compiled it. A candidate that does not fit the
device is passed over, whatever its evidence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tilewright.kernels import catalogue, identity
from tilewright.kernels import compile as compile_path
from tilewright.kernels.compile import over_limits, ptxas_version, triton_version
from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.pack import Pack, active_pack
from tilewright.kernels.prediction import MODEL, Prediction, predict
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.source import module_hash
from tilewright.kernels.work import Work, block_warps
from tilewright.tuning_db import env
from tilewright.tuning_db.env import database_dir
from tilewright.tuning_db.errors import (
    DatabaseError,
    IllegalConfigError,
    NotPackedError,
    PackError,
    ProblemError,
    UnsupportedError,
    UsageError,
)
from tilewright.tuning_db.record import Answer, Key, Provenance, Record
from tilewright.tuning_db.store import TuningDB
from tilewright.tuning_db.text import shown

TIMING_PROTOCOL = "cold-l2-2"
"""Name and revision of how times are measured on a GPU: part of the key of every measured record."""

PREDICTED_CANDIDATES = 4
"""How many predicted configurations are offered before the default: some spill once they are compiled."""

LIGHTER_REGISTERS = (0.75, 0.5)
"""Parts of the default's registers that are offered after the default: an estimate may be off by a quarter
(docs/prediction.md)."""

Usable = Callable[[Config], bool]
"""Whether who asks can use a configuration. One that it can't is no evidence for it."""

Answered = TypeVar("Answered")


@dataclass(frozen=True, slots=True)
class Choice:
    """A configuration, and what speaks for it."""

    config: Any
    provenance: Provenance | None  # None: the caller named it
    reason: str
    time_us: float | None = None
    record: Record | None = None


def record_key(kernel: Kernel[Any, Any], problem: Problem, device: Device, protocol: str = TIMING_PROTOCOL) -> Key:
    """The key under which outcomes of this problem on this device are kept."""
    return Key(
        op=kernel.name,
        kernel_hash=code_hash(kernel),
        problem=problem.to_json(),
        device=device.key,
        arch=device.arch,
        triton=triton_version(),
        ptxas=identity.of_ptxas(device.arch, ptxas_version),
        protocol=protocol,
    )


def prediction_protocol(kernel: Kernel[Any, Any]) -> str:
    """Name and revision of how a kernel's times are predicted: part of the key of its predicted records. It changes
    with the code of the model, the figures of the boards, and what the op tells the model: the modules of its problem,
    its space, its estimate and its work."""
    return identity.of_code(kernel, "prediction", lambda: _prediction_protocol(kernel))


def _prediction_protocol(kernel: Kernel[Any, Any]) -> str:
    told = {function.__module__ for function in (kernel.space.fits, kernel.space.useful, kernel.estimate, kernel.work)}
    told |= {kernel.problem.__module__, type(kernel.space).__module__, Work.__module__, Device.__module__}
    told |= {predict.__module__, catalogue.__name__}
    hashes = " ".join(module_hash(sys.modules[name]) for name in sorted(told))
    return f"{MODEL}-{hashlib.sha256(hashes.encode()).hexdigest()[:8]}"


def code_hash(kernel: Kernel[Any, Any]) -> str:
    """SHA-256 of the kernel's code and of the compile path, whose options shape the machine code as much."""

    def compute() -> str:
        return hashlib.sha256(f"{kernel.source_hash} {module_hash(compile_path)}".encode()).hexdigest()

    return identity.of_code(kernel, "code", compute)


def remember(kernel: Kernel[Any, Any], device: Device, database: TuningDB) -> None:
    """Notes in the database what the first lookup of a later process would have to work out: see `identity`.

    Raises:
        DatabaseError: it can't be written.
    """
    code_hash(kernel)
    prediction_protocol(kernel)
    identity.of_ptxas(device.arch, ptxas_version)
    identity.note(database, kernel, device.arch)


def check_supported(kernel: Kernel[Any, Any], problem: Problem, device: Device) -> None:
    """Does nothing for a problem that some configuration can run on the device.

    Raises:
        UnsupportedError: none can; the message says why.
    """
    reason = kernel.supported(problem, device)
    if reason is not None:
        raise UnsupportedError(f"{kernel.name} {problem}: {reason}")


def choose(kernel: Kernel[Any, Any], problem: Problem, device: Device, *, config: Config | None = None) -> Choice:
    """The first of `candidates`: what `kernels` would run, unless its compiled code turned out to spill.

    Raises:
        UnsupportedError: no configuration can run the problem on this device.
        IllegalConfigError: the caller's configuration does not fit.
        PackError: the pack of this process can't be used, or lacks the problem where all must come from it.
        UsageError: an argument is no kernel, device, or problem or configuration of this kernel.
    """
    if not isinstance(kernel, Kernel):
        raise UsageError(f"kernel={shown(kernel)} must be a Kernel, as find_kernel('gemm') gives one")
    if not isinstance(problem, kernel.problem):
        wanted = kernel.problem.__name__
        raise UsageError(f"problem={shown(problem)} must be a {wanted} for {kernel.name}: {wanted}.parse reads a text")
    if not isinstance(device, Device):
        raise UsageError(f"device={shown(device)} must be a Device, as resolve_device('a10') gives one")
    if config is not None and not isinstance(config, kernel.space.config):
        raise UsageError(f"config={shown(config)} must be a {kernel.space.config.__name__} for {kernel.name}")
    return next(candidates(kernel, problem, device, config=config))


def candidates(
    kernel: Kernel[Any, Any], problem: Problem, device: Device, *, config: Config | None = None
) -> Iterator[Choice]:
    """Configurations for a problem, best evidence first, read as far as they are asked for. The default comes after all
    evidence; who can't run that either (an untested combination spills once it is compiled) gets lighter ones.

    Raises:
        UnsupportedError, IllegalConfigError, PackError: as `choose`.
    """
    check_supported(kernel, problem, device)
    if config is not None:
        kernel.space.check(problem, config, device)
        yield Choice(config, None, "named by the caller")
        return
    pack = pack_for(kernel, device)
    if pack is not None:
        packed = _packed_choice(pack, kernel, problem, device)
        if packed is not None:
            yield packed
        if env.frozen():
            return
    folder = _folder()
    _warn_of_no_folders(folder)
    yield from all_ranked(kernel, problem, device, folder)


def _folder() -> Path:
    """The folder of the databases; where none is named and this user has no home, one that is nowhere."""
    try:
        return database_dir()
    except UsageError as error:
        # Python shows one text once in a process.
        warnings.warn(f"{error}: nothing that was tuned is found", RuntimeWarning, stacklevel=3)
        return _NOWHERE


_NOWHERE = Path(os.devnull, "tilewright")


def _warn_of_no_folders(folder: Path) -> None:
    """Tells a program, once, of named folders of records that aren't there; `autotune` tells its user itself."""
    global _looked_at_folders
    if not _looked_at_folders:
        _looked_at_folders = True  # 4 µs, of the first lookup alone
        for reason in (env.no_shipped_folder(), env.no_database_folder(folder)):
            if reason is not None:
                warnings.warn(reason, RuntimeWarning, stacklevel=3)


_looked_at_folders = False


def default_config(kernel: Kernel[Any, Any], problem: Problem, device: Device) -> Config:
    """The default configuration of a problem that any fits.

    Raises:
        UnsupportedError: not even that one: a grid past the hardware's, or positions past 32 bits, fit none.
    """
    default: Config = kernel.default(problem, device)
    limit = kernel.space.fits(problem, default, device)
    if limit is not None:
        raise UnsupportedError(f"{kernel.name} {problem} fits no configuration on {device.board}: {limit}")
    return default


def pack_for(kernel: Kernel[Any, Any], device: Device) -> Pack | None:
    """The pack of this process, if it has one.

    Raises:
        PackError: it is damaged, or of another device or revision.
        UsageError: `$TILEWRIGHT_FROZEN` is on without one.
    """
    pack = active_pack()
    if pack is not None:
        pack.check(device.key, kernel.name, code_hash(kernel))
    return pack


def _packed_choice(pack: Pack, kernel: Kernel[Any, Any], problem: Problem, device: Device) -> Choice | None:
    entry = pack.entry(kernel.name, problem.to_json())
    if entry is None:
        if env.frozen():
            tune = f'autotune --device {device.board} --kernel {kernel.name} --problem "{problem}"'
            raise NotPackedError(
                f'{pack.path} lacks {kernel.name} "{problem}", and {env.FROZEN} is set: tune it ({tune}) and make the '
                f"pack again (autotune pack), or unset {env.FROZEN}"
            )
        return None
    try:
        config = kernel.space.config.from_json(entry.config)
        kernel.space.check(problem, config, device)
    except (ProblemError, IllegalConfigError) as error:
        raise PackError(f"{pack.path}: {error}; make it again with `autotune pack`") from None
    return Choice(config, entry.provenance, f"packed: {entry.reason}", entry.time_us)


LIGHTER = "no evidence, and the default can't run"
"""The reason of what comes after the default."""


def all_ranked(kernel: Kernel[Any, Any], problem: Problem, device: Device, folder: Path) -> Iterator[Choice]:
    """As `candidates` without a pack and a caller's configuration, with the databases of `folder`."""
    yield from ranked(kernel, problem, device, folder)
    for config in lighter_configs(kernel, problem, device):
        yield Choice(config, Provenance.DEFAULT, LIGHTER)


def ranked(
    kernel: Kernel[Any, Any], problem: Problem, device: Device, folder: Path, usable: Usable | None = None
) -> Iterator[Choice]:
    """As `all_ranked` up to the default, with usable configurations alone: of each thing that is asked the best of
    those."""
    recorded = recorded_choice(kernel, problem, device, folder, usable)
    if recorded is not None:
        yield recorded
    default = default_config(kernel, problem, device)  # not before: most calls are answered by now
    for prediction, predicted in predicted_best(kernel, problem, device, PREDICTED_CANDIDATES, usable, apart=True):
        yield Choice(predicted, Provenance.PREDICTED, f"by {MODEL}", prediction.time_us)
    if usable is None or usable(default):
        yield Choice(default, Provenance.DEFAULT, "no evidence")


def shortlist(
    kernel: Kernel[Any, Any],
    problem: Problem,
    device: Device,
    folder: Path,
    count: int,
    usable: Usable | None = None,
) -> Iterator[Choice]:
    """The first of `candidates`, up to `count` records of the very problem on this device, best first, and then the
    other candidates up to the default: for who measures some and keeps the best. A configuration comes once for each
    thing that speaks for it, and only if it is usable.

    Raises:
        UnsupportedError, PackError: as `candidates`.
    """
    check_supported(kernel, problem, device)
    pack = pack_for(kernel, device)
    packed = None if pack is None else _packed_choice(pack, kernel, problem, device)
    if packed is not None and (usable is None or usable(packed.config)):
        yield packed
    _warn_of_no_folders(folder)
    rest = ranked(kernel, problem, device, folder, usable)
    first = next(rest, None)
    if first is None:
        return
    yield first
    if first.record is not None:
        yield from _with_database(
            device, folder, lambda database: _records(kernel, problem, device, database, count, usable)
        )
    yield from rest


def _records(
    kernel: Kernel[Any, Any],
    problem: Problem,
    device: Device,
    database: TuningDB,
    count: int,
    usable: Usable | None,
) -> list[Choice]:
    """The best records of exactly this problem and device: those made here, those shipped, those of other revisions and
    toolchains, then predicted ones."""
    identity.recall(database, kernel, device.arch)
    found = database.of_problem(
        record_key(kernel, problem, device),
        count,
        predicted_protocol=prediction_protocol(kernel),
        accept=lambda record: _usable_config(kernel, problem, device, record, usable) is not None,
        incumbent=kernel.default(problem, device).to_json(),
        defaults=config_defaults(kernel),
    )
    return [_choice(each, kernel.space.config.from_json(each.record.config)) for each in found]


def recorded_choice(
    kernel: Kernel[Any, Any], problem: Problem, device: Device, folder: Path, usable: Usable | None = None
) -> Choice | None:
    """What the device's database answers, or what was shipped for the device, if anything. A database that can't be
    read answers nothing but a warning: a program that runs a model goes on without it."""
    return _with_database(device, folder, lambda database: answer(kernel, problem, device, database, usable))


def _with_database(device: Device, folder: Path, asked: Callable[[TuningDB], Answered]) -> Answered:
    """What is asked of the device's database, or of what was shipped alone where that can't be read."""
    try:
        with TuningDB.open(device.key, folder, read_only=True) as database:
            return asked(database)
    except DatabaseError as error:
        warnings.warn(
            f"{error}. Its records are left out: programs go on with what was shipped or is predicted",
            RuntimeWarning,
            stacklevel=2,
        )
        with TuningDB.without_own(device.key, folder) as database:
            return asked(database)


def answer(
    kernel: Kernel[Any, Any], problem: Problem, device: Device, database: TuningDB, usable: Usable | None = None
) -> Choice | None:
    """What an open database answers for a problem: its best record that fits this device and is usable, with its
    provenance."""

    identity.recall(database, kernel, device.arch)
    accepted: list[Config] = []

    def accept(record: Record) -> bool:
        config = _usable_config(kernel, problem, device, record, usable)
        if config is not None:
            accepted.append(config)
        return config is not None

    found = database.best(
        record_key(kernel, problem, device),
        predicted_protocol=prediction_protocol(kernel),
        near=kernel.near(problem),
        accept=accept,
        incumbent=kernel.default(problem, device).to_json(),
        defaults=config_defaults(kernel),
    )
    if found is None:
        return None
    return _choice(found, accepted[-1])


def _choice(found: Answer, config: Config) -> Choice:
    times = found.record.times
    return Choice(config, found.provenance, found.reason, times.median_us if times else None, found.record)


def _usable_config(
    kernel: Kernel[Any, Any], problem: Problem, device: Device, record: Record, usable: Usable | None
) -> Config | None:
    config = fitting_config(kernel, problem, device, record)
    return config if config is not None and (usable is None or usable(config)) else None


def config_defaults(kernel: Kernel[Any, Any]) -> dict[str, Any]:
    """The fields of a kernel's configuration that may be left out, with what they then are."""
    fields = dataclasses.fields(kernel.space.config)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def fitting_config(kernel: Kernel[Any, Any], problem: Problem, device: Device, record: Record) -> Config | None:
    """A record's configuration, if it fits this problem on this device by the space's rules and by the resources that
    were recorded; a record of another revision may not even be one."""
    try:
        config: Config = kernel.space.config.from_json(record.config)
    except ProblemError:
        return None
    if kernel.space.fits(problem, config, device) is not None:
        return None
    resources = record.resources
    if resources is not None and over_limits(resources, device, block_warps(config, device)) is not None:
        return None
    return config


def predictions(
    kernel: Kernel[Any, Any], problem: Problem, device: Device, *, coarse: bool = False
) -> Iterator[tuple[Prediction, Config]]:
    """The configurations worth trying, each with its prediction from estimated resources, in the space's order."""
    for config in kernel.space.configs(problem, device, coarse=coarse):
        yield predict(kernel.work(problem, config), kernel.estimate(problem, config, device), device), config


def lighter_configs(kernel: Kernel[Any, Any], problem: Problem, device: Device) -> list[Config]:
    """Configurations that take fewer registers than the default by estimate: of the coarse space the fastest predicted
    with at most so many parts of the default's as `LIGHTER_REGISTERS` has, and the one with the fewest."""
    most = kernel.estimate(problem, kernel.default(problem, device), device).registers
    found: list[tuple[int, float, Config]] = []
    for config in kernel.space.configs(problem, device, coarse=True):
        resources = kernel.estimate(problem, config, device)
        if resources.registers < most and not resources.spill_bytes:
            time_us = predict(kernel.work(problem, config), resources, device).time_us
            found.append((resources.registers, time_us, config))
    if not found:
        return []
    chosen: list[Config] = []
    for part in LIGHTER_REGISTERS:
        within = [each for each in found if each[0] <= part * most]
        chosen += [min(within, key=lambda each: each[1])[2]] if within else []
    return list(dict.fromkeys((*chosen, min(found, key=lambda each: each[:2])[2])))


def predicted_best(
    kernel: Kernel[Any, Any],
    problem: Problem,
    device: Device,
    count: int,
    usable: Usable | None = None,
    *,
    apart: bool = False,
) -> list[tuple[Prediction, Config]]:
    """The `count` configurations with the least predicted time, from estimated resources, of the coarse space and the
    default: the call that asks is waiting, and `autotune` looks at the rest. Where fewer of those than that are usable,
    the whole space is looked at. With `apart`, of those with equal warps and, by estimate, registers the fastest alone:
    where the code of one spills, so does that of the others."""
    default = kernel.default(problem, device)
    known = predict(kernel.work(problem, default), kernel.estimate(problem, default, device), device)

    def by_time(coarse: bool) -> list[tuple[Prediction, Config]]:
        others = (pair for pair in predictions(kernel, problem, device, coarse=coarse) if pair[1] != default)
        every = [*others, (known, default)]
        every.sort(key=lambda pair: pair[0].order)
        wanted = (pair for pair in every if usable is None or usable(pair[1]))
        return list(islice(_apart(kernel, problem, device, wanted) if apart else wanted, count))

    found = by_time(coarse=True)
    return found if usable is None or len(found) == count else by_time(coarse=False)


def _apart(
    kernel: Kernel[Any, Any], problem: Problem, device: Device, found: Iterable[tuple[Prediction, Config]]
) -> Iterator[tuple[Prediction, Config]]:
    taken: set[tuple[int, int]] = set()
    for prediction, config in found:
        takes = (kernel.estimate(problem, config, device).registers, config.num_warps)
        if takes not in taken:
            taken.add(takes)
            yield prediction, config
