"""As much of TensorRT as a build and a run ask of it, with what a test is to see: the calls made, and failures."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

DataType = Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8 FP8 INT4 FP4")


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity


class Network:
    def __init__(self, inputs: dict[str, tuple[int, ...]], layers: Sequence[str]) -> None:
        self._layers = [SimpleNamespace(type=layer) for layer in layers]
        self.num_layers = len(layers)
        self._inputs = [SimpleNamespace(name=name, shape=shape) for name, shape in inputs.items()]
        self.num_inputs = len(inputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_layer(self, index: int) -> Any:
        return self._layers[index]


class Fake:
    """The module `tensorrt`. `fails` names the step that does not succeed."""

    __version__ = "11.4.0"
    ILogger = ILogger
    NetworkDefinitionCreationFlag = IntEnum(
        "Flag", {"STRONGLY_TYPED": 1, "PREFER_AOT_PYTHON_PLUGINS": 2, "PREFER_JIT_PYTHON_PLUGINS": 3}
    )
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    LayerType = SimpleNamespace(PLUGIN_V3="plugin")
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")

    def __init__(self, inputs: dict[str, tuple[int, ...]], fails: str = "", layers: Sequence[str] = ()) -> None:
        self.inputs, self.fails, self.layers = inputs, fails, layers
        self.did: list[tuple[Any, ...]] = []

    def _add_profile(self, profile: Any) -> int:
        self._log("profile")
        return -1 if self.fails == "profile" else 0

    def _log(self, *what: Any) -> None:
        self.did.append(what)

    # the builder

    def Builder(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        if self.fails == "builder":
            raise TypeError("factory function returned nullptr")
        self.logger = logger
        profile = SimpleNamespace(set_shape=lambda *given: self._log("shape", *given))
        return SimpleNamespace(
            create_network=self._network,
            create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=self._build,
        )

    def _network(self, flags: int) -> Network:
        self._log("flags", flags)
        return Network(self.inputs, self.layers)

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        error = SimpleNamespace(desc=lambda: "node 3:\n  no such op")
        return SimpleNamespace(
            parse_from_file=lambda path: self.fails != "parse", num_errors=1, get_error=lambda index: error
        )

    @property
    def config(self) -> Any:
        return SimpleNamespace(
            set_memory_pool_limit=lambda *given: self._log("memory", *given),
            add_optimization_profile=self._add_profile,
            create_timing_cache=lambda content: content,
            set_timing_cache=self._set_cache,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"),
        )

    def _set_cache(self, content: bytes, ignore_mismatch: bool) -> bool:
        self._log("timings", content)
        return not (self.fails == "cache" and content)

    def _build(self, network: Any, config: Any) -> bytes | None:
        if self.fails == "build":
            self.logger.log(Severity.WARNING, "hm")
            self.logger.log(Severity.ERROR, "no tactic\nfor layer 1")
            return None
        return b"the engine"

    # the runtime

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self._load)

    def _load(self, content: bytes) -> Any:
        if self.fails == "load":
            self.logger.log(Severity.ERROR, "made by another version")
            return None
        names = [*self.inputs, "y"]
        self.shapes: dict[str, tuple[int, ...]] = {}
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            get_tensor_mode=lambda name: "input" if name in self.inputs else "output",
            get_tensor_dtype=lambda name: DataType.INT64 if name == "ids" else DataType.HALF,
            create_execution_context=lambda: SimpleNamespace(
                set_input_shape=self._set_shape,
                get_tensor_shape=lambda name: (-1,) if self.fails == "shape" else (self.shapes["x"][0], 4),
                set_tensor_address=lambda name, address: self._log("address", name, address),
                execute_async_v3=self._run,
            ),
        )

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] < 100

    def _run(self, stream: int) -> bool:
        self._log("run", stream)
        return self.fails != "run"

    @staticmethod
    def nptype(kind: Any) -> Any:
        return {DataType.INT64: np.int64, DataType.BOOL: np.bool_}[kind]
