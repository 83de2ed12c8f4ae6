"""`register`: every plugin in TensorRT's registry, once, with both implementations."""

from __future__ import annotations

import functools
import inspect
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Union

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.live import live_cuda
from tilewright.kernels.lookup import check_supported
from tilewright.kernels.tensorrt.catalogue import NAMESPACE, VERSION, plugins, typed
from tilewright.kernels.tensorrt.context import Target, current, identity, set_current
from tilewright.kernels.tensorrt.descriptions import case_of, described_outputs, launch_parameters
from tilewright.kernels.tensorrt.jit import enqueue
from tilewright.kernels.tensorrt.library import plugin_api, tensorrt
from tilewright.kernels.tensorrt.operation import PluginVariant
from tilewright.kernels.tensorrt.ptx import CUDA, isa_for
from tilewright.kernels.tensorrt.tactics import MOST
from tilewright.kernels.tensorrt.types import TENSORRT_NAMES
from tilewright.tuning_db import env
from tilewright.tuning_db.errors import MissingDependencyError, UnsupportedError, UsageError

_lock = threading.Lock()
_registered: set[str] = set()
_begun: set[str] = set()
"""Plugins that TensorRT may have been told of already: `register` may be interrupted anywhere, and called again."""


def register(
    device: str | None = None,
    *,
    cuda: str | None = None,
    tactics: int = MOST,
    db: str | os.PathLike[str] | None = None,
) -> None:
    """Makes every plugin known to TensorRT, in the namespace `tilewright`, and says what engines are built for.

    A second call registers nothing again; it may name another device. Safe to call from many threads.

    Args:
        device: an arch, a board or a live GPU, as `autotune --device` takes it; by default the GPU at hand.
        cuda: the CUDA version of the oldest driver that shall run the engines, as nvidia-smi prints it ("12.4"): their
            kernels are PTX that it reads. By default that of the driver at hand if it is older than 12.8, else 12.8.
        tactics: how many configurations of a kernel TensorRT is offered at the most; it compiles and times each.
        db: the folder of the tuning databases that tactics come from; by default `$TILEWRIGHT_DB_DIR`, or the user data
            directory. Plugins that launch from Python ("jit") look into the latter whatever is named here.

    Raises:
        MissingDependencyError: TensorRT is not installed; or no device is named and there is no GPU.
        UnsupportedError: TensorRT is too old.
        UnknownDeviceError: no device has that name.
        UsageError: no PTX that this driver reads knows the device, or the driver at hand is older; `tactics` is less
            than 1; there can be no such folder; or this process interprets kernels.
    """
    if env.interpreting():
        raise UsageError(f"{env.INTERPRET} is set: plugins are compiled; unset it before the first import of Triton")
    if type(tactics) is not int or tactics < 1:
        raise UsageError(f"{tactics=} must be an integer of at least 1")
    if cuda is not None and not isinstance(cuda, str):
        raise UsageError(f'{cuda=} must be the CUDA version of the driver as text, such as "12.4"')
    folder = None if db is None else _existing(db)
    trt, api = tensorrt(), plugin_api()
    try:
        resolved = resolve_device(device or "cuda:0")
    except MissingDependencyError as error:
        if device is not None:
            raise
        raise MissingDependencyError(
            f"name the device to build for, register(device=…), for here is none: {error}"
        ) from None
    live = live_cuda()
    chosen = cuda or min(filter(None, (live, CUDA)), key=_numbers)
    isa = isa_for(resolved.arch, chosen)
    if resolved.live and live and isa > isa_for(resolved.arch, live):
        raise UsageError(
            f"{cuda=} is newer than the driver at hand, which is of CUDA {live}: leave it out, or update that"
        )
    with _lock:
        set_current(Target(resolved, chosen, tactics, folder))
        for name, variant in plugins().items():
            if name not in _registered:
                _register(variant, trt, api)
                _registered.add(name)


