"""What a plugin is to TensorRT, op by op: its tensors, its attributes, and how they become a problem.

`PluginOperation` is the contract. One operation has a plugin for every set of optional inputs, for TensorRT has no
optional ones: `FusedGemm`, `FusedGemmBias`, `FusedGemmBiasResidual`, and so on, in the order of the kernel's arguments.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from tilewright.kernels.kernel import Kernel, Launch
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.tensorrt.expressions import Number, Sizes, evaluate, is_static
from tilewright.kernels.tensorrt.types import LINEAR
from tilewright.tuning_db.errors import ProblemError, UsageError

Attributes = Mapping[str, Any]


class Attribute(NamedTuple):
    """One attribute of a plugin: an int, a float or a str."""

    name: str
    default: int | float | str  # what `plugin_attributes` fills in; its type is the attribute's
    meaning: str

    @property
    def type(self) -> type:
        """The Python type that `tensorrt.plugin` declares."""
        return type(self.default)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its name among the op's arrays, its dimensions in TensorRT's order, and how it lies in memory."""

    name: str
    dims: tuple[Number, ...]
    dtype: str  # canonical name
    format: str = LINEAR

    def at(self, sizes: Sizes) -> Tensor:
        """With its dimensions' values."""
        return replace(self, dims=tuple(evaluate(dim, sizes) for dim in self.dims))

    def with_known(self, sizes: Sizes) -> Tensor:
        """With the values of those of its dimensions that are known."""
        return replace(self, dims=tuple(sizes.get((self.name, axis), dim) for axis, dim in enumerate(self.dims)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions, all of them known."""
        assert all(is_static(dim) for dim in self.dims), self
        return self.dims  # type: ignore[return-value]

    def static(self, axis: int, what: str) -> int:
        """One dimension, which must be known when the engine is built.

        Raises:
            ProblemError: it is dynamic.
        """
        dim = self.dims[axis]
        if not isinstance(dim, int):
            raise ProblemError(
                f"{what}, dimension {axis % len(self.dims)} of {self.name}, must be static: it is dynamic"
            )
        return dim


Tensors = Mapping[str, Tensor]


class PluginOperation(ABC):
    """An op as TensorRT sees it. Stateless; every method is a function of its arguments."""

    title: ClassVar[str]  # how its plugins' names begin
    kernel: ClassVar[Kernel[Any, Any]]
    required: ClassVar[tuple[str, ...]]
    # Optional inputs, in the order of the kernel's arguments; those of one tuple come together or not at all.
    optional: ClassVar[tuple[tuple[str, ...], ...]]
    attributes: ClassVar[tuple[Attribute, ...]]
    # Which optional inputs need another one.
    needs: ClassVar[Mapping[str, str]] = {}
    # Outputs beside `out` that an optional input brings with it.
    brings: ClassVar[Mapping[str, str]] = {}

    def variants(self) -> tuple[PluginVariant, ...]:
        """The plugin of every set of optional inputs."""
        found = []
        for count in range(len(self.optional) + 1):
            for chosen in itertools.combinations(self.optional, count):
                names = {name for group in chosen for name in group}
                if all(needed in names for name, needed in self.needs.items() if name in names):
                    found.append(PluginVariant(self, tuple(name for group in chosen for name in group)))
        return tuple(found)

    @abstractmethod
    def outputs(self, tensors: Tensors, attributes: Attributes) -> tuple[Tensor, ...]:
        """The outputs. Of the inputs only ranks and dtypes are sure; dimensions may be expressions.

        Raises:
            ProblemError, UsageError: ranks, dtypes or attributes that can't be.
        """

    @abstractmethod
    def problem(self, tensors: Tensors, attributes: Attributes) -> Problem:
        """The problem of inputs whose dimensions are known.

        Raises:
            ProblemError, UsageError: they don't go together.
        """

    @abstractmethod
    def scalars(self, tensors: Tensors, attributes: Attributes) -> dict[str, Number]:
        """The sizes that launches pass, by argument name."""

    @abstractmethod
    def grid(self, tensors: Tensors, attributes: Attributes, config: Config) -> Number:
        """Blocks along x, before `Launch.on`; y and z are 1."""

    def check_static(self, tensors: Tensors, attributes: Attributes) -> None:  # noqa: B027 - most dims may be dynamic
        """Does nothing if every dimension that must be known is.

        Raises:
            ProblemError: one is not.
        """

    def generalized(self, launch: Launch, tensors: Tensors) -> Launch:
        """A launch made for odd sizes of what is dynamic, with what does not follow from divisibility set to hold for
        every size."""
        return launch

    def broadcasts(self, problem: Problem) -> Mapping[str, object]:
        """The fields of a problem that are compiled in and hang on whether a dimension is 1, by name; None for one that
        makes no difference at these sizes."""
        return {}

    def followers(
        self, tensors: Tensors, outputs: tuple[Tensor, ...], attributes: Attributes
    ) -> Mapping[tuple[str, int], Number]:
        """Dimensions of inputs that are not those of another input but computed from them."""
        return {}

    def formats(self, tensors: Tensors, outputs: tuple[Tensor, ...], attributes: Attributes) -> list[tuple[str, ...]]:
        """The formats of inputs and outputs that go together, the first all linear."""
        return [(LINEAR,) * (len(tensors) + len(outputs))]

    def constants(self, tensors: Tensors, attributes: Attributes) -> tuple[tuple[str, float], ...]:
        """Constexprs that attributes choose and no problem holds; see `Launch.with_constants`."""
        return ()


@dataclass(frozen=True)
class PluginVariant:
    """One plugin: an operation with some of its optional inputs."""

    operation: PluginOperation
    optional: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name that TensorRT and ONNX nodes have it by."""
        words = [part.capitalize() for name in self._listed() for part in name.split("_")]
        return self.operation.title + "".join(words)

    def _listed(self) -> tuple[str, ...]:
        """Optional inputs as names list them: one for those that come together."""
        heads = {group[0]: group for group in self.operation.optional}
        return tuple("scales" if len(heads[name]) > 1 else name for name in self.inputs if name in heads)

    @property
    def inputs(self) -> tuple[str, ...]:
        """All input tensors, in the order in which TensorRT and the kernel have them."""
        return self.operation.required + self.optional

    @property
    def outputs(self) -> tuple[str, ...]:
        """All output tensors, in order."""
        return "out", *(self.operation.brings[name] for name in self.optional if name in self.operation.brings)


def choice(attributes: Attributes, name: str, known: Mapping[str, Any]) -> Any:
    """What an attribute's word stands for.

    Raises:
        UsageError: it is not one of the words that are known.
    """
    word = attributes[name]
    if word not in known:
        raise UsageError(f"{name}={word!r} must be one of {', '.join(known)}")
    return known[word]


def flag(attributes: Attributes, name: str) -> bool:
    """An attribute that is 0 or 1.

    Raises:
        UsageError: it is another number.
    """
    if attributes[name] not in (0, 1):
        raise UsageError(f"{name}={attributes[name]!r} must be 0 or 1")
    return bool(attributes[name])


def check_shape(tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Does nothing if a tensor has one of the shapes.

    Raises:
        ProblemError: it has another.
    """
    if tensor.shape not in shapes:
        raise ProblemError(
            f"{tensor.name} is {tensor.shape} and must be {' or '.join(map(str, dict.fromkeys(shapes)))}"
        )


def check_rank(tensor: Tensor, accepted: Callable[[int], bool], form: str) -> None:
    """Does nothing if a tensor has as many dimensions as it may.

    Raises:
        ProblemError: it has not; `form` says what it is to be.
    """
    if not accepted(len(tensor.dims)):
        raise ProblemError(f"{tensor.name} has {len(tensor.dims)} dimensions and must be {form}")


def check_fp32(tensors: Tensors, *names: str) -> None:
    """Does nothing if those of the tensors that are there are fp32.

    Raises:
        ProblemError: one is not.
    """
    for name in names:
        if name in tensors and tensors[name].dtype != "fp32":
            raise ProblemError(f"{name} is {tensors[name].dtype} and must be fp32")
