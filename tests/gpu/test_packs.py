"""A pack on the GPU that it is of: frozen calls give right results, by the pack's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilewright.kernels import AttentionProblem, GemmProblem, attention, gemm
from tilewright.kernels import compile as compile_path
from tilewright.kernels.device import Device
from tilewright.kernels.dispatch import forget_plans
from tilewright.kernels.ops.attention.launch import ATTENTION
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.tuner.gate import compare
from tilewright.tuner.packing import build_pack
from tilewright.tuning_db.errors import NotPackedError

pytestmark = pytest.mark.gpu

PRODUCT = GemmProblem(256, 384, 512, bias="fp16", activation="relu")
DECODE = AttentionProblem(B=1, H=8, Sq=1, Skv=2048, D=64)


@pytest.fixture
def frozen(board: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    output = tmp_path / "gpu.pack"
    build_pack(board, output, problems=[PRODUCT, DECODE], jobs=2, db=tmp_path)
    monkeypatch.setenv("TILEWRIGHT_PACK", str(output))
    monkeypatch.setenv("TILEWRIGHT_FROZEN", "1")
    monkeypatch.setattr(compile_path, "_compile", None)
    monkeypatch.setattr(compile_path, "_binaries", {})
    forget_plans()
    yield
    forget_plans()


def test_frozen_calls_are_right(frozen: Any, cupy: Any) -> None:
    for kernel, problem, call in (
        (GEMM, PRODUCT, lambda a: gemm(a["a"], a["b"], bias=a["bias"], activation="relu")),
        (ATTENTION, DECODE, lambda a: attention(a["q"], a["k"], a["v"])),
    ):
        arrays = problem.inputs(0)
        result = call({name: cupy.asarray(np.ascontiguousarray(array)) for name, array in arrays.items()})
        wanted = kernel.reference(problem, arrays)["out"]
        assert compare(cupy.asnumpy(result), wanted, kernel.tolerance(problem)["out"]) is None


def test_what_is_not_packed_is_refused(frozen: Any, cupy: Any) -> None:
    with pytest.raises(NotPackedError, match="lacks gemm"):
        gemm(cupy.zeros((16, 16), "float16"), cupy.zeros((16, 16), "float16"))
