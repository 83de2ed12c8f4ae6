"""Running an engine: arrays in and out, and times. TensorRT and CuPy are made up: the GPU's memory is the host's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.kernels.tensorrt.fake_tensorrt import Fake
from tilewright.kernels.tensorrt import Latency, Runner, runner
from tilewright.tuning_db.errors import ProblemError, RunError, UnsupportedError, UsageError

X = np.zeros((3, 8), np.float16)
IDS = np.zeros(3, np.int64)


class Array(np.ndarray):
    """CuPy's array, as far as it is asked."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


class Event:
    """Events 1, 2, 3 … milliseconds apart."""

    now = 0

    def record(self, stream):
        Event.now += 1
        self.at = Event.now * (Event.now + 1) / 2


CUPY = SimpleNamespace(
    asarray=lambda array: np.asarray(array).view(Array),
    ascontiguousarray=lambda array: np.ascontiguousarray(array).view(Array),
    empty=lambda shape, dtype: np.empty(shape, dtype).view(Array),
    cuda=SimpleNamespace(
        get_current_stream=lambda: SimpleNamespace(ptr=5, synchronize=lambda: None),
        Event=Event,
        get_elapsed_time=lambda before, behind: behind.at - before.at,
    ),
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A runner by a TensorRT that fails at one step, or not."""
    path = tmp_path / "engine"
    path.write_bytes(b"the engine")
    monkeypatch.setattr(runner, "require_cupy", lambda: CUPY)
    monkeypatch.setattr(Event, "now", 0)

    def load(fails=""):
        fake = Fake({"x": (-1, 8), "ids": (-1,)}, fails)
        monkeypatch.setattr(runner, "tensorrt", lambda: fake)
        return Runner(path), fake

    return load


def test_a_run(load):
    run, fake = load()
    assert (run.inputs, run.outputs) == (("x", "ids"), ("y",))
    outputs = run({"x": X, "ids": IDS})
    assert {name: (array.shape, array.dtype) for name, array in outputs.items()} == {"y": ((3, 4), np.float16)}
    addresses = {name: address for kind, name, address in fake.did[:3] if kind == "address"}
    assert addresses["y"] == outputs["y"].data.ptr
    assert set(addresses) == {"x", "ids", "y"}
    assert fake.did[3:] == [("run", 5)]


def test_latency_is_between_events(load):
    run, fake = load()
    found = run.latency({"x": X, "ids": IDS}, runs=4)
    # Event n is n(n + 1)/2 ms in: the runs take 2, 4, 6 and 8 ms.
    assert (found.runs, found.min_us, found.max_us, found.mean_us, found.p50_us) == (4, 2000, 8000, 5000, 5000)
    assert len([each for each in fake.did if each[0] == "run"]) == runner.WARM_UP + 4
    assert str(found) == "5000.0 µs (mean 5000.0, p90 7400.0, p99 7940.0, 2000.0 to 8000.0; 4 runs)"
    with pytest.raises(UsageError, match="runs=0 must be at least 1"):
        run.latency({"x": X, "ids": IDS}, runs=0)


def test_percentiles():
    found = Latency.of(np.arange(1, 102, dtype=float))
    assert (found.p50_us, found.p90_us, found.p99_us) == (51, 91, 100)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X}, "the engine takes x, ids, not x"),
        ({}, "the engine takes x, ids, not nothing"),
        ({"x": X.astype(np.float32), "ids": IDS}, "x is float32 and must be float16"),
        (
            {"x": np.zeros((100, 8), np.float16), "ids": IDS},
            r"x is \(100, 8\), which is not in any of the engine's profiles",
        ),
    ],
)
def test_wrong_inputs(load, inputs, message):
    with pytest.raises(ProblemError, match=message):
        load()[0](inputs)


def test_failures(load, tmp_path):
    with pytest.raises(RunError, match=r"TensorRT can't load .*engine: made by another version"):
        load("load")
    with pytest.raises(RunError, match="the run failed: it gave no reason"):
        load("run")[0]({"x": X, "ids": IDS})
    with pytest.raises(UnsupportedError, match=r"the shape \(-1,\) of y depends on data"):
        load("shape")[0]({"x": X, "ids": IDS})
    with pytest.raises(UsageError, match=r"the engine .*none can't be read \(No such file"):
        Runner(tmp_path / "none")
