"""Arrays of other libraries: what is read off them, what is made in return, and what is said when they can't be used.

No GPU library is at hand here: light stand-ins have the attributes that CuPy's and torch's arrays have.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from tilewright.kernels import arrays, call, gemm, rmsnorm
from tilewright.kernels.arrays import CupyKind, DlpackKind, NumpyKind, TorchKind, View, kind_of, require_cupy
from tilewright.kernels.dtypes import DTYPES
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.errors import MissingDependencyError, ProblemError, UnsupportedError


@pytest.fixture(autouse=True)
def fresh():
    """Kinds remember the library they met first: forget the stand-ins."""

    def forget():
        arrays._kinds.clear()
        arrays._the.cache_clear()
        require_cupy.cache_clear()

    forget()
    yield
    forget()


# NumPy


def signature(kind, array):
    """What a prepared call depends on about an array."""
    return tuple(kind.look((array,))[0])


def test_numpy_views():
    kind = kind_of(np.zeros(1))
    assert isinstance(kind, NumpyKind)
    assert kind.host
    array = np.zeros((4, 6), ml_dtypes.bfloat16)[1::2, ::3]
    assert kind.view(array) == View(array.ctypes.data, (2, 2), (12, 3), "bf16", -1)
    assert kind.pointer(array) == array.ctypes.data
    assert kind.argument(array) is kind.adopt(array) is kind.give_back(array, array) is array
    assert kind.stream(-1) == 0


def test_numpy_makes_arrays_of_canonical_dtypes():
    kind = kind_of(np.zeros(1))
    made = kind.empty(np.zeros(1), (2, 3), "fp8e4m3")
    assert (made.shape, made.dtype) == ((2, 3), np.dtype(ml_dtypes.float8_e4m3fn))
    scalar = kind.scalar(np.zeros(1), 0.1)
    assert (scalar.shape, scalar.dtype, scalar[0]) == ((1,), np.dtype(np.float32), np.float32(0.1))


def test_signatures_differ_in_all_a_call_depends_on():
    kind = kind_of(np.zeros(1))
    base = np.zeros(4096, np.float32)
    start = -base.ctypes.data // 4 % 16
    array = base[start : start + 64].reshape(8, 8)
    same = np.zeros_like(array)
    others = [
        array[:4],
        array.T[:, :],
        array.astype(np.float16),
        base[start + 1 : start + 65].reshape(8, 8),
        array[:, ::2],
    ]
    signatures = {signature(kind, each) for each in (array, *others)}
    assert len(signatures) == 6
    if same.ctypes.data % 16 == 0:
        assert signature(kind, same) == signature(kind, array)


def test_strides_between_elements_are_refused():
    field = np.zeros((4, 4), "f2,i1")["f0"]
    with pytest.raises(
        UnsupportedError, match=r"^strides of \(12, 3\) B are no multiples of the 2 B of an element: pass"
    ):
        kind_of(field).view(field)


def test_one_kind_for_each_library(tmp_path):
    class Derived(np.ndarray):
        """As users derive them."""

    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2,))
    assert kind_of(mapped) is kind_of(np.zeros(1)) is kind_of(np.zeros(1).view(Derived))


# CuPy


class FakeDevice:
    """`cupy.cuda.Device`: notes which device is current."""

    current = 0

    def __init__(self, ordinal):
        self.ordinal = ordinal

    def __enter__(self):
        self.before, FakeDevice.current = FakeDevice.current, self.ordinal

    def __exit__(self, *_):
        FakeDevice.current = self.before


class CupyArray:
    """`cupy.ndarray`, on device 1 unless told otherwise."""

    def __init__(self, shape=(4, 8), dtype=np.float16, device=1, pointer=0x7000):
        host = np.zeros(shape, dtype)
        self.shape, self.strides, self.dtype, self.itemsize = host.shape, host.strides, host.dtype, host.itemsize
        self.data = SimpleNamespace(ptr=pointer, device_id=device)

    def view(self, dtype):
        return CupyArray(self.shape, dtype, self.data.device_id, self.data.ptr)


CupyArray.__module__ = "cupy"


@pytest.fixture
def cupy(monkeypatch):
    module = ModuleType("cupy")
    module.made, module.events = [], []

    class Stream:
        """`cupy.cuda.Stream`: notes what happens while it is current."""

        def __init__(self, non_blocking):
            assert non_blocking

        def __enter__(self):
            module.events.append("own stream")
            return self

        def __exit__(self, *_):
            module.events.append("left")

        def synchronize(self):
            module.events.append("waited for")

    def make(shape, dtype):
        module.events.append("made")
        if np.dtype(dtype).isbuiltin != 1:
            raise ValueError(f"Unsupported dtype {dtype}")  # as of bf16 and fp8, in some versions
        module.made.append((shape, np.dtype(dtype), FakeDevice.current))
        return CupyArray(shape, dtype, FakeDevice.current)

    module.empty = make
    module.ndarray = CupyArray
    module.asarray = lambda array: make(array.shape, array.dtype) if isinstance(array, np.ndarray) else array.adopted
    module.from_dlpack = lambda foreign: foreign.adopted
    module.cuda = SimpleNamespace(
        Device=FakeDevice,
        Stream=Stream,
        get_current_stream=lambda device=-1: SimpleNamespace(ptr=100 + device),
        runtime=SimpleNamespace(
            getDeviceCount=lambda: 2, CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {})
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_cupy_arrays(cupy):
    array = CupyArray()
    kind = kind_of(array)
    assert type(kind) is CupyKind
    assert not kind.host
    assert kind.view(array) == View(0x7000, (4, 8), (8, 1), "fp16", 1)
    assert kind.argument(array) == kind.pointer(array) == 0x7000
    assert signature(kind, array) == ((4, 8), (16, 2), np.dtype(np.float16), 1, True)
    assert [signature(kind, CupyArray(pointer=0x7000 + step))[-1] for step in (16, 2, 3)] == [True, 0, -1]


def test_cupy_makes_arrays_on_the_device_of_its_operand_and_asks_for_its_stream(cupy):
    kind = kind_of(CupyArray())
    kind.empty(CupyArray(device=1), (2, 3), "bf16")
    kind.scalar(CupyArray(device=1), 0.5)
    # CuPy takes bf16 and fp8 for the type of a view, and not all of them for that of a new array.
    assert cupy.made == [((2, 3), np.dtype(np.uint16), 1), ((1,), np.dtype(np.float32), 1)]
    assert FakeDevice.current == 0
    cupy.events.clear()
    assert kind.lasting_scalar(1, 0.25)[0] == 0x7000
    assert cupy.made.pop() == ((1,), np.dtype(np.float32), 1)
    assert cupy.events == ["own stream", "made", "waited for", "left"]
    for name in ("bf16", "fp8e4m3", "fp8e5m2", "fp16", "int8"):
        assert kind.empty(CupyArray(device=1), (2, 3), name).dtype == DTYPES[name].numpy
    assert kind.stream(1) == 101


def test_arrays_on_two_gpus_are_refused(cupy):
    with pytest.raises(ProblemError, match=r"^the arrays are on different GPUs: \[0, 1\]$"):
        gemm(CupyArray(device=0), CupyArray((8, 4), device=1))


# torch


class Tensor:
    """`torch.Tensor`."""

    def __init__(self, device="cuda:1", dtype="torch.float16"):
        name, _, index = device.partition(":")
        self.shape, self.dtype, self.made = (4, 8), SimpleNamespace(), []
        self.requires_grad, self.is_cuda, self.layout = False, name == "cuda", "torch.strided"
        self.dtype = type("dtype", (), {"__str__": lambda _: dtype})()
        self.device = type("device", (), {"type": name, "index": int(index or 0), "__str__": lambda _: device})()

    def stride(self):
        self._refuse_sparse()
        return (1, 4)

    def get_device(self):
        return self.device.index if self.is_cuda else -1

    def data_ptr(self):
        self._refuse_sparse()
        return 0x9008

    def _refuse_sparse(self):
        if self.layout != "torch.strided":
            raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")

    def new_empty(self, shape, dtype):
        self.made.append((shape, dtype))

    def new_full(self, shape, value, dtype):
        self.made.append((shape, value, dtype))


Tensor.__module__ = "torch"


class Parameter(Tensor):
    """Of another module and type, as `torch.nn.Parameter` is."""


Parameter.__module__ = "torch.nn.parameter"


class Derived(Tensor):
    """As other libraries derive them."""


Derived.__module__ = "torchthings"


class HostTensor(Tensor):
    """A tensor on the host, over a NumPy array. What NumPy has no type for must be viewed as integers first."""

    def __init__(self, array):
        super().__init__("cpu", f"torch.{array.dtype}")
        self.array, self.shape = array, array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self):
        return self.array.ctypes.data

    def detach(self):
        return self

    def view(self, kind):
        return HostTensor(self.array.view(kind.removeprefix("torch.")))

    def numpy(self):
        assert self.array.dtype.isbuiltin == 1
        return self.array


HostTensor.__module__ = "torch"


@pytest.fixture
def torch(monkeypatch):
    module = ModuleType("torch")
    module.uint8, module.uint16 = "torch.uint8", "torch.uint16"
    for name in ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"):
        setattr(module, name, f"torch.{name}")
    module.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=7 + device))
    module.is_grad_enabled = lambda: module.gradients
    module.strided = "torch.strided"
    module.gradients = True
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def test_torch_tensors(torch):
    tensor = Tensor()
    kind = kind_of(tensor)
    assert isinstance(kind, TorchKind)
    assert kind.view(tensor) == View(0x9008, (4, 8), (1, 4), "fp16", 1)
    assert signature(kind, tensor)[-1] is False
    assert kind.stream(1) == 8
    for name, spelled in (("bf16", "bfloat16"), ("fp8e4m3", "float8_e4m3fn"), ("fp32", "float32")):
        kind.empty(tensor, (2, 3), name)
        assert tensor.made.pop() == ((2, 3), f"torch.{spelled}")
    kind.scalar(tensor, 0.5)
    assert tensor.made == [((1,), 0.5, "torch.float32")]


def test_numbers_beside_torch_tensors_lie_in_memory_that_is_not_torchs(torch, cupy):
    assert kind_of(Tensor()).lasting_scalar(1, 0.25)[0] == 0x7000
    assert cupy.made == [((1,), np.dtype(np.float32), 1)]


def test_torchs_stream_is_asked_for_as_a_number_where_it_can_be(torch):
    torch._C = SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 70 + device)
    assert kind_of(Tensor()).stream(1) == 71


def test_signatures_of_torch_tensors_differ_by_device_and_gradient(torch):
    kind, tracked = kind_of(Tensor()), Tensor()
    tracked.requires_grad, tracked.dtype = True, Tensor().dtype
    tensors = [Tensor(), Tensor("cuda:0"), Tensor("cpu"), tracked]
    for tensor in tensors:
        tensor.dtype = tracked.dtype
    assert len({signature(kind, tensor) for tensor in tensors}) == 4
    torch.gradients = False
    assert len({signature(kind, tensor) for tensor in tensors}) == 3


def test_parameters_and_derived_tensors_are_torchs(torch):
    assert kind_of(Parameter()) is kind_of(Derived()) is kind_of(Tensor())


def test_a_tensor_on_the_host_is_refused_where_nothing_is_interpreted(torch, monkeypatch):
    monkeypatch.setattr(call, "interpreted", lambda: False)
    with pytest.raises(
        UnsupportedError, match=r"^a: a torch tensor on cpu is not in a GPU's memory: move it with .cuda\(\)$"
    ):
        gemm(Tensor("cpu"), Tensor("cpu"))


def test_a_tensor_on_a_gpu_beside_one_on_the_host_is_refused(torch):
    with pytest.raises(
        UnsupportedError, match=r"^b: a torch tensor on cuda:1 beside one on the host: pass both on one"
    ):
        gemm(HostTensor(np.zeros((4, 8), np.float16)), Tensor())


def test_a_sparse_tensor_is_refused(torch):
    sparse = Tensor()
    sparse.layout = "torch.sparse_coo"
    with pytest.raises(
        UnsupportedError, match=r"^a: a torch tensor of layout torch.sparse_coo has no strides: pass .to"
    ):
        gemm(sparse, Tensor())


def test_libraries_do_not_mix(torch, cupy):
    for a, b in ((np.zeros((4, 8), np.float16), Tensor()), (Tensor(), CupyArray()), (CupyArray(), np.zeros((8, 4)))):
        with pytest.raises(ProblemError, match=r"^a is a \S+ and b a \S+: pass arrays of one library$"):
            gemm(a, b)
    with pytest.raises(ProblemError, match=r"^a is a cupy.CupyArray and residual a torch.Tensor: pass"):
        gemm(CupyArray(), CupyArray(), residual=Tensor())


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2"])
def test_the_interpreter_sees_tensors_on_the_host_as_numpys(torch, kind):
    host = DTYPES[kind].numpy
    torch.from_numpy = HostTensor
    a, b = (np.arange(size).reshape(shape).astype(host) for size, shape in ((8, (2, 4)), (12, (4, 3))))
    result = gemm(HostTensor(a), HostTensor(b), out_dtype=kind)
    assert isinstance(result, HostTensor)
    np.testing.assert_array_equal(result.array, gemm(a, b, out_dtype=kind))
    out = HostTensor(np.zeros((2, 3), host))
    assert gemm(HostTensor(a), HostTensor(b), out=out, alpha=2) is out
    np.testing.assert_array_equal(out.array, gemm(a, b, out_dtype=kind, alpha=2.0))
    tracked = HostTensor(a)
    tracked.requires_grad = True
    with pytest.raises(
        UnsupportedError, match=r"^a: a torch tensor requires a gradient, and these kernels compute none"
    ):
        gemm(tracked, HostTensor(b))


# Everything else on a GPU


class Foreign:
    """An array of some library, with `__cuda_array_interface__`."""

    def __init__(self):
        self.adopted = CupyArray()

    @property
    def __cuda_array_interface__(self):
        raise AssertionError("only CuPy asks")


class DlpackOnly:
    """An array that speaks DLPack and nothing else."""

    def __init__(self):
        self.adopted = CupyArray()

    def __dlpack__(self):
        raise AssertionError("only CuPy asks")


def test_foreign_arrays_are_seen_through_cupy(cupy, monkeypatch):
    foreign = Foreign()
    monkeypatch.setattr(Foreign, "__cuda_array_interface__", {})
    kind = kind_of(foreign)
    assert isinstance(kind, DlpackKind)
    assert kind.adopt(foreign) is foreign.adopted
    assert kind.pointer(foreign) == 0x7000
    assert signature(kind, kind.adopt(foreign)) == signature(kind_of(foreign.adopted), foreign.adopted)
    assert kind.stream(1) == 101
    kind.empty(foreign, (2,), "fp32")
    assert cupy.made == [((2,), np.dtype(np.float32), 1)]
    assert kind.give_back(foreign.adopted, foreign) is foreign.adopted  # a library without a namespace gets CuPy's


def test_arrays_with_dlpack_alone_are_seen_through_cupy_too(cupy):
    foreign = DlpackOnly()
    assert kind_of(foreign).adopt(foreign) is foreign.adopted
    assert kind_of(foreign).view(foreign.adopted).device == 1


class Jax(DlpackOnly):
    """An array that speaks both, without saying which stream its memory is ready on."""

    __cuda_array_interface__ = None
    waits = 0

    def block_until_ready(self):
        self.waits += 1


def test_dlpack_is_preferred_for_it_orders_streams(cupy, monkeypatch):
    array = Jax()
    monkeypatch.setattr(cupy, "asarray", lambda array: pytest.fail("unordered"))
    assert kind_of(array).adopt(array) is array.adopted
    assert array.waits == 0


@pytest.mark.parametrize("error", [BufferError, NotImplementedError, RuntimeError, TypeError, ValueError])
def test_what_dlpack_does_not_exchange_is_waited_for(cupy, monkeypatch, error):
    def refusing(array):
        raise error("no such type")

    monkeypatch.setattr(cupy, "from_dlpack", refusing)
    array = Jax()
    assert kind_of(array).adopt(array) is array.adopted
    assert array.waits == 1
    with pytest.raises(UnsupportedError, match=r"^CuPy can't take a DlpackOnly by DLPack: no such type$"):
        kind_of(DlpackOnly()).adopt(DlpackOnly())


class OnHost:
    """An array of NumPy's in a library that forwards DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_an_array_in_host_memory_is_refused_where_nothing_is_interpreted(without_cupy, monkeypatch):
    array = OnHost(np.ones((2, 16), np.float32))
    with pytest.raises(UnsupportedError, match=r"^an OnHost is not in a GPU's memory \(DLPack's device type is 1\)"):
        kind_of(array).adopt(array)
    monkeypatch.setattr(call, "interpreted", lambda: False)
    with pytest.raises(UnsupportedError, match=r"^x: an OnHost is not in a GPU's memory"):
        rmsnorm(array)


