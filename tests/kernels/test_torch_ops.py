"""Calls inside torch.compile and torch.export: one node each, with the results of an eager call.

In torch's CPU build, on tensors in host memory, which the interpreter takes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tilewright.kernels import GemmConfig, attention, conv2d, gemm, rmsnorm
from tilewright.kernels.call import OPERATIONS
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.errors import UnsupportedError, UsageError

torch = pytest.importorskip("torch", reason="torch is not installed")

from tests.kernels.torch_calls import CALLS, FP8, ints, randn  # noqa: E402 - torch may be absent
from tilewright.kernels import torch_ops  # noqa: E402

TRACKED = torch.zeros(16, requires_grad=True)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


BY_NAME = [pytest.param(call, arguments, id=call.__name__) for call, arguments in CALLS]


def parts(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same(results: Any, wanted: Any) -> None:
    for result, want in zip(parts(results), parts(wanted), strict=True):
        assert (result.shape, result.dtype, result.stride()) == (want.shape, want.dtype, want.stride())
        assert torch.equal(result.float(), want.float())


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize(("call", "arguments"), BY_NAME)
def test_a_compiled_call_gives_what_an_eager_one_does(call: Any, arguments: Any, dynamic: bool) -> None:
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_same(compiled(*arguments), call(*arguments))


@pytest.mark.parametrize(("call", "arguments"), BY_NAME)
def test_an_exported_call_does_too(call: Any, arguments: Any) -> None:
    class Module(torch.nn.Module):
        def forward(self, *arrays: Any) -> Any:
            return call(*arrays)

    program = torch.export.export(Module(), arguments)
    assert "tilewright" in str(program.graph)
    assert_same(program.module()(*arguments), call(*arguments))


def operator_and_arguments(call: Any, arguments: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators that a call becomes, each with what it is given."""
    found = []

    class Noting(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if getattr(target, "namespace", getattr(target, "_qualified_op_name", "")).startswith(torch_ops.NAMESPACE):
                copies = tuple(each.clone() if isinstance(each, torch.Tensor) else each for each in args)
                found.append((target.default, copies))
            return super().call_function(target, args, kwargs)

    torch.compile(call, backend=lambda graph, _: Noting(graph).run, fullgraph=True)(*arguments)
    return found


@pytest.mark.parametrize(("call", "arguments"), BY_NAME)
def test_torch_finds_nothing_wrong_with_the_operators(call: Any, arguments: Any) -> None:
    """Its own checks: the schema tells what is written, results without contents are like those with."""
    found = operator_and_arguments(call, arguments)
    assert found
    for operator, given in found:
        utilities = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
        if any(isinstance(each, torch.Tensor) and each.dtype == FP8 for each in given):
            del utilities[0]  # it compares fp8, which torch has no product of on a processor
        torch.library.opcheck(operator, given, test_utils=utilities)


def test_every_op_has_both_operators() -> None:
    for name in ("gemm", "grouped_gemm", "conv2d", "conv1d", "attention", "rmsnorm"):
        assert name in OPERATIONS
        for operator in (name, f"{name}_out"):
            assert hasattr(torch.ops.tilewright, operator)


def test_sizes_that_change_are_compiled_once() -> None:
    def call(x: Any, w: Any) -> Any:
        return rmsnorm(gemm(x, w, activation="gelu"))

    compiled, w = torch.compile(call, backend="eager", fullgraph=True, dynamic=True), randn(32, 16)
    for rows in (3, 8, 21, 40):
        x = randn(rows, 32)
        assert_same(compiled(x, w), call(x, w))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_numbers_that_change_are_compiled_again_and_not_mixed_up() -> None:
    compiled = torch.compile(lambda x, w, alpha: gemm(x, w, alpha=alpha), backend="eager", fullgraph=True)
    x, w = randn(8, 32), randn(32, 16)
    for alpha in (0.5, 2.0, 1.0, -3):
        assert_same(compiled(x, w, alpha), gemm(x, w, alpha=alpha))


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda x, w: gemm(x.T, w), r"K=8 and K=32 must be equal"),
        (lambda x, w: gemm(x, w, activation="gulu"), r"unknown activation 'gulu'"),
        (
            lambda x, w: gemm(x, w, bias=TRACKED),
            r"^bias: a torch tensor requires a gradient, and these kernels compute",
        ),
        (lambda x, w: gemm(x, "w"), r"^b: a str is no array"),
        (lambda x, w: gemm(x, None), r"b is missing"),
        (lambda x, w: gemm(None, w), r"^a is missing"),
        (lambda x, w: gemm(x.long(), w), r"arrays of dtype int64 are not supported"),
        (lambda x, w: gemm(x, w, bias=torch.zeros(32)[::2]), r"bias must be contiguous"),
        (lambda x, w: gemm(x, w, alpha=True), r"^alpha=True must be a real number"),
        (lambda x, w: gemm(x, w, activation=3), r"activation"),
    ],
    ids=["shapes", "activation", "gradient", "text", "absent", "first absent", "dtype", "gaps", "flag", "type"],
)
def test_what_is_refused_is_refused_with_the_same_words(call: Any, wanted: str) -> None:
    """While it compiles, and in the eager run that takes its place."""
    x, w = randn(8, 32), randn(32, 16)
    with pytest.raises(Exception, match=wanted):
        torch.compile(call, backend="eager")(x, w)


