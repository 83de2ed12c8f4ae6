"""`gemm` on a GPU against float64: data types, layouts, sizes, streams, graphs, CuPy's arrays and torch's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tilewright.kernels import GemmConfig, GemmProblem, gemm
from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.reference import supported
from tilewright.tuner.gate import compare

pytestmark = pytest.mark.gpu


def on_gpu(cupy: Any, array: np.ndarray[Any, Any]) -> Any:
    """The array in device memory, in its own layout. CuPy knows bf16 and fp8 as bytes at the least."""
    column_major = array.ndim > 1 and array.strides[-1] != array.itemsize
    stored = np.ascontiguousarray(array.swapaxes(-1, -2) if column_major else array)
    moved = cupy.asarray(stored.view(f"u{stored.itemsize}")).view(stored.dtype)
    return moved.swapaxes(-1, -2) if column_major else moved


def on_host(cupy: Any, array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(cupy.asnumpy(array.view(f"u{array.dtype.itemsize}")).view(array.dtype))


def call(cupy: Any, problem: GemmProblem, seed: int = 0, **more: Any) -> str | None:
    """None, or how `gemm` of this problem's inputs is off."""
    arrays = problem.inputs(seed)
    moved = {name: on_gpu(cupy, array) for name, array in arrays.items() if name != "alpha"}
    out = gemm(
        moved["a"],
        moved["b"],
        bias=moved.get("bias"),
        residual=moved.get("residual"),
        activation=problem.activation,
        alpha=float(arrays["alpha"][0]) if problem.alpha else 1.0,
        precision=problem.precision,
        out_dtype=problem.output_dtype,
        **more,
    )
    assert out.dtype == np.dtype(dtype(problem.output_dtype).numpy)
    return compare(on_host(cupy, out), GEMM.reference(problem, arrays)["out"], GEMM.tolerance(problem)["out"])


def skip_unless(problem: GemmProblem, board: Device) -> None:
    reason = supported(problem, board)
    if reason is not None:
        pytest.skip(reason)


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
    skip_unless(problem, board)
    assert call(cupy, problem) is None


@pytest.mark.parametrize("m", [1, 15, 17, 128, 129])
@pytest.mark.parametrize("n", [1, 16, 127, 129])
@pytest.mark.parametrize("k", [1, 16, 63, 129])
def test_odd_sizes(cupy: Any, m: int, n: int, k: int) -> None:
    assert call(cupy, GemmProblem(M=m, N=n, K=k, batch=1, bias="fp16", residual="fp16")) is None


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", "gelu_erf", "silu", "sigmoid", "tanh", "hardswish"])
def test_every_activation(cupy: Any, activation: str) -> None:
    problem = GemmProblem(M=64, N=96, K=80, out_dtype="fp32", bias="fp32", activation=activation, alpha=True)
    assert call(cupy, problem) is None


@pytest.mark.parametrize("split_k", [2, 3, 8])
@pytest.mark.parametrize("sizes", [(16, 256, 2048), (7, 100, 1111)])
def test_split_k_gives_the_same_bits_every_time(cupy: Any, sizes: tuple[int, int, int], split_k: int) -> None:
    problem = GemmProblem(*sizes, dtype="fp16", out_dtype="fp32")
    config = GemmConfig(16, 64, 32, GROUP_M=1, SPLIT_K=split_k)
    assert call(cupy, problem, config=config) is None
    arrays = {name: on_gpu(cupy, array) for name, array in problem.inputs(0).items()}
    results = [on_host(cupy, gemm(**arrays, out_dtype="fp32", config=config)) for _ in range(20)]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_a_stream_of_ones_own(cupy: Any) -> None:
    """The operands are made on that stream, behind a long copy: a launch on any other would come too early."""
    problem = GemmProblem(M=256, N=256, K=256)
    arrays = problem.inputs(0)
    sources = [on_gpu(cupy, arrays[name]) for name in "ab"]
    delay = cupy.zeros(1 << 28, np.uint8)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        operands = [cupy.full(source.shape, np.nan, source.dtype) for source in sources]
        for _ in range(8):
            delay.copy()
        for operand, source in zip(operands, sources, strict=True):
            operand[...] = source
        out = gemm(*operands)
        stream.synchronize()
    assert compare(on_host(cupy, out), GEMM.reference(problem, arrays)["out"], GEMM.tolerance(problem)["out"]) is None


