"""From a call with arrays to a launch: what every op's public function does, in one place.

An op says which arrays it takes, and how the views of one set of arrays become a problem (`prepare`). `Operation` does
the rest: one library for all arrays, DLPack adoption, one GPU, a prepared call remembered for every signature of
arrays, new arrays for results, numbers as device arrays, and no output over an input.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np

from tilewright.kernels.arrays import ArrayKind, View, kind_of
from tilewright.kernels.dispatch import Constants, call_cache, plan_for
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.interpreter import require_interpreter
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.problem import Config, Output, Problem
from tilewright.kernels.runtime import Plan
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UsageError

MOST_CALLS = 65536
"""Signatures an op remembers; a program with more (every shape new) prepares them again rather than grow for ever."""

Arrays = tuple[Any, ...]


class Prepared(Protocol):
    """A call for one signature of arrays: run as often as arrays of that signature come."""

    def __call__(self, kind: ArrayKind, arrays: Arrays, outs: Arrays) -> Arrays:
        """Puts the work on the current stream of the arrays' library; gives the outputs, None for absent ones."""


MOST_NUMBERS = 4096
"""Numbers kept on the device, of 512 bytes each. A program whose numbers change all the time should pass arrays; beyond
this many it pays for each call's, as each is let go after its call."""

_numbers: dict[tuple[Any, ...], Any] = {}


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One plan over the call's arrays."""

    plan: Plan
    inputs: tuple[tuple[int, str], ...]  # of each input that is there: its place, and its argument's name
    outputs: tuple[tuple[str, Output | None], ...]  # argument name of each output, and what a new array of it is
    strides: Mapping[str, int]
    ordinal: int  # of the GPU; -1 for host memory

    def __call__(self, kind: ArrayKind, arrays: Arrays, outs: Arrays) -> Arrays:
        like = arrays[0]
        stream = kind.stream(like)
        of = kind.argument
        pointers = {}
        for place, name in self.inputs:
            array = arrays[place]
            pointers[name] = of(self._on_device(kind, like, name, array, stream) if array.__class__ is float else array)
        results = list(outs)
        for place, (name, output) in enumerate(self.outputs):
            if output is not None:
                if results[place] is None:
                    results[place] = kind.empty(like, *output)
                pointers[name] = of(results[place])
        self.plan.run(pointers, self.strides, stream)
        return tuple(results)

    def _on_device(self, kind: ArrayKind, like: Any, name: str, value: float, stream: int) -> Any:
        """A number on the device, made once per value and stream, in whose order it is filled: a kernel takes no
        floats."""
        key = (kind, self.ordinal, stream, value)  # by number: CuPy's devices have no hash
        array = _numbers.get(key)
        if array is None:
            array = kind.scalar(like, _finite(name.removesuffix("_ptr"), value))
            if len(_numbers) < MOST_NUMBERS:
                _numbers[key] = array  # for good, as a captured CUDA graph may read it
        return array


LARGEST = float(np.finfo(np.float32).max)
"""Of finite numbers as kernels have them."""


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST:
        raise UsageError(f"{name}={value!r} must be a finite number of fp32")
    return number


def factor(value: Any) -> Any:
    """A factor, or None where it is 1: nothing is multiplied then."""
    if value.__class__ is float:  # what it mostly is; asking the abstract class takes half a microsecond
        return None if value == 1.0 else value
    return None if isinstance(value, numbers.Real) and value == 1.0 else value


def integer(name: str, value: Any) -> int | None:
    """An option that is an integer or None, of Python's or NumPy's; as Python's, for 32 and 32.0 are equal keys.

    Raises:
        UsageError: it is neither.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name}={value!r} must be an integer")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """An option that is true or false.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise UsageError(f"{name}={value!r} must be True or False")
    return bool(value)


def _kind(name: str, array: Any) -> ArrayKind:
    try:
        return kind_of(array)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from None


def _view(name: str, array: Any) -> View:
    try:
        return kind_of(array).view(array)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from None


