"""What every op does alike on a GPU: CuPy's, torch's and JAX's arrays in and out, streams, graphs, `out=`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.gpu.conforming import fault, on_host, to_gpu
from tests.kernels.calls import call
from tilewright.kernels import (
    AttentionConfig,
    AttentionProblem,
    Conv2dConfig,
    Conv2dProblem,
    GemmConfig,
    GemmProblem,
    RmsNormProblem,
    gemm,
)
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.registry import find_kernel

pytestmark = pytest.mark.gpu

Array = np.ndarray[Any, Any]


def problems(kind: str) -> list[Any]:
    return [
        GemmProblem(M=130, N=200, K=300, dtype=kind, bias="fp32", residual=kind, activation="silu"),
        Conv2dProblem(N=2, H=14, W=15, C=32, K=48, R=3, S=3, pad_top=1, pad_right=1, dtype=kind, bias=kind),
        AttentionProblem(2, 8, 65, 129, 64, Hkv=2, dtype=kind, causal=True, lse=True),
        RmsNormProblem(M=37, N=1000, dtype=kind, weight=kind, residual=kind, residual_out=True),
    ]


PROBLEMS = problems("fp16")
SCRATCH: list[tuple[Any, Any]] = [
    (GemmProblem(M=64, N=256, K=1024), GemmConfig(32, 64, 32, GROUP_M=1, SPLIT_K=4)),
    (Conv2dProblem(N=1, H=9, W=9, C=64, K=64, R=3, S=3), Conv2dConfig(32, 32, 32, SPLIT_K=3)),
    (AttentionProblem(2, 8, 1, 1000, 64, Hkv=2), AttentionConfig(16, 32, SPLIT_KV=4)),
]
"""Configurations that leave something in scratch memory between their blocks or launches."""
GRAPHS = [*((problem, None) for problem in PROBLEMS), *SCRATCH]


def op_of(value: Any) -> str:
    return getattr(value, "op", "")


def off(problem: Any, arrays: Mapping[str, Array], results: Mapping[str, Array]) -> str:
    """How results are off the reference for these inputs, or nothing."""
    kernel = find_kernel(problem.op)
    return fault(kernel, problem, kernel.reference(problem, arrays), results)


def poisoned(cupy: Any, problem: Any) -> dict[str, Any]:
    return {
        name: cupy.full(output.shape, np.nan, np.dtype(dtype(output.dtype).numpy))
        for name, output in problem.outputs().items()
    }


def hosted(cupy: Any, results: Mapping[str, Any]) -> dict[str, Array]:
    return {name: on_host(cupy, result) for name, result in results.items()}


# CuPy


@pytest.mark.parametrize("problem", PROBLEMS, ids=op_of)
def test_a_stream_of_ones_own(cupy: Any, problem: Any) -> None:
    """The inputs are made on that stream, behind long copies: a launch on any other would come too early."""
    arrays = problem.inputs(0)
    sources = {name: to_gpu(cupy, array) for name, array in arrays.items()}
    delay = cupy.zeros(1 << 28, np.uint8)
    call(problem, sources)  # compiled and loaded: from here on nothing waits
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        operands = {name: cupy.zeros_like(source) for name, source in sources.items()}
        for _ in range(8):
            delay.copy()
        for name, source in sources.items():
            operands[name][...] = source
        results = call(problem, operands)
        stream.synchronize()
    assert not off(problem, arrays, hosted(cupy, results))


@pytest.mark.parametrize(("problem", "config"), GRAPHS, ids=op_of)
def test_a_captured_graph_replays_on_new_contents(cupy: Any, problem: Any, config: Any) -> None:
    moved = {name: to_gpu(cupy, array) for name, array in problem.inputs(0).items()}
    outs = poisoned(cupy, problem)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call(problem, moved, outs, config)  # prepared, and its scratch memory lent
        stream.begin_capture()
        call(problem, moved, outs, config)
        graph = stream.end_capture()
        for seed in (1, 2):
            fresh = problem.inputs(seed)
            for name, array in fresh.items():
                moved[name][...] = to_gpu(cupy, array)
            for out in outs.values():
                out.fill(np.nan)
            graph.launch(stream)
            stream.synchronize()
            assert not off(problem, fresh, hosted(cupy, outs))


@pytest.mark.parametrize(("problem", "config"), SCRATCH, ids=op_of)
def test_scratch_lent_in_a_capture_is_zero_for_calls_outside_the_graph(cupy: Any, problem: Any, config: Any) -> None:
    """Zeroing on the captured stream would become part of the graph, and an eager call find what memory holds."""
    arrays = problem.inputs(0)
    moved = {name: to_gpu(cupy, array) for name, array in arrays.items()}
    outs, eager = poisoned(cupy, problem), poisoned(cupy, problem)
    call(problem, moved, outs, config)  # prepared, on another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        call(problem, moved, outs, config)
        graph = stream.end_capture()
        call(problem, moved, eager, config)
        stream.synchronize()
        assert not off(problem, arrays, hosted(cupy, eager))
        for out in outs.values():
            out.fill(np.nan)
        graph.launch(stream)
        stream.synchronize()
    assert not off(problem, arrays, hosted(cupy, outs))


@pytest.mark.parametrize(("problem", "config"), SCRATCH, ids=op_of)
def test_two_streams_at_once_never_share_scratch(cupy: Any, problem: Any, config: Any) -> None:
    inputs = [problem.inputs(seed) for seed in (0, 1)]
    moved = [{name: to_gpu(cupy, array) for name, array in arrays.items()} for arrays in inputs]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in inputs]
    cupy.cuda.Device().synchronize()
    results: list[list[dict[str, Any]]] = [[], []]
    for _ in range(20):
        for each, stream, found in zip(moved, streams, results, strict=True):
            with stream:
                found.append(call(problem, each, None, config))
    for stream in streams:
        stream.synchronize()
    for arrays, found in zip(inputs, results, strict=True):
        first = hosted(cupy, found[0])
        assert not off(problem, arrays, first)
        for other in found[1:]:
            for name, array in hosted(cupy, other).items():
                assert array.tobytes() == first[name].tobytes()


def test_numbers_beside_arrays_are_those_of_each_call(cupy: Any) -> None:
    problem = GemmProblem(M=33, N=48, K=64, out_dtype="fp32", alpha=True)
    arrays = problem.inputs(0)
    a, b = (to_gpu(cupy, arrays[name]) for name in "ab")
    for alpha in (0.5, 2, np.float32(3.0), 0.5):
        out = gemm(a, b, alpha=alpha, out_dtype="fp32")
        wanted = {**arrays, "alpha": np.full(1, alpha, np.float32)}
        assert not off(problem, wanted, {"out": on_host(cupy, out)})
    alone = cupy.asarray(np.full(1, 0.25, np.float32))
    out = gemm(a, b, alpha=alone, out_dtype="fp32")
    assert not off(problem, {**arrays, "alpha": np.full(1, 0.25, np.float32)}, {"out": on_host(cupy, out)})


# torch


def to_torch(torch: Any, array: Array) -> Any:
    bits = np.ascontiguousarray(array).view(f"i{array.itemsize}")
    return torch.from_numpy(bits).cuda().view(getattr(torch, str(array.dtype)))


def from_torch(torch: Any, tensor: Any, kind: str) -> Array:
    wanted = np.dtype(dtype(kind).numpy)
    assert str(tensor.dtype) == f"torch.{wanted}"
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[wanted.itemsize]
    return np.asarray(tensor.detach().cpu().view(bits).numpy().view(wanted))


def torch_hosted(torch: Any, problem: Any, results: Mapping[str, Any]) -> dict[str, Array]:
    return {name: from_torch(torch, results[name], output.dtype) for name, output in problem.outputs().items()}


@pytest.mark.parametrize("problem", [*PROBLEMS, *problems("bf16")], ids=op_of)
def test_torch_tensors_in_and_out(torch: Any, problem: Any) -> None:
    arrays = problem.inputs(0)
    moved = {name: to_torch(torch, array) for name, array in arrays.items()}
    results = call(problem, moved)
    assert all(isinstance(result, torch.Tensor) and result.is_cuda for result in results.values())
    first = torch_hosted(torch, problem, results)
    assert not off(problem, arrays, first)
    outs = {name: torch.zeros_like(result) for name, result in results.items()}
    for name, result in call(problem, moved, outs).items():
        assert result is outs[name]
        assert from_torch(torch, result, problem.outputs()[name].dtype).tobytes() == first[name].tobytes()


@pytest.mark.parametrize("problem", PROBLEMS, ids=op_of)
def test_torchs_current_stream(torch: Any, problem: Any) -> None:
    arrays = problem.inputs(0)
    sources = {name: to_torch(torch, array) for name, array in arrays.items()}
    delay = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    call(problem, sources)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        operands = {name: torch.zeros_like(source) for name, source in sources.items()}
        for _ in range(8):
            delay.clone()
        for name, source in sources.items():
            operands[name].copy_(source)
        results = call(problem, operands)
    stream.synchronize()
    assert not off(problem, arrays, torch_hosted(torch, problem, results))


@pytest.mark.parametrize("problem", PROBLEMS, ids=op_of)
def test_a_graph_that_torch_captures_on_a_stream_that_was_called_on_before(torch: Any, problem: Any) -> None:
    """As it is documented for what needs scratch memory: the default configuration, whatever it is."""
    moved = {name: to_torch(torch, array) for name, array in problem.inputs(0).items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        outs = call(problem, moved)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call(problem, moved, outs)
    for out in outs.values():
        out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert not off(problem, problem.inputs(0), torch_hosted(torch, problem, outs))


@pytest.mark.parametrize("problem", PROBLEMS, ids=op_of)
def test_a_graph_that_torch_captures(torch: Any, problem: Any) -> None:
    moved = {name: to_torch(torch, array) for name, array in problem.inputs(0).items()}
    # Without scratch memory: that would be allocated in the capture, which torch forbids.
    config = {
        "gemm": GemmConfig(32, 64, 32),
        "conv2d": Conv2dConfig(32, 32, 32),
        "attention": AttentionConfig(32, 32),
    }.get(problem.op)
    outs = call(problem, moved, None, config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(problem, moved, outs, config)
    fresh = problem.inputs(1)
    for name, array in fresh.items():
        moved[name].copy_(to_torch(torch, array))
    for out in outs.values():
        out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert not off(problem, fresh, torch_hosted(torch, problem, outs))


# JAX


@pytest.mark.parametrize("problem", PROBLEMS, ids=op_of)
def test_jax_arrays_in_and_out(jax: Any, problem: Any) -> None:
    arrays = problem.inputs(0)
    moved = {name: jax.device_put(np.ascontiguousarray(array)) for name, array in arrays.items()}
    for _ in range(2):
        results = call(problem, moved)
        assert all(isinstance(result, jax.Array) for result in results.values())
        assert not off(problem, arrays, {name: np.asarray(result) for name, result in results.items()})
