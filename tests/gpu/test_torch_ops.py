"""Calls inside torch.compile on the GPU: Inductor's graphs, and CUDA graphs of these."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tilewright.tuning_db.env import compiling_environment

LIMIT_S = 240.0
"""Of a process: less than a test's own limit, which costs the process that the tests run in."""

COMPILED = """
import sys, torch
from tests.kernels.torch_calls import CALLS

name, mode = sys.argv[1:]
((call, arguments),) = [each for each in CALLS if each[0].__name__ == name]
arguments = [each.cuda() for each in arguments]
parts = lambda results: results if isinstance(results, tuple) else (results,)
compiled = torch.compile(call, fullgraph=True, mode=mode)
with torch.no_grad():
    for turn in range(5):  # a CUDA graph is warmed up, captured and then replayed
        for each in arguments:
            if each.is_floating_point():
                each.copy_((each.float() * 0.9 + 0.05).to(each.dtype))
        wanted = [part.clone() for part in parts(call(*arguments))]
        torch.compiler.cudagraph_mark_step_begin()
        for result, want in zip(parts(compiled(*arguments)), wanted, strict=True):
            assert (result.shape, result.dtype, result.stride()) == (want.shape, want.dtype, want.stride())
            assert torch.equal(result.float(), want.float()), (turn, (result.float() - want.float()).abs().max())
        eager = [part.clone() for part in parts(call(*arguments))]  # nothing that the graph keeps is the eager call's
        assert all(torch.equal(part.float(), want.float()) for part, want in zip(eager, wanted, strict=True)), turn
"""


def finished(program: str, *arguments: str, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """What a process of its own came to, in which Inductor compiles by itself: its pool of compilers would be as many
    again as there are processors, for each of the tests at a time."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=compiling_environment() | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(
    "name",
    [
        *("of_one_epilogue", "of_configs", "of_fp8", "of_pairs", "of_groups", "in_place", "of_images", "of_pixels"),
        *("of_rows", "of_windows", "of_sequences", "of_one_config", "of_sums", "of_row_scales", "in_place_sums"),
    ],
)
def test_compiled_calls_give_what_eager_ones_do(torch: Any, name: str, mode: str) -> None:
    """Each in a process of its own: compilers and pools of graphs stay for good."""
    done = finished(COMPILED, name, mode)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_process_has_no_pool_of_compilers_and_a_limit(pytestconfig: pytest.Config) -> None:
    assert float(pytestconfig.getini("timeout")) > LIMIT_S
    told = finished("import os, sys; print(os.environ['TORCHINDUCTOR_COMPILE_THREADS'], sys.argv[1])", "of_rows")
    assert told.stdout.split() == ["1", "of_rows"]
    with pytest.raises(subprocess.TimeoutExpired):
        finished("import time; time.sleep(60)", limit_s=0.1)