def _existing(db: str | os.PathLike[str]) -> Path:
    """The folder of the databases that was named: one that isn't there holds no record, and would do so silently."""
    if not isinstance(db, str | os.PathLike):
        raise UsageError(f"{db=} must be a folder's path")
    folder = env.database_dir(db)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} of tuning databases: tune first, or leave db out")
    return folder


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _register(variant: PluginVariant, trt: Any, api: Any) -> None:
    identifier = f"{NAMESPACE}::{variant.name}"
    operation = variant.operation
    attributes = {attribute.name: attribute.type for attribute in operation.attributes}
    names, count = variant.inputs, len(variant.inputs)

    def split(arguments: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any], Sequence[Any]]:
        """Tensors, attributes by name, and what comes behind them."""
        end = count + len(attributes)
        return arguments[:count], dict(zip(attributes, arguments[count:end], strict=True)), arguments[end:]

    @noting_failures
    def describe(*descriptions: Any, **given: Any) -> Any:
        outputs = described_outputs(variant, descriptions, given, trt, api)
        return outputs if len(outputs) > 1 else outputs[0]

    @noting_failures
    def autotune(*arguments: Any) -> Any:
        inputs, given, (outputs,) = split(arguments)
        return combinations(variant, inputs, outputs, given, api)

    @noting_failures
    def autotune_jit(*arguments: Any) -> Any:
        inputs, given, (outputs,) = split(arguments)
        return combinations(variant, inputs, outputs, given, api, ahead=False)

    @noting_failures
    def aot(*arguments: Any) -> Any:
        inputs, given, (outputs, tactic) = split(arguments)
        plan = current().get(case_of(variant, inputs, outputs, given), int(tactic)).plan
        return plan.name, plan.ptx, *launch_parameters(plan, variant, inputs, api)

    @noting_failures
    def jit(*arguments: Any, stream: int) -> None:
        inputs, given, (outputs,) = split(arguments)
        enqueue(variant, inputs, outputs, given, stream)

    results = len(variant.outputs)
    described = tuple[(api.TensorDesc,) * results] if results > 1 else api.TensorDesc  # type: ignore[misc]
    text = Union[str, bytes]  # noqa: UP007 - as TensorRT compares it
    kernel = tuple[text, text, api.KernelLaunchParams, api.SymExprs]
    _sign(describe, {**dict.fromkeys(names, api.TensorDesc), **attributes}, described)
    _sign(autotune, dict.fromkeys((*names, *attributes, "outputs")), list[api.AutoTuneCombination])
    _sign(aot, dict.fromkeys((*names, *attributes, "outputs", "tactic")), kernel)
    _sign(jit, dict.fromkeys((*names, *attributes, "outputs", "stream")), None)
    # TensorRT takes a description once; implementations replace those it has.
    if variant.name not in _begun or not hasattr(getattr(api.op, NAMESPACE, None), variant.name):
        _begun.add(variant.name)
        api.register(identifier)(describe)
    api.autotune(identifier)(autotune)
    api.aot_impl(identifier)(aot)
    api.impl(identifier)(jit)
    _watch_creator(trt.get_plugin_registry().get_creator(variant.name, VERSION, NAMESPACE), variant, autotune_jit)


def combinations(
    variant: PluginVariant,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    attributes: Mapping[str, Any],
    api: Any,
    *,
    ahead: bool = True,
) -> list[Any]:
    """The types and formats that go together, with the tactics of each, where kernels are compiled ahead of time. Types
    are the network's own, which is typed.

    Raises:
        ProblemError, UsageError, UnsupportedError: there is none; the message says why not the linear one.
    """
    linear = case_of(variant, inputs, outputs, attributes, ["LINEAR"] * (len(inputs) + len(outputs)))
    linear.check(ahead=ahead)
    types = ",".join(TENSORRT_NAMES[tensor.dtype] for tensor in (*linear.inputs, *linear.outputs))
    found, refused = [], None
    for formats in variant.operation.formats(linear.tensors, linear.outputs, attributes):
        case = case_of(variant, inputs, outputs, attributes, formats)
        try:
            if ahead:
                numbers = [tactic.number for tactic in current().of(case)]
            else:
                case.check(ahead=ahead)
                check_supported(case.kernel, case.problem(case.profile.opt), current().target.device)
                numbers = []
        except UnsupportedError as error:
            refused = refused or error
            continue
        found.append(api.AutoTuneCombination(types, ",".join(formats), numbers))
    if not found:
        assert refused is not None
        raise refused
    return found