def test_the_interpreter_sees_arrays_on_the_host_with_dlpack_as_numpys(monkeypatch):
    x, w = np.full((2, 16), 2, np.float32), np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(rmsnorm(OnHost(x), OnHost(w)), rmsnorm(x, w))

    def refusing(self, **_):
        raise BufferError("no such type")

    monkeypatch.setattr(OnHost, "__dlpack__", refusing)
    with pytest.raises(UnsupportedError, match=r"^x: NumPy can't take an OnHost by DLPack: no such type$"):
        rmsnorm(OnHost(x))


def test_an_array_that_is_gone_says_so_itself(cupy, monkeypatch):
    class Gone(DlpackOnly):
        def __dlpack_device__(self):
            raise RuntimeError("deleted")

    def refusing(array):
        array.__dlpack_device__()

    monkeypatch.setattr(cupy, "from_dlpack", refusing)
    with pytest.raises(UnsupportedError, match=r"^x: CuPy can't take a Gone by DLPack: deleted$"):
        rmsnorm(Gone())


def test_foreign_libraries_have_kinds_of_their_own(cupy):
    one = type("Array", (Foreign,), {"__module__": "one.core", "__cuda_array_interface__": {}})
    same = type("Buffer", (Foreign,), {"__module__": "one.other", "__cuda_array_interface__": {}})
    other = type("Array", (Foreign,), {"__module__": "other", "__cuda_array_interface__": {}})
    assert kind_of(one()) is kind_of(same())
    assert kind_of(one()) is not kind_of(other())


