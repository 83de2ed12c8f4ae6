"""The scales of a model's activations, measured on calibration data.

`observe` runs the model over the data once for the extent of every value and, for methods that need the distribution,
once more for its histogram; how many methods are asked for makes no difference. What is held are the values of one
feed and the histograms. Of a model whose values take more than `GROUP_BYTES` a feed, they are taken in groups, and the
model is run for each up to where the group needs it.

`save` and `load` keep the result under a key that is made of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.calibration.calibrators import TARGETS, Method, Observer, Settings
from tilewright.tuner.model.calibration.feeds import Array, Feed
from tilewright.tuner.model.calibration.histogram import Extent
from tilewright.tuner.model.graph import dtype_name, elements
from tilewright.tuner.model.session import main_values, run
from tilewright.tuning_db import strict_json
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import ModelError, UsageError
from tilewright.tuning_db.text import shown

__all__ = ["Method", "Settings", "calibrate", "calibration_key", "load", "observe", "save"]

Scales = dict[Method, dict[str, float]]
Progress = Callable[[int, int], None]

GROUP_BYTES = 512 << 20
"""Values of one feed that are held at a time."""

FLOATS = ("fp32", "fp16", "bf16")
FORMAT = 1


def calibrate(
    model: ir.Model,
    feeds: Sequence[Feed],
    values: Sequence[str],
    *,
    methods: Sequence[Method],
    target: str,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Scales:
    """The symmetric scale of each value by each method: q = round(x / scale), one scale a tensor.

    Args:
        model, feeds, values, methods, settings, progress: see `observe`.
        target: `int8`, scale = range / 127; `uint8`, scale = range / 255, of values that are never negative; or
            `fp8e4m3`, scale = range / 448.

    Raises:
        UsageError: no such target.
        ModelError, MissingDependencyError, RunError: see `observe`.
    """
    if target not in TARGETS:
        raise UsageError(f"{target=} must be one of {', '.join(TARGETS)}")
    observers = observe(model, feeds, values, methods=methods, settings=settings, progress=progress)
    return {
        method: {name: observer.scale(method, target) for name, observer in observers.items()} for method in methods
    }


def observe(
    model: ir.Model,
    feeds: Sequence[Feed],
    values: Sequence[str],
    *,
    methods: Sequence[Method],
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> dict[str, Observer]:
    """What the methods need to know of each value, for scales of any target.

    Args:
        model: the model in memory; it is left as it is.
        feeds: calibration data, gone through once or twice.
        values: names of fp32, fp16 or bf16 values of the main graph.
        methods: see `calibrators`.
        settings: of the calibrators.
        progress: called after each run of a feed with how many are done, and how many there are in all.

    Raises:
        ModelError: there is no data, a value is not the model's or not a float, or is NaN or infinite for some data.
        MissingDependencyError, RunError: see `session.run`.
    """
    if not len(feeds):
        raise ModelError("there are no calibration samples: give at least one")
    groups = grouped(model, values)
    passes = 1 if set(methods) <= {Method.MINMAX} else 2
    report = _counted(progress, passes * len(groups) * len(feeds))
    observers: dict[str, Observer] = {}
    for group in groups:
        extents = _extents(model, feeds, group, report)
        observers |= {name: Observer(extent, methods, settings or Settings()) for name, extent in extents.items()}
        if passes == 2:
            for results in run(model, feeds, group):
                for name, array in results.items():
                    observers[name].add(_floats(array))
                report()
    return {name: observers[name] for name in values}


def calibration_key(
    files: Iterable[Path],
    data: str,
    values: Sequence[str],
    *,
    methods: Sequence[Method],
    target: str,
    settings: Settings | None = None,
) -> str:
    """A hash of all that scales depend on: the model's files, the data (`Samples.digest`), the values and the methods.

    Raises:
        ModelError: a file can't be read.
    """
    parts: dict[str, Any] = {"format": FORMAT, "data": data, "values": list(values), "target": target}
    parts["methods"] = [str(method) for method in methods]
    parts["settings"] = asdict(settings or Settings())
    parts["files"] = []
    for path in files:
        try:
            with path.open("rb") as stream:
                parts["files"].append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise ModelError(f"{path} can't be read ({error.strerror})") from None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save(path: Path, key: str, scales: Mapping[Method, Mapping[str, float]]) -> None:
    """Writes scales to a file, whole or not at all.

    Raises:
        UsageError: the file can't be written.
    """
    content = {"format": FORMAT, "key": key, "scales": {str(method): dict(each) for method, each in scales.items()}}
    with whole_file(path) as stream:
        stream.write(json.dumps(content, indent=1).encode())


def load(path: Path, key: str) -> Scales | None:
    """The scales that `save` wrote; None if there is no such file, or it was written under another key.

    Raises:
        ModelError: the file can't be read or isn't one of `save`.
    """
    try:
        content = strict_json.read_object(path.read_bytes())
        fields = {"format": strict_json.integer(1), "key": strict_json.word, "scales": strict_json.anything}
        strict_json.check_fields(content, fields)
        if (content["format"], content["key"]) != (FORMAT, key):
            return None
        methods: dict[str, Any] = content["scales"]
        for method, scales in methods.items():
            if method not in list(Method):
                raise ValueError(f"{shown(method)} is no method")
            if not isinstance(scales, dict):
                raise ValueError(f"{method} is {shown(scales)} and must be an object")
            strict_json.check_fields(scales, dict.fromkeys(scales, strict_json.positive))
        return {
            Method(method): {name: float(scale) for name, scale in each.items()} for method, each in methods.items()
        }
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{path} can't be read ({error.strerror})") from None
    except ValueError as error:
        raise ModelError(f"{path} holds no calibration: {error}; delete it to calibrate anew") from None


def grouped(model: ir.Model, names: Sequence[str]) -> list[list[str]]:
    """The values, each once, in groups that take at most `GROUP_BYTES` a feed, or are single."""
    known = main_values(model)
    groups: list[list[str]] = []
    room = 0
    for name in dict.fromkeys(names):
        value = known.get(name)
        if value is None:
            raise ModelError(f"model {model.graph.name!r} has no value {name!r} in its main graph to calibrate")
        if (kind := dtype_name(value)) not in FLOATS:
            raise ModelError(f"value {name!r} is {kind}: only {', '.join(FLOATS)} are calibrated")
        size = 4 * (elements(value) or 0)
        if not groups or size > room:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _extents(
    model: ir.Model, feeds: Sequence[Feed], names: Sequence[str], report: Callable[[], None]
) -> dict[str, Extent]:
    extents = {name: Extent() for name in names}
    for number, results in enumerate(run(model, feeds, names)):
        for name, array in results.items():
            if not extents[name].add(_floats(array)):
                count = int(np.count_nonzero(~np.isfinite(_floats(array))))
                raise ModelError(
                    f"value {name!r} has {count} NaN or infinite of {array.size} numbers for calibration sample "
                    f"{number}: it has no scale"
                )
        report()
    return extents


def _floats(array: Array) -> Array:
    """fp16 and bf16 as fp32, in which NumPy finds extremes ten times as fast."""
    return array if array.dtype == np.float32 else array.astype(np.float32)


def _counted(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return report
