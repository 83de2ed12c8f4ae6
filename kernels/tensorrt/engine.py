"""`build_engine`: from an ONNX file with plugin nodes to an engine file, where TensorRT's builder is."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.kernels.arrays import require_cupy
from tilewright.kernels.compile import triton_version
from tilewright.kernels.lookup import code_hash
from tilewright.kernels.tensorrt.catalogue import NAMESPACE, OPERATIONS, VERSION, plugins
from tilewright.kernels.tensorrt.context import Tactics, current
from tilewright.kernels.tensorrt.library import tensorrt
from tilewright.kernels.tensorrt.registration import register
from tilewright.kernels.tensorrt.tactics import MOST
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import MissingDependencyError, RunError, UsageError
from tilewright.tuning_db.text import one_line

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]

# TensorRT keeps the expressions of the build in progress in a global of its Python module.
_building = threading.Lock()


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine file, and the file that says what it was made of."""

    path: Path
    provenance_path: Path
    provenance: Mapping[str, Any]


def build_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    device: str | None = None,
    cuda: str | None = None,
    profiles: Mapping[str, Range] | None = None,
    implementation: str = "aot",
    timing_cache: str | Path | None = None,
    workspace_bytes: int | None = None,
    tactics: int = MOST,
    db: str | os.PathLike[str] | None = None,
) -> Engine:
    """Builds the engine of an ONNX file, with the plugins registered; writes it, and beside it `<engine>.json`.

    The network is strongly typed: data types are those of the file. One build at a time: others wait.

    Args:
        onnx_path: the model. Nodes of the domain `tilewright` become plugins.
        engine_path: the file to write.
        device, cuda, tactics, db: as `register` takes them; TensorRT builds for the GPU at hand: it must be that.
        profiles: of every input with a dynamic dimension its least, best and largest shape.
        implementation: "aot": kernels are compiled into the engine, which runs without Python. "jit": they are launched
            from Python, with each shape's own configuration, by a process that has called `register`.
        timing_cache: a file that TensorRT reads timings from and writes them to.
        workspace_bytes: the most device memory that a layer may ask for while it runs; by default TensorRT's own limit.

    Raises:
        MissingDependencyError: no TensorRT is installed, or one without a builder; or there is no GPU.
        UsageError: no such file or folder, a model that TensorRT can't read or whose fused nodes it doesn't take for
            plugins, inputs without a profile, a device that isn't here.
        TilewrightError: what a plugin raised, where one could not be built.
        RunError: TensorRT could not build the engine; the message is its first error.
    """
    if implementation not in ("aot", "jit"):
        raise UsageError(f"{implementation=} must be aot or jit")
    source, path = Path(onnx_path), Path(engine_path)
    cache = None if timing_cache is None else Path(timing_cache)
    if not source.is_file():
        raise UsageError(f"there is no file {source}")
    for written in filter(None, (path, _beside(path), cache)):
        if not written.parent.is_dir() or written.is_dir():
            reason = "it is a folder" if written.is_dir() else f"there is no folder {written.parent}"
            raise UsageError(f"{written} can't be written: {reason}")
    with _building:  # no other build's `register` comes between
        register(device, cuda=cuda, tactics=tactics, db=db)
        ranges = _ranges({} if profiles is None else profiles)
        return _build(tensorrt(), source, path, ranges, implementation, cache, workspace_bytes)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _ranges(profiles: Mapping[str, Range]) -> dict[str, Range]:
    """The profiles, each of three shapes. A size may be 0, as that of an empty cache is."""
    if not isinstance(profiles, Mapping):
        raise UsageError(f"{profiles=} must be a mapping, from inputs to their least, best and largest shape")
    checked: dict[str, Range] = {}
    for name, shapes in profiles.items():
        try:
            least, best, largest = (tuple(operator.index(size) for size in shape) for shape in shapes)
        except (TypeError, ValueError):
            least = best = largest = (-1,)
        if any(size < 0 for shape in (least, best, largest) for size in shape):
            raise UsageError(f"the profile of {name} is {shapes!r} and must be its least, best and largest shape")
        checked[name] = least, best, largest
    return checked


