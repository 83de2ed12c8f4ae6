"""C++ objects of TensorRT's ABI, made and called with ctypes: what a builder passes to a plugin, and how it calls it.

Laid out by the Itanium C++ ABI: an object begins with the address of its virtual functions, and before these stands its
type. The interfaces are those of NvInferRuntime.h and NvInferPluginBase.h; `plugin_life` checks their sizes.
"""

from __future__ import annotations

import ctypes as c
import itertools
from collections.abc import Callable, Mapping
from typing import Any

pointer, i32, i64, boolean = c.c_void_p, c.c_int32, c.c_int64, c.c_bool
_kept: list[Any] = []  # for as long as the process lives: TensorRT holds addresses of these


def keep(value: Any) -> None:
    _kept.append(value)


_runtime = c.CDLL("libstdc++.so.6")
_CLASS_TYPE = c.addressof(c.c_void_p.in_dll(_runtime, "_ZTVN10__cxxabiv117__class_type_infoE")) + 2 * c.sizeof(pointer)


class Dims(c.Structure):
    _fields_ = [("rank", i32), ("sizes", i64 * 8)]


class TensorDescription(c.Structure):
    _fields_ = [("dims", Dims), ("type", i32), ("format", i32), ("scale", c.c_float)]


class DynamicTensorDescription(c.Structure):
    _fields_ = [("desc", TensorDescription), ("min", Dims), ("max", Dims), ("opt", Dims)]


class DimsExpressions(c.Structure):
    _fields_ = [("rank", i32), ("expressions", pointer * 8)]


class InterfaceInfo(c.Structure):
    _fields_ = [("kind", c.c_char_p), ("major", i32), ("minor", i32)]


class Field(c.Structure):
    _fields_ = [("name", c.c_char_p), ("data", pointer), ("type", i32), ("length", i32)]


class FieldCollection(c.Structure):
    _fields_ = [("count", i32), ("fields", c.POINTER(Field))]


SIZES = {Dims: 72, TensorDescription: 88, DynamicTensorDescription: 304, DimsExpressions: 72, Field: 24}
assert {kind: c.sizeof(kind) for kind in SIZES} == SIZES


def functions(mangled: str, members: list[Any]) -> int:
    """The virtual functions of a class, preceded by its type; gives what an object begins with."""
    name = c.create_string_buffer(mangled.encode())
    kind = (pointer * 2)(_CLASS_TYPE, c.addressof(name))
    table = (pointer * (2 + len(members)))(0, c.addressof(kind), *(c.cast(member, pointer).value for member in members))
    _kept.extend([name, kind, table, *members])
    return c.addressof(table) + 2 * c.sizeof(pointer)


def instance(table: int, *fields: int) -> int:
    """An object of these virtual functions and fields; gives its address."""
    memory = (pointer * (1 + len(fields)))(table, *fields)
    _kept.append(memory)
    return c.addressof(memory)


def call(address: int, index: int, result: Any, *arguments: tuple[Any, Any]) -> Any:
    """Calls an object's virtual function with (type, value) arguments."""
    table = c.cast(address, c.POINTER(pointer))[0]
    function = c.cast(table, c.POINTER(pointer))[index]
    kinds = [kind for kind, _ in arguments]
    return c.CFUNCTYPE(result, pointer, *kinds)(function)(address, *(value for _, value in arguments))


