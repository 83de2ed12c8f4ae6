"""From a call with arrays to a launch: what every op's public function does, in one place.

An op says which arrays it takes, and how the views of one set of arrays become a problem (`prepare`). `Operation` does
the rest: one library for all arrays, DLPack adoption, one GPU, a prepared call remembered for every signature of
arrays, new arrays for results, numbers as device arrays, and no output over an input.
"""

from __future__ import annotations

import functools
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from tilewright.kernels.arrays import NOWHERE, ArrayKind, View, another, kind_of
from tilewright.kernels.constants import checked_number, is_real
from tilewright.kernels.dispatch import Constants, call_cache, plan_for
from tilewright.kernels.dtypes import array_dtype_text, dtype
from tilewright.kernels.interpreter import interpreted, require_interpreter
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.overlaps import Guard, guards
from tilewright.kernels.problem import Config, Output, Problem
from tilewright.kernels.runtime import Plan, Run
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UnsupportedProblemError, UsageError

MOST_SIGNATURES = 65536
"""Signatures an op remembers; a program with more (every shape new) prepares them again rather than grow for ever."""

Arrays = tuple[Any, ...]


class New(NamedTuple):
    """A result that is a new array, as the caller sees it."""

    shape: tuple[int, ...]
    dtype: str  # canonical name
    memory: tuple[int, ...] | None = None  # its dimensions in the order of memory, where that is another


Options = tuple[Any, ...]


class Prepared(Protocol):
    """A call for one signature of arrays: run as often as arrays of that signature come."""

    def run(self, kind: ArrayKind, arrays: Arrays, outs: Arrays, arguments: list[Any]) -> Arrays:
        """Puts the work on the current stream of the arrays' library; gives the outputs, None for absent ones.

        `arguments` are what `ArrayKind.look` gives a plan for the arrays and outputs that are there.
        """


MOST_NUMBERS = 4096
"""Numbers kept on the device, of 512 bytes each. A program whose numbers change all the time should pass arrays; beyond
this many it pays for each call's, as each is let go after its call."""

_numbers: dict[tuple[Any, ...], tuple[Any, Any]] = {}


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One plan over the call's arrays."""

    launch: Run  # of the arguments, and after them the new outputs
    numbers: tuple[tuple[int, str], ...]  # of each input that is a number: its place among the arguments, and its name
    made: tuple[tuple[int, Output], ...]  # of each new output: its place among the outputs, and what array it is
    ordinal: int  # of the GPU; -1 for host memory

    @classmethod
    def of(
        cls,
        plan: Plan,
        views: Mapping[str, View],
        inputs: Mapping[str, str],
        outputs: Mapping[str, Output | None],
        strides: Mapping[str, int],
    ) -> PlannedCall:
        """The call of a plan for these views. `inputs` are the names of the plan's arguments by those of the arrays;
        `outputs` what new arrays of them are, None for what the plan doesn't have. Both are in the order of calls.
        """
        given = [name for name in (*inputs, *outputs) if name in views]
        made = [(place, name) for place, name in enumerate(outputs) if outputs[name] is not None and name not in views]
        names = [inputs.get(name, f"{name}_ptr") for name in (*given, *(name for _, name in made))]
        return cls(
            plan.bind(names, strides),
            tuple((place, name) for place, name in enumerate(given) if views[name].pointer == NOWHERE),
            tuple((place, output) for place, name in made if (output := outputs[name]) is not None),
            next(iter(views.values())).device,
        )

    def run(self, kind: ArrayKind, arrays: Arrays, outs: Arrays, arguments: list[Any]) -> Arrays:
        stream = kind.stream(self.ordinal)
        held = []  # until the launch, which comes after the allocations below
        for place, name in self.numbers:
            arguments[place], array = self._on_device(kind, arrays[0], name, arguments[place])
            held.append(array)
        for place, output in self.made:
            if outs[place] is None:  # else it is a new one all the same, made by whoever wraps this call
                outs = (*outs[:place], kind.empty(arrays[0], *output), *outs[place + 1 :])
            arguments.append(kind.argument(outs[place]))
        self.launch(arguments, stream)
        return outs

    def _on_device(self, kind: ArrayKind, like: Any, name: str, value: float) -> tuple[Any, Any]:
        """A number on the device, made once per name and value, for a kernel takes no floats: what a plan is given for
        it, and the array."""
        # By the GPU's number: CuPy's devices have no hash. By name, as not every input may have every value.
        key = (self.ordinal, name, value, math.copysign(1.0, value))  # 0.0 and -0.0 are equal
        made = _numbers.get(key)
        if made is None:
            number = checked_number(name, value)
            if len(_numbers) >= MOST_NUMBERS:
                array = kind.scalar(like, number)
                return kind.argument(array), array
            # For good, as a captured CUDA graph may read it. Of threads that make one at once, all take the first's.
            made = _numbers.setdefault(key, kind.lasting_scalar(self.ordinal, number))
        return made


