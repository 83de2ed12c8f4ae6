"""A plugin's whole life as TensorRT's builder leads it, through Python's methods and through the C++ virtual functions.

Without a builder and without a GPU: only the builder's own objects, its expressions and launch parameters, are made
here (`cxx`). Run as a script it writes what became of the jobs on stdin to the file it is given, for the tests' own
process interprets kernels:

    {"plugin": "FusedGemmBias", "through": "python" or "c++", "attributes": {…},
     "inputs": [{"dims": [[1, 128, 4096], 512], "dtype": "fp16"}, …], "sizes": [[64], …]}

A dimension that is a list is dynamic: least, best and largest. `sizes` are those to evaluate at, one number for each
dynamic dimension in the order in which they stand. `raw` are attributes as they are, in place of `attributes` and what
these leave out; `order` is another order of them; with `plans`, the answer has launch plans made of what TensorRT was
given.
"""

from __future__ import annotations

import ctypes as c
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cxx
import numpy as np
import tensorrt_bindings as trt
from cxx import Symbol

sys.modules["tensorrt"] = trt
import tensorrt_bindings.plugin as api  # noqa: E402 - by the name that it is known by from here on

sys.modules["tensorrt.plugin"] = api

import triton  # noqa: E402

import tilewright.kernels.tensorrt as plugins  # noqa: E402
from tilewright.kernels.tensorrt.catalogue import find_plugin  # noqa: E402
from tilewright.kernels.tensorrt.context import current  # noqa: E402
from tilewright.kernels.tensorrt.expressions import Expression, dimension  # noqa: E402
from tilewright.kernels.tensorrt.plans import LaunchPlan  # noqa: E402
from tilewright.kernels.tensorrt.ptx import parameter_types  # noqa: E402
from tilewright.kernels.tensorrt.types import canonical, member  # noqa: E402

FIELD_TYPES = {int: (np.int64, "INT64"), float: (np.float32, "FLOAT32")}
FORMATS = trt.TensorFormat


def fields(attributes: Mapping[str, Any]) -> list[Any]:
    """Plugin fields as TensorRT's ONNX parser makes them. Keep the list: a collection holds addresses of these."""
    made = []
    for name, value in attributes.items():
        if isinstance(value, str):
            made.append(trt.PluginField(name, value.encode(), trt.PluginFieldType.CHAR))
        else:
            values = value if isinstance(value, list) else [value]
            kind, text = FIELD_TYPES[type(values[0])]
            made.append(trt.PluginField(name, np.array(values, kind), getattr(trt.PluginFieldType, text)))
    return made


def creator_of(name: str) -> Any:
    return trt.get_plugin_registry().get_creator(name, plugins.VERSION, plugins.NAMESPACE)


def created(name: str, attributes: Mapping[str, Any], request: str) -> tuple[Any, list[Any]]:
    """A plugin, and its fields, which must be kept."""
    kept = fields(attributes)
    asked = getattr(trt.QuickPluginCreationRequest, request)
    collection = trt.PluginFieldCollection(kept)
    return creator_of(name).create_plugin(name, plugins.NAMESPACE, collection, trt.TensorRTPhase.BUILD, asked), kept


