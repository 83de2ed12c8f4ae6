"""Compiles a kernel in Gluon of the benchmarks for sm_90, by the job on the command line as JSON, and prints what came
out: for tests, whose own process interprets kernels.

    {"op": "gemm", "kind": "bf16", "bias": true, "activation": "none", "config": {…}}
    {"op": "attention", "kind": "bf16", "dim": 128, "causal": true, "config": {…}}
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks.gluon_attention import ROWS, GluonAttentionConfig, gluon_attention_kernel
from benchmarks.gluon_gemm import REGISTERS, GluonGemmConfig, gluon_gemm_kernel, tile_layout
from tilewright.kernels.compile import _cuobjdump, read_resources

Tiles = dict[str, tuple[int, ...]]


def gemm(job: dict[str, Any]) -> tuple[Any, Tiles, dict[str, str], dict[str, Any]]:
    config = GluonGemmConfig(**job["config"])
    tiles = {
        "a_desc": (config.rows, config.BLOCK_K),
        "b_desc": (config.BLOCK_N, config.BLOCK_K),
        "out_desc": (config.BLOCK_M, config.BLOCK_N // config.PIECES),
    }
    constants = {name: getattr(config, name) for name in ("BLOCK_N", "STAGES", "GROUP_M", "COOPERATIVE")}
    constants["ACTIVATION"] = job["activation"]
    if not job["bias"]:
        constants["bias_ptr"] = None
    return gluon_gemm_kernel, tiles, {"bias_ptr": f"*{job['kind']}", **dict.fromkeys("MNK", "i32")}, constants


def attention(job: dict[str, Any]) -> tuple[Any, Tiles, dict[str, str], dict[str, Any]]:
    config, dim = GluonAttentionConfig(**job["config"]), job["dim"]
    rows, keys = (1, ROWS.value, dim), (1, config.BLOCK_N, dim)
    tiles = {"q_desc": rows, "k_desc": keys, "v_desc": keys, "out_desc": rows}
    sizes = dict.fromkeys(("heads", "shared_by", "queries", "keys"), "i32")
    constants = {"STAGES": config.STAGES, "GROUP_H": config.GROUP_H, "CAUSAL": job["causal"]}
    return gluon_attention_kernel, tiles, {**sizes, "unit": "fp32"}, constants


def answer(job: dict[str, Any]) -> dict[str, Any]:
    kernel, tiles, rest, constants = {"gemm": gemm, "attention": attention}[job["op"]](job)
    described = {
        name: f"tensordesc<{job['kind']}[{', '.join(map(str, shape))}],{tile_layout(*shape)!r}>"
        for name, shape in tiles.items()
    }
    compiled = triton.compile(
        GluonASTSource(kernel, {**described, **rest, **dict.fromkeys(constants, "constexpr")}, constants, {}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": REGISTERS, "enable_fp_fusion": True},
    )
    metadata, cubin = compiled.metadata, compiled.asm["cubin"]
    return {
        "num_warps": metadata.num_warps,
        "resources": asdict(read_resources(cubin, metadata.shared)),
        "ptx": compiled.asm["ptx"],
        "sass": _cuobjdump(cubin, "--dump-sass"),  # `asm["sass"]` of Triton 3.6 ends early
    }


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
