"""Kernels on NumPy arrays, in Triton's interpreter, without a GPU and without torch.

Triton's interpreter runs a kernel one program after the other in Python. As shipped (3.6 to 3.9) it takes torch tensors
only, and it holds bf16 and fp8 as raw integers: a bf16 `tl.dot` multiplies bit patterns, fp32 to bf16 truncates, fp8
rounding loses its carry. This file launches on NumPy arrays and sends those types through ml_dtypes. What a kernel
computes here is then what the compiled one computes, but for the order of additions:

- To bf16: to nearest even, overflow to infinity. To e4m3 and e5m2: to nearest even, and *saturating*: infinity and what
  is out of range become ±448 and ±57344, NaN stays NaN. That is `cvt.rn.satfinite`, which Triton 3.9 emits from sm_89
  on; its software path for e5m2 on older arches does the same. Triton 3.6 converts to e5m2 in software from fp16 and
  bf16 everywhere, and from fp32 below sm_90. Read in its PTX for fp16 and fp32: ties go away from zero, overflow to
  infinity, and the NaN 0x7fff becomes a negative zero. That is not modelled.
- Arithmetic on bf16 and fp8 that was not upcast first: in fp32, rounded once. Reductions of them: rounded at the end.
- `tl.dot` of fp16, bf16, fp8: exact products, added in fp32, rounded once if the accumulator is fp16. Of int8: exact,
  wrapping at 32 bits. Of fp32 with `input_precision="tf32"`, Triton's default: operands cut to 10 mantissa bits, since
  Triton 3.6 to 3.9 emits no rounding and the tensor core ignores the low 13 bits (PTX ISA, `mma` with `.tf32`).
  "tf32x3" and "ieee": in fp32. Hopper's narrower fp8 accumulators (`max_num_imprecise_acc`) are not modelled.
- Float to integer of up to 32 bits: towards zero; out of range saturates, NaN is 0 (`cvt.rzi`; 8-bit types through 16
  bits, and then wrapped).

An address outside every array of the launch, or a store to a read-only array, raises. On a GPU the first is an illegal
address, or worse, silence. Names in `tl` are patched for the time of a launch and restored after it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter as shipped

from tilewright.tuning_db.env import INTERPRET, interpreting
from tilewright.tuning_db.errors import RunError, UsageError

_Array = npt.NDArray[Any]

# The types the interpreter holds as raw bits, and the NumPy type those bits are.
_RAW: dict[Any, Any] = {
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
}
_LARGEST = {dtype: float(ml_dtypes.finfo(_RAW[dtype]).max) for dtype in (tl.float8e4nv, tl.float8e5)}

_POINTEE: dict[Any, Any] = {stored: dtype for dtype, stored in _RAW.items()} | {
    np.dtype(numpy_type): dtype
    for numpy_type, dtype in (
        (np.bool_, tl.int1),
        *((getattr(np, name), getattr(tl, name)) for name in ("int8", "int16", "int32", "int64")),
        *((getattr(np, name), getattr(tl, name)) for name in ("uint8", "uint16", "uint32", "uint64")),
        *((getattr(np, name), getattr(tl, name)) for name in ("float16", "float32", "float64")),
    )
}

# Triton's builder holds the program's grid position, and `tl` is patched while a launch runs: one at a time.
_lock = threading.Lock()
# In a launch: of each array the first byte, one past the last, and whether it may be written.
_memory: list[tuple[int, int, bool]] | None = None
# What the launch that runs patched, of Triton's.
_patched: Any = None


def _begin_anew() -> None:
    """In a child that was forked: a launch of another thread does not go on there, and would hold the lock for ever."""
    global _lock, _memory
    _lock, _memory = threading.Lock(), None
    if _patched is not None:
        _patched.restore()


os.register_at_fork(after_in_child=_begin_anew)


def interpret(fn: Any, grid: tuple[int, int, int], args: Mapping[str, Any]) -> None:
    """Run the `triton.jit` function `fn` once for each program of `grid`, in place on the arrays in `args`.

    `args` holds every parameter without a default, by name: NumPy arrays (any native type of Triton's; with ml_dtypes
    bf16 and fp8), integers, floats, booleans, `None`, and any value for a `tl.constexpr`. A kernel gets an array's data
    pointer and nothing else, so views work as they do on a GPU: strides are the kernel's business. Nothing is copied,
    neither in nor out. One launch at a time runs in a process.

    Raises:
        UsageError: Triton was imported without `TRITON_INTERPRET`, or an argument is unknown, missing or of no type of
            Triton's.
        RunError: the kernel raised, or touched memory outside the arrays or a read-only one; names the program.
    """
    require_interpreter()
    if not isinstance(fn, shipped.InterpretedFunction):
        raise UsageError(f"{getattr(fn, '__name__', fn)} was defined while {INTERPRET} was unset; {_REMEDY}")
    call = _bind(fn, args)
    arrays = [value for value in args.values() if isinstance(value, np.ndarray)]
    with _lock:
        _patch_interpreter()
        kernel = fn.rewrite()
        builder = shipped.interpreter_builder
        # A GPU raises no floating-point flags: exp2(128.) is inf and inf - inf is NaN, without a warning.
        with _launching(arrays), np.errstate(all="ignore"):
            builder.set_grid_dim(*grid)
            for program in np.ndindex(*grid):
                builder.set_grid_idx(*program)
                try:
                    kernel(**call)
                except Exception as error:  # noqa: BLE001  a kernel's body can raise anything
                    cause = _root(error)
                    what = f"{type(cause).__name__}: {cause}"
                    raise RunError(f"{fn.__name__} failed in the interpreter, at program {program}: {what}") from cause


def interpreted() -> bool:
    """Whether this process runs kernels in the interpreter."""
    # Triton's own device functions were made when it was imported: interpreted then, or never.
    return isinstance(tl.zeros, shipped.InterpretedFunction)


def require_interpreter() -> None:
    """Make sure that this process runs kernels on NumPy arrays, for callers that were given some.

    Raises:
        UsageError: Triton was imported without `TRITON_INTERPRET`.
    """
    if not interpreted():
        when = "is set too late, Triton is imported already" if interpreting() else "is not set"
        raise UsageError(f"NumPy arrays need Triton's interpreter, but {INTERPRET} {when}; {_REMEDY}")


_REMEDY = f"set {INTERPRET}=1 before the first `import triton` or `import tilewright.kernels`"


# Arguments


def _bind(fn: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of one program: defaults filled in, all but constexprs as Triton's tensors."""
    signature = inspect.signature(fn.fn)
    try:
        bound = signature.bind(**args)
    except TypeError as error:
        raise UsageError(f"{fn.__name__}: {error}") from None
    bound.apply_defaults()
    return {
        name: value if "constexpr" in str(signature.parameters[name].annotation) else _tensor(name, value)
        for name, value in bound.arguments.items()
    }


