"""The child: its tasks, and that nothing but replies leaves by the reply channel."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tilewright.kernels.registry import KERNELS
from tilewright.tuner import measure, worker
from tilewright.tuner.pool import COMMAND, Pool
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.errors import WorkerError

PROBLEM = {"M": 64, "N": 64, "K": 128, "dtype": "fp16", "activation": "relu"}
CONFIG = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 1, "num_warps": 4, "num_stages": 3}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Two workers that find nothing compiled."""
    cache = str(tmp_path_factory.mktemp("triton"))
    with Pool(2, environment={**compiling_environment(), "TRITON_CACHE_DIR": cache}) as pool:
        yield pool


def compile_request(arch: int = 86, **changes: Any) -> dict[str, Any]:
    return {"do": "compile", "op": "gemm", "problem": PROBLEM, "config": CONFIG, "arch": arch, **changes}


def test_a_gemm_compiles_for_two_archs_at_once(compiler: Pool) -> None:
    futures = [compiler.submit(compile_request(arch), timeout=120) for arch in (86, 90)]
    ampere, hopper = (future.result() for future in futures)
    for reply in (ampere, hopper):
        assert reply["status"] == "ok"
        assert 16 < reply["resources"]["registers"] <= 255
        assert reply["resources"]["spill_bytes"] == reply["resources"]["stack_bytes"] == 0
        assert reply["num_warps"] == 4
        assert reply["seconds"] > 0
    tile = (64 + 32) * 32 * 2
    # mma.sync has one of the three stages in registers; wgmma reads all from shared memory.
    assert 2 * tile <= ampere["resources"]["shared_bytes"] < 3 * tile
    assert 3 * tile <= hopper["resources"]["shared_bytes"] < 4 * tile
    assert compiler.starts <= 2


def test_code_is_handed_over_for_each_launch(compiler: Pool) -> None:
    problem = {"B": 1, "H": 8, "Sq": 1, "Skv": 1024, "D": 64, "dtype": "fp16"}
    config = {"BLOCK_M": 16, "BLOCK_N": 64, "SPLIT_KV": 8, "num_warps": 4, "num_stages": 2}
    request = {"do": "build", "op": "attention", "problem": problem, "config": config, "arch": 86}
    first, second = (
        compiler.submit({**request, "constants": constants}, timeout=120).result() for constants in ({}, {"SCALE": 0.5})
    )
    assert [binary["name"] for binary in first["binaries"]] == ["attention_kernel", "combine_kernel"]
    for binary in first["binaries"]:
        assert base64.b64decode(binary["cubin"])[:4] == b"\x7fELF"
        assert set(binary) == {"name", "cubin", "num_warps", "shared_bytes", "scratch_bytes", "resources"}
        assert binary["resources"]["registers"] > 0
    assert first["binaries"][0]["cubin"] != second["binaries"][0]["cubin"]
    assert first["binaries"][1] == second["binaries"][1]
    refused = {**request, "problem": {**problem, "dtype": "fp8e4m3"}, "constants": {}}
    assert compiler.submit(refused, timeout=120).result()["status"] == "compile_error"


def test_a_refusal_by_the_compiler_is_a_reply_with_its_reason(compiler: Pool) -> None:
    problem = {**PROBLEM, "dtype": "fp8e4m3"}  # sm_86 has no e4m3
    reply = compiler.submit(compile_request(problem=problem), timeout=120).result()
    assert reply["status"] == "compile_error"
    assert "fp8e4nv" in reply["message"]
    assert "\n" not in reply["message"]
    assert reply["seconds"] > 0


def test_a_ptxas_that_somebody_killed_gets_a_second_try(tmp_path: Path) -> None:
    from triton import knobs

    real, once, ptxas = knobs.nvidia.ptxas.path, tmp_path / "once", tmp_path / "ptxas"
    ptxas.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || [ -e {once} ] || {{ touch {once}; kill -KILL $$; }}\nexec {real} "$@"\n'
    )
    ptxas.chmod(0o755)
    here = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_PTXAS_PATH": str(ptxas)}
    with Pool(1, environment={**compiling_environment(), **here}) as pool:
        reply = pool.submit(compile_request(), timeout=120).result()
    assert once.exists()
    assert reply["status"] == "ok"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "gem"}, f"unknown op 'gem'; did you mean gemm? (ops: {', '.join(k.name for k in KERNELS)})"),
        ({"problem": {"M": 0, "N": 1, "K": 1}}, "M=0 must be from 1 to 2147483647"),
        ({"config": {"BLOCK_M": 16}}, "GemmConfig is missing BLOCK_N, BLOCK_K"),
        ({"problem": None}, "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_wrong_request_is_a_reply(compiler: Pool, changes: dict[str, Any], message: str) -> None:
    starts = compiler.starts
    reply = compiler.submit(compile_request(**changes), timeout=60).result()
    assert reply == {"status": "compile_error", "message": message}
    assert compiler.starts <= max(starts, 2)


def test_an_unknown_task_is_a_reply(compiler: Pool) -> None:
    reply = compiler.submit({"do": "dream"}, timeout=60).result()
    assert reply == {"status": "runtime_error", "message": "KeyError: 'dream'"}


def test_the_process_speaks_json_lines_and_ends_with_its_stdin() -> None:
    requests = [{"id": 5, "timeout": 60.0, "request": {"do": "nothing"}}, {"id": 6, "timeout": 60.0, "request": {}}]
    text = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run(
        COMMAND, input=text, capture_output=True, text=True, timeout=60, env=compiling_environment(), check=True
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"id": 0, "reply": {"status": "ok"}},
        {"id": 5, "error": "KeyError: 'nothing'"},
        {"id": 6, "error": "KeyError: 'do'"},
    ]
    assert done.stderr == ""


def test_a_gpu_that_is_not_there_is_told_at_the_start() -> None:
    with Pool(1, arguments=[("--gpu", "99")]) as pool, pytest.raises(WorkerError, match="cuda:99"):
        pool.start()


def test_a_worker_with_a_gpu_takes_it_into_use_and_measures_there(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    used: list[Any] = []
    monkeypatch.setattr(worker, "serve", lambda tasks, prepare: served.append((tasks, prepare)))
    monkeypatch.setattr(measure, "use_gpu", used.append)
    monkeypatch.setattr(measure, "measure", lambda request: {"status": "ok", **request})
    worker.main(["--gpu", "2"])
    ((tasks, prepare),) = served
    prepare()
    assert used == [2]
    assert tasks["measure"]({"do": "measure", "ordinal": 0}) == {"status": "ok", "do": "measure", "ordinal": 2}
    assert tasks["compile"] is worker.TASKS["compile"]
