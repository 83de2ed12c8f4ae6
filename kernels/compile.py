"""From a `Launch` to machine code for a named target, and what that code takes. No GPU, no driver, no torch."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilewright.kernels.barriers import stale_barriers
from tilewright.kernels.device import MAX_REGISTERS_PER_THREAD, REGISTERS_PER_BLOCK, WARP_SIZE, Device
from tilewright.kernels.kernel import Launch
from tilewright.tuning_db import env
from tilewright.tuning_db.errors import CompileError, UsageError
from tilewright.tuning_db.record import Resources

HIDDEN_POINTERS = 2
"""Trailing parameters Triton adds to every entry point since 3.5: global scratch and profile scratch."""

SYSTEM_SHARED_BYTES = 1024
"""Shared memory the driver keeps of every block from sm_80 on; `cuobjdump` counts it from sm_90 on."""


@dataclass(frozen=True, slots=True)
class Binary:
    """One compiled kernel."""

    name: str  # of the entry point
    arch: int
    cubin: bytes
    ptx: str
    num_warps: int  # of a block, as compiled
    shared_bytes: int  # dynamic shared memory to launch with
    scratch_bytes: int  # global scratch per launch; 0 but for tensor descriptors made on the device
    resources: Resources


def triton_version() -> str:
    """Version of the Triton that compiles here."""
    return str(triton.__version__)


@functools.cache
def ptxas_version(arch: int) -> str:
    """Version of the ptxas that assembles for an arch here, as in `12.8.93`.

    Raises:
        CompileError: Triton's ptxas can't be run.
    """
    from triton.backends.nvidia.compiler import get_ptxas_version

    try:
        text = get_ptxas_version(arch)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise CompileError(f"Triton's ptxas can't be run: {error}") from error
    match = re.search(r"V(\d+(?:\.\d+)+)", text)
    return match.group(1) if match else text.strip().splitlines()[-1]


def compile_launch(launch: Launch, arch: int, *, ptx_isa: int | None = None) -> Binary:
    """Machine code of a launch for sm_<arch>; from memory or Triton's on-disk cache where it is there already.

    `ptx_isa` is the version of the PTX ISA, times ten, to write the PTX in, for a driver that reads it; by default that
    of Triton's ptxas.

    Raises:
        CompileError: Triton or ptxas refused it; the message is the first line of their reason.
        UsageError: this process interprets kernels, and a process does one or the other; or may not compile.
    """
    env.refuse_if_frozen("nothing is compiled")
    if env.interpreting():
        raise UsageError(f"this process interprets kernels ({env.INTERPRET} is set) and can't compile: unset it")
    key = (launch.specialization, arch, ptx_isa)
    binary = _binaries.pop(key, None) or _compile(launch, arch, ptx_isa)
    _binaries[key] = binary  # last in the dict: most recently used
    while len(_binaries) > MOST_BINARIES:
        _binaries.pop(next(iter(_binaries)), None)
    return binary


MOST_BINARIES = 256
"""Kernels that a process keeps, of about 0.3 MB each. A program that runs a model needs dozens; a tuning worker sees
thousands, and each but once."""
_binaries: dict[tuple[Any, ...], Binary] = {}


def _compile(launch: Launch, arch: int, ptx_isa: int | None) -> Binary:
    signature = {argument.name: argument.type or "constexpr" for argument in launch.arguments}
    constexprs: dict[str, Any] = {argument.name: None for argument in launch.arguments if argument.type is None}
    constexprs.update(launch.constexprs)
    if arch // 10 != 9 and "WARP_SPECIALIZE" in constexprs:
        # Values are the same without it, and of other archs Triton's passes for it expect other loops, or fail.
        constexprs["WARP_SPECIALIZE"] = False
    signature.update(dict.fromkeys(dict(launch.constexprs), "constexpr"))
    aligned = {argument.name for argument in launch.arguments if argument.aligned and argument.type is not None}
    names = launch.fn.arg_names
    # Without these, not one load is a cp.async.
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned)}
    source = ASTSource(launch.fn, {name: signature[name] for name in names}, constexprs, attributes)
    # Its default flips in Triton 3.10.
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    if ptx_isa is not None:
        options["ptx_version"] = ptx_isa
    binary = _assemble(source, arch, options)
    if constexprs.get("WARP_SPECIALIZE"):
        stale = stale_barriers(binary.ptx)
        if stale:
            raise CompileError(
                f"Triton {triton_version()} copies operands over barriers at {stale} that it left behind"
            )
    most = min(MAX_REGISTERS_PER_THREAD, REGISTERS_PER_BLOCK // (binary.num_warps * WARP_SIZE) // 8 * 8)
    if binary.resources.spill_bytes and binary.resources.registers < most:
        # ptxas spills a few bytes where that fits another block on an SM: 3 kernels in a thousand, at 72, 80, 96 or 128
        # registers. Told how many there are, it takes what it needs.
        roomy = _assemble(source, arch, {**options, "maxnreg": most})
        if roomy.resources.spill_bytes < binary.resources.spill_bytes:
            return roomy
    return binary


def _assemble(source: ASTSource, arch: int, options: dict[str, Any]) -> Binary:
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, WARP_SIZE), options=options)
    except Exception as error:
        raise CompileError(f"{type(error).__name__}: {_first_line(_innermost(error))}") from error
    metadata = compiled.metadata
    cubin = compiled.asm["cubin"]
    return Binary(
        name=metadata.name,
        arch=arch,
        cubin=cubin,
        ptx=compiled.asm["ptx"],
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        scratch_bytes=metadata.global_scratch_size + getattr(metadata, "profile_scratch_size", 0),
        resources=read_resources(cubin, metadata.shared),
    )


def _innermost(error: BaseException) -> BaseException:
    """Triton's error in the device function where it arose: those around it say only where they call it."""
    while type(error.__cause__) is type(error):
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    # ptxas says "ptxas /tmp/x.ptx, line 556; error   : Feature …"; Triton wraps its own reasons: "at 12:8: … error: …".
    from_ptxas = re.search(r"; (?:fatal|error) *: *(.+)", str(error))
    if from_ptxas:
        return from_ptxas.group(1).strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (reasons or lines or ["no reason given"])[-1 if not reasons else 0]


