"""Gluon kernels of sm_90 on NumPy: partitions take turns as a seed says, and what is asynchronous comes as late as it
may, or whenever its turn is. A partition is one thread here: fences, and races between a group's threads, are not seen.

A copy into shared memory is an actor of its own. Of products and copies out, in their order, some are too, and read
what they need at any time; others no earlier than somebody waits for them: a stage that is given back too soon is read
after it was written over. Shared memory is NaN before it is written. Who waits for what never comes is told of.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from triton.runtime.jit import JITFunction

Array = np.ndarray[Any, Any]


EAGER = 0.5
"""Part of products and copies out that may happen before they are waited for."""

LATE = 40
"""Steps of others after which a late copy may happen, or when nobody else can do anything."""


class DeadlockError(Exception):
    """Nobody can go on."""


class Tensor(np.ndarray[Any, Any]):
    """Registers of a partition."""

    def to(self, dtype: Any) -> Tensor:
        """Cast."""
        return self.astype(dtype).view(Tensor)

    @property
    def type(self) -> Any:
        """Without a layout, of which nothing depends here."""
        return SimpleNamespace(layout=None)


class Turns:
    """One of several threads runs at a time; each gives its turn away wherever another's could matter."""

    def __init__(self, seed: str) -> None:
        self.draw = random.Random(seed)
        self._ready: dict[Any, Callable[[], bool]] = {}  # who waits for a turn, and whether it could use it
        self._turns: dict[Any, threading.Event] = {}
        self._copies: list[tuple[int, Callable[[], None]]] = []  # and how many steps must have been before
        self._steps = 0
        self._failed: BaseException | None = None
        self._done = threading.Event()

    def run(self, partitions: Iterable[Callable[[], None]]) -> None:
        """Until all partitions have returned; raises what one of them raised."""
        threads = [threading.Thread(target=self._partition, args=(each,), daemon=True) for each in partitions]
        for thread in threads:
            self._ready[thread] = lambda: True
            self._turns[thread] = threading.Event()
        for thread in threads:
            thread.start()
        self._next()
        self._done.wait()
        for thread in threads:
            thread.join()
        if self._failed is not None:
            raise self._failed

    def copy(self, copy: Callable[[], None]) -> None:
        """`copy` happens whenever its turn comes: of some that is long after."""
        self._copies.append((self._steps + self.draw.choice((0, 0, LATE)), copy))
        self.give()

    def give(self, until: Callable[[], bool] = lambda: True) -> None:
        """Lets others run, at least until that holds."""
        me = threading.current_thread()
        self._ready[me] = until
        self._next()
        self._turns[me].wait()
        self._turns[me].clear()
        if self._failed is not None:
            raise SystemExit

    def _partition(self, body: Callable[[], None]) -> None:
        me = threading.current_thread()
        self._turns[me].wait()
        self._turns[me].clear()
        try:
            if self._failed is None:
                with np.errstate(all="ignore"):  # as on a GPU
                    body()
        except SystemExit:
            pass
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._failed = error
        del self._turns[me]
        self._next()

    def _next(self) -> None:
        """Copies what is drawn, until somebody's turn is drawn or nobody is left."""
        while self._failed is None and (self._ready or self._copies):
            able: list[Any] = [thread for thread, until in self._ready.items() if until()]
            if not able and not self._copies:
                self._failed = DeadlockError(f"{len(self._ready)} partitions wait")
                break
            self._steps += 1
            due = [copy for copy in self._copies if copy[0] <= self._steps]
            chosen = self.draw.choice([*due, *able] or self._copies)
            if chosen in self._copies:
                self._copies.remove(chosen)
                chosen[1]()
                continue
            del self._ready[chosen]
            self._turns[chosen].set()
            return
        self._ready.clear()
        for event in list(self._turns.values()):  # of those that have failed with another
            event.set()
        if not self._turns:
            self._done.set()


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def index(self, place: int) -> Shared:
        """One of the first dimension; of barriers a barrier."""
        assert 0 <= place < len(self.array)
        return self.array[place] if self.array.dtype == object else Shared(self.array[place])

    def slice(self, start: int, length: int) -> Shared:
        """Rows of it."""
        return Shared(self.array[start : start + length])

    def permute(self, order: Sequence[int]) -> Shared:
        """Its transpose."""
        return Shared(self.array.transpose(order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        """The same elements."""
        view = self.array.reshape(shape)
        assert np.shares_memory(view, self.array)
        return Shared(view)

    def store(self, value: Array) -> None:
        """Writes a whole tile."""
        assert value.shape == self.shape
        self.array[...] = value


class Barrier:
    """An mbarrier: of arrivals and bytes that are expected, and the parity of its phase."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        """A phase is over after so many arrivals."""
        self.count = self.left = count

    def change(self, arrivals: int, size: int) -> None:
        """Arrivals, and bytes that are expected more or, below 0, have come."""
        self.left -= arrivals
        self.bytes += size
        assert self.left >= 0, "an arrival too many"
        if self.left == 0 and self.bytes == 0:
            self.left, self.phase = self.count, self.phase ^ 1


class Descriptor:
    """A tensor descriptor: zeros come from out of bounds, and nothing goes there."""

    def __init__(self, array: Array, block: Sequence[int]) -> None:
        self.array = array
        self.dtype, self.layout = array.dtype, None
        self.block_type = SimpleNamespace(shape=list(block), nbytes=int(np.prod(block)) * array.itemsize)

    def read(self, at: Sequence[int]) -> Array:
        """A tile."""
        tile = np.zeros(self.block_type.shape, self.dtype)
        part = self.array[self._place(at)]
        tile[tuple(map(slice, part.shape))] = part
        return tile

    def write(self, at: Sequence[int], tile: Array) -> None:
        """Writes a tile."""
        part = self.array[self._place(at)]
        part[...] = tile[tuple(map(slice, part.shape))]

    def _place(self, at: Sequence[int]) -> tuple[slice, ...]:
        assert min(at) >= 0
        return tuple(slice(first, first + size) for first, size in zip(at, self.block_type.shape, strict=True))


class Pointer:
    """Addresses of elements."""

    def __init__(self, array: Array, offsets: Any = 0) -> None:
        self.array, self.offsets = array, offsets

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.array, self.offsets + offsets)


class Block:
    """What one block of threads sees of Gluon."""

    def __init__(self, program: int, programs: int, seed: str) -> None:
        self._program, self._programs = program, programs
        self._turns = Turns(seed)
        self._pending: dict[Any, list[Callable[[], None]]] = {}  # products and copies out, by who issued them

    def names(self) -> dict[str, Any]:
        """What a kernel's module imports, by the names it is imported under."""
        gl = SimpleNamespace(
            program_id=lambda axis: self._program,
            num_programs=lambda axis: self._programs,
            minimum=np.minimum,
            maximum=np.maximum,
            exp2=np.exp2,
            max=np.max,
            sum=np.sum,
            where=lambda *of: np.where(*of).view(Tensor),
            cdiv=lambda a, b: -(-a // b),
            static_range=range,
            int64=object,
            int32=np.int32,
            float32=np.float32,
            allocate_shared_memory=_allocate,
            warp_specialize=lambda parts, warps, registers: self._turns.run(
                [lambda part=part: part[0](*part[1]) for part in parts]
            ),
            NVMMADistributedLayout=lambda version, **options: None,
            SliceLayout=lambda axis, parent: None,
            DotOperandLayout=lambda operand, parent, k_width: None,
            convert_layout=lambda x, layout: x,
            zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Tensor),
            full=lambda shape, value, dtype, layout: np.full(shape, value, dtype).view(Tensor),
            arange=lambda start, end, layout: np.arange(start, end),
            load=_load,
            expand_dims=np.expand_dims,
            reshape=np.reshape,
            permute=np.transpose,
            split=lambda x: (x[..., 0], x[..., 1]),
        )
        mbarrier = SimpleNamespace(
            init=lambda barrier, count: barrier.init(count),
            MBarrierLayout=lambda: None,
            wait=lambda barrier, phase: self._turns.give(lambda: barrier.phase != phase),
            expect=lambda barrier, size: self._change(barrier, 1, size),
            arrive=lambda barrier, pred=True: self._change(barrier, 1, 0) if pred else None,
        )
        return {
            "gl": gl,
            "mbarrier": mbarrier,
            "tma": SimpleNamespace(store_wait=lambda pending: self._finish("out", pending)),
            "copy_tile_in": self._copy_in,
            "copy_tile_out": lambda descriptor, at, tile: self._issue("out", lambda: descriptor.write(at, tile.array)),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._multiplied,
        }

    def _change(self, barrier: Barrier, arrivals: int, size: int) -> None:
        barrier.change(arrivals, size)
        self._turns.give() if threading.current_thread() in self._turns._turns else None

    def _copy_in(self, descriptor: Descriptor, at: Sequence[int], barrier: Barrier, tile: Shared) -> None:
        def copy() -> None:
            tile.array[...] = descriptor.read(at)
            barrier.change(0, -descriptor.block_type.nbytes)

        self._turns.copy(copy)

    def _issue(self, kind: str, work: Callable[[], None]) -> None:
        queue = self._pending.setdefault((kind, threading.current_thread()), [])
        queue.append(work)
        if self._turns.draw.random() < EAGER:
            self._turns.copy(lambda: queue.pop(0)() if queue else None)
        else:
            self._turns.give()

    def _finish(self, kind: str, pending: int) -> None:
        self._turns.give()
        queue = self._pending.setdefault((kind, threading.current_thread()), [])
        while len(queue) > pending:
            queue.pop(0)()

    def _multiply(self, a: Shared | Tensor, b: Shared, total: Tensor, is_async: bool, use_acc: bool = True) -> Tensor:
        assert is_async
        left = a.array if isinstance(a, Shared) else a

        def product() -> None:
            product = left.astype(np.float32) @ b.array.astype(np.float32)
            total[...] = total + product if use_acc else product

        if not use_acc:
            total[...] = np.nan  # until it is there
        self._issue("product", product)
        return total

    def _multiplied(self, pending: int, deps: Sequence[Tensor]) -> Any:
        self._finish("product", pending)
        return deps[0] if len(deps) == 1 else tuple(deps)


def simulate(module: ModuleType, kernel: str, arguments: Sequence[Any], programs: int, seed: int, **names: Any) -> None:
    """Runs all blocks of a kernel, one after another. `names` are functions of Triton's that it calls, on numbers."""
    for program in range(programs):
        scope: dict[str, Any] = {**vars(module), **names, **Block(program, programs, f"{seed} {program}").names()}
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.__module__ == module.__name__:
                scope[name] = FunctionType(value.fn.__code__, scope)
        scope[kernel](*arguments)


def changed(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module with another line, from a file in `folder`."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1, f"{source.count(old)} of: {old}"
    path = folder / "gluon_changed.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("gluon_changed", path)
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    sys.modules[other.__name__] = other  # dataclasses look there
    try:
        spec.loader.exec_module(other)
    finally:
        del sys.modules[other.__name__]
    return other


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
    if dtype is object:
        barriers = np.empty(shape[0], object)
        barriers[:] = [Barrier() for _ in range(shape[0])]
        return Shared(barriers)
    return Shared(np.full(shape, np.nan, dtype))


def _load(pointer: Pointer, mask: Array, other: float) -> Tensor:
    values = np.full(mask.shape, other, pointer.array.dtype)
    values[mask] = pointer.array[pointer.offsets[mask]]
    return values.view(Tensor)


__all__ = ["DeadlockError", "Descriptor", "Pointer", "changed", "simulate"]