def test_a_call_goes_on_while_another_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says in every thread that it is compiling."""
    x, w = randn(8, 32), randn(32, 16)
    wanted = gemm(x, w)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(gemm(x, w), wanted)
    assert np.array_equal(gemm(x.numpy(), w.numpy()), wanted.numpy())


def test_options_may_be_symbols_of_an_exported_program() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Any, k: Any, starts: Any) -> Any:
            packed = attention(
                q, k, k, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=q.shape[0], max_seqlen_k=k.shape[0]
            )
            return rmsnorm(packed, eps=1 / q.shape[-1])

    def arguments(tokens: int) -> Any:
        return randn(tokens, 4, 16), randn(tokens, 2, 16), ints(0, 4, tokens)

    tokens = torch.export.Dim("tokens", min=6, max=64)
    program = torch.export.export(Module(), arguments(9), dynamic_shapes=({0: tokens}, {0: tokens}, None))
    for count in (9, 21):
        assert_same(program.module()(*arguments(count)), Module()(*arguments(count)))


def test_options_that_change_are_compiled_again() -> None:
    x, w = randn(1, 8, 8, 8), randn(8, 3, 3, 8)
    compiled = torch.compile(lambda x, w, padding: conv2d(x, w, padding=padding), backend="aot_eager")
    for padding in (1, 2, (1, 2), 3):
        assert_same(compiled(x, w, padding), conv2d(x, w, padding=padding))
    x, w = randn(8, 32), randn(32, 16)
    compiled = torch.compile(lambda x, w, config: gemm(x, w, config=config), backend="eager", fullgraph=True)
    for rows in (1, 2, 3):
        config = GemmConfig(16, 16, 16, GROUP_M=rows)
        assert_same(compiled(x, w, config), gemm(x, w, config=config))


class Layer(torch.nn.Module):
    """Weights that could be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(randn(32, 16))

    def forward(self, x: Any) -> Any:
        return gemm(x, self.weight, out_dtype=torch.float32)


def test_a_layer_is_exported_without_gradients_and_its_program_runs_in_another_process(tmp_path: Path) -> None:
    layer, x = Layer(), randn(8, 32)
    with pytest.raises(
        UnsupportedError, match=r"^b: a torch tensor requires a gradient, and these kernels compute none"
    ):
        torch.export.export(layer, (x,))
    with torch.no_grad():
        torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
        torch.save((x, layer(x)), tmp_path / "arrays.pt")
    code = (
        "import sys, torch, tilewright.kernels.torch_ops\n"
        "program, (x, wanted) = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(program.module()(x), wanted)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "layer.pt2", tmp_path / "arrays.pt"]
    environment = compiling_environment() | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_written_to_is_newer_than_what_was_kept_of_it() -> None:
    """So a backward pass that needs what stood there says that it is gone."""
    out = randn(8, 16)
    version = out._version
    torch.compile(lambda x, w, out: gemm(x, w, out=out), backend="eager")(randn(8, 32), randn(32, 16), out)
    assert out._version > version


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ here")
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize(("call", "arguments"), [BY_NAME[0], BY_NAME[5], BY_NAME[6], BY_NAME[14]])
def test_inductors_code_gives_what_an_eager_call_does(call: Any, arguments: Any) -> None:
    """It makes what lies between two nodes itself."""

    def between(*arrays: Any) -> Any:
        return call(*(array * 1 for array in arrays))

    assert_same(torch.compile(between, fullgraph=True)(*arguments), between(*arguments))


@pytest.mark.parametrize("alpha", [ml_dtypes.bfloat16(0.5), np.float32(0.5), 2])
def test_numbers_beside_tensors_on_the_host_are_those_beside_arrays(alpha: Any) -> None:
    x, w = randn(8, 32), randn(32, 16)
    assert torch.equal(gemm(x, w, alpha=alpha), gemm(x, w, alpha=float(alpha)))


@pytest.mark.parametrize("alpha", ["0.5", [0.5], 1j, np.True_])
def test_what_is_no_number_is_said_alike_too(alpha: Any) -> None:
    x, w = randn(8, 32), randn(32, 16)
    for arrays in ((x, w), (x.numpy(), w.numpy())):
        with pytest.raises(UsageError, match=r"^alpha=.* must be a real number or an array$"):
            gemm(*arrays, alpha=alpha)


def test_a_tensor_that_is_no_plain_memory_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"^a: torch can't show a Tensor as a NumPy array: "):
        gemm(torch._neg_view(randn(8, 32)), randn(32, 16))


def test_importing_it_without_torch_says_what_to_do() -> None:
    code = "import sys; sys.modules.pop('torch', None); import tilewright.kernels.torch_ops"
    done = subprocess.run([sys.executable, "-c", code], env=compiling_environment(), capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(
        "MissingDependencyError: tilewright.kernels.torch_ops registers operators with torch: import torch before it"
    )