def test_what_has_no_array_in_it_is_refused(cupy):
    named = {"an int": 3, "a str": "x", "a NoneType": None, "a list": [1.0], "an object": object()}
    for name, value in named.items():
        with pytest.raises(UnsupportedError, match=rf"^{name} is no array: pass NumPy, CuPy"):
            kind_of(value)


# What is missing, in one line


@pytest.fixture
def without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # its import fails


def test_a_gpu_array_without_cupy_says_what_to_install(without_cupy, monkeypatch):
    monkeypatch.setattr(Foreign, "__cuda_array_interface__", {})
    with pytest.raises(MissingDependencyError) as raised:
        gemm(Foreign(), Foreign())
    assert str(raised.value) == (
        'running a kernel on a GPU needs CuPy: pip install "tilewright[cuda13]" (or [cuda12], by your driver)'
    )
    assert isinstance(raised.value, ImportError)


@pytest.mark.parametrize("count", [0, RuntimeError("cudaErrorNoDevice: none")], ids=["no GPU", "no driver"])
def test_cupy_without_a_gpu_says_so(cupy, count):
    def device_count():
        if isinstance(count, Exception):
            raise count
        return count

    cupy.cuda.runtime.getDeviceCount = device_count
    with pytest.raises(MissingDependencyError, match=r"^CuPy is installed but finds no CUDA (GPU|driver): [^\n]*$"):
        require_cupy()
    # A GPU may appear, as when a driver is loaded: the failure is not remembered.
    cupy.cuda.runtime.getDeviceCount = lambda: 1
    assert require_cupy() is cupy