def _build(
    trt: Any,
    source: Path,
    path: Path,
    profiles: dict[str, Range],
    implementation: str,
    cache: Path | None,
    workspace_bytes: int | None,
) -> Engine:
    logger, errors = collecting_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:
        raise MissingDependencyError(
            f"this TensorRT {trt.__version__} has no builder: pip install 'tensorrt>=10.16' ({error})"
        ) from None
    tactics = current()
    target = tactics.target.device
    if not target.live:
        raise UsageError(f"TensorRT builds for the GPU at hand, and {target.board} is not here: leave device out")
    if target.live != _current_gpu():
        raise UsageError(
            f"TensorRT builds for the current GPU, which is {_current_gpu()}, not {target.live}: make that current"
        )
    tactics.begin()
    preference = f"PREFER_{implementation.upper()}_PYTHON_PLUGINS"
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name) for name in ("STRONGLY_TYPED", preference)]
    network = builder.create_network(sum(1 << int(flag) for flag in flags))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source)):
        _raise_failure(tactics)
        found = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
        raise UsageError(f"TensorRT can't read {source}: {_first(found + errors)}")
    _check_plugins(trt, source, network)
    config = builder.create_builder_config()
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    _set_profile(builder, network, config, profiles)
    _read_timings(config, cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        _raise_failure(tactics)
        raise RunError(f"TensorRT could not build {source}: {_first(errors)}")
    tactics.take_failure()  # one that TensorRT has got over
    provenance = _provenance(trt, source, bytes(serialized), profiles, implementation, tactics)
    beside = _beside(path)
    with whole_file(path) as stream:
        stream.write(bytes(serialized))
        stream.flush()  # a full disk leaves the earlier engine what is said of it
        beside.unlink(missing_ok=True)  # of that one: whoever is killed from here on leaves none beside the new one
    with whole_file(beside) as stream:
        stream.write(json.dumps(provenance, indent=1).encode())
    if cache is not None:
        with whole_file(cache) as stream:
            stream.write(bytes(config.get_timing_cache().serialize()))
    return Engine(path, beside, provenance)


def _check_plugins(trt: Any, source: Path, network: Any) -> None:
    """Does nothing for a network in which every fused node is a plugin. Another parser may take one for its body: for a
    slow one, or, as it goes by the name alone, for another node's. Where the package onnx is missing nobody counts.

    Raises:
        UsageError: some are none.
    """
    try:
        import onnx
    except ImportError:
        return
    nodes = onnx.load(source, load_external_data=False).graph.node
    ours = [node for node in nodes if node.domain.partition(".")[0] == NAMESPACE and node.op_type in plugins()]
    layers = [network.get_layer(index).type for index in range(network.num_layers)]
    found = layers.count(trt.LayerType.PLUGIN_V3)
    if found < len(ours):
        raise UsageError(
            f"TensorRT {trt.__version__} took {found} of the {len(ours)} fused nodes of {source} for plugins: each must"
            f" have the attributes plugin_namespace={NAMESPACE!r} and plugin_version={VERSION!r}"
        )


def _current_gpu() -> str:
    return f"cuda:{int(require_cupy().cuda.runtime.getDevice())}"


def _raise_failure(tactics: Tactics) -> None:
    """Raises what a plugin raised, if one did: it says more than TensorRT, which only sees that one failed."""
    failure = tactics.take_failure()
    if failure is not None:
        raise failure.with_traceback(None)  # what is under construction hangs on it


def collecting_logger(trt: Any) -> tuple[Any, list[str]]:
    """A logger for TensorRT that keeps errors, in the list, and says nothing."""
    errors: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                errors.append(message)

    return Logger(), errors


def _first(errors: list[str]) -> str:
    """The first error, in one line."""
    return one_line(errors[0]) if errors else "it gave no reason"


def _set_profile(builder: Any, network: Any, config: Any, profiles: dict[str, Range]) -> None:
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    for name in profiles:
        if name not in inputs:
            raise UsageError(f"the model has no input {name!r}; it has {', '.join(inputs)}")
    dynamic = {name: tuple(tensor.shape) for name, tensor in inputs.items() if -1 in tuple(tensor.shape)}
    missing = [f"{name} {shape}" for name, shape in dynamic.items() if name not in profiles]
    if missing:
        raise UsageError(f"profiles lacks the least, best and largest shape of {', '.join(missing)}")
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name, shape in dynamic.items():
        least, best, largest = profiles[name]
        for each in (least, best, largest):
            if len(each) != len(shape) or any(
                wanted not in (-1, size) for wanted, size in zip(shape, each, strict=True)
            ):
                raise UsageError(f"the profile {each} of {name} does not go with its shape {shape}")
        if any(not low <= middle <= high for low, middle, high in zip(least, best, largest, strict=True)):
            raise UsageError(f"the profile of {name} must grow: {least}, {best}, {largest}")
        profile.set_shape(name, least, best, largest)
    if config.add_optimization_profile(profile) < 0:
        ranges = "; ".join(f"{name} {', '.join(map(str, profiles[name]))}" for name in dynamic)
        raise UsageError(f"TensorRT refuses the profile {ranges}")


def _read_timings(config: Any, cache: Path | None) -> None:
    if cache is None:
        return
    try:
        known = cache.read_bytes()
    except FileNotFoundError:
        known = b""
    except OSError as error:
        raise UsageError(f"the timing cache {cache} can't be read ({error.strerror})") from None
    # Timings of another GPU or version are refused by TensorRT, and begun anew.
    if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _provenance(
    trt: Any, source: Path, engine: bytes, profiles: dict[str, Range], implementation: str, tactics: Tactics
) -> dict[str, Any]:
    """What the engine was made of, in plain values."""
    return {
        "model": {"path": str(source.resolve()), "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
        "engine": {"sha256": hashlib.sha256(engine).hexdigest(), "bytes": len(engine)},
        "tensorrt": str(trt.__version__),
        "triton": triton_version(),
        "device": tactics.target.device.key,
        "cuda": tactics.target.cuda,
        "implementation": implementation,
        "profiles": {name: [list(shape) for shape in shapes] for name, shapes in profiles.items()},
        "kernels": {operation.kernel.name: code_hash(operation.kernel) for operation in OPERATIONS},
        "namespace": NAMESPACE,
        "tactics": tactics.described(),
    }