def enqueue(plugin: Any, tensors: list[tuple[list[int], Any, int]], inputs: int, stream: int, through: str) -> None:
    """Has a plugin launch on tensors of (shape, data type, address), the first of them inputs."""
    strides = [[int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))] for shape, _, _ in tensors]
    if through == "python":
        described = []
        for shape, dtype, _ in tensors:
            one = trt.PluginTensorDesc()
            one.dims, one.type, one.format, one.scale = trt.Dims(shape), dtype, trt.TensorFormat.LINEAR, 1.0
            described.append(one)
        addresses = [address for _, _, address in tensors]
        groups = [(each[:inputs], each[inputs:]) for each in (described, addresses, list(map(tuple, strides)))]
        plugin.enqueue(*groups[0], *groups[1], *groups[2], stream)
        return
    places = c.cast(c.cast(id(plugin), c.POINTER(cxx.pointer))[2], c.POINTER(cxx.pointer))
    kinds = {cxx.call(places[2 * index], 1, cxx.InterfaceInfo).kind: places[2 * index] for index in range(4)}
    runtime = cxx.call(kinds[b"PLUGIN"], 4, cxx.pointer, _int(2))
    described = [cxx.TensorDescription(_plain(shape), int(dtype), 0, 1.0) for shape, dtype, _ in tensors]
    arrays: list[Any] = []
    for kind, values in (
        (cxx.TensorDescription, described),
        (cxx.pointer, [address for _, _, address in tensors]),
        (cxx.Dims, list(map(_plain, strides))),
    ):
        arrays += [(kind * len(part))(*part) for part in (values[:inputs], values[inputs:])]
    counts = (_int(inputs), _int(len(tensors) - inputs))
    code = cxx.call(runtime, 5, cxx.i32, *map(_array, arrays), *counts, (cxx.pointer, stream))
    if code != 0:
        raise RuntimeError(f"enqueue returned {code}")


class Inputs:
    """The inputs of a job, and names for its dynamic dimensions."""

    def __init__(self, described: list[dict[str, Any]]) -> None:
        # Those that kernels lack by TensorRT's name.
        self.dtypes = [getattr(trt.DataType, each["dtype"], None) or member(trt, each["dtype"]) for each in described]
        self.ranges = [each["dims"] for each in described]
        self.names = [
            f"{tensor}.{axis}"
            for tensor, each in enumerate(described)
            for axis, dim in enumerate(each["dims"])
            if isinstance(dim, list)
        ]

    def symbols(self) -> list[list[Symbol]]:
        return [
            [Symbol(f"{tensor}.{axis}" if isinstance(dim, list) else dim) for axis, dim in enumerate(dims)]
            for tensor, dims in enumerate(self.ranges)
        ]

    def at(self, which: int, dims: list[Any]) -> list[int]:
        return [dim[which] if isinstance(dim, list) else dim for dim in dims]

    def named(self, sizes: list[int]) -> dict[str, int]:
        return dict(zip(self.names, sizes, strict=True))

    def profile(self, which: int) -> dict[str, int]:
        values = [dim[which] for dims in self.ranges for dim in dims if isinstance(dim, list)]
        return dict(zip(self.names, values, strict=True))


