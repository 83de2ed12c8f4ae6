"""ONNX Runtime as the judge of what a model computes: on the CPU, its own graph optimisations off.

With optimisations on, ONNX Runtime would fuse and reorder what is to be compared; and it is made to round values of
fp16, which it leaves out else (`rounded.py`). `run` gives any value of the main graph, not only its outputs, feed by
feed, so what is held at a time is the values of one feed.

A model in memory is run without a second copy of its weights. ONNX Runtime gets a file that says of each large weight
only that it lies in another file, and the arrays that we have to use in their place; the other file is empty. Up to
`PREPACK_BYTES` of weights it keeps a copy in the layout that its kernels like, which halves the time of small GEMMs.

With its optimisations on, as users have them, it may refuse what it runs without: `check_default` tries that. There
too the weights of a large model are held once, for which its optimisers have to be kept from computing with them.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import google.protobuf.message
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from tilewright.tuner.model.calibration.feeds import Array, Feed
from tilewright.tuner.model.graph import constant
from tilewright.tuner.model.messages import fault, listed, quoted
from tilewright.tuner.model.rounded import has_fp16, round_fp16
from tilewright.tuning_db.errors import MissingDependencyError, ModelError, RunError

INLINE_BYTES = 16 << 10
"""Smaller tensors stay in the file: shape inference reads them there, and a thousand of them are nothing."""

PREPACK_BYTES = 128 << 20
"""Weights that take more than this in fp32, which ONNX Runtime computes in, are used as they lie: a second copy of a
large model costs more than it gains."""

OWN_BYTES = 64 << 20
"""A larger file, which then has its weights in it, ONNX Runtime reads itself, and holds them once; we would twice. Of a
smaller one it uses what we read, with external weights mapped."""

FOLDING = (
    "ConstantFolding",
    "ConvAddFusion",
    "ConvBNFusion",
    "ConvMulFusion",
    "MatMul_BatchNormalization_Fusion",
)
"""ONNX Runtime's optimisers that compute weights from weights (1.32): a second copy, and of weights that are ours in
place of a file's, which they look for in that file, one of zeros."""

LONGEST_NODE_S = 5.0
"""How long an interrupted run waits for the node that is being computed, which can't be interrupted."""

# Types that NumPy has no dtype of and ONNX Runtime no NumPy array: they travel as bits of the integer type. FP32 holds
# every number of each, so what comes out is cast to it in the graph and back here, without loss.
_FOREIGN: Mapping[ir.DataType, tuple[type, type]] = {
    ir.DataType.BFLOAT16: (ml_dtypes.bfloat16, np.uint16),
    ir.DataType.FLOAT8E4M3FN: (ml_dtypes.float8_e4m3fn, np.uint8),
    ir.DataType.FLOAT8E5M2: (ml_dtypes.float8_e5m2, np.uint8),
}
_FOREIGN_NAMES = {"tensor(bfloat16)", "tensor(float8e4m3fn)", "tensor(float8e5m2)"}


def run(
    model: ir.Model | Path, feeds: Iterable[Feed], outputs: Sequence[str] | None = None
) -> Iterator[dict[str, Array]]:
    """The values of some outputs of a model for each of some feeds, in their order; nothing is computed ahead.

    Args:
        model: in memory, left as it is, or a file.
        feeds: an array for every input of the model, in its shape and dtype.
        outputs: names of values of the main graph, which may be inputs and constants too; by default the model's
            outputs.

    Raises:
        MissingDependencyError: there is no ONNX Runtime.
        ModelError: the model can't be loaded or has no value of that name, or a feed doesn't fit it.
        RunError: ONNX Runtime failed while it ran.
    """
    session = Session(model, outputs)
    return (session.run(feed) for feed in feeds)