def _sign(function: Callable[..., Any], parameters: Mapping[str, Any], result: Any) -> None:
    """Gives a function the signature that TensorRT reads its tensors and attributes from."""
    empty = inspect.Parameter.empty
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind or empty)
            for name, kind in parameters.items()
        ],
        return_annotation=result,
    )


def noting_failures(function: Callable[..., Any]) -> Callable[..., Any]:
    """That function, noting what it raises: TensorRT calls it through C++, which prints the error and forgets it."""

    @functools.wraps(function)
    def noting(*arguments: Any, **given: Any) -> Any:
        try:
            return function(*arguments, **given)
        except Exception as error:
            current().note_failure(error)
            raise

    return noting


def _watch_creator(creator: Any, variant: PluginVariant, autotune_jit: Callable[..., Any]) -> None:
    """Has every new plugin's attributes checked and put in order, and gives it an identity; and formats without tactics
    if it launches from Python, where they count for nothing.

    TensorRT passes attributes in the order in which they came, calls a plugin without one that it needs, and shares
    timings between plugins that differ in their attributes or in their kernels' revision.
    """
    create = creator.create_plugin
    if hasattr(create, "__wrapped__"):
        return  # by a call of `register` that was interrupted

    @noting_failures
    @functools.wraps(create)
    def checked(name: str, namespace: str, fields: Any, phase: Any, *request: Any) -> Any:
        check_fields(variant, fields)
        plugin = create(name, namespace, [_plain(field) for field in fields], phase, *request)
        plugin.attrs = {
            attribute.name: typed(
                variant.name,
                attribute.name,
                attribute.type,
                value.rstrip("\0") if isinstance(value := plugin.attrs[attribute.name], str) else value,
            )
            for attribute in variant.operation.attributes
        }
        suffix = identity(variant, plugin.attrs, current().target)
        plugin.get_timing_cache_id = lambda: suffix
        if hasattr(plugin, "enqueue"):
            plugin.autotune_function = autotune_jit
        return plugin

    creator.create_plugin = checked


def _plain(field: Any) -> Any:
    """A field whose number is one: TensorRT 10.16 makes an int of an array of one, which NumPy 2.4 no longer does."""
    number = field.type.name != "CHAR" and field.data.size == 1
    return SimpleNamespace(name=field.name, type=field.type, data=field.data[0] if number else field.data)


def check_fields(variant: PluginVariant, fields: Any) -> None:
    """Does nothing if the fields are the plugin's attributes, each of its type.

    Raises:
        UsageError: one is missing, unknown or of another type.
    """
    declared = {attribute.name: attribute.type for attribute in variant.operation.attributes}
    found = {field.name: field.type.name for field in fields}
    for name in found:
        if name not in declared:
            raise UsageError(f"{variant.name} has no attribute {name!r}; it has {', '.join(declared)}")
    missing = [f"{name} ({kind.__name__})" for name, kind in declared.items() if name not in found]
    if missing:
        raise UsageError(f"{variant.name} lacks the attributes {', '.join(missing)}: plugin_attributes() fills them in")
    for field in fields:
        kind = declared[field.name]
        accepted = {int: ("INT",), float: ("FLOAT", "INT"), str: ("CHAR",)}[kind]
        if not found[field.name].startswith(accepted):
            raise UsageError(
                f"{variant.name}: attribute {field.name} is {found[field.name]} and must be {kind.__name__}"
            )
        if kind is str:
            _check_text(variant, field)
        elif field.data.size != 1 or not math.isfinite(field.data.item()):
            values = ", ".join(map(str, field.data.ravel()[:4]))
            raise UsageError(f"{variant.name}: attribute {field.name} is [{values}] and must be one finite number")


def _check_text(variant: PluginVariant, field: Any) -> None:
    try:
        bytes(field.data).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{variant.name}: attribute {field.name} is no UTF-8: {bytes(field.data)[:40]!r}") from None
