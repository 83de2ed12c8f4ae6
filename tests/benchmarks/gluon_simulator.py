"""Gluon kernels of sm_90 on NumPy: partitions take turns as a seed says, and what is asynchronous comes as late as it
may, or whenever its turn is. A partition is one thread here: fences, and races between a group's threads, are not seen.

A copy into shared memory is an actor of its own. Products read their operands, and copies out their tiles, no earlier
than somebody waits for them: a stage that is given back too soon is read after it was written over. Shared memory is
NaN before it is written. Who waits for what never comes is told of.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from triton.runtime.jit import JITFunction

Array = np.ndarray[Any, Any]


class DeadlockError(Exception):
    """Nobody can go on."""


class Tensor(np.ndarray[Any, Any]):
    """Registers of a partition."""

    def to(self, dtype: Any) -> Tensor:
        """Cast."""
        return self.astype(dtype).view(Tensor)


class Turns:
    """One of several threads runs at a time; each gives its turn away wherever another's could matter."""

    def __init__(self, seed: str) -> None:
        self._draw = random.Random(seed)
        self._ready: dict[Any, Callable[[], bool]] = {}  # who waits for a turn, and whether it could use it
        self._turns: dict[Any, threading.Event] = {}
        self._copies: list[Callable[[], None]] = []
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
        """`copy` happens whenever its turn comes."""
        self._copies.append(copy)
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
            chosen = self._draw.choice([*self._copies, *able])
            if chosen in self._copies:
                self._copies.remove(chosen)
                chosen()
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
        self.shape = array.shape

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

    def read(self, row: int, column: int) -> Array:
        """A tile."""
        rows, columns = self.block_type.shape
        tile = np.zeros((rows, columns), self.dtype)
        part = self.array[row : row + rows, column : column + columns]
        tile[: part.shape[0], : part.shape[1]] = part
        return tile

    def write(self, row: int, column: int, tile: Array) -> None:
        """Writes a tile."""
        part = self.array[row : row + tile.shape[0], column : column + tile.shape[1]]
        part[...] = tile[: part.shape[0], : part.shape[1]]


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
            cdiv=lambda a, b: -(-a // b),
            static_range=range,
            int64=object,
            float32=np.float32,
            allocate_shared_memory=_allocate,
            warp_specialize=lambda parts, warps, registers: self._turns.run(
                [lambda part=part: part[0](*part[1]) for part in parts]
            ),
            NVMMADistributedLayout=lambda version, **options: None,
            SliceLayout=lambda axis, parent: None,
            zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Tensor),
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
            "copy_tile_out": lambda descriptor, at, tile: self._issue("out", lambda: descriptor.write(*at, tile.array)),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._multiplied,
        }

    def _change(self, barrier: Barrier, arrivals: int, size: int) -> None:
        barrier.change(arrivals, size)
        self._turns.give() if threading.current_thread() in self._turns._turns else None

    def _copy_in(self, descriptor: Descriptor, at: Sequence[int], barrier: Barrier, tile: Shared) -> None:
        def copy() -> None:
            tile.array[...] = descriptor.read(*at)
            barrier.change(0, -descriptor.block_type.nbytes)

        self._turns.copy(copy)

    def _issue(self, kind: str, work: Callable[[], None]) -> None:
        self._pending.setdefault((kind, threading.current_thread()), []).append(work)
        self._turns.give()

    def _finish(self, kind: str, pending: int) -> None:
        self._turns.give()
        queue = self._pending.setdefault((kind, threading.current_thread()), [])
        while len(queue) > pending:
            queue.pop(0)()

    def _multiply(self, a: Shared, b: Shared, total: Tensor, is_async: bool) -> Tensor:
        assert is_async

        def product() -> None:
            total[...] += a.array.astype(np.float32) @ b.array.astype(np.float32)

        self._issue("product", product)
        return total

    def _multiplied(self, pending: int, deps: Sequence[Tensor]) -> Tensor:
        self._finish("product", pending)
        return deps[0]


def simulate(module: ModuleType, kernel: str, arguments: Sequence[Any], programs: int, seed: int, **names: Any) -> None:
    """Runs all blocks of a kernel, one after another. `names` are functions of Triton's that it calls, on numbers."""
    for program in range(programs):
        scope: dict[str, Any] = {**vars(module), **names, **Block(program, programs, f"{seed} {program}").names()}
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.__module__ == module.__name__:
                scope[name] = FunctionType(value.fn.__code__, scope)
        scope[kernel](*arguments)


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


__all__ = ["DeadlockError", "Descriptor", "Mapping", "Pointer", "simulate"]
