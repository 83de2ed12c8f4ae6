"""What is queued on a GPU, and in which order: with a recording stand-in for CuPy, whose kernels take 20 µs each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.runtime import InterpretedPlan, Plan, Run
from tilewright.tuner import gpu as module
from tilewright.tuner.gpu import Gpu, flush_launch
from tilewright.tuner.timing import flush_bytes, replay_launches
from tilewright.tuning_db.env import compiling_environment

KERNEL_US = 20.0
TESTS = Path(__file__).parents[1]


class Stand:
    """CuPy, as far as `Gpu` uses it. `queue` is what reached the stream; `us` the device's clock."""

    def __init__(self) -> None:
        self.queue: list[str] = []
        self.captured: list[str] | None = None
        self.us = 0.0
        self.runtime = Runtime()
        stand = self

        class Event:
            at = 0.0

            def record(self, stream: Any) -> None:
                stand.put("event")
                self.at = stand.us

            def synchronize(self) -> None:
                pass

        class Graph:
            def __init__(self, nodes: list[str]) -> None:
                self.nodes = nodes

            def launch(self, stream: Any) -> None:
                stand.put("replay")
                stand.us += KERNEL_US * len(self.nodes)

        class Stream:
            ptr = 5

            def __init__(self, non_blocking: bool) -> None:
                assert non_blocking

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

            def begin_capture(self) -> None:
                stand.captured = []

            def end_capture(self) -> Graph:
                nodes, stand.captured = stand.captured, None
                assert nodes is not None
                return Graph(nodes)

            def synchronize(self) -> None:
                pass

        self.cuda = SimpleNamespace(
            Event=Event,
            Stream=Stream,
            Device=lambda ordinal: SimpleNamespace(use=lambda: None),
            get_elapsed_time=lambda before, after: (after.at - before.at) / 1e3,
            memory=SimpleNamespace(OutOfMemoryError=MemoryError),
            alloc=lambda nbytes: SimpleNamespace(ptr=0x1000, nbytes=nbytes),
        )

    def put(self, what: str) -> None:
        (self.queue if self.captured is None else self.captured).append(what)

    def run(self, copy: int) -> None:
        self.put(f"run {copy}")
        if self.captured is None:
            self.us += KERNEL_US


class Runtime:
    """`cupy_backends.cuda.api.runtime`, as far as `Gpu` uses it; keeps what is moved. Kinds are of cudaMemcpyKind."""

    CUDARuntimeError = RuntimeError
    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3  # noqa: N815 - CUDA's names

    def __init__(self) -> None:
        self.transfers: list[tuple[int, ...]] = []

    def deviceGetPCIBusId(self, ordinal: int) -> str:  # noqa: N802
        return f"0000:0{ordinal}:00.0"

    def memcpyAsync(self, *arguments: int) -> None:  # noqa: N802
        self.transfers.append(arguments)

    def memsetAsync(self, *arguments: int) -> None:  # noqa: N802
        pass

    def deviceSynchronize(self) -> None:  # noqa: N802
        pass


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    api = SimpleNamespace(driver=SimpleNamespace(CUDADriverError=RuntimeError), runtime=stand.runtime)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", api)
    monkeypatch.setattr(module, "require_cupy", lambda: stand)
    monkeypatch.setattr(module, "resolve_device", lambda name: resolve_device("h200"))
    return stand


