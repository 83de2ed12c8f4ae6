"""Compiles the GEMM in Gluon for sm_90 by the configuration on the command line, as JSON, and prints what came out: for
tests, whose own process interprets kernels.

    {"kind": "bf16", "bias": true, "activation": "none", "config": {…}}
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks.gluon_gemm import REGISTERS, GluonConfig, gluon_gemm_kernel, tile_layout
from tilewright.kernels.compile import read_resources


def answer(job: dict[str, Any]) -> dict[str, Any]:
    config, kind = GluonConfig(**job["config"]), job["kind"]
    tiles = {
        "a_desc": (config.rows, config.BLOCK_K),
        "b_desc": (config.BLOCK_N, config.BLOCK_K),
        "out_desc": (config.BLOCK_M, config.BLOCK_N // config.PIECES),
    }
    constants = {name: getattr(config, name) for name in ("BLOCK_N", "STAGES", "GROUP_M", "COOPERATIVE")}
    constants["ACTIVATION"] = job["activation"]
    if not job["bias"]:
        constants["bias_ptr"] = None
    signature = {
        **{name: f"tensordesc<{kind}[{r}, {c}],{tile_layout(r, c)!r}>" for name, (r, c) in tiles.items()},
        **{"bias_ptr": f"*{kind}", "M": "i32", "N": "i32", "K": "i32"},
        **dict.fromkeys(constants, "constexpr"),
    }
    kernel = triton.compile(
        GluonASTSource(gluon_gemm_kernel, signature, constants, {}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": REGISTERS, "enable_fp_fusion": True},
    )
    metadata = kernel.metadata
    resources = read_resources(kernel.asm["cubin"], metadata.shared)
    return {"num_warps": metadata.num_warps, "resources": asdict(resources), "ptx": kernel.asm["ptx"]}


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
