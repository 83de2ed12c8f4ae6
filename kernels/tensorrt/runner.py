"""`Runner`: an engine file run from Python, and how long that takes. It needs TensorRT's runtime and CuPy alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.kernels.arrays import empty, require_cupy
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.tensorrt.engine import collecting_logger
from tilewright.kernels.tensorrt.library import tensorrt
from tilewright.kernels.tensorrt.types import canonical
from tilewright.tuning_db.errors import ProblemError, RunError, UnsupportedError, UsageError
from tilewright.tuning_db.text import one_line

WARM_UP = 10
"""Runs before the timed ones: the first allocate, and clocks rise."""


@dataclass(frozen=True, slots=True)
class Latency:
    """The GPU's time for one run of an engine, in microseconds: from an event before it to one behind, on one stream,
    without copies from and to the host."""

    runs: int
    mean_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    min_us: float
    max_us: float

    @classmethod
    def of(cls, times_us: np.ndarray[Any, Any]) -> Latency:
        """The statistics of single runs' times."""
        p50, p90, p99 = np.percentile(times_us, [50, 90, 99])
        extremes = (float(times_us.min()), float(times_us.max()))
        return cls(len(times_us), float(times_us.mean()), float(p50), float(p90), float(p99), *extremes)

    def __str__(self) -> str:
        """One line of text."""
        return (
            f"{self.p50_us:.1f} µs (mean {self.mean_us:.1f}, p90 {self.p90_us:.1f}, p99 {self.p99_us:.1f}, "
            f"{self.min_us:.1f} to {self.max_us:.1f}; {self.runs} runs)"
        )


class Runner:
    """An engine, ready to run on the current GPU. One run at a time: it has one context."""

    def __init__(self, engine_path: str | Path) -> None:
        """Loads the engine. One with plugins that launch from Python needs `register` before.

        Raises:
            MissingDependencyError: TensorRT, CuPy or a GPU is missing.
            UsageError: there is no such file.
            RunError: TensorRT refused it: made by another version, or for another GPU.
        """
        self._trt, self._cupy = tensorrt(), require_cupy()
        path = Path(engine_path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"the engine {path} can't be read ({error.strerror})") from None
        self._logger, self._errors = collecting_logger(self._trt)
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise RunError(f"TensorRT can't load {path}: {self._reason()}")
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.inputs = tuple(name for name in names if modes[name] == self._trt.TensorIOMode.INPUT)
        self.outputs = tuple(name for name in names if modes[name] == self._trt.TensorIOMode.OUTPUT)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the engine on CuPy arrays, or NumPy arrays that are copied to the GPU; gives CuPy arrays, on the current
        stream.

        Raises:
            ProblemError: an input is missing, unknown, or of a shape or data type that the engine does not take.
            RunError: the run failed.
        """
        outputs = self._bind(inputs)
        self._run(self._cupy.cuda.get_current_stream())
        return outputs

    def latency(self, inputs: Mapping[str, Any], *, runs: int = 200) -> Latency:
        """The time of a run on these inputs.

        Raises:
            ProblemError, RunError: as a call.
            UsageError: `runs` is less than 1.
        """
        if runs < 1:
            raise UsageError(f"{runs=} must be at least 1")
        kept = self._bind(inputs)
        stream = self._cupy.cuda.get_current_stream()
        for _ in range(WARM_UP):
            self._run(stream)
        events = [(self._cupy.cuda.Event(), self._cupy.cuda.Event()) for _ in range(runs)]
        for before, behind in events:
            before.record(stream)
            self._run(stream)
            behind.record(stream)
        stream.synchronize()
        elapsed = [1000 * self._cupy.cuda.get_elapsed_time(before, behind) for before, behind in events]
        del kept  # alive until here: the engine writes to it
        return Latency.of(np.array(elapsed))

    def _bind(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the engine its inputs, and arrays for its outputs."""
        if set(inputs) != set(self.inputs):
            raise ProblemError(f"the engine takes {', '.join(self.inputs)}, not {', '.join(inputs) or 'nothing'}")
        self._bound = {}
        for name in self.inputs:
            wanted = self._dtype(name)
            array = self._cupy.ascontiguousarray(self._cupy.asarray(inputs[name]))
            if array.dtype != wanted:
                raise ProblemError(f"{name} is {array.dtype} and must be {wanted}")
            if not self._context.set_input_shape(name, tuple(array.shape)):
                raise ProblemError(
                    f"{name} is {array.shape}, which is not in any of the engine's profiles: {self._reason()}"
                )
            self._bound[name] = array
        outputs = {}
        for name in self.outputs:
            shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise UnsupportedError(f"the shape {shape} of {name} depends on data, which this runner does not know")
            outputs[name] = empty(self._cupy, shape, self._dtype(name))
        for name, array in (self._bound | outputs).items():
            self._context.set_tensor_address(name, int(array.data.ptr))
        return outputs

    def _run(self, stream: Any) -> None:
        if not self._context.execute_async_v3(stream.ptr):
            raise RunError(f"the run failed: {self._reason()}")

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self._engine.get_tensor_dtype(name)
        try:
            return np.dtype(DTYPES[canonical(kind, name)].numpy)
        except UnsupportedError:
            other: np.dtype[Any] = np.dtype(self._trt.nptype(kind))
            return other  # indices and flags, which kernels don't take

    def _reason(self) -> str:
        return one_line(self._errors[-1]) if self._errors else "it gave no reason"
