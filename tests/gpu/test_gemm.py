"""`gemm` and `grouped_gemm` on a GPU against float64: data types, layouts, sizes, forms, epilogues, large offsets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.gpu.conforming import conforms, on_host, skip_unless, to_gpu
from tests.kernels.conformance import pairwise
from tilewright.kernels import GemmConfig, GemmProblem, gemm
from tilewright.kernels.device import Device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.tuner.gate import compare

pytestmark = pytest.mark.gpu


TYPES: list[dict[str, Any]] = [
    {"dtype": "fp16"},
    {"dtype": "bf16"},
    {"dtype": "fp32"},
    {"dtype": "fp32", "precision": "tf32"},
    {"dtype": "fp8e5m2"},
    {"dtype": "fp8e4m3"},
    {"dtype": "fp16", "out_dtype": "fp32"},
    {"dtype": "bf16", "out_dtype": "fp16"},
]


@pytest.mark.parametrize("layouts", ["rr", "rc", "cr", "cc"])
@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(types.values()))
def test_every_data_type_and_layout(cupy: Any, board: Device, types: dict[str, Any], layouts: str) -> None:
    a_layout, b_layout = ({"r": "row", "c": "col"}[letter] for letter in layouts)
    problem = GemmProblem(M=192, N=160, K=224, a_layout=a_layout, b_layout=b_layout, **types)
    skip_unless(GEMM, problem, board)
    conforms(cupy, GEMM, problem)


@pytest.mark.parametrize("m", [1, 15, 17, 128, 129])
@pytest.mark.parametrize("n", [1, 16, 127, 129])
@pytest.mark.parametrize("k", [1, 16, 63, 129])
def test_odd_sizes(cupy: Any, m: int, n: int, k: int) -> None:
    conforms(cupy, GEMM, GemmProblem(M=m, N=n, K=k, batch=1, bias="fp16", residual="fp16"))


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", "gelu_erf", "silu", "sigmoid", "tanh", "hardswish"])
def test_every_activation(cupy: Any, activation: str) -> None:
    problem = GemmProblem(M=64, N=96, K=80, out_dtype="fp32", bias="fp32", activation=activation, alpha=True)
    conforms(cupy, GEMM, problem)


FORMS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "int8 by row and column": {"dtype": "int8", "a_scale": "row", "b_scale": "column", "out_dtype": "fp16"},
    "int8 to int8": {"dtype": "int8", "a_scale": "tensor", "b_scale": "column", "out_dtype": "int8", "out_scale": True},
    "int8 weights": {"b_dtype": "int8", "b_scale": "column"},
    "int8 weights in groups": {"b_dtype": "int8", "b_scale": "group", "group_size": 64, "b_zero": True},
    "int4 weights": {"b_dtype": "int4", "b_scale": "column"},
    "int4 weights in groups of 32": {"b_dtype": "int4", "b_scale": "group", "group_size": 32, "dtype": "bf16"},
    "int4 weights in groups of 128": {"b_dtype": "int4", "b_scale": "group", "group_size": 128, "b_zero": True},
    "fp8": {"dtype": "fp8e4m3", "a_scale": "tensor", "b_scale": "tensor", "b_layout": "col"},
    "fp8 result": {"dtype": "bf16", "out_dtype": "fp8e4m3", "out_scale": True},
    "gated halves": {"gated": "halves", "activation": "silu"},
    "gated pairs": {"gated": "interleaved", "activation": "gelu_tanh", "dtype": "bf16"},
    "groups of rows": {"groups": 3},
    "groups of rows, gated": {"groups": 4, "gated": "halves", "activation": "silu", "dtype": "bf16"},
    "groups of rows, int4": {"groups": 2, "b_dtype": "int4", "b_scale": "group", "group_size": 32},
    "batch": {"batch": 3, "b_broadcast": True},
    "wide rows": {"batch": 2, "strided": True},
    "unaligned": {"aligned": False, "end_aligned": False},
}
EPILOGUES: dict[str, dict[str, Any]] = {
    "none": {},
    "bias": {"bias": "fp32"},
    "all": {"bias": "fp16", "residual": "bf16", "alpha": True},
}
AXES = {
    "form": tuple(FORMS),
    "epilogue": tuple(EPILOGUES),
    "M": (1, 17, 64, 257),
    "N": (32, 130, 256),
    "K": (32, 96, 131, 1024),
}


def problem_of(row: dict[str, Any]) -> GemmProblem:
    form, epilogue = FORMS[row["form"]], EPILOGUES[row["epilogue"]]
    if row["form"] == "int8" and epilogue:
        form = {**form, "a_scale": "tensor"}  # int32 is for bare sums
    return GemmProblem(M=row["M"], N=row["N"], K=row["K"], **form, **epilogue)


PROBLEMS = list(dict.fromkeys(problem_of(row) for row in pairwise(AXES)))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_form_with_every_epilogue(cupy: Any, board: Device, problem: GemmProblem) -> None:
    skip_unless(GEMM, problem, board)
    conforms(cupy, GEMM, problem)


@pytest.mark.parametrize("split_k", [2, 3, 8])
@pytest.mark.parametrize("sizes", [(16, 256, 2048), (7, 100, 1111)])
def test_split_k_gives_the_same_bits_every_time(cupy: Any, sizes: tuple[int, int, int], split_k: int) -> None:
    problem = GemmProblem(*sizes, dtype="fp16", out_dtype="fp32")
    config = GemmConfig(16, 64, 32, GROUP_M=1, SPLIT_K=split_k)
    conforms(cupy, GEMM, problem, config)
    arrays = {name: to_gpu(cupy, array) for name, array in problem.inputs(0).items()}
    results = [on_host(cupy, gemm(**arrays, out_dtype="fp32", config=config)) for _ in range(20)]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_out_is_written_and_given_back(cupy: Any) -> None:
    problem = GemmProblem(M=70, N=90, K=110, residual="fp16")
    arrays = problem.inputs(0)
    moved = {name: to_gpu(cupy, array) for name, array in arrays.items()}
    out = cupy.full((1, 70, 90), np.nan, np.float16)
    assert gemm(moved["a"], moved["b"], residual=moved["residual"], out=out) is out
    wanted = GEMM.reference(problem, arrays)["out"]
    assert compare(on_host(cupy, out), wanted, GEMM.tolerance(problem)["out"]) is None
    # In place: each element of the residual is read by who writes it.
    gemm(moved["a"], moved["b"], residual=moved["residual"], out=moved["residual"])
    assert compare(on_host(cupy, moved["residual"]), wanted, GEMM.tolerance(problem)["out"]) is None


def test_a_slice_of_a_larger_array_leaves_the_rest_alone(cupy: Any) -> None:
    problem = GemmProblem(M=33, N=48, K=64)
    arrays = problem.inputs(0)
    a, b = (to_gpu(cupy, arrays[name])[0] for name in "ab")
    around = cupy.full((100, 100), 7.0, np.float16)
    gemm(a, b, out=around[10:43, 20:68])
    result = on_host(cupy, around)
    assert (
        compare(result[None, 10:43, 20:68], GEMM.reference(problem, arrays)["out"], GEMM.tolerance(problem)["out"])
        is None
    )
    result[10:43, 20:68] = 7
    assert (result == 7).all()


def test_offsets_beyond_31_bits(cupy: Any, board: Device) -> None:
    rows, columns = 70_000, 32_768  # 2.29 G elements of output, 4.6 GB
    if board.memory_gib < 16:
        pytest.skip(f"{board.board} has {board.memory_gib} GiB of memory; this takes 5")
    problem = GemmProblem(M=rows, N=columns, K=16, dtype="fp16")
    random = np.random.default_rng(0)
    a = random.standard_normal((rows, 16), np.float32).astype(np.float16)
    b = random.standard_normal((16, columns), np.float32).astype(np.float16)
    out = gemm(cupy.asarray(a), cupy.asarray(b))
    chosen = np.array([0, 1, 65_535, 65_536, 65_537, rows - 1])
    wanted = a[chosen].astype(float) @ b.astype(float)
    loose = GEMM.tolerance(problem)["out"]._replace(absolute=GEMM.tolerance(problem)["out"].absolute * math.sqrt(16))
    found = np.stack([on_host(cupy, out[row]) for row in chosen.tolist()])
    del out
    cupy.get_default_memory_pool().free_all_blocks()
    assert compare(found, wanted, loose) is None


@pytest.mark.parametrize("far", ["a", "b"])
def test_operands_beyond_31_bits(cupy: Any, board: Device, far: str) -> None:
    """Rows at both ends, and beside the edges of 2^31 elements, are random, all others 1: one read in place of another
    shows. Of B, whose rows are all summed, A is 0 but at those."""
    rows, columns = 70_000, 32_768  # 2.29 G elements, 4.6 GB
    if board.memory_gib < 16:
        pytest.skip(f"{board.board} has {board.memory_gib} GiB of memory; this takes 5")
    random = np.random.default_rng(0)
    chosen = np.array([0, 1, 65_535, 65_536, 65_537, rows - 1])
    large = cupy.ones((rows, columns), np.float16)
    own = random.standard_normal((len(chosen), columns), np.float32).astype(np.float16)
    for row, values in zip(chosen.tolist(), own, strict=True):
        large[row].set(values)
    if far == "a":
        other = random.standard_normal((columns, 16), np.float32).astype(np.float16)
        out = gemm(large, cupy.asarray(other))
        found, wanted = on_host(cupy, out[cupy.asarray(chosen)]), own.astype(float) @ other.astype(float)
        terms = columns
    else:
        other = random.standard_normal((16, len(chosen)), np.float32).astype(np.float16)
        a = np.zeros((16, rows), np.float16)
        a[:, chosen] = other
        found = on_host(cupy, gemm(cupy.asarray(a), large))
        wanted = other.astype(float) @ own.astype(float)
        terms = len(chosen)
    del large
    cupy.get_default_memory_pool().free_all_blocks()
    tolerance = GEMM.tolerance(GemmProblem(M=16, N=16, K=terms, dtype="fp16"))["out"]
    assert compare(found, wanted, tolerance._replace(absolute=tolerance.absolute * math.sqrt(terms))) is None


# torch


def test_torch_bf16_against_torch(torch: Any) -> None:
    torch.manual_seed(0)
    a = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16) / 512**0.5
    b = torch.randn(384, 512, device="cuda", dtype=torch.bfloat16).t()
    tolerance = GEMM.tolerance(GemmProblem(M=256, N=384, K=512, dtype="bf16", b_layout="col"))["out"]
    wanted = a.double().cpu().numpy() @ b.double().cpu().numpy()
    assert compare(gemm(a, b).float().cpu().numpy(), wanted, tolerance) is None