class Flush(Plan):
    """The plan of the launch that reads all of L2: notes that it ran."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand

    def bind(self, names: Sequence[str], strides: Mapping[str, int]) -> Run:
        assert (tuple(names), strides) == (("buffer_ptr", "out_ptr"), {})

        def run(pointers: Sequence[Any], stream: int) -> None:
            assert (list(pointers), stream) == ([0x1000, 0x1000], 5)
            self.stand.put("flush")
            self.stand.us += 60.0

        return run


@pytest.fixture
def gpu(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(0)
    monkeypatch.setattr(gpu, "load", lambda launches: Flush(stand))
    return gpu


def test_a_cold_sample_is_a_flush_and_a_launch_between_two_events(gpu: Gpu, stand: Stand) -> None:
    assert gpu.cold_sampler(stand.run)(3) == pytest.approx([KERNEL_US] * 3)
    assert stand.queue == ["flush", "event", "run 0", "event"] * 3
    assert gpu._flush_memory[0].nbytes == flush_bytes(gpu.device.l2_bytes)


def test_what_is_to_be_prepared_comes_before_the_flush_and_is_not_timed(gpu: Gpu, stand: Stand) -> None:
    def prepare() -> None:
        stand.put("prepare")
        stand.us += 500.0

    assert gpu.cold_sampler(stand.run, prepare)(2) == pytest.approx([KERNEL_US] * 2)
    assert stand.queue == ["prepare", "flush", "event", "run 0", "event"] * 2


def test_a_replay_rotates_over_the_copies_behind_one_that_is_not_counted(
    gpu: Gpu, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[list[str]] = []
    end_capture = gpu._stream.end_capture

    def noting() -> Any:
        graph = end_capture()
        graphs.append(graph.nodes)
        return graph

    monkeypatch.setattr(gpu._stream, "end_capture", noting)
    sample = gpu.replay_sampler(stand.run, 7)
    assert len(graphs) == 1
    assert len(graphs[0]) == replay_launches(KERNEL_US, 7) == 56  # 1000 µs in rounds of seven
    assert graphs[0] == [f"run {index % 7}" for index in range(56)]
    stand.queue.clear()
    assert sample(2) == pytest.approx([KERNEL_US] * 2)
    assert stand.queue == ["replay", *["event", "replay", "event"] * 2]


def test_a_capture_is_ended_even_where_a_launch_fails(gpu: Gpu, stand: Stand) -> None:
    def run(copy: int) -> None:
        if stand.captured is not None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        gpu.replay_sampler(run, 2)
    assert stand.captured is None


@pytest.mark.parametrize("dead", [False, True])
def test_a_gpu_is_alive_until_the_driver_repeats_an_error(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, dead: bool
) -> None:
    def synchronize() -> None:
        if dead:
            raise MemoryError

    monkeypatch.setattr(gpu, "_runtime", SimpleNamespace(deviceSynchronize=synchronize))
    assert gpu.alive() is not dead


def test_transfers_are_queued_on_the_stream_each_of_its_kind(gpu: Gpu, stand: Stand) -> None:
    memory, other, host = SimpleNamespace(ptr=16), SimpleNamespace(ptr=64), np.zeros(8, np.uint8)
    gpu.upload(memory, host)
    gpu.download(memory, host)
    gpu.copy(other, memory, 8)
    assert stand.runtime.transfers == [
        (16, host.ctypes.data, 8, 1, 5),
        (host.ctypes.data, 16, 8, 2, 5),
        (64, 16, 8, 3, 5),
    ]
    assert gpu.argument(memory, 256, np.dtype(np.float16), 4) == 272


def test_cupy_has_what_its_stand_in_has() -> None:
    runtime = pytest.importorskip("cupy_backends.cuda.api.runtime", reason="CuPy is not installed")
    for name, value in vars(Runtime).items():
        if name.startswith("memcpy") and isinstance(value, int):
            assert getattr(runtime, name) == value
        elif not name.startswith("_"):
            assert callable(getattr(runtime, name)), name


def test_the_flush_reads_every_byte() -> None:
    launch = flush_launch(1 << 16)
    out = np.zeros(1, np.int32)
    for at in (0, 4095, 4096, 16383):
        buffer = np.zeros(1 << 14, np.int32)
        buffer[at] = 1  # one that is not zero shows in the output
        out[0] = 0
        InterpretedPlan((launch,)).run({"buffer_ptr": buffer, "out_ptr": out}, {}, 0)
        assert out[0] == 1


COMPILE = """
import json, runpy, sys
from tilewright.kernels.compile import compile_launch
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.tuner.gpu import flush_launch
faults = runpy.run_path(sys.argv[1])["FAULTS"]
gemm, = GEMM.launches(GemmProblem(M=240, N=256, K=256, activation="relu"), GemmConfig(64, 64, 32))
found = {name: compile_launch(fault(gemm), 90).ptx for name, fault in faults.items()}
print(json.dumps({**found, "flush": compile_launch(flush_launch(1 << 20), 80).ptx}))
"""


def test_the_flush_and_the_planted_faults_compile_to_what_they_should_do() -> None:
    """The rehearsal of what a GPU will run: the compiler could have taken any of it for useless."""
    environment = {**compiling_environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-P", "-c", COMPILE, str(TESTS / "gpu" / "faulty_kernels.py")]
    done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True, timeout=120)
    ptx = json.loads(done.stdout)
    assert ptx["flush"].count("ld.global.v4.b32") == 8
    assert "st.global" in ptx["illegal address"]
    assert "bra" in ptx["endless"]
    assert "atom" in ptx["endless"]
    assert ptx["activation skipped"] != ptx["last tile missing"] != ptx["out of bounds"]
