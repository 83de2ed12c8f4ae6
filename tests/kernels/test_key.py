"""The key of a record: each thing that changes an outcome misses what was measured before it, all else finds it.

Every case measures a problem, makes one change, and asks again through the real lookup and a real file.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tilewright.kernels import activations, epilogue, identity, source
from tilewright.kernels import compile as compile_path
from tilewright.kernels import lookup as lookup_module
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.lookup import TIMING_PROTOCOL, answer, record_key
from tilewright.kernels.ops.attention import jit as attention_jit
from tilewright.kernels.ops.conv2d import jit as conv2d_jit
from tilewright.kernels.ops.conv2d import launch as conv2d_launch
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm import jit as gemm_jit
from tilewright.kernels.ops.gemm import launch as gemm_launch
from tilewright.kernels.ops.gemm import mainloop, packing
from tilewright.kernels.ops.gemm import problem as gemm_problem
from tilewright.kernels.ops.gemm import space as gemm_space
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.registry import KERNELS, find_kernel
from tilewright.tuning_db.record import Environment, Provenance, Record, Resources, Status, Times
from tilewright.tuning_db.store import TuningDB

DEVICE = resolve_device("rtx3090")
GEMM = find_kernel("gemm")
PROBLEM = GemmProblem(M=128, N=4096, K=4096, bias="fp16", activation="gelu_tanh")
RESOURCES = Resources(registers=64, spill_bytes=0, stack_bytes=0, shared_bytes=8192)

PROBLEMS = {
    "gemm": PROBLEM,
    "conv2d": Conv2dProblem(N=1, H=14, W=14, C=64, K=64, R=3, S=3, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1),
    "attention": find_kernel("attention").problem.parse("B=1,H=8,Sq=128,Skv=128,D=64"),
    "rmsnorm": find_kernel("rmsnorm").problem.parse("M=128,N=4096,weight=fp16"),
}


def forget_hashes() -> None:
    identity.forget()
    for hashed in (source.source_hash, source.module_hash, source.called_hash):
        hashed.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget_hashes()
    yield
    monkeypatch.undo()
    forget_hashes()


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., None]:
    """Puts a measured default of a problem on record."""

    def add(kernel: Kernel[Any, Any] = GEMM, problem: Any = PROBLEM) -> None:
        record = Record(
            record_key(kernel, problem, DEVICE),
            kernel.default(problem, DEVICE).to_json(),
            Status.OK,
            Provenance.MEASURED,
            Times.single(10.0),
            RESOURCES,
        )
        with TuningDB.open(DEVICE.key, tmp_path) as database:
            database.add(record, database.start_run(Environment("0", "", "", "", "here", TIMING_PROTOCOL)))

    return add


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., bool]:
    """Whether a question is answered with what was measured under its very key."""

    def ask(kernel: Kernel[Any, Any] = GEMM, problem: Any = PROBLEM, device: Any = DEVICE) -> bool:
        # A copy: the hash of one that was asked before is remembered. The file is this device's, whatever its board:
        # that boards have files of their own is not what keeps them apart here.
        with TuningDB.open(DEVICE.key, tmp_path, read_only=True) as database:
            choice = answer(replace(kernel), problem, device, database)
        return choice is not None and (choice.provenance, choice.reason) == (Provenance.MEASURED, "exact")

    return ask


def device_with(**changes: Any) -> Any:
    return replace(DEVICE, **changes)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_what_did_not_change_is_found(measured, found, kernel: Kernel[Any, Any]) -> None:
    problem = PROBLEMS[kernel.name]
    measured(kernel, problem)
    forget_hashes()
    assert found(kernel, problem)
    assert found(kernel, kernel.problem.from_json(problem.to_json()))
    assert found(kernel, kernel.problem.parse(str(problem)))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    "device",
    [resolve_device("a10"), resolve_device("a100"), device_with(sms=DEVICE.sms - 2)],
    ids=["board", "arch", "SM count"],
)
def test_another_device_misses(measured, found, kernel: Kernel[Any, Any], device: Any) -> None:
    measured(kernel, PROBLEMS[kernel.name])
    assert not found(kernel, PROBLEMS[kernel.name], device)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", ["triton_version", "ptxas_version"])
def test_another_toolchain_misses(measured, found, monkeypatch, kernel: Kernel[Any, Any], name: str) -> None:
    measured(kernel, PROBLEMS[kernel.name])
    monkeypatch.setattr(lookup_module, name, lambda *_: "3.5.0")
    identity.forget()
    assert not found(kernel, PROBLEMS[kernel.name])


def test_another_timing_protocol_misses(tmp_path: Path, measured) -> None:
    measured()
    with TuningDB.open(DEVICE.key, tmp_path) as database:
        assert database.best(record_key(GEMM, PROBLEM, DEVICE)).reason == "exact"
        assert database.best(record_key(GEMM, PROBLEM, DEVICE, "warm-l2-1")).reason == "other protocol"


@pytest.mark.parametrize(
    "change",
    [
        {"M": 129},
        {"N": 4097},
        {"K": 2048},
        {"batch": 2},
        {"dtype": "bf16", "out_dtype": "fp16"},
        {"b_dtype": "int8", "b_scale": "column"},
        {"out_dtype": "fp32"},
        {"bias": None},
        {"bias": "fp32"},
        {"bias": "fp16", "bias_axis": "m"},
        {"residual": "fp16"},
        {"activation": "gelu_erf"},
        {"activation": "none"},
        {"alpha": True},
        {"out_scale": True, "out_dtype": "int8"},
        {"gated": "halves"},
        {"a_layout": "col"},
        {"b_layout": "col"},
        {"strided": True},
        {"aligned": False},
        {"end_aligned": False},
    ],
    ids=str,
)
def test_another_problem_misses(measured, found, change: dict[str, Any]) -> None:
    """Shape, dtypes, epilogue, strides, alignment."""
    measured()
    assert not found(problem=replace(PROBLEM, **change))


def test_every_field_of_a_problem_counts() -> None:
    """No field is left out of the JSON, and none of two values gives one text."""
    for name, problem in PROBLEMS.items():
        assert set(problem.to_dict()) == {field.name for field in fields(problem)}
        for field, value in problem.to_dict().items():
            other = type(problem).from_json(problem.to_json())
            object.__setattr__(other, field, f"not {value}")
            assert other.to_json() != problem.to_json(), (name, field)


# How source text may change: the same program otherwise written, and another one.

Edit = Callable[[str], str]


def at_the_first_statement(text: str, lines: str) -> str:
    """The text with lines before the first statement that is no docstring or import, indented as it is."""
    tree = ast.parse(text)
    body = tree.body[0].body if len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef) else tree.body
    first = next(node for node in body if not isinstance(node, ast.Expr | ast.Import | ast.ImportFrom))
    start = min([first.lineno, *(node.lineno for node in getattr(first, "decorator_list", []))])
    whole = text.splitlines(keepends=True)
    return "".join([*whole[: start - 1], textwrap.indent(lines, " " * first.col_offset), *whole[start - 1 :]])


def without_docstrings(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant("Something else."))
    return ast.unparse(tree)


SAME: dict[str, Edit] = {
    "comment": lambda text: at_the_first_statement(text, "# A comment.\n"),
    "blank lines": lambda text: at_the_first_statement(text, "\n\n"),
    "line numbers": lambda text: "\n\n\n" + text,
    "formatting": lambda text: ast.unparse(ast.parse(text)),
    "docstrings": without_docstrings,
}
ANOTHER: Edit = lambda text: at_the_first_statement(text, "another = 7\n")  # noqa: E731 - beside those in SAME

OURS = {
    "kernel": gemm_jit.gemm_kernel.fn,
    "device function it calls": mainloop.load_tile.fn,
    "device function of all ops": epilogue.finish.fn,
    "device function called by that": activations.tanh.fn,
    "what makes launches": gemm_launch,
    "problem": gemm_problem,
    "compile path": compile_path,
}
UNRELATED = {
    "another op's kernel": conv2d_jit,
    "another op's kernel, as functions": attention_jit,
    "what fits": gemm_space.fits,
    "packing of weights": packing,
}


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Edit], None]:
    """Changes the source of a function or a module, as everything that hashes sees it."""

    def edit(target: Any, change: Edit) -> None:
        original = inspect.getsource
        hits = []

        def getsource(thing: Any) -> str:
            text = original(thing)
            inside = inspect.ismodule(target) and getattr(thing, "__module__", None) == target.__name__
            if thing is target or inside:
                hits.append(thing)
                return change(textwrap.dedent(text))
            return text

        monkeypatch.setattr(inspect, "getsource", getsource)
        forget_hashes()
        edit.hits = hits

    return edit


@pytest.mark.parametrize("how", SAME)
@pytest.mark.parametrize("what", OURS)
def test_the_same_code_otherwise_written_is_found(measured, found, edit, what: str, how: str) -> None:
    measured()
    edit(OURS[what], SAME[how])
    assert found()
    assert edit.hits, "the source that was changed is not looked at"


@pytest.mark.parametrize("what", OURS)
def test_other_code_misses(measured, found, edit, what: str) -> None:
    measured()
    edit(OURS[what], ANOTHER)
    assert not found()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_other_code_of_any_kernel_misses(measured, found, edit, kernel: Kernel[Any, Any]) -> None:
    problem = PROBLEMS[kernel.name]
    for function in kernel.jit_functions:
        measured(kernel, problem)
        edit(function.fn, ANOTHER)
        assert not found(kernel, problem)


@pytest.mark.parametrize(("module", "kernel"), [(gemm_launch, GEMM), (conv2d_launch, find_kernel("conv2d"))])
def test_another_constant_that_launches_take_misses(measured, found, monkeypatch, module, kernel) -> None:
    measured(kernel, PROBLEMS[kernel.name])
    forget_hashes()
    monkeypatch.setattr(module, "FP8_SUM", 64)
    assert not found(kernel, PROBLEMS[kernel.name])


@pytest.mark.parametrize("what", UNRELATED)
def test_other_code_elsewhere_is_no_matter(measured, found, edit, what: str) -> None:
    measured()
    edit(UNRELATED[what], ANOTHER)
    assert found()