def read_resources(cubin: bytes, dynamic_shared: int) -> Resources:
    """Registers, spills, stack and shared memory of a cubin with one kernel, by Triton's own `cuobjdump`.

    A stack frame holds spills and whatever else lives in local memory; only where there is one is the machine code
    read, to count what its spill instructions (STL) store.

    Raises:
        CompileError: `cuobjdump` failed.
    """
    usage = _cuobjdump(cubin, "--dump-resource-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if match is None:
        raise CompileError(f"cuobjdump reports no resources: {usage.strip()[:200]!r}")
    registers, stack, shared, local = map(int, match.groups())
    spilled = _spilled_bytes(_cuobjdump(cubin, "--dump-sass")) if stack or local else 0
    # From sm_90 on the static figure is what the driver keeps, which is no part of a block's limit.
    static = shared if shared != SYSTEM_SHARED_BYTES else 0
    return Resources(
        registers, min(spilled, stack + local) if stack + local else 0, stack + local, static + dynamic_shared
    )


def _spilled_bytes(sass: str) -> int:
    """Bytes per thread that STL instructions store to local memory."""
    widths = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return sum(widths.get((width or "").lstrip("."), 4) for width in re.findall(r"\bSTL(\.\w+)?", sass))


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            raise CompileError(f"cuobjdump can't read the compiled kernel: {error}") from error
    return done.stdout


def over_limits(resources: Resources, device: Device, num_warps: int) -> str | None:
    """None, or which limit of the device the compiled kernel breaks, with the values. A spill is one."""
    if resources.shared_bytes > device.shared_per_block:
        return f"{resources.shared_bytes} B of shared memory are over the {device.shared_per_block} B of {device.board}"
    if resources.spill_bytes:
        return f"{resources.spill_bytes} B a thread spill to local memory"
    if resources.registers * num_warps * WARP_SIZE > device.registers_per_sm:
        return f"{resources.registers} registers × {num_warps} warps are over the {device.registers_per_sm} of an SM"
    return None