def _kind(name: str, array: Any) -> ArrayKind:
    try:
        return kind_of(array)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from None


def _adopt(name: str, kind: ArrayKind, array: Any) -> Any:
    try:
        return kind.adopt(array)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error.__cause__


def _view(name: str, array: Any, known: Sequence[str]) -> View:
    """An array as a kernel sees it; `known` are the dtypes that it may have, if they are told."""
    try:
        view = kind_of(array).view(array)
    except UnsupportedError as error:
        found = array_dtype_text(getattr(array, "dtype", None))
        if known and found is not None:  # as NumPy's and torch's integers are int64 unless they are told otherwise
            names = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
            raise UnsupportedProblemError(f"{name} is {found} and must be {names}") from None
        raise UnsupportedError(f"{name}: {error}") from None
    size = int(dtype(view.dtype).bytes)
    if view.pointer % size:
        raise UnsupportedError(
            f"{name} starts {view.pointer % size} B past a multiple of its elements' {size} B: {another(name)}"
        )
    return view


_READERS = "torch._C._dynamo.eval_frame"
"""Module that says whether torch's compiler reads what is called."""


class Operation:
    """An op as its public function calls it. Safe to share between threads."""

    def __init__(
        self,
        name: str,
        kernel: Kernel[Any, Any],
        inputs: tuple[str, ...],
        options: Mapping[str, str],
        prepare: Callable[[dict[str, View], Options], Prepared],
        results: Callable[[dict[str, View], Options], tuple[New, ...]],
        *,
        outputs: tuple[str, ...] = ("out",),
        scalars: tuple[str, ...] = (),
        scalar_or_array: tuple[str, ...] = (),
        in_place: tuple[str, ...] = (),
        required: tuple[str, ...] = (),
        optional: Mapping[str, str] | None = None,
        dtypes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """`name` is the public function's. `inputs` and `outputs` are the names of the arrays, in the order of calls;
        the first input decides library, device and stream. Those in `scalars` are numbers or have one element, those in
        `scalar_or_array` are numbers or of any shape; an output may be one of those in `in_place`, element for element.
        `options` are the names of what else a call says, in order, with what they are (`torch_ops.KINDS`): text,
        numbers, tuples of them, a configuration or None. `prepare` gets the views of the arrays that are there, by
        name, and the options' values; `results` gets the same, also with torch's symbols for sizes, and says what each
        output would be as a new array. Without `required`, the first input is. `optional` has the outputs that are
        there only if they are given or an option is true, with its name. `dtypes` are those that an array may have, by
        its name, for the message about one whose dtype no kernel has.
        """
        self.name = name
        self.kernel = kernel
        self.required = required or inputs[:1]
        self.inputs, self.outputs = inputs, outputs
        self.options = options
        self.results = results
        self._optional = dict(optional or {})
        self._prepare = prepare
        self._scalars = tuple(index for index, name in enumerate(inputs) if name in scalars)
        self.numbers = tuple(index for index, name in enumerate(inputs) if name in scalars + scalar_or_array)
        self._in_place = frozenset(in_place)
        self._dtypes = {**dict.fromkeys(scalars, ("fp32",)), **(dtypes or {})}
        self._calls: dict[tuple[Any, ...], Ready] = call_cache()
        OPERATIONS[name] = self

    def has(self, output: str, options: Options) -> bool:
        """Whether calls with these options have an output that they were not given."""
        asked = self._optional.get(output)
        return asked is None or bool(options[tuple(self.options).index(asked)])

    # A method, as `Prepared.run` is: an object with `__call__` takes twice as long to call.
    def run(self, arrays: Arrays, outs: Arrays, options: Options) -> Arrays:
        """Runs the op; gives its outputs.

        Raises:
            ProblemError: arrays of several libraries or GPUs, an output over an input; or what `prepare` says.
            UsageError: an option or a number of a type that it can't have; or what `prepare` says.
        """
        # torch.compile reads on to here: what it can't follow must not come before. It says so in every thread.
        compiler = getattr(sys.modules.get("torch"), "compiler", None)
        if compiler is not None:
            if compiler.is_compiling():
                from tilewright.kernels.torch_ops import traced

                return traced(self, arrays, outs, options)
            # Having broken a graph it reads on in the functions that are called now, and what it can't read there is an
            # error of its own: with torch 2.11 in place of ours, that says what is wrong with a call.
            reader = sys.modules.get(_READERS)
            if reader is not None and reader.get_eval_frame_callback():
                from tilewright.kernels.torch_ops import eagerly

                return eagerly(self, arrays, outs, options)  # type: ignore[no-any-return]
        return self.run_now(arrays, outs, options)

    def run_now(self, arrays: Arrays, outs: Arrays, options: Options) -> Arrays:
        """`run`, whatever torch is at."""
        try:
            kind = kind_of(arrays[0])
        except UnsupportedError:
            self.refuse_absent(arrays)  # None is no array either, and is said to be missing
            kind = _kind(self.inputs[0], arrays[0])  # raises with the name
        if kind.foreign:
            host = kind.on_host(arrays[0]) if interpreted() else None
            return self._adopted(host or kind, arrays, outs, options)
        try:
            # Arrays of another library need no look of their own: their signatures are never equal to the kind's, if
            # they can be taken at all.
            given = arrays + outs
            signatures, addresses, arguments = kind.look(given)
            ready = self._calls.get((kind, options, tuple(signatures)))
        except (AttributeError, TypeError, RuntimeError):
            # Among the arrays is a number, another library's, or one of torch's without memory; or an option is none.
            ready = None
        if ready is None:
            return self._first(kind, arrays, outs, options)
        call, guarded = ready
        for guard in guarded:
            guard.check(kind, given, outs, addresses)
        return call.run(kind, arrays, outs, arguments)

    def _adopted(self, kind: ArrayKind, arrays: Arrays, outs: Arrays, options: Options) -> Arrays:
        """The call with arrays seen through CuPy, or NumPy, as `kind` does: once, not at every use."""
        arrays = self._with_numbers(arrays)
        self._refuse_libraries(kind_of(arrays[0]), arrays, outs)

        def seen(names: tuple[str, ...], given: Arrays) -> Arrays:
            return tuple(
                x if x is None or x.__class__ is float else _adopt(name, kind, x)
                for name, x in zip(names, given, strict=True)
            )

        results = self.run_now(seen(self.inputs, arrays), seen(self.outputs, outs), options)
        return tuple(
            out if out is not None else result if result is None else kind.give_back(result, arrays[0])
            for out, result in zip(outs, results, strict=True)
        )

    def _first(self, kind: ArrayKind, arrays: Arrays, outs: Arrays, options: Options) -> Arrays:
        """The first call of its signature, or one whose numbers are of another type than float, or of arrays that the
        interpreter sees as those of another library."""
        host = kind.on_host(arrays[0]) if interpreted() else None
        if host is not None:
            return self._adopted(host, arrays, outs, options)
        with_numbers = self._with_numbers(arrays)
        if with_numbers is arrays:
            self._learn(kind, arrays, outs, options)
        return self.run_now(with_numbers, outs, options)

    def made_ready(self, arrays: Arrays, outs: Arrays, options: Options) -> Callable[[], Arrays]:
        """A call of which nothing is left but the launch: arrays are the library's own, numbers floats.

        Raises:
            As `run`.
        """
        kind, given = kind_of(arrays[0]), arrays + outs
        signatures, addresses, arguments = kind.look(given)
        ready = self._calls.get((kind, options, tuple(signatures)))
        call, guarded = ready or self._learn(kind, arrays, outs, options)
        for guard in guarded:
            guard.check(kind, given, outs, addresses)
        return functools.partial(call.run, kind, arrays, outs, arguments)

    def _learn(self, kind: ArrayKind, arrays: Arrays, outs: Arrays, options: Options) -> Ready:
        """What there is to know of all calls with the signatures of this one; it is kept."""
        self._refuse_libraries(kind, arrays, outs)
        self.refuse_absent(arrays)
        self._refuse_options(options)
        views = self._views(kind, arrays, outs)
        call = self._prepare(views, options)
        if len(self._calls) >= MOST_SIGNATURES:
            self._calls.clear()
        signatures, _, _ = kind.look(arrays + outs)
        ready = (call, guards(self.inputs + self.outputs, views, outs, self._in_place))
        self._calls[(kind, options, tuple(signatures))] = ready
        return ready

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
        outputs = {
            name: made[name]._replace(shape=(shapes or {}).get(name, made[name].shape)) if name in made else None
            for name in self.outputs
        }
        return PlannedCall.of(plan, views, {name: f"{name}_ptr" for name in self.inputs}, outputs, strides or {})

    def _views(self, kind: ArrayKind, arrays: Arrays, outs: Arrays) -> dict[str, View]:
        """The arrays that are there, by name, all on one GPU."""
        if kind.host:
            require_interpreter()
        views: dict[str, View] = {}
        for index, (name, array) in enumerate(zip(self.inputs + self.outputs, arrays + outs, strict=True)):
            if array.__class__ is float and index in self.numbers:
                views[name] = View(NOWHERE, (1,), (1,), "fp32", next(iter(views.values())).device)
            elif array is not None:
                views[name] = _view(name, array, self._dtypes.get(name, ()))
        for index in self._scalars:
            scalar = views.get(self.inputs[index])
            if scalar is not None and (scalar.dtype != "fp32" or math.prod(scalar.shape) != 1):
                raise ProblemError(
                    f"{self.inputs[index]} is {scalar.shape} of {scalar.dtype}: a number, or one element of fp32"
                )
        ordinals = {view.device for view in views.values()}
        if len(ordinals) > 1:
            raise ProblemError(f"the arrays are on different GPUs: {sorted(ordinals)}")
        return views

    def _with_numbers(self, arrays: Arrays) -> Arrays:
        """The arrays with numbers that are no floats as such; the very same tuple where there are none.

        Raises:
            UsageError: a value that the input can't have.
        """
        for index in self.numbers:
            value = arrays[index]
            if value is None:
                continue
            if value.__class__ is float:
                checked_number(self.inputs[index], value)  # before anything is compiled for it
            elif is_real(value):
                arrays = (*arrays[:index], checked_number(self.inputs[index], value), *arrays[index + 1 :])
            elif isinstance(value, str | bytes | numbers.Number | np.generic | list | tuple):
                raise UsageError(f"{self.inputs[index]}={value!r} must be a real number or an array")
        return arrays

    def refuse_absent(self, arrays: Arrays) -> None:
        """Does nothing if no required input is None.

        Raises:
            ProblemError: one is.
        """
        for name in self.required:
            if arrays[self.inputs.index(name)] is None:
                raise ProblemError(f"{name} is missing")

    def _refuse_options(self, options: Options) -> None:
        for name, value in zip(self.options, options, strict=True):
            try:
                hash(value)
            except TypeError:
                raise UsageError(f"{name}={value!r} can't be a {type(value).__name__}") from None

    def _refuse_libraries(self, kind: ArrayKind, arrays: Arrays, outs: Arrays) -> None:
        for index, (name, array) in enumerate(zip(self.inputs + self.outputs, arrays + outs, strict=True)):
            number = index in self.numbers and isinstance(array, numbers.Real)
            if array is not None and not number and _kind(name, array) is not kind:
                raise ProblemError(
                    f"{self.inputs[0]} is a {_type_name(arrays[0])} and {name} a {_type_name(array)}: pass arrays of "
                    f"one library"
                )


OPERATIONS: dict[str, Operation] = {}
"""By the name of the public function."""


Ready = tuple[Prepared, tuple[Guard, ...]]
"""A prepared call, and what guards its outputs."""


def _type_name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"
