"""PTX as TensorRT takes it: exactly the parameters it passes, a name of its own, and an ISA that the driver reads."""

from __future__ import annotations

import hashlib
import re

from tilewright.kernels.compile import HIDDEN_POINTERS, Binary, ptxas_version
from tilewright.tuning_db.errors import UnsupportedError, UsageError

CUDA = "12.8"
"""Version of CUDA whose driver (570) reads the PTX of plugins unless told otherwise: the oldest that knows every arch
of the catalogue, sm_120 included."""

ISA = {
    "12.0": 80,
    "12.1": 81,
    "12.2": 82,
    "12.3": 83,
    "12.4": 84,
    "12.5": 85,
    "12.6": 85,
    "12.7": 86,
    "12.8": 87,
    "12.9": 88,
    "13.0": 90,
    "13.1": 91,
}
"""The newest PTX ISA, times ten, that the driver of a CUDA version reads ("PTX ISA", section "Release Notes")."""

OLDEST_ISA = {80: 70, 86: 71, 87: 74, 89: 84, 90: 80, 100: 86, 103: 88, 120: 87, 121: 88}
"""The first PTX ISA that has an arch's target, and for sm_89 its fp8 mma (ibid.)."""


def isa_for(arch: int, cuda: str) -> int:
    """The PTX ISA, times ten, to write for an arch and the driver of a CUDA version.

    Raises:
        UsageError: there is no such version, or its driver knows no such arch.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.\d+)?", cuda)
    if match is None or int(match.group(1)) < 12:
        raise UsageError(
            f"cuda={cuda!r} must be the CUDA version of the driver, 12.0 or newer, as nvidia-smi prints it"
        )
    version = f"{match.group(1)}.{match.group(2)}"
    # What a driver of tomorrow reads beyond the last row is not known; it reads that row's.
    newest = max(ISA.values())
    known = ISA.get(version, newest if tuple(map(int, version.split("."))) > (13, 1) else None)
    if known is None:
        raise UsageError(f"cuda={cuda!r} is no CUDA version; there are {', '.join(ISA)}")
    if known < OLDEST_ISA.get(arch, 0):
        raise UsageError(
            f"sm_{arch} needs PTX {OLDEST_ISA[arch] / 10:.1f}, and the driver of CUDA {cuda} reads up to "
            f"{known / 10:.1f}: name a newer one with cuda="
        )
    return known


def assembled_isa(arch: int) -> int:
    """The newest PTX ISA, times ten, that the ptxas of this Triton assembles for an arch. An arch may have one of its
    own, older than that of the others."""
    return ISA.get(".".join(ptxas_version(arch).split(".")[:2]), max(ISA.values()))


def check_readable(ptx: str, cuda: str) -> None:
    """Does nothing if the driver of a CUDA version reads the PTX.

    Raises:
        UsageError: it is too old; the engine would only fail when it is run.
    """
    match = re.search(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)
    target = re.search(r"^\.target sm_(\d+)", ptx, re.MULTILINE)
    if match is None or target is None:
        raise UnsupportedError("the compiler's PTX names no version or target")
    readable = isa_for(int(target.group(1)), cuda)
    if int(match.group(1)) * 10 + int(match.group(2)) > readable:
        raise UsageError(
            f"the kernel is PTX {match.group(1)}.{match.group(2)} and the driver of CUDA {cuda} reads up to "
            f"{readable / 10:.1f}: unset TRITON_PTXAS_PATH and TRITON_MOCK_PTX_VERSION, or update the driver"
        )


def prepared(binary: Binary, parameters: int) -> tuple[str, str]:
    """Name and PTX of a kernel for TensorRT, which passes `parameters` arguments and nothing hidden.

    Triton's trailing scratch pointers go, and so do line numbers and debug sections, which hold paths of this machine.
    The entry is named after its content: no two kernels of an engine share a name.

    Raises:
        UnsupportedError: the kernel needs scratch memory, or reads one of the pointers.
    """
    if binary.scratch_bytes:
        raise UnsupportedError(
            f"{binary.name} needs {binary.scratch_bytes} B of scratch memory a launch, as TensorRT gives none"
        )
    ptx = _without_debug(binary.ptx)
    entry = re.search(rf"\.entry {re.escape(binary.name)}\(([^)]*)\)", ptx)
    if entry is None:
        raise UnsupportedError(f"the compiler's PTX has no entry {binary.name}")
    declared = [line.strip() for line in entry.group(1).split(",") if line.strip()]
    hidden = len(declared) - parameters
    if not 0 <= hidden <= HIDDEN_POINTERS:
        raise UnsupportedError(f"{binary.name} has {len(declared)} parameters and TensorRT passes {parameters}")
    for index in range(parameters, len(declared)):
        if len(re.findall(rf"\b{re.escape(binary.name)}_param_{index}\b", ptx)) != 1:
            raise UnsupportedError(f"{binary.name} reads its hidden parameter {index}, which TensorRT does not pass")
    kept = "".join(f"\n\t{line}," for line in declared[:parameters])[:-1]
    ptx = f"{ptx[: entry.start(1)]}{kept}\n{ptx[entry.end(1) :]}"
    name = f"tilewright_{binary.name}_{hashlib.sha256(ptx.encode()).hexdigest()[:16]}"
    return name, re.sub(rf"\b{re.escape(binary.name)}(?=_param_\d+\b|\b)", name, ptx)


def _without_debug(ptx: str) -> str:
    ptx = re.sub(r"^\t\.section\t\.debug_\w+\s*\{.*?\}\n?", "", ptx, flags=re.MULTILINE | re.DOTALL)
    ptx = re.sub(r"^\s*\.(?:loc|file)\b.*\n", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^(\.target [^,\n]+), debug$", r"\1", ptx, flags=re.MULTILINE)
    return re.sub(r"\s*//.*$", "", ptx, flags=re.MULTILINE)


def parameter_types(ptx: str, name: str) -> list[str]:
    """The types of an entry's parameters, as `u64` and `u32`."""
    entry = re.search(rf"\.entry {re.escape(name)}\(([^)]*)\)", ptx)
    return re.findall(r"\.param \.(\w+)", entry.group(1)) if entry else []
