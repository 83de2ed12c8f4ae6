"""Compiles what each line of stdin asks for and prints a line of what came out: for tests, whose own process interprets
kernels.

    [{"op": "gemm", "problem": "M=16,N=16,K=16" or its fields, "config": {…} or null, "arch": 86}, …]

`null` asks for the default configuration. A reply is about the op's first launch; `more` has those of the others.
With TRITON_DUMP_PTXAS_LOG and an empty cache, `log` is what `ptxas -v` said.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import sys
from dataclasses import asdict
from typing import Any

from tilewright.kernels.compile import compile_launch, over_limits
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Launch
from tilewright.kernels.registry import find_kernel
from tilewright.tuning_db.errors import CompileError


def answer(job: dict[str, Any]) -> dict[str, Any]:
    kernel, device = find_kernel(job["op"]), resolve_device(f"sm_{job['arch']}")
    fields = job["problem"]
    problem = kernel.problem.parse(fields) if isinstance(fields, str) else kernel.problem.from_dict(fields)
    asked = job["config"]
    config = kernel.default(problem, device) if asked is None else kernel.space.config.from_dict(asked)
    reply = {"op": kernel.name, "problem": str(problem), "config": config.to_dict(), "arch": job["arch"]}
    first, *others = [
        compiled(launch, job["arch"], device) | {"estimate": kernel.estimate(problem, config, device).shared_bytes}
        for launch in kernel.launches(problem, config)
    ]
    return reply | first | {"more": others}


def compiled(launch: Launch, arch: int, device: Device) -> dict[str, Any]:
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            binary = compile_launch(launch, arch)
    except CompileError as error:
        return {"error": str(error)}
    entry = binary.ptx[binary.ptx.index(".entry") :]
    body = entry[entry.index("{") :]
    return {
        "name": binary.name,
        "num_warps": binary.num_warps,
        "resources": asdict(binary.resources),
        "dynamic_shared": binary.shared_bytes,
        "scratch": binary.scratch_bytes,
        "over": over_limits(binary.resources, device, binary.num_warps),
        "parameters": re.findall(r"\.param (\.\w+)", entry[: entry.index(")")]),
        "arguments": [argument.type for argument in launch.arguments if argument.type is not None],
        "instructions": {name: len(re.findall(pattern, body)) for name, pattern in INSTRUCTIONS.items()},
        "order": [name for name, _ in itertools.groupby(re.findall("|".join(ORDERED), body))],
        "log": log.getvalue(),
    }


INSTRUCTIONS = {
    "cp.async": r"\bcp\.async\.\w+\.shared\.global",
    "bulk tensor": r"\bcp\.async\.bulk\.tensor",
    "mma.sync": r"\bmma\.sync",
    "int8 mma": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*(?:\.s8|kind::i8)\b",
    "fp8 mma": r"\b(?:mma\.sync|wgmma\.mma_async)\S*\.e[45]m[32]\b",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "shuffles": r"\bshfl\.",
    "narrow loads": r"\bld\.global(?:\.\w+)*\.[bus](?:8|16)\b",
    "setmaxnreg": r"\bsetmaxnreg\b",
    "ended barriers": r"\bfirst mbarrier\.inval\b",
    "wide loads": r"\bld\.global(?:\.\w+)*\.v4\.b32\b",
}
ORDERED = (r"\bwgmma\.commit", r"\bwgmma\.wait", r"\bex2\b")
"""What `order` lists, as often as one follows another."""


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what compilers print is no answer
    for line in sys.stdin:
        print(json.dumps([answer(job) for job in json.loads(line)]), file=answers, flush=True)
