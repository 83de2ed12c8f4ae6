"""The ops as operators of torch, `torch.ops.tilewright`, so that torch.compile and torch.export take calls whole.

torch.compile reads Python code, and could follow neither lookups nor launches. So a call that it comes upon becomes one
node of its graph: an operator of which torch knows the arguments, and the shapes, dtypes and strides of its results
(`Operation.results`). Running the graph makes the call as ever. `NAME_out` are those that write to arrays of the
caller's. The first call that is compiled or exported imports this file, which registers them all; a process that loads
an exported program imports it itself, after torch.

torch is a guest: it is here already, or nobody asked.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import string
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.kernels.arrays import NOWHERE, View, check_tensor, torch_dtype
from tilewright.kernels.call import OPERATIONS, Arrays, New, Operation, Options
from tilewright.kernels.dtypes import dtype_name
from tilewright.kernels.problem import Config
from tilewright.kernels.registry import KERNELS
from tilewright.tuning_db.errors import MissingDependencyError, ProblemError, UnsupportedError

torch: Any = sys.modules.get("torch")
if torch is None:
    raise MissingDependencyError("tilewright.kernels.torch_ops registers operators with torch: import torch before it")

if "reason" not in inspect.signature(torch.compiler.disable).parameters:
    raise MissingDependencyError(
        f"calls inside torch.compile and torch.export need torch 2.8 or newer, and this is {torch.__version__}"
    )

NAMESPACE = "tilewright"


@dataclass(frozen=True)
class Kind:
    """What an option may be: its type in torch's schemas, and its way there and back."""

    schema: str
    to_torch: Callable[[Any], Any] = lambda value: value
    from_torch: Callable[[Any], Any] = lambda value: value


def _as_list(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _as_numbers(value: Sequence[int]) -> int | tuple[int, ...]:
    return value[0] if len(value) == 1 else tuple(value)


NO_LIMIT = -1
"""A side of a window without one."""


def _as_sides(window: tuple[int | None, int | None] | None) -> list[int] | None:
    return None if window is None else [NO_LIMIT if side is None else side for side in window]


def _as_window(sides: Sequence[int] | None) -> tuple[int | None, ...] | None:
    return None if sides is None else tuple(None if side == NO_LIMIT else side for side in sides)


_CONFIGS = {kernel.space.config.__name__: kernel.space.config for kernel in KERNELS}
_FIELDS = tuple((config, tuple(field.name for field in dataclasses.fields(config))) for config in _CONFIGS.values())


def _as_text(config: Config | None) -> str | None:
    for kind, names in _FIELDS:
        if isinstance(config, kind):
            return f"{kind.__name__} {','.join([f'{name}={_constant(getattr(config, name))}' for name in names])}"
    return None


def _constant(value: Any) -> Any:
    return value if isinstance(value, bool) else int(value)  # a symbol becomes a constant


@functools.lru_cache(maxsize=4096)
def _as_config(text: str | None) -> Config | None:
    if text is None:
        return None
    name, _, values = text.partition(" ")
    config: Config = _CONFIGS[name].parse(values)
    return config


KINDS = {
    "bool": Kind("bool"),
    "int?": Kind("SymInt?"),
    "float": Kind("float"),
    "float?": Kind("float?"),
    "str": Kind("str"),
    "str?": Kind("str?"),
    "ints": Kind("SymInt[]", _as_list, _as_numbers),
    "window": Kind("SymInt[]?", _as_sides, _as_window),
    "config": Kind("str?", _as_text, _as_config),
}
"""Of `Operation.options`."""


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="tilewright: no kernel takes this call as it is, for a gradient or a type; without fullgraph it says why"
)
def eagerly(operation: Operation, arrays: Arrays, outs: Arrays, options: Options) -> Arrays:
    """The call as ever, of which torch's compiler reads nothing."""
    return operation.run_now(arrays, outs, options)


def traced(operation: Operation, arrays: Arrays, outs: Arrays, options: Options) -> Arrays:
    """What `operation.run` gives, as nodes of the graph that is being made. For arguments that no node takes the graph
    is broken: the call is made as ever, and says what is wrong with them.

    Raises:
        UnsupportedError: a tensor of a program that is exported, where no graph can be broken, requires a gradient or
            is sparse.
    """
    for name, array in zip((*operation.inputs, *operation.outputs), (*arrays, *outs), strict=True):
        if isinstance(array, torch.Tensor):
            usable = array.layout is torch.strided and not (array.requires_grad and torch.is_grad_enabled())
            if not usable and torch.compiler.is_exporting():
                check_tensor(torch, name, array)
        else:
            usable = array is None or _is_number(array)
        if not usable or not isinstance(arrays[0], torch.Tensor):
            return eagerly(operation, arrays, outs, options)  # type: ignore[no-any-return]
    for kind, value in zip(operation.options.values(), options, strict=True):
        if KINDS[kind].schema.startswith("str") and kind != "config" and not isinstance(value, str | None):
            return eagerly(operation, arrays, outs, options)  # type: ignore[no-any-return]
    numbers = []
    for place in operation.numbers:
        value = arrays[place]
        number = _is_number(value)
        numbers.append(float(value) if number else None)
        if number:
            arrays = (*arrays[:place], None, *arrays[place + 1 :])
    told = [KINDS[kind].to_torch(value) for kind, value in zip(operation.options.values(), options, strict=True)]
    operators = getattr(torch.ops, NAMESPACE)
    if any(out is not None for out in outs):
        made = getattr(operators, f"{operation.name}_out")(*arrays, *numbers, *told, *outs)
    else:
        made = getattr(operators, operation.name)(*arrays, *numbers, *told)
    made = made if len(outs) > 1 else (made,)
    return tuple(
        out if out is not None else new if operation.has(name, options) else None
        for name, out, new in zip(operation.outputs, outs, made, strict=True)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat) and not isinstance(value, bool)


