"""The hash of device code: what changes it, what doesn't, and that every process finds the same one."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import subprocess
import sys

import numpy as np
import pytest

from tilewright.kernels import GemmProblem, gemm
from tilewright.kernels.ops.gemm import jit
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.registry import KERNELS
from tilewright.kernels.source import module_hash, source_hash
from tilewright.tuning_db.env import compiling_environment

KERNEL = '''
import triton
import triton.language as tl

SCALE: tl.constexpr = tl.constexpr(3)
OFFSET = tl.constexpr(1.5)
KIND = tl.float32
UNUSED = tl.constexpr(7)


@triton.jit
def shift(x, BY: tl.constexpr = 2):
    return x + OFFSET * BY


@triton.jit
def kernel(x_ptr, n, y_ptr, BLOCK: tl.constexpr):
    """Scales."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(KIND)
    tl.store(y_ptr + i, shift(x * SCALE), mask=i < n)


@triton.jit
def other(x_ptr):
    tl.store(x_ptr, 1)
'''

count = itertools.count()


@pytest.fixture
def hash_of(tmp_path):
    """The hash of `kernel` in a module of this text."""

    def hash_of(text, name="kernel"):
        path = tmp_path / f"code_{next(count)}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return source_hash(getattr(module, name))

    yield hash_of
    for name in [name for name in sys.modules if name.startswith("code_")]:
        del sys.modules[name]


def replaced(old, new):
    assert KERNEL.count(old) == 1, old
    return KERNEL.replace(old, new)


@pytest.mark.parametrize(
    "text",
    [
        KERNEL,
        "# A comment.\n\n\n" + KERNEL,
        replaced(
            "    i = tl.arange(0, BLOCK)\n", "    # Positions.\n\n    i = tl.arange(  # one each\n        0, BLOCK)\n"
        ),
        replaced('"""Scales."""', '"""Multiplies, shifts, stores."""'),
        replaced('    """Scales."""\n', ""),
        replaced("def shift(x, BY: tl.constexpr = 2):\n", 'def shift(x, BY: tl.constexpr = 2):\n    "Adds."\n'),
        replaced("shift(x * SCALE)", "shift((x * (SCALE)))"),
        replaced("UNUSED = tl.constexpr(7)", "UNUSED = tl.constexpr(8)"),
        replaced("tl.store(x_ptr, 1)", "tl.store(x_ptr, 2)"),
        replaced("other=0.0", "other=0.00"),
    ],
    ids=[
        "the same",
        "line numbers",
        "comments and line breaks",
        "docstring",
        "no docstring",
        "docstring of a device function",
        "parentheses",
        "constant that is not used",
        "another kernel",
        "spelling of a number",
    ],
)
def test_what_compiles_to_the_same_code_has_the_same_hash(hash_of, text):
    assert hash_of(text) == hash_of(KERNEL)


CHANGES = {
    "body": replaced("x * SCALE", "x + SCALE"),
    "a literal": replaced("other=0.0", "other=1.0"),
    "a literal's type": replaced("other=0.0", "other=0"),
    "device function": replaced("return x + OFFSET", "return x - OFFSET"),
    "default of a device function": replaced("BY: tl.constexpr = 2", "BY: tl.constexpr = 3"),
    "annotated constant": replaced("tl.constexpr(3)", "tl.constexpr(4)"),
    "constant of a device function": replaced("tl.constexpr(1.5)", "tl.constexpr(1.25)"),
    "dtype by name": replaced("KIND = tl.float32", "KIND = tl.float16"),
    "order of arguments": replaced("x_ptr, n, y_ptr, BLOCK", "x_ptr, y_ptr, n, BLOCK"),
    "an annotation": replaced("y_ptr, BLOCK: tl.constexpr", "y_ptr, BLOCK"),
    "an option of jit": KERNEL.replace("@triton.jit\ndef shift", "@triton.jit(noinline=True)\ndef shift"),
}


def test_what_can_change_the_code_changes_the_hash(hash_of):
    hashes = {name: hash_of(text) for name, text in CHANGES.items()} | {"as it was": hash_of(KERNEL)}
    assert len(set(hashes.values())) == len(hashes), hashes
    assert hash_of(KERNEL, "other") not in hashes.values()


@pytest.mark.smoke
def test_the_hash_is_the_same_under_every_python_and_triton(hash_of):
    # Records are found by it: were it of this Python's making, a new Python would void them all.
    assert hash_of(KERNEL) == "7a59dbcc8a87235d341d54729ee86417131731aa98ac15af1bc039bbad873af5"


def test_constants_and_functions_around_a_nested_kernel_count(hash_of):
    nested = """
import triton
import triton.language as tl

def make():
    SCALE = tl.constexpr(2)
    @triton.jit
    def shift(x):
        return x + 1
    @triton.jit
    def kernel(x_ptr):
        tl.store(x_ptr, shift(tl.load(x_ptr) * SCALE))
    return kernel

kernel = make()
"""
    hashes = {hash_of(text) for text in (nested, nested.replace("(2)", "(3)"), nested.replace("x + 1", "x + 2"))}
    assert len(hashes) == 3
    assert hash_of("# Further down.\n" + nested) in hashes


def test_functions_are_hashed_in_order():
    one, other = jit.tile_of, jit.leading
    assert len({source_hash(one), source_hash(other), source_hash(one, other), source_hash(other, one)}) == 4


def test_a_shared_epilogue_is_part_of_every_kernel_that_calls_it(hash_of, tmp_path, monkeypatch):
    from tilewright.kernels import epilogue, source

    parts = list(source._parts(jit.gemm_kernel, set()))
    names = [part.partition(",")[0] for part in parts]
    for name in ("gemm_kernel", "tile_of", "sums", "load_tile", "store_tile", "finish", "activate", "tanh", "sigmoid"):
        assert f"FunctionDef(name='{name}'" in names
    assert len(set(parts)) == len(parts)
    assert next(source._parts(epilogue.activate, set())) in parts


@pytest.mark.smoke
def test_interpreting_and_compiling_processes_agree():
    before = source_hash(*GEMM.jit_functions)
    source_hash.cache_clear()
    problem = GemmProblem(3, 4, 5, activation="tanh")
    arrays = problem.inputs(0)
    gemm(arrays["a"], arrays["b"], activation="tanh")
    # An interpreted launch patches names of Triton's; none of it may show.
    assert source_hash(*GEMM.jit_functions) == before
    program = (
        "from tilewright.kernels import KERNELS\n"
        "from triton import JITFunction\n"
        "for kernel in KERNELS: print(kernel.name, kernel.source_hash, type(kernel.jit_functions[0]) is JITFunction)"
    )
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=compiling_environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(
        itertools.chain.from_iterable((kernel.name, kernel.source_hash, "True") for kernel in KERNELS)
    )


def test_array_values_are_no_part_of_it():
    assert GEMM.jit_functions == (jit.gemm_kernel,)
    assert GEMM.source_hash != source_hash(jit.gemm_kernel)  # the launches count too
    assert np.unique([kernel.source_hash for kernel in KERNELS]).size == len(KERNELS)
    assert all(len(kernel.source_hash) == 64 for kernel in KERNELS)


def test_a_modules_hash_is_of_its_code(tmp_path, monkeypatch):
    def hash_of(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return module_hash(importlib.import_module(name))

    monkeypatch.syspath_prepend(tmp_path)
    one = hash_of("module_one", '"""A."""\nLIMIT = 1\ndef f(x):\n    """B."""\n    return x + LIMIT\n')
    same = hash_of("module_two", '"""C."""\n\nLIMIT = 1  # why\n\n\ndef f(x):\n    """D."""\n    return (x + LIMIT)\n')
    other = hash_of("module_three", '"""A."""\nLIMIT = 2\ndef f(x):\n    """B."""\n    return x + LIMIT\n')
    assert one == same != other


def test_a_modules_hash_is_the_same_on_a_python_whose_trees_have_more_fields(tmp_path, monkeypatch):
    """As 3.12's, whose functions and classes have type parameters, and 3.13's, which leaves empty fields out."""
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for name, more in (("module_four", ()), ("module_five", ("params_of_tomorrow",))):
        (tmp_path / f"{name}.py").write_text("class A:\n    def f(self, x, *, y=1.5):\n        return f'{x}{y}'\n")
        monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, *more))
        monkeypatch.setattr(ast.ClassDef, "_fields", (*ast.ClassDef._fields, *more))
        for kind in (ast.FunctionDef, ast.ClassDef):
            for field in more:
                monkeypatch.setattr(kind, field, [], raising=False)
        hashes.append(module_hash(importlib.import_module(name)))
    assert len(set(hashes)) == 1


@pytest.mark.smoke
def test_the_code_is_the_same_under_every_triton():
    # A pack that one Triton compiled serves under others: it is of their code, though each compiles another.
    asked = """
import sys, triton
triton.__version__ = sys.argv[1]
from tilewright.kernels.registry import KERNELS
from tilewright.kernels.specialise import reuses_barriers
print(reuses_barriers(), *(kernel.source_hash for kernel in KERNELS))
"""
    found = {}
    for version in ("3.7.1", "3.9.0"):
        done = subprocess.run(
            [sys.executable, "-c", asked, version],
            env=compiling_environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        reused, *found[version] = done.stdout.split()
        assert reused == str(version == "3.7.1")
    assert found["3.7.1"] == found["3.9.0"]