@pytest.mark.parametrize("split_k", [1, 4])
def test_a_captured_graph_replays_on_new_contents(cupy: Any, split_k: int) -> None:
    problem = GemmProblem(M=64, N=256, K=1024)
    config = GemmConfig(32, 64, 32, GROUP_M=1, SPLIT_K=split_k)
    arrays = {name: on_gpu(cupy, array) for name, array in problem.inputs(0).items()}
    out = cupy.full((1, 64, 256), np.nan, np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        gemm(**arrays, out=out, config=config)  # prepared, and its scratch memory lent
        stream.begin_capture()
        gemm(**arrays, out=out, config=config)
        graph = stream.end_capture()
        for seed in (1, 2):
            fresh = problem.inputs(seed)
            for name in "ab":
                arrays[name][...] = on_gpu(cupy, fresh[name])
            out.fill(np.nan)
            graph.launch(stream)
            stream.synchronize()
            assert (
                compare(on_host(cupy, out), GEMM.reference(problem, fresh)["out"], GEMM.tolerance(problem)["out"])
                is None
            )


def test_out_is_written_and_given_back(cupy: Any) -> None:
    problem = GemmProblem(M=70, N=90, K=110, residual="fp16")
    arrays = problem.inputs(0)
    moved = {name: on_gpu(cupy, array) for name, array in arrays.items()}
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
    a, b = (on_gpu(cupy, arrays[name])[0] for name in "ab")
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
    assert compare(found, wanted, loose) is None


# torch


def test_torch_tensors_on_torchs_current_stream(torch: Any) -> None:
    problem = GemmProblem(M=130, N=200, K=300, bias="fp32", activation="silu")
    arrays = problem.inputs(0)
    sources = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in arrays.items()}
    delay = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        operands = {name: torch.full_like(source, float("nan")) for name, source in sources.items()}
        for _ in range(8):
            delay.clone()
        for name, source in sources.items():
            operands[name].copy_(source)
        out = gemm(operands["a"], operands["b"], bias=operands["bias"], activation="silu")
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.float16
    stream.synchronize()
    assert compare(out.cpu().numpy(), GEMM.reference(problem, arrays)["out"], GEMM.tolerance(problem)["out"]) is None


def test_torch_bf16_against_torch(torch: Any) -> None:
    torch.manual_seed(0)
    a = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16) / 512**0.5
    b = torch.randn(384, 512, device="cuda", dtype=torch.bfloat16).t()
    tolerance = GEMM.tolerance(GemmProblem(M=256, N=384, K=512, dtype="bf16", b_layout="col"))["out"]
    wanted = a.double().cpu().numpy() @ b.double().cpu().numpy()
    assert compare(gemm(a, b).float().cpu().numpy(), wanted, tolerance) is None


def test_a_graph_that_torch_captures(torch: Any) -> None:
    a = torch.randn(64, 256, device="cuda", dtype=torch.float16) / 16
    b = torch.randn(256, 128, device="cuda", dtype=torch.float16)
    out = torch.empty(64, 128, device="cuda", dtype=torch.float16)
    gemm(a, b, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm(a, b, out=out)
    a.copy_(torch.randn_like(a) / 16)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    wanted = a.double().cpu().numpy() @ b.double().cpu().numpy()
    assert compare(out.cpu().numpy(), wanted, GEMM.tolerance(GemmProblem(M=64, N=128, K=256))["out"]) is None