def check_default(model: ir.Model | Path, name: str, feed: Feed) -> None:
    """Does nothing for a model that ONNX Runtime loads with its optimisations on, and then runs.

    With weights of up to `PREPACK_BYTES` in fp32 its options are the default ones, and its optimisers see the weights.
    Of more weights they would make copies: then its level is EXTENDED, without the layouts of the highest, nothing is
    folded (`FOLDING`), and nodes are run as late as they can be. Its optimisers see zeros in place of the weights,
    which are there when the model runs; so a model that is refused is tried again with weights that they see, which
    ONNX Runtime copies, and it is that second refusal which counts.

    Raises: what `run` does, of a model of that name.
    """
    with suppress(ModelError, RunError):
        Session(model, default=name).run(feed)
        return
    Session(model, default=name, shown=True).run(feed)


class Session:
    """A model that is ready to run; see `run`. Not to be used by two threads at a time."""

    def __init__(
        self,
        model: ir.Model | Path,
        outputs: Sequence[str] | None = None,
        *,
        default: str | None = None,
        shown: bool = False,
    ) -> None:
        """As `run`, and raises what that does. `default` is the name of one that is to be run as `check_default` says:
        optimised, and nothing rounded; and `shown`, whether optimisers see weights that take more than
        `PREPACK_BYTES`."""
        self._default = default is not None
        self._shown = shown
        self._label = default or (str(model) if isinstance(model, Path) else f"model {model.graph.name!r}")
        self._constants: dict[str, Array] = {}
        self._casts: dict[str, tuple[str, type]] = {}  # by output: what is fetched instead, and what it becomes again
        self._shared: dict[str, Any] = {}  # weights, which ONNX Runtime uses where they are
        self._session: Any = None
        self._outputs: list[str] = []
        if isinstance(model, Path):
            large = model.is_file() and model.stat().st_size > OWN_BYTES
            if large and (self._default or not _file_has_fp16(model)) and self._open_file(model, outputs):
                return
            model = _read(model)
        self._open_model(model, outputs)

    def run(self, feed: Feed) -> dict[str, Array]:
        """The outputs for one feed. They may share memory with it.

        Raises:
            ModelError: the feed doesn't fit the model.
            RunError: ONNX Runtime failed.
        """
        for name in self._inputs:
            if name not in feed:
                given = listed(list(feed)) or "nothing"
                raise ModelError(f"{self._label}: its input {quoted(name)} is not fed (given: {given})")
        for name in feed:
            if name not in self._inputs:
                raise ModelError(f"{self._label} has no input {quoted(name)} (inputs: {listed(self._inputs)})")
        fetched = [
            self._casts[name][0] if name in self._casts else name
            for name in self._outputs
            if name not in self._constants and name not in self._inputs
        ]
        results: dict[str, Array] = {}
        if fetched:
            try:
                arrays = self._computed(fetched, {name: _given(array) for name, array in feed.items()})
            except _errors() as error:
                refused = type(error).__name__ == "InvalidArgument"
                raise (ModelError if refused else RunError)(
                    f"{self._label}: ONNX Runtime {'refuses the feed' if refused else 'failed'}: {_said(error)}"
                ) from None
            results = dict(zip(fetched, arrays, strict=True))
        return {name: self._result(name, feed, results) for name in self._outputs}

    def _computed(self, fetched: Sequence[str], feed: Mapping[str, Any]) -> list[Array]:
        """What ONNX Runtime gives for a feed, while Ctrl-C and SIGTERM work.

        Python handles signals in the main thread between its own instructions, and a model may run for hours: that
        thread waits for another one. ONNX Runtime looks at `terminate` after every node, those of loops too.
        """
        if threading.current_thread() is not threading.main_thread():
            return list(self._session.run(fetched, feed))
        options = _runtime().RunOptions()
        running: Future[list[Array]] = Future()

        def compute() -> None:
            try:
                running.set_result(self._session.run(fetched, feed, options))
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                running.set_exception(error)

        thread = threading.Thread(target=compute, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise RunError(f"{self._label}: no thread can be started to run it ({error})") from None
        try:
            wait([running])
        except BaseException:
            options.terminate = True
            wait([running], timeout=LONGEST_NODE_S)
            raise
        return running.result()

    def _result(self, name: str, feed: Feed, results: Mapping[str, Array]) -> Array:
        if name in self._constants:
            return self._constants[name]
        if name in self._inputs:
            return feed[name]
        if name in self._casts:
            source, dtype = self._casts[name]
            return results[source].astype(dtype)
        return results[name]

    def _open_file(self, path: Path, outputs: Sequence[str] | None) -> bool:
        """Loads a file as it is; False if one of the outputs is not its own, or of a type that NumPy lacks."""
        self._load(path, path.stat().st_size)
        kinds = {output.name: output.type for output in self._session.get_outputs()}
        self._outputs = list(dict.fromkeys(kinds if outputs is None else outputs))
        if any(kinds.get(name) in _FOREIGN_NAMES | {None} for name in self._outputs):
            self._session = None
            return False
        self._inputs = [given.name for given in self._session.get_inputs()]
        return True

    def _open_model(self, model: ir.Model, outputs: Sequence[str] | None) -> None:
        values = main_values(model)
        wanted = [str(output.name) for output in model.graph.outputs] if outputs is None else list(outputs)
        for name in wanted:
            if name not in values:
                raise ModelError(f"{self._label} has no value {quoted(name)} in its main graph")
        self._outputs = list(dict.fromkeys(wanted))
        required = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        self._inputs = [str(value.name) for value in required]
        for name in self._outputs:
            array = constant(values[name])
            if array is not None:
                self._constants[name] = array
        fetched = [name for name in self._outputs if name not in self._constants and name not in self._inputs]
        if not fetched:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
                self._load(*self._shell(model, fetched, Path(folder)))
        except OSError as error:
            raise RunError(
                f"{tempfile.gettempdir()}: {error.strerror or error}: make room, or name another folder in TMPDIR"
            ) from None

    def _shell(self, model: ir.Model, fetched: Sequence[str], folder: Path) -> tuple[Path, int]:
        """A file of the model without its large weights, with `fetched` as outputs, and how many bytes these weights,
        which go into `_shared`, take in fp32. Values of fp16 are rounded in it.

        The nodes that none of them needs are left out.
        """
        shell = model.clone()
        graph = shell.graph
        values = main_values(shell)
        graph.outputs.clear()
        for name in fetched:
            value = values[name]
            if value.dtype is not None and value.dtype in _FOREIGN:
                node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
                node.outputs[0].name = f"{name}/fp32"
                node.outputs[0].dtype = ir.DataType.FLOAT
                node.outputs[0].shape = value.shape
                graph.append(node)
                self._casts[name] = str(node.outputs[0].name), _FOREIGN[value.dtype][0]
                value = node.outputs[0]
            graph.outputs.append(value)
        if not self._default:
            graph.outputs.extend(_kept_caches(list(graph.outputs)))
        RemoveUnusedNodesPass()(shell)
        LiftConstantsToInitializersPass(size_limit=INLINE_BYTES)(shell)

        for each in shell.graphs():
            for value in each.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and not (each is graph and _shareable(tensor)):
                    value.const_value = ir.tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)
        largest = total = 0
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not _shareable(tensor):
                continue
            self._shared[name] = _ort_value(np.ascontiguousarray(tensor.numpy()))
            value.const_value = ir.ExternalTensor(
                "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
            total += 4 * tensor.size
            largest = max(largest, tensor.nbytes)
        # ONNX Runtime looks whether the file is there and doesn't read it: a hole of the right size.
        (folder / "weights").touch()
        os.truncate(folder / "weights", largest)
        path = folder / "model.onnx"
        proto = ir.to_proto(shell)
        path.write_bytes((proto if self._default else round_fp16(proto)).SerializeToString())
        return path, total

    def _load(self, path: Path, weights: int) -> None:
        """Loads a file of so many bytes of weights in fp32, and what is shared."""
        options = (_default_options if self._default else _options)(weights)
        if self._default and (self._shown or weights <= PREPACK_BYTES):
            options.add_external_initializers(list(self._shared), list(self._shared.values()))
        else:
            for name, shared in self._shared.items():
                options.add_initializer(name, shared)
        off = {"disabled_optimizers": list(FOLDING)} if self._default and weights > PREPACK_BYTES else {}
        try:
            self._session = _runtime().InferenceSession(str(path), options, providers=["CPUExecutionProvider"], **off)
        except _errors() as error:
            raise ModelError(f"{self._label}: ONNX Runtime can't load it: {_said(error, path)}") from None


def _kept_caches(wanted: Sequence[ir.Value]) -> list[ir.Value]:
    """The present keys and values of every `Attention` that the wanted values need and that has past ones: without
    outputs for them ONNX Runtime's kernel stops (1.32)."""
    found: list[ir.Value] = []
    seen: set[ir.Node] = set()
    waiting = [value.producer() for value in wanted]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "Attention" and node.domain == "" and len(node.inputs) > 4 and node.inputs[4] is not None:
            found += [value for value in node.outputs[1:3] if value not in wanted]
        waiting += [value.producer() for value in node.inputs if value is not None]
    return found


def main_values(model: ir.Model) -> dict[str, ir.Value]:
    """Every named value of the main graph: inputs, initializers and what its nodes give."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return {value.name: value for value in values if value.name}


@cache
def _runtime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise MissingDependencyError(
                f"running a model needs ONNX Runtime ({error}): pip install onnxruntime"
            ) from None
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):  # C++ code that is interrupted raises an ImportError from it
                raise KeyboardInterrupt from None
            cause = cause.__cause__ or cause.__context__
        raise RunError(f"ONNX Runtime is installed, and can't be imported: {fault(error)}") from None
    module: ModuleType = onnxruntime
    return module


@cache
def _errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its own errors have no class in common."""
    _runtime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return *own, RuntimeError, ValueError


def _options(weights: int) -> Any:
    """Session options for a model whose weights take so many bytes in fp32."""
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    # Nodes as late as they can be: in the default order all casts of weights come first, and all their results live.
    options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
    return _sparing(options, weights)


def _default_options(weights: int) -> Any:
    """Session options as they are, but for what bounds threads and memory, and for what is logged."""
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    if weights > PREPACK_BYTES:
        # The level above casts weights of fp16, and lays those of convolutions out anew, all before anything runs.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED  # see `_options`
    return _sparing(options, weights)


def _sparing(options: Any, weights: int) -> Any:
    """Options for weights that take so many bytes in fp32, which log nothing."""
    options.log_severity_level = 4  # fatal; what is an error is raised as well
    # Threads that wait for work by running in circles take the cores that other processes need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if weights > PREPACK_BYTES:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # which keeps twice what is needed at a time, and gives nothing back
    return options


def _shareable(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is large, and an array of its type has an element in each item: of packed int4 and of texts it
    has not."""
    dtype = tensor.dtype
    return dtype != ir.DataType.STRING and dtype.bitwidth % 8 == 0 and tensor.nbytes >= INLINE_BYTES


def _ort_value(array: Array) -> Any:
    """An `OrtValue` over an array's own memory."""
    value = _runtime().OrtValue
    for kind, (dtype, bits) in _FOREIGN.items():
        if array.dtype == dtype:
            return value.ortvalue_from_numpy_with_onnx_type(array.view(bits), int(kind.value))
    return value.ortvalue_from_numpy(array)


def _given(array: Array) -> Any:
    array = np.ascontiguousarray(array)
    return _ort_value(array) if any(array.dtype == dtype for dtype, _ in _FOREIGN.values()) else array


def _read(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except OSError as error:
        raise ModelError(f"{path} can't be read ({error.strerror})") from None
    except (google.protobuf.message.DecodeError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path} is no ONNX model: {_said(error)}") from None


def _file_has_fp16(path: Path) -> bool:
    """See `has_fp16`; False of a file that is no model."""
    try:
        return has_fp16(onnx.load(path, load_external_data=False))
    except (OSError, google.protobuf.message.DecodeError):
        return False  # what is wrong with it is said by whoever reads it next


def _said(error: Exception, path: Path | None = None) -> str:
    """What an error of ONNX Runtime says, in one line, without its marks and the name of the file it loaded."""
    line = fault(error) or type(error).__name__
    if line.startswith("[ONNXRuntimeError]"):
        line = line.split(" : ", 3)[-1]
    return line.removeprefix(f"Load model from {path} failed:").strip()
