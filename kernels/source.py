"""The hash of device code: of a kernel's syntax tree and of every device function and global constant it uses.

Comments, docstrings, formatting and line numbers don't change it; anything that can change the compiled code does.
It comes from the source text alone, so that it is the same whether this process compiles kernels or interprets them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl


@cache
def module_hash(module: ModuleType) -> str:
    """SHA-256, in hexadecimal, of a Python module's code: for what decides how device code is specialized or compiled
    without being part of it. Comments, docstrings and formatting don't change it."""
    return hashlib.sha256(_python_text(inspect.getsource(module)).encode()).hexdigest()


@cache
def called_hash(module: ModuleType) -> str:
    """SHA-256, in hexadecimal, of the plain functions of ops, and the constants, that the functions of a module use:
    what a module that makes launches asks of its neighbours, such as how many tiles there are."""
    digest = hashlib.sha256()
    for function in [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.FunctionDef)]:
        for node in ast.walk(function):
            value = None
            if isinstance(node, ast.Name):
                value = vars(module).get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = vars(module).get(node.value.id)
                value = getattr(owner, node.attr, None) if inspect.ismodule(owner) else None
            if inspect.isfunction(value) and value.__module__.startswith("tilewright.kernels.ops."):
                digest.update(_python_text(textwrap.dedent(inspect.getsource(value))).encode() + b"\0")
            elif isinstance(value, int | float | str | tuple):
                digest.update(f"{ast.unparse(node)}={value!r}".encode() + b"\0")
    return digest.hexdigest()


def _python_text(source: str) -> str:
    """Python code without comments, docstrings and formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return _text(tree)


@cache
def source_hash(*functions: Any) -> str:
    """SHA-256, in hexadecimal, of the device code of jit functions, in the order given."""
    digest = hashlib.sha256()
    seen: set[int] = set()
    for function in functions:
        for part in _parts(function, seen):
            digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _parts(function: Any, seen: set[int]) -> Iterator[str]:
    python = function.fn  # both JITFunction and InterpretedFunction keep the plain function here
    if id(python) in seen:
        return
    seen.add(id(python))
    tree = ast.parse(textwrap.dedent(inspect.getsource(python))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    yield _text(tree)
    # Names in the order of first use; attributes (module.function) are followed one level, as kernels write them.
    scope = dict(python.__globals__)
    scope.update(inspect.getclosurevars(python).nonlocals)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in scope:
            yield from _used(node.id, scope[node.id], seen)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = scope.get(node.value.id)
            if inspect.ismodule(owner) and owner.__name__.startswith("tilewright."):
                yield from _used(f"{node.value.id}.{node.attr}", getattr(owner, node.attr, None), seen)


def _text(node: object) -> str:
    """A syntax tree as text. `ast.dump`'s changes with Python's version; empty fields, which versions add, are not
    written here."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({','.join(f'{name}={_text(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    return repr(node)


def _used(name: str, value: Any, seen: set[int]) -> Iterator[str]:
    if _is_device_function(value):
        yield from _parts(value, seen)
    elif isinstance(value, tl.constexpr):
        yield f"{name}={value.value!r}"
    elif isinstance(value, int | float | str | bool | tuple | tl.dtype):
        yield f"{name}={value!r}"


def _is_device_function(value: Any) -> bool:
    # Triton's own library functions change with its version, which is part of every key already.
    python = getattr(value, "fn", None)
    return callable(python) and inspect.isfunction(python) and not python.__module__.startswith("triton.")