def run(program, **environment):
    command = [sys.executable, "-P", "-c", textwrap.dedent(program)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.smoke
@pytest.mark.parametrize("interpret", [{}, {"TRITON_INTERPRET": "1"}], ids=["compiling", "interpreting"])
def test_importing_the_kernels_imports_no_gpu_library(interpret):
    done = run(
        """
        import sys, warnings
        warnings.simplefilter("error")
        import tilewright.kernels
        guests = ("torch", "cupy", "cupy_backends", "jax", "tensorrt", "onnx", "optuna", "pynvml")
        print(sorted(set(guests) & set(sys.modules)), sorted(set(sys.modules) & {"tilewright.tuner"}))
        """,
        **compiling_environment(),
        **interpret,
    )
    assert (done.stdout, done.stderr) == ("[] []\n", "")


@pytest.mark.smoke
def test_numpy_arrays_without_the_interpreter_say_what_to_set():
    done = run(
        """
        import numpy
        from tilewright.kernels import gemm
        gemm(numpy.ones((4, 8), "f2"), numpy.ones((8, 4), "f2"))
        """,
        **compiling_environment(),
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tilewright.tuning_db.errors.UsageError: NumPy arrays need Triton's interpreter, but ")
    assert last.endswith("set TRITON_INTERPRET=1 before the first `import triton` or `import tilewright.kernels`")


@pytest.mark.smoke
def test_gpu_arrays_without_cupy_say_what_to_install_in_a_fresh_process():
    done = run(
        """
        import sys
        sys.modules["cupy"] = None
        from tilewright.kernels import gemm
        class Array:
            __cuda_array_interface__ = {}
        gemm(Array(), Array())
        """,
        **compiling_environment(),
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "tilewright.tuning_db.errors.MissingDependencyError: running a kernel on a GPU needs CuPy: pip"
    )
