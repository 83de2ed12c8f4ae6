"""Plugins that launch from Python; on a GPU in `tests/gpu/test_tensorrt.py`."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest

from tilewright.kernels import AttentionProblem, Conv2dProblem, GemmProblem, RmsNormProblem
from tilewright.kernels.tensorrt import jit
from tilewright.kernels.tensorrt.catalogue import find_plugin, plugin_attributes
from tilewright.tuning_db.errors import ProblemError

DataType = Enum("DataType", "FLOAT HALF BF16 INT8 INT32 FP8")
Format = Enum("Format", "LINEAR HWC8")


def tensor(shape, pointer=4096, dtype=DataType.HALF, format=Format.LINEAR):
    return SimpleNamespace(shape=shape, data_ptr=pointer, dtype=dtype, format=format)


@pytest.fixture
def planned(monkeypatch):
    """What was asked to be planned and run; nothing is."""
    asked = []

    def plan_for(kernel, problem, ordinal, *, constants):
        def run(pointers, strides, stream):
            asked.append((problem, pointers, strides, stream, dict(constants)))

        asked.append("planned")
        return SimpleNamespace(run=run), None

    runtime = SimpleNamespace(getDevice=lambda: 0)
    monkeypatch.setattr(jit, "plan_for", plan_for)
    monkeypatch.setattr(jit, "require_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(jit, "_plans", {})
    return asked


def run(plugin, inputs, outputs, stream=7, **attributes):
    jit.enqueue(find_plugin(plugin), inputs, outputs, plugin_attributes(plugin, **attributes), stream)


def test_a_shape_is_planned_once_and_run_on_the_stream(planned):
    for pointer in (4096, 8192):
        run("FusedGemm", [tensor((5, 64), pointer), tensor((64, 32), 512)], [tensor((5, 32), 1024)], activation="relu")
    assert planned[0] == "planned"
    problem, pointers, strides, stream, _ = planned[1]
    assert problem == GemmProblem(M=5, N=32, K=64, activation="relu")
    assert (pointers, strides, stream) == ({"a_ptr": 4096, "b_ptr": 512, "out_ptr": 1024}, {}, 7)
    assert planned[2][1]["a_ptr"] == 8192
    assert len(planned) == 3


def test_a_process_with_ever_new_shapes_keeps_so_many_plans(planned, monkeypatch):
    monkeypatch.setattr(jit, "MOST_PLANS", 3)
    for rows in range(1, 11):
        run("FusedGemm", [tensor((rows, 64)), tensor((64, 32))], [tensor((rows, 32))])
        assert len(jit._plans) <= 3
    assert planned.count("planned") == 10


def test_formats_attributes_and_alignment_are_part_of_the_plan(planned):
    inputs = [tensor((1, 16, 8, 8), format=Format.HWC8), tensor((8, 16, 3, 3))]
    out = tensor((1, 8, 6, 6), format=Format.HWC8)
    run("FusedConv2d", inputs, [out])
    run("FusedConv2d", [tensor((1, 16, 8, 8)), inputs[1]], [tensor((1, 8, 6, 6))])
    run("FusedConv2d", [tensor((1, 16, 8, 8), 4098), inputs[1]], [tensor((1, 8, 6, 6))])
    found = [each[0] for each in planned if each != "planned"]
    shape = {"N": 1, "H": 8, "W": 8, "C": 16, "K": 8, "R": 3, "S": 3, "w_layout": "kcrs"}
    assert found == [
        Conv2dProblem(**shape),
        Conv2dProblem(**shape, layout="nchw"),
        Conv2dProblem(**shape, layout="nchw", aligned=False),
    ]


def test_unaligned_gemm(planned):
    run("FusedGemm", [tensor((5, 64), 4098), tensor((64, 32))], [tensor((5, 32))])
    assert planned[1][0] == GemmProblem(M=5, N=32, K=64, aligned=False, end_aligned=False)


def test_constants_and_second_outputs(planned):
    qkv = [tensor((1, 2, 16, 64))] * 3
    run("FusedAttention", qkv, [tensor((1, 2, 16, 64))], scale=0.5, softcap=20.0)
    assert planned[1][0] == AttentionProblem(B=1, H=2, Sq=16, Skv=16, D=64, softcap=True)
    assert planned[1][4] == {"SCALE": 0.5, "SOFTCAP": 20.0}
    run("FusedRmsNormResidual", [tensor((4, 64)), tensor((4, 64))], [tensor((4, 64), 16), tensor((4, 64), 32)])
    assert planned[3][0] == RmsNormProblem(M=4, N=64, residual="fp16", residual_out=True)
    assert planned[3][1] == {"x_ptr": 4096, "residual_ptr": 4096, "out_ptr": 16, "residual_out_ptr": 32}


def test_results_of_another_shape_are_refused(planned):
    with pytest.raises(ProblemError, match=r"FusedGemm: out is \(5, 31\) of fp16 and must be \(5, 32\) of fp16"):
        run("FusedGemm", [tensor((5, 64)), tensor((64, 32))], [tensor((5, 31))])
    assert planned == []