class ThroughPython:
    """The methods of TensorRT's Python classes."""

    def __init__(self, name: str, attributes: Mapping[str, Any], inputs: Inputs) -> None:
        self.inputs = inputs
        self.plugin, self._fields = created(name, attributes, "PREFER_AOT")
        self.builder, made = cxx.python_expressions(trt)
        self.shapes = [self._dims([made(symbol) for symbol in symbols]) for symbols in inputs.symbols()]

    @staticmethod
    def _dims(expressions: list[Any]) -> Any:
        dims = trt.DimsExprs(len(expressions))
        for axis, expression in enumerate(expressions):
            dims[axis] = expression
        return dims

    def output_types(self) -> list[Any]:
        ranks = [len(dims) for dims in self.inputs.ranges]
        return list(self.plugin.get_output_data_types(self.inputs.dtypes, ranks))

    def output_shapes(self) -> list[list[Symbol]]:
        shapes = self.plugin.get_output_shapes(self.shapes, [], self.builder)
        return [[self._symbol(shape[axis]) for axis in range(len(shape))] for shape in shapes]

    @staticmethod
    def _symbol(expression: Any) -> Symbol:
        return cxx.symbol(c.cast(id(expression), c.POINTER(cxx.pointer))[2])

    @staticmethod
    def _read(value: Any) -> tuple[int, int, Symbol]:
        return cxx.read_symbol(c.cast(id(value), c.POINTER(cxx.pointer))[2])

    def _described(self, dims: list[Any], dtype: Any, which: str) -> Any:
        dynamic, plain = trt.DynamicPluginTensorDesc(), trt.PluginTensorDesc()
        plain.dims = trt.Dims([-1 if isinstance(dim, list) else dim for dim in dims])
        plain.type, plain.format, plain.scale = dtype, getattr(FORMATS, which), 1.0
        dynamic.desc = plain
        for index, name in enumerate(("min", "opt", "max")):
            setattr(dynamic, name, trt.Dims(self.inputs.at(index, dims)))
        return dynamic

    def describe(self, outputs: list[tuple[list[Any], Any]], formats: list[str]) -> list[Any]:
        every = [*zip(self.inputs.ranges, self.inputs.dtypes, strict=True), *outputs]
        return [self._described(dims, dtype, which) for (dims, dtype), which in zip(every, formats, strict=True)]

    def combinations(self, described: list[Any]) -> list[list[tuple[str, str]]]:
        count = len(self.inputs.ranges)
        flat = self.plugin.get_supported_format_combinations(described, count)
        each = [(canonical(found.type, "found"), found.format.name) for found in flat]
        return [each[start : start + len(described)] for start in range(0, len(each), len(described))]

    def configure(self, described: list[Any]) -> None:
        count = len(self.inputs.ranges)
        self.plugin.configure_plugin(described[:count], described[count:])

    def tactics(self) -> list[int]:
        return list(self.plugin.get_valid_tactics())

    def timing_id(self) -> str:
        return str(self.plugin.get_timing_cache_id())

    def kernel(self, tactic: int, described: list[Any]) -> dict[str, Any]:
        count = len(self.inputs.ranges)
        plugin = self.plugin.clone()  # as a builder that times it
        plugin.set_tactic(tactic)

        class Recorder:
            """Takes attributes as `IKernelLaunchParams` and items as `ISymExprs`."""

            def __init__(self) -> None:
                self.items: dict[int, Any] = {}

            def __setitem__(self, index: int, value: Any) -> None:
                self.items[index] = value

        launch, extra = Recorder(), Recorder()
        plugin.get_launch_params(self.shapes, described, count, launch, extra, self.builder)
        plain = [each.desc for each in described]
        name, code = plugin.get_kernel(plain[:count], plain[count:])
        return {
            "name": name,
            "ptx": bytes(code).decode(),
            "launch": {slot: self._read(getattr(launch, slot))[2] for slot in cxx.SLOTS},
            "scalars": [self._read(extra.items[index])[2] for index in range(extra.nbSymExprs)],
            "scalar_types": [
                trt.PluginArgDataType(self._read(extra.items[index])[1]).name for index in range(extra.nbSymExprs)
            ],
        }