def _tensor(name: str, value: Any) -> Any:
    data: _Array
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        if value.dtype not in _POINTEE:
            raise UsageError(f"argument {name} is an array of {value.dtype}, which Triton has no pointer to")
        dtype = tl.pointer_type(_POINTEE[value.dtype])
        data = np.array([value.ctypes.data], dtype=np.uint64)
    elif isinstance(value, bool | np.bool_):
        dtype, data = tl.int1, np.array([value], dtype=np.bool_)
    elif isinstance(value, int | np.integer):
        number = operator.index(value)
        if -(2**31) <= number < 2**31:
            dtype, data = tl.int32, np.array([number], dtype=np.int32)
        elif -(2**63) <= number < 2**63:
            dtype, data = tl.int64, np.array([number], dtype=np.int64)
        else:
            raise UsageError(f"argument {name}={number} does not fit in 64 bits")
    elif isinstance(value, float | np.floating):
        dtype, data = tl.float32, np.array([value], dtype=np.float32)
    else:
        raise UsageError(f"argument {name} is a {type(value).__name__}; the interpreter takes NumPy arrays and numbers")
    return tl.tensor(shipped.TensorHandle(data, dtype), dtype)


def _root(error: BaseException) -> BaseException:
    """What went wrong, without Triton's wrapping at every device function called."""
    while isinstance(error, shipped.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


# Memory


@contextmanager
def _launching(arrays: list[_Array]) -> Iterator[None]:
    global _memory, _patched
    # The interpreter patches the modules it finds in the globals of the function it is about to run. `tl.core` is named
    # here too because Triton's own device functions use it.
    _patched = scope = shipped._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    # Triton 3.6 has int(array of one element), which NumPy 2.3 warns about and 2.4 refuses.
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    _memory = [(*_extent(array), array.flags.writeable) for array in arrays]
    try:
        yield
    finally:
        _memory = None
        scope.restore()


def _extent(array: _Array) -> tuple[int, int]:
    """The first byte of an array and the one past its last, whatever the signs of its strides."""
    first = last = array.ctypes.data
    if array.size == 0:
        return first, first
    for length, stride in zip(array.shape, array.strides, strict=True):
        reach = (length - 1) * stride
        first, last = first + min(reach, 0), last + max(reach, 0)
    return first, last + array.itemsize


def _check_access(pointers: Any, mask: _Array, *, store: bool) -> None:
    if _memory is None:
        return
    addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
    if addresses.size == 0:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    legal = [(first, last) for first, last, writeable in _memory if writeable or not store]
    lowest, highest = int(addresses.min()), int(addresses.max())
    if any(first <= lowest and highest + size <= last for first, last in legal):
        return  # nearly always: all of them in one array
    inside = np.zeros(addresses.shape, dtype=np.bool_)
    for first, last in legal:
        if last - first >= size:
            inside |= (addresses >= np.uint64(first)) & (addresses <= np.uint64(last - size))
    if not inside.all():
        what = "stores" if store else "loads"
        where = "outside every array that may be written" if store else "outside every array"
        raise IndexError(f"{np.count_nonzero(~inside)} of {addresses.size} {what} are {where} of the launch")


# Numbers


def _raw_type(handle: Any) -> Any:
    """The NumPy type a handle's bits are, if the interpreter holds them raw; else None."""
    scalar = handle.dtype.scalar
    return None if isinstance(scalar, tl.pointer_type) else _RAW.get(scalar)


def _numbers(handle: Any) -> _Array:
    """A handle's elements as NumPy numbers: bf16 and fp8 in fp32, which holds them exactly."""
    raw = _raw_type(handle)
    data: _Array = handle.data
    return data if raw is None else data.view(raw).astype(np.float32)


def _handle(numbers: _Array, dtype: Any) -> Any:
    """Round numbers to a type of Triton's, as the CUDA backend's conversions do."""
    target = shipped._get_np_dtype(dtype)
    if dtype in _RAW:
        if dtype in _LARGEST:
            numbers = np.clip(numbers, -_LARGEST[dtype], _LARGEST[dtype])
        numbers = numbers.astype(_RAW[dtype]).view(target)
    elif numbers.dtype.kind == "f" and target.kind in "iu" and target.itemsize <= 4:
        wide = np.dtype(f"{target.kind}{max(2, target.itemsize)}")
        limits = np.iinfo(wide)
        numbers = np.clip(np.nan_to_num(numbers.astype(np.float64)), limits.min, limits.max).astype(wide).astype(target)
    else:
        numbers = numbers.astype(target)
    return shipped.TensorHandle(numbers, dtype)


def _dot_operand(handle: Any, input_precision: Any) -> _Array:
    numbers = _numbers(handle)
    if numbers.dtype == np.float16:
        return numbers.astype(np.float32)
    if handle.dtype.scalar == tl.float32 and input_precision == shipped._ir.INPUT_PRECISION.TF32:
        return (numbers.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return numbers


# The patch: methods of Triton's InterpreterBuilder, and the two ways out of it (reductions, `_patch_lang`)


def _dot(_builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if d.dtype.scalar.is_int():
        # Through float64, where BLAS is: products are below 2^16, so sums are exact for any K below 2^37.
        total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.int64) + d.data
    else:
        total = np.matmul(_dot_operand(a, input_precision), _dot_operand(b, input_precision)) + d.data
    return shipped.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


def _cast(_builder: Any, source: Any, dst_type: Any) -> Any:
    return _handle(_numbers(source), dst_type.scalar)


def _fp_to_fp(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def fp_to_fp(self: Any, source: Any, dst_type: Any, rounding_mode: Any) -> Any:
        known = all(dtype in _RAW or dtype in _STANDARD for dtype in (source.dtype.scalar, dst_type.scalar))
        # Cutting off, `fp_downcast_rounding="rtz"`, is what Triton's own does well.
        if known and rounding_mode in (None, shipped._ir.ROUNDING_MODE.RTNE):
            return _cast(self, source, dst_type)
        return original(self, source, dst_type, rounding_mode)

    return fp_to_fp


_STANDARD = (tl.float16, tl.float32, tl.float64)


def _in_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    """An elementwise method that computes on numbers where its operands are raw bits, and rounds the result once."""

    @functools.wraps(original)
    def elementwise(self: Any, *args: Any) -> Any:
        handles = [arg for arg in args if isinstance(arg, shipped.TensorHandle)]
        raw = next((handle.dtype.scalar for handle in handles if _raw_type(handle) is not None), None)
        if raw is None or args[-1] is np.where:  # `where` only picks: bits will do
            return original(self, *args)
        result = original(self, *(_lift(arg) if isinstance(arg, shipped.TensorHandle) else arg for arg in args))
        if result.data.dtype == np.bool_:  # a comparison: as shipped its handle keeps the operands' type
            return shipped.TensorHandle(result.data, tl.int1)
        return _handle(result.data, raw)

    return elementwise


def _lift(handle: Any) -> Any:
    return handle if _raw_type(handle) is None else shipped.TensorHandle(_numbers(handle), tl.float32)


def _reduce_in_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply(self: Any, tensors: Any) -> Any:
        if not isinstance(tensors, tuple):
            return apply(self, (tensors,))[0]
        cast = shipped.interpreter_semantic.cast
        types = [tensor.dtype for tensor in tensors]
        lifted = tuple(cast(t, tl.float32) if d in _RAW else t for t, d in zip(tensors, types, strict=True))
        results = original(self, lifted)
        return tuple(cast(r, d) if d in _RAW else r for r, d in zip(results, types, strict=False))

    return apply


def _checked(original: Callable[..., Any], *, store: bool, mask_at: int | None) -> Callable[..., Any]:
    """A memory method that looks at its addresses first; `mask_at` is the mask's place among the arguments."""

    @functools.wraps(original)
    def access(self: Any, *args: Any, **kwargs: Any) -> Any:
        pointers = next(arg for arg in args if isinstance(arg, shipped.TensorHandle))
        if original.__name__.startswith("create_atomic") and pointers.get_element_ty() in _RAW:
            raise NotImplementedError(f"the interpreter adds raw bits in atomics on {pointers.get_element_ty()}")
        mask = np.ones((), dtype=np.bool_) if mask_at is None else args[mask_at].data
        _check_access(pointers, mask, store=store)
        return original(self, *args, **kwargs)

    return access


@functools.cache
def _patch_interpreter() -> None:
    """Put the above in place of Triton's own; once, for the process."""
    # As shipped each integer operation is computed again in int64, and the verdict is then dropped: `debug` is off.
    options = dataclasses.replace(shipped.interpreter_builder.options, sanitize_overflow=False)
    shipped.interpreter_builder.options = options
    builder = shipped.InterpreterBuilder
    builder.cast_impl = _cast
    builder.create_dot = _dot
    builder.create_fp_to_fp = _fp_to_fp(builder.create_fp_to_fp)
    # Absent from Triton 3.6: there a bf16 constant (`tl.full`) fails.
    builder.get_bf16 = lambda self, value: _handle(np.array([value], dtype=np.float32), tl.bfloat16)
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma"):
        setattr(builder, name, _in_fp32(getattr(builder, name)))
    # Unmasked loads and stores arrive at the masked methods with a mask of ones.
    for name, store, mask_at in (
        ("create_masked_load", False, 1),
        ("create_masked_store", True, 2),
        ("create_atomic_rmw", True, 3),
        ("create_atomic_cas", True, None),
    ):
        setattr(builder, name, _checked(getattr(builder, name), store=store, mask_at=mask_at))
    scans = shipped.ReduceScanOpInterface
    scans.apply = _reduce_in_fp32(scans.apply)

    # A device function patches `tl` anew at each call and never restores it: milliseconds for each `tl.zeros`, and
    # names left behind. In a launch all is patched already.
    patch_lang = shipped._patch_lang
    shipped._patch_lang = lambda fn: patch_lang(fn) if _memory is None else shipped._LangPatchScope()