class Operator:
    """One of `Operation`'s two operators: the one with new results, or the one with the caller's outputs among its
    arguments. Both give a tensor for each output, without elements for one that is the caller's or isn't there: torch
    wants as many, whatever the options, of an operator that writes to its arguments."""

    def __init__(self, operation: Operation, *, out: bool) -> None:
        self._operation, self._out = operation, out
        self.name = f"{operation.name}_out" if out else operation.name

    def schema(self) -> str:
        """Its declaration in torch's language."""
        op = self._operation
        arguments = [f"{'Tensor' if name in op.required else 'Tensor?'} {name}" for name in op.inputs]
        arguments += [f"float? {op.inputs[place]}_number" for place in op.numbers]
        arguments += [f"{KINDS[kind].schema} {_told(name, op)}" for name, kind in op.options.items()]
        if self._out:
            letters = string.ascii_lowercase[: len(op.outputs)]
            arguments += [f"Tensor({letter}!)? {name}" for letter, name in zip(letters, op.outputs, strict=True)]
        return f"{self.name}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * len(op.outputs))})"

    def run(self, *arguments: Any) -> Any:
        """The call itself."""
        arrays, outs, options = self._parts(arguments)
        results = self._operation.run_now(arrays, outs, options)
        for out in outs:
            if out is not None:
                torch.autograd.graph.increment_version(out)
        return _given_back(
            arrays[0].new_empty(0) if result is None or out is not None else result
            for result, out in zip(results, outs, strict=True)
        )

    def fake(self, *arguments: Any) -> Any:
        """Arrays like the new results, without contents, from arguments without contents.

        Raises:
            ProblemError: a call with such arguments is refused.
        """
        op = self._operation
        arrays, outs, options = self._parts(arguments)
        views = {
            name: View(NOWHERE, (1,), (1,), "fp32", 0)
            if isinstance(array, float)
            else View(NOWHERE, tuple(array.shape), array.stride(), dtype_name(array.dtype), 0)
            for name, array in zip((*op.inputs, *op.outputs), (*arrays, *outs), strict=True)
            if array is not None
        }
        op.refuse_absent(arrays)
        try:
            news = zip(op.outputs, op.results(views, options), outs, strict=True)
        except UnsupportedError as error:
            # It is a NotImplementedError, for which torch.compile would break the graph and try again without.
            raise ProblemError(str(error)) from None
        return _given_back(
            _empty(arrays[0], new) if out is None and op.has(name, options) else arrays[0].new_empty(0)
            for name, new, out in news
        )

    def _parts(self, arguments: Sequence[Any]) -> tuple[Arrays, Arrays, Options]:
        op = self._operation
        rest = list(arguments)

        def take(count: int) -> list[Any]:
            taken = rest[:count]
            del rest[:count]
            return taken

        arrays, numbers = take(len(op.inputs)), take(len(op.numbers))
        for place, number in zip(op.numbers, numbers, strict=True):
            if number is not None:
                arrays[place] = number
        told = take(len(op.options))
        options = tuple(KINDS[kind].from_torch(value) for kind, value in zip(op.options.values(), told, strict=True))
        return tuple(arrays), tuple(rest) if self._out else (None,) * len(op.outputs), options


def _told(name: str, operation: Operation) -> str:
    """An option's name, apart from those of arrays."""
    return f"{name}_option" if name in (*operation.inputs, *operation.outputs) else name


def _given_back(results: Iterable[Any]) -> Any:
    made = tuple(results)
    return made if len(made) > 1 else made[0]


def _empty(like: Any, new: New) -> Any:
    kind = torch_dtype(torch, new.dtype)
    if new.memory is None:
        return like.new_empty(new.shape, dtype=kind)
    stored = like.new_empty([new.shape[axis] for axis in new.memory], dtype=kind)
    return stored.permute([new.memory.index(axis) for axis in range(len(new.memory))])


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
"""As long as it lives, so do the operators."""


def _register(operator: Operator) -> None:
    # Inductor may choose the strides of what lies between nodes: problems are of those that the trace had.
    strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    _library.define(operator.schema(), tags=(torch.Tag.pt2_compliant_tag, strides))
    # It may be called between two graphs, where every frame is looked at.
    _library.impl(operator.name, torch.compiler.disable(operator.run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{operator.name}", operator.fake, lib=_library)


for _operation in OPERATIONS.values():
    for _out in (False, True):
        _register(Operator(_operation, out=_out))