class ThroughCxx:
    """The virtual functions of `IPluginV3` and `IPluginV3QuickAOTBuild`, which lead into Python."""

    BUILD = 1  # of the capabilities

    def __init__(self, name: str, attributes: Mapping[str, Any], inputs: Inputs) -> None:
        self.inputs = inputs
        # A Python object's C++ one follows the header that every Python object has.
        creator = c.cast(id(creator_of(name)), c.POINTER(cxx.pointer))[2]
        if cxx.call(creator, 1, cxx.InterfaceInfo).kind != b"PLUGIN CREATOR_V3QUICK":
            raise RuntimeError("the creator's virtual functions are not those of IPluginCreatorV3Quick")
        self._fields = [self._field(*each) for each in attributes.items()]
        collection = cxx.FieldCollection(len(self._fields), (cxx.Field * len(self._fields))(*self._fields))
        self.plugin = cxx.call(
            creator,
            4,
            cxx.pointer,
            (c.c_char_p, name.encode()),
            (c.c_char_p, plugins.NAMESPACE.encode()),
            _array(collection),
            _int(int(trt.TensorRTPhase.BUILD)),
            _int(int(trt.QuickPluginCreationRequest.PREFER_AOT)),
        )
        if self.plugin is None:
            raise RuntimeError("createPlugin returned null")
        self.build = self._builder_side(self.plugin)
        self.shapes = (cxx.DimsExpressions * len(inputs.ranges))(*map(self._dims, inputs.symbols()))

    def _builder_side(self, plugin: int) -> int:
        """The `IPluginV3QuickAOTBuild` of an `IPluginV3`."""
        return int(cxx.call(plugin, 4, cxx.pointer, (cxx.i32, self.BUILD)))

    @staticmethod
    def _field(name: str, value: Any) -> cxx.Field:
        kinds = {int: (c.c_int64, "INT64"), float: (c.c_float, "FLOAT32")}
        if isinstance(value, str):
            kept, kind, length = c.create_string_buffer(value.encode()), "CHAR", len(value)
        else:
            kept, kind, length = kinds[type(value)][0](value), kinds[type(value)][1], 1
        cxx.keep(kept)
        return cxx.Field(name.encode(), c.addressof(kept), int(getattr(trt.PluginFieldType, kind)), length)

    @staticmethod
    def _dims(symbols: list[Symbol]) -> cxx.DimsExpressions:
        return cxx.DimsExpressions(len(symbols), (cxx.pointer * 8)(*map(cxx.expression, symbols)))

    def _call(self, index: int, *arguments: tuple[Any, Any], result: Any = cxx.i32) -> Any:
        return cxx.call(self.build, index, result, *arguments)

    def _checked(self, index: int, *arguments: tuple[Any, Any]) -> None:
        # An exception in Python becomes a text on stderr and this number.
        code = self._call(index, *arguments)
        if code != 0:
            raise RuntimeError(f"virtual function {index} returned {code}")

    def output_types(self) -> list[Any]:
        outputs = self._call(9)
        count = len(self.inputs.ranges)
        types = (cxx.i32 * outputs)(*[-1] * outputs)
        given = (cxx.i32 * count)(*(int(dtype) for dtype in self.inputs.dtypes))
        ranks = (cxx.i32 * count)(*map(len, self.inputs.ranges))
        self._checked(4, _array(types), _int(outputs), _array(given), _array(ranks), _int(count))
        return [trt.DataType(value) for value in types]

    def output_shapes(self) -> list[list[Symbol]]:
        shapes = (cxx.DimsExpressions * self._call(9))()
        none = (cxx.pointer, None)
        count = _int(len(self.inputs.ranges))
        builder = (cxx.pointer, cxx.BUILDER)
        self._checked(5, _array(self.shapes), count, none, _int(0), _array(shapes), _int(len(shapes)), builder)
        return [[cxx.symbol(shape.expressions[axis]) for axis in range(shape.rank)] for shape in shapes]

    def describe(self, outputs: list[tuple[list[Any], Any]], formats: list[str]) -> Any:
        every = [*zip(self.inputs.ranges, self.inputs.dtypes, strict=True), *outputs]
        described = (cxx.DynamicTensorDescription * len(every))()
        for place, (dims, dtype), which in zip(described, every, formats, strict=True):
            place.desc = cxx.TensorDescription(
                _plain([-1 if isinstance(dim, list) else dim for dim in dims]),
                int(dtype),
                int(getattr(FORMATS, which)),
                1.0,
            )
            place.min, place.opt, place.max = (_plain(self.inputs.at(index, dims)) for index in range(3))
        return described

    def combinations(self, described: Any) -> list[list[tuple[str, str]]]:
        count, total = len(self.inputs.ranges), len(described)
        outputs = total - count
        found = self._call(7, _array(described), _int(count), _int(outputs))
        if found < 0:
            raise RuntimeError(f"getNbSupportedFormatCombinations returned {found}")
        flat = (cxx.TensorDescription * (found * total))()
        self._checked(8, _array(described), _int(count), _int(outputs), _array(flat), _int(found))
        each = [(canonical(trt.DataType(one.type), "one"), trt.TensorFormat(one.format).name) for one in flat]
        return [each[start : start + total] for start in range(0, len(each), total)]

    def configure(self, described: Any) -> None:
        count = len(self.inputs.ranges)
        behind = c.addressof(described) + count * c.sizeof(cxx.DynamicTensorDescription)
        self._checked(6, _array(described), _int(count), (cxx.pointer, behind), _int(len(described) - count))

    def tactics(self) -> list[int]:
        numbers = (cxx.i32 * self._call(12))()
        self._checked(11, _array(numbers), _int(len(numbers)))
        return list(numbers)

    def timing_id(self) -> str:
        return str(self._call(13, result=c.c_char_p).decode())

    def kernel(self, tactic: int, described: Any) -> dict[str, Any]:
        count, total = len(self.inputs.ranges), len(described)
        self.build = self._builder_side(cxx.call(self.plugin, 5, cxx.pointer))  # a clone, as a builder that times it
        self._checked(17, _int(tactic))
        recorder = cxx.LaunchParameters()
        places = ((cxx.pointer, recorder.address), (cxx.pointer, recorder.extra_address), (cxx.pointer, cxx.BUILDER))
        self._checked(15, _array(self.shapes), _array(described), _int(count), _int(total - count), *places)
        # Now: the symbols belong to Python objects that go with the next call.
        launch = {slot: cxx.read_symbol(recorder.launch[slot])[2] for slot in cxx.SLOTS}
        scalars = [cxx.read_symbol(address) for address in recorder.extra]
        plain = (cxx.TensorDescription * total)(*(each.desc for each in described))
        behind = c.addressof(plain) + count * c.sizeof(cxx.TensorDescription)
        name, code, size = c.c_char_p(), cxx.pointer(), cxx.i32()
        self._checked(
            16,
            _array(plain),
            _int(count),
            (cxx.pointer, behind),
            _int(total - count),
            *(((cxx.pointer, c.addressof(place))) for place in (name, code, size)),
        )
        assert name.value is not None
        return {
            "name": name.value.decode(),
            "ptx": c.string_at(code.value or 0, size.value).decode(),
            "launch": launch,
            "scalars": [symbol for _, _, symbol in scalars],
            "scalar_types": [trt.PluginArgDataType(kind).name for _, kind, _ in scalars],
        }