def method(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    return c.CFUNCTYPE(result, pointer, *kinds)


destructor = method(None)(lambda this: None)


class Symbol:
    """An integer expression as the builder has it: a constant, a dimension by name, or an operation on two."""

    OPERATIONS: Mapping[int, tuple[str, Callable[[int, int], int]]] = {
        0: ("SUM", lambda a, b: a + b),
        1: ("PROD", lambda a, b: a * b),
        2: ("MAX", max),
        3: ("MIN", min),
        4: ("SUB", lambda a, b: a - b),
        5: ("EQUAL", lambda a, b: int(a == b)),
        6: ("LESS", lambda a, b: int(a < b)),
        7: ("FLOOR_DIV", lambda a, b: a // b),
        8: ("CEIL_DIV", lambda a, b: -(-a // b)),
    }

    def __init__(self, value: int | str | tuple[int, Symbol, Symbol]) -> None:
        self.value = value

    def at(self, sizes: Mapping[str, int]) -> int:
        if isinstance(self.value, int):
            return self.value
        if isinstance(self.value, str):
            return sizes[self.value]
        operation, left, right = self.value
        return self.OPERATIONS[operation][1](left.at(sizes), right.at(sizes))

    def constant(self) -> int | None:
        try:
            return self.at({})
        except KeyError:
            return None


_symbols: dict[int, Symbol] = {}  # by the address of the expression, and of what it is implemented by


def symbol(address: int) -> Symbol:
    return _symbols[address]


def expression(value: Symbol) -> int:
    """The `IDimensionExpr` of a symbol."""
    inner = instance(_EXPRESSION_INNER)
    outer = instance(_EXPRESSION, inner)
    _symbols[inner] = _symbols[outer] = value
    return outer


def _constant_value(this: int) -> int:
    value = _symbols[this].constant()
    return -(2**63) if value is None else value


_EXPRESSION_INNER = functions(
    "N8nvinfer14apiv14VDimensionExprE",
    [
        destructor,
        destructor,
        method(boolean)(lambda this: _symbols[this].constant() is not None),
        method(i64)(_constant_value),
        method(boolean)(lambda this: False),
    ],
)
_EXPRESSION = functions("N8nvinfer114IDimensionExprE", [destructor, destructor])
_BUILDER_INNER = functions(
    "N8nvinfer14apiv12VExprBuilderE",
    [
        destructor,
        destructor,
        method(pointer, i64)(lambda this, value: expression(Symbol(value))),
        method(pointer, i32, pointer, pointer)(
            lambda this, operation, left, right: expression(Symbol((operation, symbol(left), symbol(right))))
        ),
        method(pointer, i32, pointer, pointer)(lambda this, index, opt, upper: 0),
    ],
)
BUILDER = instance(functions("N8nvinfer112IExprBuilderE", [destructor, destructor]), instance(_BUILDER_INNER))

_next: list[Symbol] = []
_GIVER = instance(
    functions(
        "N8nvinfer14apiv12VExprBuilderE",
        [
            destructor,
            destructor,
            method(pointer, i64)(lambda this, value: expression(_next[-1])),
            destructor,
            destructor,
        ],
    )
)


def python_builder(tensorrt: Any, inner: int) -> Any:
    """An `IExprBuilder` of Python that is implemented by a C++ object: its own has none."""
    builder = tensorrt.IExprBuilder()
    # The object's address follows the header that every Python object has; behind its functions is the implementation.
    address = c.cast(id(builder), c.POINTER(pointer))[2]
    c.cast(address, c.POINTER(pointer))[1] = inner
    return builder


def python_expressions(tensorrt: Any) -> tuple[Any, Callable[[Symbol], Any]]:
    """A builder for Python, and what makes Python's expression of a symbol."""
    builder = python_builder(tensorrt, c.cast(BUILDER, c.POINTER(pointer))[1])
    giver = python_builder(tensorrt, _GIVER)

    def made(value: Symbol) -> Any:
        _next.append(value)
        return giver.constant(0)

    return builder, made


SLOTS = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")


class LaunchParameters:
    """`IKernelLaunchParams` and `ISymExprs`, which a plugin fills in."""

    def __init__(self) -> None:
        self.launch: dict[str, int] = {}
        self.extra: list[int] = []

        def put(name: str) -> list[Any]:
            return [
                method(pointer)(lambda this: self.launch.get(name, 0)),
                method(boolean, pointer)(lambda this, value: self.launch.update({name: value}) is None),
            ]

        inner = functions(
            "N8nvinfer123IKernelLaunchParamsImplE",
            [*itertools.chain.from_iterable(map(put, SLOTS)), destructor, destructor],
        )
        self.address = instance(
            functions("N8nvinfer119IKernelLaunchParamsE", [destructor, destructor]), instance(inner)
        )
        exprs = functions(
            "N8nvinfer113ISymExprsImplE",
            [
                method(pointer, i32)(lambda this, index: self.extra[index]),
                method(boolean, i32, pointer)(self._set),
                method(i32)(lambda this: len(self.extra)),
                method(boolean, i32)(self._size),
                destructor,
                destructor,
            ],
        )
        self.extra_address = instance(functions("N8nvinfer19ISymExprsE", [destructor, destructor]), instance(exprs))

    def _set(self, this: int, index: int, value: int) -> bool:
        if index >= len(self.extra):
            return False
        self.extra[index] = value
        return True

    def _size(self, this: int, count: int) -> bool:
        self.extra[:] = [0] * count
        return True


def read_symbol(address: int) -> tuple[int, int, Symbol]:
    """Type, data type and expression of an `ISymExpr`."""
    return call(address, 0, i32), call(address, 1, i32), symbol(call(address, 2, pointer))