class Operation:
    """An op as its public function calls it. Safe to share between threads."""

    def __init__(
        self,
        kernel: Kernel[Any, Any],
        inputs: tuple[str, ...],
        options: tuple[str, ...],
        prepare: Callable[[ArrayKind, dict[str, View], tuple[Any, ...]], Prepared],
        *,
        outputs: tuple[str, ...] = ("out",),
        scalars: tuple[str, ...] = (),
        scalar_or_array: tuple[str, ...] = (),
        in_place: tuple[str, ...] = (),
        required: tuple[str, ...] = (),
    ) -> None:
        """`inputs` and `outputs` are the names of the arrays, in the order of calls; the first input decides library,
        device and stream. Those in `scalars` are numbers or have one element, those in `scalar_or_array` are numbers or
        of any shape; an output may be one of those in `in_place`, element for element. `options` are the names of what
        else a call says: text, numbers, tuples of them, a configuration or None. `prepare` gets the views of the arrays
        that are there, by name, and the options' values. Without `required`, the first input is.
        """
        self.kernel = kernel
        self._required = required or inputs[:1]
        self._inputs, self._outputs = inputs, outputs
        self._options = options
        self._prepare = prepare
        self._scalars = tuple(index for index, name in enumerate(inputs) if name in scalars)
        self._numbers = tuple(index for index, name in enumerate(inputs) if name in scalars + scalar_or_array)
        self._in_place = frozenset(in_place)
        self._calls: dict[tuple[Any, ...], tuple[Prepared, tuple[Guard, ...]]] = call_cache()

    def __call__(self, arrays: Arrays, outs: Arrays, options: tuple[Any, ...]) -> Arrays:
        """Runs the op; gives its outputs.

        Raises:
            ProblemError: arrays of several libraries or GPUs, an output over an input; or what `prepare` says.
            UsageError: an option of a type that can't be one, a number that is none; or what `prepare` says.
        """
        kind = kind_of(arrays[0])
        if kind.foreign:
            return self._adopted(kind, arrays, outs, options)
        try:
            key = _key(kind, arrays, outs, options)
            ready = self._calls.get(key)
        except (AttributeError, TypeError):
            ready = None  # among the arrays is a number or another library's, or an option that can't be one
        if ready is None:
            return self._first(kind, arrays, outs, options)
        call, guards = ready
        for guard in guards:
            guard.check(kind, arrays, outs)
        return call(kind, arrays, outs)

    def _adopted(self, kind: ArrayKind, arrays: Arrays, outs: Arrays, options: tuple[Any, ...]) -> Arrays:
        """The call with arrays seen through CuPy: once, not at every use."""
        self._refuse_libraries(kind, arrays, outs)
        arrays = self._with_numbers(arrays)

        def seen(given: Arrays) -> Arrays:
            return tuple(x if x is None or x.__class__ is float else kind.adopt(x) for x in given)

        results = self(seen(arrays), seen(outs), options)
        return tuple(
            out if out is not None else result if result is None else kind.give_back(result, arrays[0])
            for out, result in zip(outs, results, strict=True)
        )

    def _first(self, kind: ArrayKind, arrays: Arrays, outs: Arrays, options: tuple[Any, ...]) -> Arrays:
        """The first call of its signature, or one whose numbers are of another type than float."""
        with_numbers = self._with_numbers(arrays)
        if with_numbers is not arrays:
            return self(with_numbers, outs, options)
        self._refuse_libraries(kind, arrays, outs)
        self._refuse_absent(arrays)
        self._refuse_options(options)
        views = self._views(kind, arrays, outs)
        call = self._prepare(kind, views, options)
        if len(self._calls) >= MOST_CALLS:
            self._calls.clear()
        self._calls[_key(kind, arrays, outs, options)] = (call, self._guards(kind, views, outs))
        return self(arrays, outs, options)

    def planned(
        self,
        problem: Problem,
        views: Mapping[str, View],
        *,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        strides: Mapping[str, int] | None = None,
        config: Config | None = None,
        constants: Constants = (),
    ) -> PlannedCall:
        """The call of a problem made from these views. `shapes` are those of new outputs, where the caller sees others
        than the problem does.

        Raises:
            UnsupportedError, IllegalConfigError, CompileError, LaunchError: as `plan_for`.
        """
        ordinal = next(iter(views.values())).device
        plan, _ = plan_for(self.kernel, problem, ordinal, config=config, constants=constants)
        made = problem.outputs()
        outputs = [
            (f"{name}_ptr", made[name]._replace(shape=(shapes or {}).get(name, made[name].shape)))
            if name in made
            else (f"{name}_ptr", None)
            for name in self._outputs
        ]
        inputs = [(place, f"{name}_ptr") for place, name in enumerate(self._inputs) if name in views]
        return PlannedCall(plan, tuple(inputs), tuple(outputs), strides or {}, ordinal)

    def _views(self, kind: ArrayKind, arrays: Arrays, outs: Arrays) -> dict[str, View]:
        """The arrays that are there, by name, all on one GPU."""
        if kind.host:
            require_interpreter()
        views: dict[str, View] = {}
        for index, (name, array) in enumerate(zip(self._inputs + self._outputs, arrays + outs, strict=True)):
            if array.__class__ is float and index in self._numbers:
                views[name] = View(0, (1,), (1,), "fp32", next(iter(views.values())).device)
            elif array is not None:
                views[name] = _view(name, array)
        for index in self._scalars:
            scalar = views.get(self._inputs[index])
            if scalar is not None and (scalar.dtype != "fp32" or math.prod(scalar.shape) != 1):
                raise ProblemError(
                    f"{self._inputs[index]} is {scalar.shape} of {scalar.dtype}: a number, or one element of fp32"
                )
        ordinals = {view.device for view in views.values()}
        if len(ordinals) > 1:
            raise ProblemError(f"the arrays are on different GPUs: {sorted(ordinals)}")
        return views

    def _guards(self, kind: ArrayKind, views: Mapping[str, View], outs: Arrays) -> tuple[Guard, ...]:
        """A guard for each output that the caller gave.

        Raises:
            UnsupportedError, ProblemError: an output overlaps itself, or may not be written.
        """
        places = [(place, name) for place, name in enumerate(self._inputs + self._outputs) if name in views]
        guards = []
        for position, out in enumerate(outs):
            if out is None:
                continue
            name, own = self._outputs[position], len(self._inputs) + position
            _refuse_self_overlap(name, views[name])
            if kind.host and not out.flags.writeable:
                raise ProblemError(f"{name} is read-only")
            others = tuple(
                (place, other, _reach(views[other]), other in self._in_place and views[other][1:] == views[name][1:])
                for place, other in places
                if place < own and views[other].pointer  # a number has no place yet
            )
            guards.append(Guard(position, name, _reach(views[name]), others))
        return tuple(guards)

    def _with_numbers(self, arrays: Arrays) -> Arrays:
        """The arrays with numbers that are no floats as such; the very same tuple where there are none."""
        for index in self._numbers:
            value = arrays[index]
            if value is None or value.__class__ is float:
                continue
            if isinstance(value, numbers.Real):
                arrays = (*arrays[:index], _finite(self._inputs[index], value), *arrays[index + 1 :])
            elif isinstance(value, str | bytes | numbers.Number | list | tuple):
                raise UsageError(f"{self._inputs[index]}={value!r} must be a real number or an array")
        return arrays

    def _refuse_absent(self, arrays: Arrays) -> None:
        for name in self._required:
            if arrays[self._inputs.index(name)] is None:
                raise ProblemError(f"{name} is missing")

    def _refuse_options(self, options: tuple[Any, ...]) -> None:
        for name, value in zip(self._options, options, strict=True):
            try:
                hash(value)
            except TypeError:
                raise UsageError(f"{name}={value!r} can't be a {type(value).__name__}") from None

    def _refuse_libraries(self, kind: ArrayKind, arrays: Arrays, outs: Arrays) -> None:
        for index, (name, array) in enumerate(zip(self._inputs + self._outputs, arrays + outs, strict=True)):
            number = index in self._numbers and isinstance(array, numbers.Real)
            if array is not None and not number and _kind(name, array) is not kind:
                raise ProblemError(
                    f"{self._inputs[0]} is a {_type_name(arrays[0])} and {name} a {_type_name(array)}: pass arrays of "
                    f"one library"
                )