def _plain(sizes: list[int]) -> cxx.Dims:
    return cxx.Dims(len(sizes), (cxx.i64 * 8)(*sizes))


def _array(array: Any) -> tuple[Any, Any]:
    return cxx.pointer, c.addressof(array)


def _int(value: int) -> tuple[Any, Any]:
    return cxx.i32, value


def recorded(found: Mapping[str, Any], plugin: str) -> LaunchPlan:
    """A launch plan of what TensorRT was given, and of nothing else."""
    variant = find_plugin(plugin)
    launch = found["launch"]
    return LaunchPlan(
        name=found["name"],
        ptx=found["ptx"],
        grid=tuple(as_number(launch[slot], variant.inputs) for slot in cxx.SLOTS[:3]),
        threads=launch["block_x"].at({}) * launch["block_y"].at({}) * launch["block_z"].at({}),
        shared_bytes=launch["shared_mem"].at({}),
        inputs=variant.inputs,
        scalars=tuple((str(place), as_number(symbol, variant.inputs)) for place, symbol in enumerate(found["scalars"])),
        outputs=variant.outputs,
        origin={"plugin": plugin, "trt": trt.__version__, "triton": triton.__version__},
    )


WRITTEN = {"SUM": "+", "PROD": "*", "MAX": "max", "MIN": "min", "SUB": "-", "FLOOR_DIV": "//", "CEIL_DIV": "ceil_div"}


def as_number(symbol: Symbol, names: tuple[str, ...]) -> Any:
    """TensorRT's expression as this package writes it."""
    if isinstance(symbol.value, int):
        return symbol.value
    if isinstance(symbol.value, str):
        tensor, axis = map(int, symbol.value.split("."))
        return dimension(names[tensor], axis)
    operation, left, right = symbol.value
    return Expression(WRITTEN[Symbol.OPERATIONS[operation][0]], as_number(left, names), as_number(right, names))


def assembled(ptx: str, arch: int) -> str:
    """Why Triton's ptxas refuses the PTX; nothing if it does not, whatever it remarks."""
    target = next(line.split()[1].rstrip(",") for line in ptx.splitlines() if line.startswith(".target"))
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if arch >= 90 and (folder / "ptxas-blackwell").exists() else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [tool, f"--gpu-name={target}", file.name, "-o", os.devnull], capture_output=True, text=True, check=False
        )
    return "" if done.returncode == 0 else f"{done.returncode}: {done.stdout}{done.stderr}"


