"""Arrays of other libraries, seen as pointers: NumPy, CuPy, torch, and whatever speaks DLPack.

They are guests: none of their libraries is imported here before one of its arrays comes in, and what goes out is of
the kind that came in, on the stream that is current in its own library.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from tilewright.kernels.dtypes import dtype, dtype_name
from tilewright.tuning_db.errors import MissingDependencyError, UnsupportedError

NOWHERE = 0
"""Address of a number in its view: it is put on the device by the call."""


class View(NamedTuple):
    """An array as a kernel sees it."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # canonical name
    device: int  # CUDA ordinal; -1 for host memory


class ArrayKind(ABC):
    """What has to be known about one library's arrays. Stateless, safe to share between threads."""

    host = False
    foreign = False  # seen through CuPy: arrays are adopted before anything else is done with them

    @abstractmethod
    def look(self, arrays: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """All that a warm call asks arrays, in one pass: their attributes are most of what it costs.

        Of arrays, numbers (floats) and None, gives the signatures, one after the other; and of what is not None, the
        addresses and what a plan is given (a number, itself). A signature is what a prepared call depends on: hashable,
        of an array its shape first and last True where it is aligned to 16 bytes, else how far it is off its elements'
        alignment, of a number `float`, of None None. The last list is the caller's to change.

        Raises:
            AttributeError, TypeError: one of them is no array, or another library's.
        """

    @abstractmethod
    def pointer(self, array: Any) -> int:
        """Address of the first element."""

    @abstractmethod
    def view(self, array: Any) -> View:
        """The array as a kernel sees it.

        Raises:
            UnsupportedError: kernels have no such data type, or the array is not in a GPU's memory.
        """

    @abstractmethod
    def empty(self, like: Any, shape: tuple[int, ...], kind: str) -> Any:
        """A new array of canonical dtype `kind`, on the device of `like`."""

    @abstractmethod
    def scalar(self, like: Any, value: float) -> Any:
        """A new array of one fp32 element, on the device of `like`, filled in the order of the current stream."""

    @abstractmethod
    def lasting_scalar(self, ordinal: int, value: float) -> tuple[Any, Any]:
        """A new array of one fp32 element on a GPU that is filled on return, for every stream: what a plan is given for
        it, and what it lives as long as."""

    @abstractmethod
    def stream(self, device: int) -> int:
        """The library's current stream on a GPU, by its ordinal, as an address; 0 is the default stream."""

    def on_host(self, array: Any) -> ArrayKind | None:
        """The kind that an array in host memory is seen as in the interpreter; None for one that needs no other."""
        return None

    def adopt(self, array: Any) -> Any:
        """An array whose memory kernels can be given: `array` itself, or a view of it in another library."""
        return array

    def argument(self, array: Any) -> Any:
        """What a plan is given for an array: its address; the interpreter takes the array itself."""
        return self.pointer(array)

    def give_back(self, array: Any, like: Any) -> Any:
        """The kind of `like` for an array made by `empty`."""
        return array


class NumpyKind(ArrayKind):
    """Host memory; only the interpreter runs on it."""

    host = True

    def look(self, arrays: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        signatures: list[Any] = []
        addresses: list[Any] = []
        arguments = [array for array in arrays if array is not None]
        for array in arrays:
            if array is None:
                signatures.append(None)
            elif array.__class__ is float:
                signatures.append(float)
                addresses.append(array)
            else:
                address = array.__array_interface__["data"][0]
                # By class too: a masked array, or a number of NumPy's, looks like a plain array but for that.
                signatures += (
                    array.__class__,
                    array.shape,
                    array.strides,
                    array.dtype,
                    address % 16 == 0 or -(address % array.itemsize),
                )
                addresses.append(address)
        return signatures, addresses, arguments

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)

    def view(self, array: Any) -> View:
        return View(self.pointer(array), array.shape, _in_elements(array), dtype_name(array.dtype), -1)

    def empty(self, like: Any, shape: tuple[int, ...], kind: str) -> Any:
        return np.empty(shape, dtype(kind).numpy)

    def argument(self, array: Any) -> Any:
        return array

    def scalar(self, like: Any, value: float) -> Any:
        return np.full(1, value, np.float32)

    def lasting_scalar(self, ordinal: int, value: float) -> tuple[Any, Any]:
        array = np.full(1, value, np.float32)
        return array, array

    def stream(self, device: int) -> int:
        return 0


class CupyKind(ArrayKind):
    """CuPy, and the library that launches for all others."""

    def __init__(self) -> None:
        require_cupy()

    @cached_property
    def _cupy(self) -> Any:
        return require_cupy()

    @cached_property
    def _current_stream(self) -> Any:
        return self._cupy.cuda.get_current_stream

    def look(self, arrays: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        signatures: list[Any] = []
        addresses: list[Any] = []
        for array in arrays:
            if array is None:
                signatures.append(None)
            elif array.__class__ is float:
                signatures.append(float)
                addresses.append(array)
            else:
                data = array.data
                address = data.ptr
                signatures += (
                    array.shape,
                    array.strides,
                    array.dtype,
                    data.device_id,
                    address % 16 == 0 or -(address % array.itemsize),
                )
                addresses.append(address)
        return signatures, addresses, addresses

    def pointer(self, array: Any) -> int:
        return int(array.data.ptr)

    def view(self, array: Any) -> View:
        return View(array.data.ptr, array.shape, _in_elements(array), dtype_name(array.dtype), array.data.device_id)

    def empty(self, like: Any, shape: tuple[int, ...], kind: str) -> Any:
        wanted = np.dtype(dtype(kind).numpy)
        with self._cupy.cuda.Device(self._device(like)):
            return empty(self._cupy, shape, wanted)

    def scalar(self, like: Any, value: float) -> Any:
        with self._cupy.cuda.Device(self._device(like)):
            # Not `full`: that compiles a kernel, and NVRTC may be absent.
            return self._cupy.asarray(np.full(1, value, np.float32))

    def lasting_scalar(self, ordinal: int, value: float) -> tuple[Any, Any]:
        return _lasting_scalar(self._cupy, ordinal, value)

    def stream(self, device: int) -> int:
        return self._current_stream(device).ptr  # type: ignore[no-any-return]

    def _device(self, like: Any) -> int:
        return int(self.adopt(like).data.device_id)


class TorchKind(ArrayKind):
    """torch tensors on CUDA."""

    def __init__(self) -> None:
        self._torch = sys.modules["torch"]  # one of its tensors is in hand, so it is loaded
        self._gradients = self._torch.is_grad_enabled
        self._dtypes: dict[str, Any] = {}
        # An ordinal's stream as a number, as Triton and Inductor ask for it: making a Stream of it takes microseconds.
        self._raw_stream = getattr(getattr(self._torch, "_C", None), "_cuda_getCurrentRawStream", None)

    def look(self, arrays: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        signatures: list[Any] = []
        addresses: list[Any] = []
        gradients = self._gradients()
        for array in arrays:
            if array is None:
                signatures.append(None)
            elif array.__class__ is float:
                signatures.append(float)
                addresses.append(array)
            else:
                address = array.data_ptr()
                signatures += (
                    array.shape,
                    array.stride(),
                    array.dtype,
                    # Twice as fast as hashing and comparing a torch.device.
                    array.get_device() if array.is_cuda else None,
                    gradients and array.requires_grad,
                    address % 16 == 0,
                )
                addresses.append(address)
        return signatures, addresses, addresses

    def pointer(self, array: Any) -> int:
        return int(array.data_ptr())

    def view(self, array: Any) -> View:
        if array.device.type != "cuda":
            raise UnsupportedError(f"a torch tensor on {array.device} is not in a GPU's memory: move it with .cuda()")
        check_tensor(self._torch, None, array)
        return View(array.data_ptr(), tuple(array.shape), array.stride(), dtype_name(array.dtype), array.device.index)

    def empty(self, like: Any, shape: tuple[int, ...], kind: str) -> Any:
        made = self._dtypes.get(kind)
        if made is None:  # NumPy takes microseconds to spell it
            made = self._dtypes[kind] = torch_dtype(self._torch, kind)
        return like.new_empty(shape, dtype=made)

    def scalar(self, like: Any, value: float) -> Any:
        return like.new_full((1,), value, dtype=self._torch.float32)

    def lasting_scalar(self, ordinal: int, value: float) -> tuple[Any, Any]:
        # CuPy's memory: a tensor that is made while torch.compile warms a CUDA graph up would lie in the graph's pool,
        # where nothing may outlive the run.
        return _lasting_scalar(require_cupy(), ordinal, value)

    def stream(self, device: int) -> int:
        if self._raw_stream is not None:
            return self._raw_stream(device)  # type: ignore[no-any-return]
        return int(self._torch.cuda.current_stream(device).cuda_stream)

    def on_host(self, array: Any) -> ArrayKind | None:
        return _the(TorchHostKind, "torch, on the host") if array.device.type == "cpu" else None


class TorchHostKind(NumpyKind):
    """torch tensors in host memory, seen through NumPy without a copy: for the interpreter."""

    foreign = True

    def __init__(self) -> None:
        self._torch = sys.modules["torch"]

    def adopt(self, array: Any) -> Any:
        if array.device.type != "cpu":
            raise UnsupportedError(f"a torch tensor on {array.device} beside one on the host: pass both on one device")
        check_tensor(self._torch, None, array)
        kind = np.dtype(dtype(dtype_name(array.dtype)).numpy)
        plain = array.detach()
        try:
            if kind.isbuiltin == 1:
                return plain.numpy()
            return plain.view(getattr(self._torch, f"uint{8 * kind.itemsize}")).numpy().view(kind)
        except RuntimeError as error:  # of a tensor that is no plain memory, as a fake one or a negated view
            raise UnsupportedError(f"torch can't show a {type(array).__name__} as a NumPy array: {error}") from None

    def give_back(self, array: Any, like: Any) -> Any:
        if array.dtype.isbuiltin == 1:
            return self._torch.from_numpy(array)
        bits = self._torch.from_numpy(array.view(f"u{array.itemsize}"))
        return bits.view(getattr(self._torch, str(array.dtype)))


def torch_dtype(torch: Any, kind: str) -> Any:
    """torch's object for a canonical dtype."""
    return getattr(torch, str(np.dtype(dtype(kind).numpy)))


def check_tensor(torch: Any, name: str | None, tensor: Any) -> None:
    """Does nothing for a tensor that kernels can take.

    Raises:
        UnsupportedError: it is sparse, or requires a gradient; the message begins with the name, if there is one.
    """
    said = "a torch tensor" if name is None else f"{name}: a torch tensor"
    if tensor.layout is not torch.strided:
        raise UnsupportedError(f"{said} of layout {tensor.layout} has no strides: pass .to_dense()")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            f"{said} requires a gradient, and these kernels compute none: call them under torch.no_grad(), or pass "
            ".detach()"
        )


_IN_CUDA, _ON_HOST = (2, 13), 1
"""DLPack's device types of a GPU's memory and of managed memory, and of the host's (`DLDeviceType` in dlpack.h)."""


class DlpackKind(CupyKind):
    """Any other array in a GPU's memory, seen through CuPy without a copy: JAX, and what has DLPack or
    `__cuda_array_interface__`.

    DLPack's exchange orders the library's pending work before ours; the other interface does so only where it names a
    stream, which JAX's doesn't: an array that comes that way is waited for.
    """

    foreign = True

    def __init__(self) -> None:
        """Without CuPy: an array of the same class may be on the host."""

    def pointer(self, array: Any) -> int:
        return super().pointer(self.adopt(array))

    def on_host(self, array: Any) -> ArrayKind | None:
        return _the(DlpackHostKind, "DLPack, on the host") if _place(array) == _ON_HOST else None

    def adopt(self, array: Any) -> Any:
        other = hasattr(array, "__cuda_array_interface__")
        place = _place(array)
        if place is not None:
            name = _a(type(array))
            if place not in _IN_CUDA and not other:
                raise UnsupportedError(
                    f"{name} is not in a GPU's memory (DLPack's device type is {int(place)}): move it there"
                )
            cupy = self._cupy
            try:
                if place in _IN_CUDA:
                    return cupy.from_dlpack(array)
            except cupy.cuda.runtime.CUDARuntimeError:  # of an earlier kernel, perhaps
                raise
            except (BufferError, RuntimeError, TypeError, ValueError) as error:
                if not other:
                    raise UnsupportedError(f"CuPy can't take {name} by DLPack: {error}") from error
        if not other:
            raise UnsupportedError(_no_array(type(array)))
        if hasattr(array, "block_until_ready"):
            array.block_until_ready()
        return self._cupy.asarray(array)

    def give_back(self, array: Any, like: Any) -> Any:
        return _in_namespace(array, like)


class DlpackHostKind(NumpyKind):
    """Any other array in host memory with DLPack, seen through NumPy without a copy: for the interpreter."""

    foreign = True

    def adopt(self, array: Any) -> Any:
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedError(f"NumPy can't take {_a(type(array))} by DLPack: {error}") from error

    def give_back(self, array: Any, like: Any) -> Any:
        return _in_namespace(array, like)


def _place(array: Any) -> Any:
    """DLPack's device type of an array's memory, a GPU's where it doesn't say; None without DLPack."""
    if not hasattr(array, "__dlpack__"):
        return None
    try:
        return array.__dlpack_device__()[0] if hasattr(array, "__dlpack_device__") else _IN_CUDA[0]
    except (BufferError, RuntimeError, TypeError, ValueError):  # of an array that is gone: its exchange says so
        return _IN_CUDA[0]


def _in_namespace(array: Any, like: Any) -> Any:
    """An array as one of the library of `like`, where that has the array API; else itself."""
    if array_api_compat.is_array_api_obj(like):
        return array_api_compat.array_namespace(like).from_dlpack(array)
    return array


def _a(cls: type) -> str:
    return f"{'an' if cls.__name__[0] in 'AEIOUaeiou' else 'a'} {cls.__name__}"


def _no_array(cls: type) -> str:
    return f"{_a(cls)} is no array: pass NumPy, CuPy, torch or JAX arrays, or any with DLPack"


def kind_of(array: Any) -> ArrayKind:
    """The kind of an array.

    Raises:
        MissingDependencyError: it is CuPy's, and finds no driver or GPU.
        UnsupportedError: it is no array.
    """
    cls = type(array)
    kind = _kinds.get(cls)
    if kind is None:
        kind = _kinds[cls] = _kind_of_type(cls)
    return kind


_kinds: dict[type, ArrayKind] = {}


def _kind_of_type(cls: type) -> ArrayKind:
    if issubclass(cls, np.ma.MaskedArray):
        raise UnsupportedError("masked arrays are not supported, their masks would be ignored: pass .filled(0)")
    if issubclass(cls, np.ndarray):
        return _the(NumpyKind, "numpy")
    # By every base class: torch's Parameter, and tensors that others derive, are torch's too.
    roots = [base.__module__.partition(".")[0] for base in cls.__mro__]
    if "cupy" in roots:
        return _the(CupyKind, "cupy")
    if "torch" in roots:
        return _the(TorchKind, "torch")
    if not (hasattr(cls, "__cuda_array_interface__") or hasattr(cls, "__dlpack__")):
        raise UnsupportedError(_no_array(cls))
    return _the(DlpackKind, roots[0])


@cache
def _the(kind: type[ArrayKind], library: str) -> ArrayKind:
    """One object for each library, so that two arrays are of one library exactly when their kind is one object."""
    return kind()


def _in_elements(array: Any) -> tuple[int, ...]:
    size = array.itemsize
    if any(stride % size for stride in array.strides):
        raise UnsupportedError(
            f"strides of {array.strides} B are no multiples of the {size} B of an element: pass a copy"
        )
    return tuple(stride // size for stride in array.strides)


def _lasting_scalar(cupy: Any, ordinal: int, value: float) -> tuple[int, Any]:
    # On a stream of its own: a capture on the caller's would take the copy into its graph.
    with cupy.cuda.Device(ordinal), cupy.cuda.Stream(non_blocking=True) as own:
        array = cupy.asarray(np.full(1, value, np.float32))
        own.synchronize()
    return int(array.data.ptr), array


def another(name: str) -> str:
    """What to pass in place of an array that kernels can't take: nobody would see a result that is in a copy."""
    return "pass a contiguous array, and copy the result from it" if name in _RESULTS else "pass a copy"


_RESULTS = ("out", "residual_out")


def empty(cupy: Any, shape: tuple[int, ...], wanted: np.dtype[Any]) -> Any:
    """An array of CuPy's on the current GPU, of fp8 too, which CuPy views memory as and makes no array of."""
    if wanted.isbuiltin == 1:
        return cupy.empty(shape, wanted)
    return cupy.empty(shape, f"u{wanted.itemsize}").view(wanted)


@cache
def require_cupy() -> Any:
    """The module `cupy`.

    Raises:
        MissingDependencyError: it is not installed, or finds no driver or GPU; the message says which.
    """
    try:
        import cupy
    except ImportError:
        raise MissingDependencyError(
            'running a kernel on a GPU needs CuPy: pip install "tilewright[cuda13]" (or [cuda12], by your driver)'
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except (RuntimeError, cupy.cuda.runtime.CUDARuntimeError) as error:
        raise MissingDependencyError(f"CuPy is installed but finds no CUDA driver: {error}") from None
    if count == 0:
        raise MissingDependencyError("CuPy is installed but finds no CUDA GPU: `nvidia-smi` should list one")
    return cupy