def _key(kind: ArrayKind, arrays: Arrays, outs: Arrays, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a prepared call depends on. This and the call itself are the whole cost of a warm call; arrays of another
    library need no look of their own, for their signatures are never equal, if they can be taken at all."""
    signature = kind.signature
    return (
        kind,
        options,
        *[None if x is None else float if x.__class__ is float else signature(x) for x in arrays],
        *[None if x is None else signature(x) for x in outs],
    )


class Guard(NamedTuple):
    """What an output must not lie over."""

    position: int
    name: str
    bytes: int  # from the first element to the end of the last
    # Of each array before it: place, name, bytes, and whether the output may be this very array.
    others: tuple[tuple[int, str, int, bool], ...]

    def check(self, kind: ArrayKind, arrays: Arrays, outs: Arrays) -> None:
        """Does nothing if the output may be written while the other arrays are used: it is apart from each, or is one
        that it may replace.

        Raises:
            ProblemError: they share memory.
        """
        out = outs[self.position]
        start = kind.pointer(out)
        end = start + self.bytes
        inputs = len(arrays)
        for place, name, size, replaceable in self.others:
            array = arrays[place] if place < inputs else outs[place - inputs]
            first = kind.pointer(array)
            if first >= end or start >= first + size or (replaceable and first == start):
                continue  # apart, or each element is read by the block that then writes it
            # Reaching over each other they may still interleave, as the halves of one wide array do.
            if _share_memory(kind, array, out):
                raise ProblemError(f"{self.name} may not share memory with {name}")


def _refuse_self_overlap(name: str, view: View) -> None:
    """Does nothing for an output that has every element once."""
    reach = 1
    for step, length in sorted(zip(view.strides, view.shape, strict=True)):
        if length > 1:
            if step < reach:
                raise UnsupportedError(f"{name} has strides {view.strides} for shape {view.shape}: it overlaps itself")
            reach = step * (length - 1) + reach


def _reach(view: View) -> int:
    last = sum(max(0, length - 1) * max(0, stride) for length, stride in zip(view.shape, view.strides, strict=True))
    return (last + 1) * math.ceil(dtype(view.dtype).bytes)


def _share_memory(kind: ArrayKind, one: Any, other: Any) -> bool:
    placed: list[np.ndarray[Any, Any]] = []
    for view in (kind.view(one), kind.view(other)):
        size = int(dtype(view.dtype).bytes)
        strides = tuple(stride * size for stride in view.strides)
        place = {"shape": view.shape, "strides": strides, "typestr": f"|V{size}", "data": (view.pointer, True)}
        # NumPy knows how to find out, and reads nothing at these addresses, which may be a GPU's.
        placed.append(np.asarray(SimpleNamespace(__array_interface__={**place, "version": 3})))
    return np.shares_memory(placed[0], placed[1])


def _type_name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"