def live(job: dict[str, Any]) -> dict[str, Any]:
    """One plugin's life, and what TensorRT has got of it in the end."""
    attributes = job["raw"] if "raw" in job else plugins.plugin_attributes(job["plugin"], **job["attributes"])
    order = job.get("order", list(attributes))
    inputs = Inputs(job["inputs"])
    kind: Any = {"python": ThroughPython, "c++": ThroughCxx}[job["through"]]
    life = kind(job["plugin"], {name: attributes[name] for name in order}, inputs)
    types = life.output_types()
    shapes = life.output_shapes()
    outputs = []
    for dtype, shape in zip(types, shapes, strict=True):
        dims = []
        for symbol in shape:
            ranges = [symbol.at(inputs.profile(which)) for which in range(3)]
            dims.append(ranges if symbol.constant() is None else ranges[0])
        outputs.append((dims, dtype))
    linear = life.describe(outputs, ["LINEAR"] * (len(inputs.ranges) + len(outputs)))
    answer: dict[str, Any] = {
        "output_types": [canonical(dtype, "output") for dtype in types],
        "output_shapes": [
            [[symbol.at(inputs.named(at)) for symbol in shape] for at in job["sizes"]] for shape in shapes
        ],
        "timing_id": life.timing_id(),
        "formats": [],
        "kind": type(life.plugin).__name__,
    }
    target = current().target
    for combination in life.combinations(linear):
        described = life.describe(outputs, [which for _, which in combination])
        life.configure(described)
        entry: dict[str, Any] = {"combination": combination, "tactics": []}
        for number in sorted(life.tactics()):
            found = life.kernel(number, described)
            entry["tactics"].append(
                {
                    "number": number,
                    "name": found["name"],
                    "parameters": parameter_types(found["ptx"], found["name"]),
                    "ptxas": assembled(found["ptx"], target.device.arch),
                    "launch": [
                        {slot: symbol.at(inputs.named(at)) for slot, symbol in found["launch"].items()}
                        for at in job["sizes"]
                    ],
                    "scalars": [[symbol.at(inputs.named(at)) for symbol in found["scalars"]] for at in job["sizes"]],
                    "scalar_types": found["scalar_types"],
                    "version": re.findall(r"^\.version (\S+)", found["ptx"], re.MULTILINE),
                    "copies": len(re.findall(r"\bcp\.async\.\w+\.shared\.global", found["ptx"])),
                    "wgmma": len(re.findall(r"\bwgmma\.mma_async", found["ptx"])),
                    "wide": len(re.findall(r"\bcp\.async\.cg\.shared\.global [^;]*, 0x10\b", found["ptx"])),
                    "narrow": len(re.findall(r"\bld\.global(?:\.\w+)*\.[bus](?:8|16)\b", found["ptx"])),
                    "plan": recorded(found, job["plugin"]).to_json() if job.get("plans") else "",
                    "local_paths": len(re.findall(r"\.py\b|\.debug_|\.loc\b", found["ptx"])),
                }
            )
        answer["formats"].append(entry)
    return answer


def known_tactics() -> list[dict[str, Any]]:
    """What the plugins' numbers of tactics stand for."""
    return [
        {
            "plugin": case["plugin"],
            "formats": [tensor.split()[-1] for tensor in (*case["inputs"], *case["outputs"])],
            "number": int(number),
            **tactic,
        }
        for case in current().described()
        for number, tactic in case["tactics"].items()
    ]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    exec(asked["script"])  # a test's own
    if asked["device"]:  # else the script did
        plugins.register(asked["device"], tactics=asked["tactics"])
    answers = []
    for job in asked["jobs"]:
        current().begin()
        try:
            answers.append(live(job) | {"known": known_tactics()})
        except Exception as error:  # noqa: BLE001 - whatever it is, the test is to see it
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(sys.argv[1]).write_text(json.dumps(answers))  # stdout is where TensorRT logs
